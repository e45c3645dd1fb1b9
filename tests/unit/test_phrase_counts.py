"""Counting phrases: exact whatever is spilled, from every kind of input, in bounded memory; and coverage."""

from __future__ import annotations

import json
import random
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.corpus.phrases import captions, phrase_counts
from mvptr_ds.corpus.phrases.captions import list_inputs, read_captions
from mvptr_ds.corpus.phrases.phrase_counts import (
    SpillingCounter,
    choose_phrases,
    count_corpus,
    count_phrases,
    merge_counts,
)
from mvptr_ds.corpus.phrases.phrase_coverage import coverage_lines, measure_coverage, most_frequent_lines
from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.data.phrases import PhraseTuple, PhraseVocab
from mvptr_ds.data.schema import Caption, Extractor, Phrase, Record, Words
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_writer import write_tar
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError

WORDS = WordPiece()
NOUNS = ["dog", "cat", "a\tb", 'say "x"', "line\nend", "é☃", "dog]", "dog,", "doge"]


def random_captions(number: int, seed: int = 0) -> list[list[PhraseTuple]]:
    """Lists of phrases, some twice in a list and some lists empty."""
    draw = random.Random(seed)
    return [
        [tuple(draw.choices(NOUNS, k=draw.randint(1, 3))) for _ in range(draw.choice([0, 1, 2, 5]))]
        for _ in range(number)
    ]


def brute_force(lists: list[list[PhraseTuple]]) -> dict[PhraseTuple, int]:
    return dict(Counter(phrase for phrases in lists for phrase in set(phrases)))


def caption(phrases: list[PhraseTuple]) -> Caption:
    return Caption("some words", tuple(Phrase(words, tuple((0, 4) for _ in words)) for words in phrases))


def line(phrases: list[PhraseTuple]) -> str:
    return json.dumps({"caption": "some words", "phrases": phrases_json(phrases)})


def phrases_json(phrases: list[PhraseTuple]) -> list[dict[str, Any]]:
    return [{"tuple": list(words), "spans": [[0, 4]] * len(words)} for words in phrases]


def write_lines(path: Path, lines: list[str]) -> Path:
    path.write_text("".join(f"{text}\n" for text in lines), encoding="utf-8")
    return path


def counted(paths: list[Path], folder: Path, max_in_memory: int = 5) -> dict[PhraseTuple, int]:
    count_phrases(list_inputs(paths), folder, 1, max_in_memory)
    return dict(merge_counts(sorted(folder.glob("counts-*.tsv")), folder / "all"))


# --- counting


@pytest.mark.parametrize("max_in_memory", [1, 7, 10_000])
def test_spilled_runs_add_up_exactly(tmp_path: Path, max_in_memory: int) -> None:
    lists = random_captions(500)
    counter = SpillingCounter(tmp_path / "counts.tsv", max_in_memory)
    for phrases in lists:
        counter.add(set(phrases))
    assert (len(list(tmp_path.glob("*spill*"))) > 10) == (max_in_memory < 10_000)
    counter.write()
    assert [path.name for path in tmp_path.iterdir()] == ["counts.tsv"]
    pairs = list(merge_counts([tmp_path / "counts.tsv"], tmp_path / "all"))
    assert len(pairs) == len(dict(pairs)) and dict(pairs) == brute_force(lists)


def test_more_runs_than_open_files_are_merged_in_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(phrase_counts, "_MAX_OPEN_RUNS", 3)
    lists = random_captions(400, seed=1)
    runs = []
    for start in range(0, 400, 10):
        runs.append(tmp_path / f"run-{start:03d}.tsv")
        counter = SpillingCounter(runs[-1], 2)
        for phrases in lists[start : start + 10]:
            counter.add(set(phrases))
        counter.write()
    assert dict(merge_counts(runs, tmp_path / "all")) == brute_force(lists)
    assert sorted(tmp_path.iterdir()) == runs  # and what was made between is gone


def test_memory_is_bounded_by_what_is_held_and_kept(tmp_path: Path) -> None:
    peaks = {}
    for max_in_memory in (1_000, 1_000_000):
        tracemalloc.start()
        counter = SpillingCounter(tmp_path / f"{max_in_memory}.tsv", max_in_memory)
        for n in range(10_000):
            counter.add({("man",), (f"word {n}", "rare")})
        counter.write()
        kept = choose_phrases(merge_counts([tmp_path / f"{max_in_memory}.tsv"], tmp_path / "all"), 2, None, Summary())
        peaks[max_in_memory] = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert kept == {("man",): 10_000}
    assert peaks[1_000] < peaks[1_000_000] / 5


# --- inputs


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[list[Path], list[list[PhraseTuple]]]:
    """Shards, a sidecar and both kinds of JSON lines; and the phrases of all their captions."""
    lists = random_captions(120, seed=2)
    own, beside, single, several = lists[:40], lists[40:60], lists[60:90], lists[90:]
    records = [(f"k{n}", Record(f"{n}", 0, 0, (caption(own[2 * n]), caption(own[2 * n + 1]))), {}) for n in range(20)]
    write_shards(tmp_path / "shards", records, 7)
    (tmp_path / "sidecar").mkdir()
    entries = [(f"s{n}", {"json": sidecar_json(Extractor("e", "1"), captions=[caption(beside[n])])}) for n in range(20)]
    write_tar(tmp_path / "sidecar" / "shard-000000.tar", entries)
    build_index(tmp_path / "sidecar")
    write_lines(tmp_path / "single.jsonl", [line(phrases) for phrases in single])
    groups = [several[at : at + 3] for at in range(0, 30, 3)]
    lines = [{"captions": [{"text": "some words", "phrases": phrases_json(p)} for p in group]} for group in groups]
    write_lines(tmp_path / "several.jsonl", [json.dumps(content) for content in lines])
    return [tmp_path / name for name in ("shards", "sidecar", "single.jsonl", "several.jsonl")], lists


def test_all_kinds_of_input_are_counted_together(
    inputs: tuple[list[Path], list[list[PhraseTuple]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths, lists = inputs
    monkeypatch.setattr(captions, "_PART_BYTES", 400)
    parts = list_inputs(paths).parts
    assert len(parts) == 20  # three shards, one tar, ranges of lines
    assert counted(paths, tmp_path / "counts") == brute_force(lists)
    summary = count_phrases(list_inputs(paths), tmp_path / "again", 1, 5)
    different = [set(phrases) for phrases in lists]
    assert summary.counts == {
        "captions": 120,
        "captions without a phrase": sum(not phrases for phrases in lists),
        "objects": sum(len(p) == 1 for phrases in different for p in phrases),
        "attributes": sum(len(p) == 2 for phrases in different for p in phrases),
        "relations": sum(len(p) == 3 for phrases in different for p in phrases),
    }
    assert not summary.dropped


def test_two_processes_give_the_same_files(inputs: tuple[list[Path], list[list[PhraseTuple]]], tmp_path: Path) -> None:
    paths, _ = inputs
    for num_processes in (1, 2):
        count_phrases(list_inputs(paths), tmp_path / str(num_processes), num_processes, 5)
    files = [{p.name: p.read_bytes() for p in (tmp_path / n).glob("*.tsv")} for n in ("1", "2")]
    assert files[0] == files[1] and len(files[0]) == 6


def test_lines_that_cannot_be_read_are_dropped_and_counted(tmp_path: Path) -> None:
    lines = [
        line([("dog",)]),
        "{",
        "[1]",
        "[" * 100_000,
        '{"caption": "no phrases"}',
        '{"captions": [{"text": "  "}, {"text": "a dog", "phrases": [{"tuple": ["dog"], "spans": [[2, 5]]}]}]}',
        '{"captions": ["not parsed"]}',
        '{"caption": "a dog", "phrases": [{"tuple": ["dog"], "spans": [[2, 50]]}]}',
        '{"caption": "half \\ud800", "phrases": []}',
        "",
        line([("cat",)]),
    ]
    path = write_lines(tmp_path / "lines.jsonl", lines)
    summary = Summary()
    (part,) = list_inputs([path]).parts
    found = [[phrase.tuple for phrase in caption.phrases] for caption in read_captions(part, summary)]
    assert found == [[("dog",)], [("dog",)], [("cat",)]]
    assert summary.dropped == {"the line cannot be read": 7, "the caption is empty": 1}
    assert "lines.jsonl, byte" in summary.examples["the line cannot be read"][0]


def test_a_damaged_tar_stops_the_count_which_then_goes_on(
    inputs: tuple[list[Path], list[list[PhraseTuple]]], tmp_path: Path
) -> None:
    paths, lists = inputs
    listed = list_inputs(paths[:1])
    tar = paths[0] / "shard-000002.tar"
    sound = tar.read_bytes()
    tar.write_bytes(bytes(512) + sound[512:])
    with pytest.raises(DataError, match=r"shard-000002\.tar: byte 0: .*validate_shards"):
        count_phrases(listed, tmp_path / "counts", 1, 5)
    first = tmp_path / "counts" / "counts-000000.tsv"
    written_ns = first.stat().st_mtime_ns
    tar.write_bytes(sound)
    count_phrases(listed, tmp_path / "counts", 1, 5)
    runs = sorted((tmp_path / "counts").glob("counts-*.tsv"))
    assert dict(merge_counts(runs, tmp_path / "all")) == brute_force(lists[:40])
    assert first.stat().st_mtime_ns == written_ns


def test_a_count_does_not_go_on_with_changed_inputs(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "lines.jsonl", [line([("dog",)])])
    count_phrases(list_inputs([path]), tmp_path / "counts", 1)
    write_lines(path, [line([("dog",)]), line([("cat",)])])
    with pytest.raises(DataError, match="other arguments"):
        count_phrases(list_inputs([path]), tmp_path / "counts", 1)


def test_inputs_that_are_none(tmp_path: Path) -> None:
    for name in ("captions.txt", "missing.jsonl", "missing"):
        (tmp_path / "captions.txt").write_text("A dog.\n")
        with pytest.raises(DataError, match=r"neither a folder of shards nor a \.jsonl file"):
            list_inputs([tmp_path / name])
    path = write_lines(tmp_path / "lines.jsonl", [line([])])
    with pytest.raises(DataError, match="given twice"):
        list_inputs([path, tmp_path / "." / "lines.jsonl"])
    with pytest.raises(DataError, match=r"the 1 captions of .*lines\.jsonl have no phrases; find them"):
        count_corpus([path], tmp_path / "counts", 1, None, 1)


# --- choosing


COUNTS = {("dog",): 9, ("cat",): 3, ("dog", "brown"): 3, ("cat", "old"): 2, ("dog", "chase", "cat"): 3, ("rare",): 1}


def test_phrases_below_the_count_are_dropped_by_kind() -> None:
    summary = Summary()
    kept = choose_phrases(COUNTS.items(), 3, None, summary)
    assert set(kept) == {("dog",), ("cat",), ("dog", "brown"), ("dog", "chase", "cat")}
    assert summary.dropped == {"objects in fewer than 3 captions": 1, "attributes in fewer than 3 captions": 1}
    assert summary.counts == {
        "different objects": 3, "different attributes": 2, "different relations": 1,
        "kept objects": 2, "kept attributes": 1, "kept relations": 1,
    }  # fmt: skip


def test_phrases_with_a_word_that_is_none_are_dropped_however_frequent() -> None:
    good = [("t-shirt",), ("o'clock",), ("dog", "2"), ("café",), ("狗",), ("man", "have", "747s"), ("mp3", "1950s")]
    bad = [("//aiga",), ("gmail", "@"), ("my_house_01",), ("clock12",), ("2",), ("-", "mid"), ("dog", "12.50"), ("🐕",)]
    summary = Summary()
    kept = choose_phrases([(phrase, 100) for phrase in [*good, *bad]], 1, None, summary)
    assert list(kept) == good
    assert summary.dropped == {"objects with a word that is none": 5, "attributes with a word that is none": 3}


def test_the_cap_keeps_the_most_frequent_and_does_not_depend_on_the_order() -> None:
    summary = Summary()
    kept = choose_phrases(COUNTS.items(), 2, 3, summary)
    assert kept == {("dog",): 9, ("cat",): 3, ("dog", "brown"): 3}
    assert kept == choose_phrases(reversed(COUNTS.items()), 2, 3, Summary())
    assert summary.dropped["relations beyond the 3 most frequent"] == 1


# --- coverage


def test_coverage_by_hand(tmp_path: Path) -> None:
    vocab = PhraseVocab.build({("dog",): 3, ("cat",): 2, ("dog", "brown"): 1}, WORDS, 1)
    vocab.save(tmp_path / "vocab.json")
    lists: list[list[Words]] = [
        [("dog",), ("dog",), ("dog", "brown")],
        [("dog",), ("bird",)],
        [("bird",), ("bird", "see", "dog")],
        [],
        [("cat",)],
    ]
    path = write_lines(tmp_path / "lines.jsonl", [line(phrases) for phrases in lists])
    found = measure_coverage([path], tmp_path / "vocab.json", WORDS, tmp_path / "coverage", 1)
    assert coverage_lines("held out", found) == [
        "held out: 5 captions, 4 with phrases",
        "  phrases kept                4 of           7   57.14%",
        "    objects                   3 of           5   60.00%",
        "    attributes                1 of           1  100.00%",
        "    relations                 0 of           1    0.00%",
        "  captions with all phrases kept            2 of           4   50.00%",
        "  captions by kept phrases",
        "    0                         2 of           5   40.00%",
        "    1                         2 of           5   40.00%",
        "    2                         1 of           5   20.00%",
        *(f"    {name:<15}           0 of           5    0.00%" for name in [*"3456789", "10 or more"]),
    ]
    assert measure_coverage([path], tmp_path / "vocab.json", WORDS, tmp_path / "coverage", 1) == found
    assert most_frequent_lines(vocab, 1) == ["objects: dog 3", "attributes: dog brown 1", "relations: "]
