"""Captions -> phrases -> vocabulary, with the tools as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from mvptr_ds.corpus.concepts.parser import PhraseParser
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from tests.conftest import REPO
from tests.support.tools import run_tool

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}
SUBJECTS, PLACES = ["man", "dog", "woman", "cat"], ["a brown sofa", "the beach", "an old bench"]


def command(tool: str, *arguments: object) -> list[str]:
    return [sys.executable, str(REPO / "tools" / tool), *map(str, arguments)]


def texts(number: int) -> list[str]:
    """Two captions of a record; every subject and place is drawn evenly, in all combinations."""
    return [f"A young {SUBJECTS[(number + n) % 4]} sits on {PLACES[number % 3]}." for n in range(2)]


def write(folder: Path, numbers: range, records_per_shard: int = 20) -> Path:
    items = [
        (f"key{number}", Record(f"{number}", 0, 0, tuple(Caption(text) for text in texts(number))), {})
        for number in numbers
    ]
    write_shards(folder, items, records_per_shard)
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_from_shards_to_a_vocabulary_and_the_published_layout(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", range(48))
    held_out = tmp_path / "held_out.jsonl"
    (tmp_path / "held_out.txt").write_text("A young man sits on a zeppelin.\nA man.\n")
    assert run_tool("extract_phrases.py", tmp_path / "held_out.txt", held_out, "--processes", 1).returncode == 0
    done = run_tool("extract_phrases.py", shards, tmp_path / "sidecar", "--processes", 2)
    assert done.returncode == 0, done.stderr
    assert "captions: 96" in done.stdout and "captions without a phrase: 0" in done.stdout

    vocab_path, exported = tmp_path / "vocab.json", tmp_path / "id2phrase.json"
    arguments = [tmp_path / "sidecar", "--out", vocab_path, "--min-count", 24, "--processes", 1]
    done = run_tool("build_vocab.py", *arguments, "--stats", "--held-out", held_out, "--export-id2phrase", exported)
    assert done.returncode == 0, done.stderr
    words = WordPiece()
    vocab = PhraseVocab.load(vocab_path, words)
    found = [{p.tuple for p in phrases} for n in range(48) for phrases in PhraseParser().parse(texts(n))]
    counts = {phrase: sum(phrase in phrases for phrases in found) for phrases in found for phrase in phrases}
    assert dict(zip(vocab.tuples, vocab.counts, strict=True)) == {p: c for p, c in counts.items() if c >= 24}
    assert vocab.counts[vocab.tuples.index(("man",))] == 24  # in a quarter of the captions
    dropped = sum(count < 24 and len(phrase) == 3 for phrase, count in counts.items())
    assert f"dropped {dropped}: relations in fewer than 24 captions" in done.stdout
    assert "these inputs: 96 captions, 96 with phrases" in done.stdout
    held_out_lines = done.stdout.partition("held out: ")[2].splitlines()
    assert held_out_lines[0] == "2 captions, 2 with phrases"
    assert " ".join(held_out_lines[5].split()) == "captions with all phrases kept 1 of 2 50.00%"
    assert not (tmp_path / "vocab.json.parts").exists()

    done = run_tool("build_vocab.py", "--from-id2phrase", exported, "--out", tmp_path / "imported.json")
    assert done.returncode == 0, done.stderr
    imported = PhraseVocab.load(tmp_path / "imported.json", words)
    assert imported.fingerprint == vocab.fingerprint and not any(imported.counts)
    assert f"{len(vocab)} phrases, {vocab.num_rows} rows" in done.stdout

    small = [held_out, "--out", tmp_path / "small.json", "--min-count", 1, "--max-phrases", 1, "--processes", 1]
    assert run_tool("build_vocab.py", *small).returncode == 0
    assert PhraseVocab.load(tmp_path / "small.json", words).tuples == [("man",)]
    merging = ["--merge", tmp_path / "small.json", vocab_path, "--out", tmp_path / "merged.json"]
    for _ in range(2):
        assert run_tool("build_vocab.py", *merging).returncode == 0
    merged = PhraseVocab.load(tmp_path / "merged.json", words)
    assert merged.tuples == [("man",), *(phrase for phrase in vocab.tuples if phrase != ("man",))]
    before = vocab_path.read_bytes()
    done = run_tool("build_vocab.py", "--merge", tmp_path / "small.json", "--out", vocab_path)
    assert done.returncode == 1 and "vocab.json is there and holds something else; remove it" in done.stderr
    assert vocab_path.read_bytes() == before and not vocab_path.with_name("vocab.json.new").exists()


def test_what_is_wrong_is_one_line(tmp_path: Path) -> None:
    out = tmp_path / "vocab.json"
    shards = write(tmp_path / "shards", range(2))
    for arguments, message in [
        ([shards], "have no phrases; find them with tools/extract_phrases.py"),
        ([tmp_path / "captions.txt"], "neither a folder of shards nor a .jsonl file"),
        (["--merge", tmp_path / "missing.json"], "cannot read the phrase vocabulary"),
        (["--from-id2phrase", tmp_path / "missing.json"], "cannot read the phrase list"),
    ]:
        done = run_tool("build_vocab.py", *arguments, "--out", out, "--processes", 1)
        assert (done.returncode, done.stdout) == (1, "") and not out.exists()
        assert message in done.stderr and len(done.stderr.splitlines()) == 1
    for number in range(2):  # what was counted of other inputs is not in the way
        sidecar = tmp_path / "sidecar"
        assert number or run_tool("extract_phrases.py", shards, sidecar, "--processes", 1).returncode == 0
        done = run_tool("build_vocab.py", sidecar, "--out", out, "--processes", 1, "--min-count", 50 - 49 * number)
        assert done.returncode == 1 - number and out.exists() == bool(number)
        assert number or "in 50 captions; set --min-count lower" in done.stderr
    out.unlink()
    for usage in ([], [shards, "--merge", out], [shards, "--min-count", 0], ["--merge", out, "--stats"]):
        assert run_tool("build_vocab.py", *usage, "--out", out).returncode == 2


def test_a_killed_extraction_goes_on_and_gives_the_same_bytes(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", range(600), 50)
    assert run_tool("extract_phrases.py", shards, tmp_path / "whole", "--processes", 1).returncode == 0
    arguments = command("extract_phrases.py", shards, tmp_path / "cut", "--processes", 2)
    process = subprocess.Popen(arguments, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    end_s = time.monotonic() + 60
    while not list(tmp_path.glob("cut/.progress/00*.json")):
        assert process.poll() is None and time.monotonic() < end_s, "no shard was written"
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "summary.json").exists()
    time.sleep(0.1)  # its processes end themselves when they notice
    # a tar without its entry was written and not yet recorded: it is written again
    recorded = [path.stem for path in tmp_path.glob("cut/.progress/00*.json")]
    finished = [tmp_path / "cut" / f"shard-{stem}.tar" for stem in recorded]
    before = [path.stat().st_mtime_ns for path in finished]
    done = run_tool("extract_phrases.py", shards, tmp_path / "cut", "--processes", 1)
    assert done.returncode == 0 and "going on" in done.stderr and "captions: 1,200" in done.stdout
    assert tars(tmp_path / "cut") == tars(tmp_path / "whole") and len(tars(tmp_path / "cut")) == 12
    assert [path.stat().st_mtime_ns for path in finished] == before


def test_coco_from_its_annotations_in_one_command(tmp_path: Path) -> None:
    for split, first in (("train2014", 0), ("val2014", 12)):
        numbers = range(first, first + 24)
        images = [{"id": n, "file_name": f"COCO_{n}.jpg", "width": 64, "height": 48} for n in numbers]
        annotations = [{"id": n, "image_id": n, "caption": text} for n in numbers for text in texts(n)]
        content = json.dumps({"images": images, "annotations": annotations})
        (tmp_path / f"captions_{split}.json").write_text(content)
    arguments = (tmp_path, "--out", tmp_path / "out", "--min-count", 12, "--processes", 1)
    streams = {"capture_output": True, "text": True, "timeout": 120}  # those of the steps, which it starts, too
    done = subprocess.run(command("dev/coco_phrases.py", *arguments), env=ENVIRONMENT, **streams)
    assert done.returncode == 0, done.stderr
    words = WordPiece()
    counts = [
        PhraseVocab.load(tmp_path / "out" / name, words).counts[0]
        for name in ("phrase_vocab.json", "phrase_vocab_train2014.json")
    ]
    assert counts == [32, 16]  # each place in a third of the captions
    assert "these inputs: 96 captions" in done.stdout and "held out: 48 captions" in done.stdout
    assert done.stdout.count("MiB a process]") == 6
    nowhere = command("dev/coco_phrases.py", tmp_path / "nowhere", "--out", tmp_path / "none")
    again = subprocess.run(nowhere, env=ENVIRONMENT, **streams)
    assert again.returncode == 1 and "nowhere" in again.stderr.splitlines()[-1]
