"""tools/build_shards.py: every format to shards that we and plain webdataset read alike; interruptions; splits."""

from __future__ import annotations

import csv
import io
import json
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import webdataset
from PIL import Image

from mvptr_ds.commands import shards as build_shards
from mvptr_ds.data.images import decode_image
from mvptr_ds.data.schema import parse_record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.tar_reader import read_record
from tests.conftest import REPO

TOOL = REPO / "tools/build_shards.py"
Build = Callable[..., tuple[int, str, str]]


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Build:
    """`build(format, source, ...)` -> exit status, stdout, stderr; one process, this one."""

    def run(*arguments: object, processes: int = 1) -> tuple[int, str, str]:
        command = [*map(str, arguments), "--processes", str(processes)]
        monkeypatch.setattr(sys, "argv", ["build_shards.py", *command])
        capsys.readouterr()
        try:
            code = build_shards.main()
        except SystemExit as stop:
            code = int(stop.code or 0)
        return (code, *capsys.readouterr())

    return run


def picture(number: int, picture_format: str = "JPEG", side: int = 24) -> bytes:
    noise = np.random.default_rng(number).integers(0, 256, (side, side + 8, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).save(buffer, picture_format)
    return buffer.getvalue()


class Corpus:
    """Four pictures of two captions each; the third is a PNG that is named .jpg."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.images = folder / "images"
        self.images.mkdir()
        self.pictures = {n: picture(n, "PNG" if n == 3 else "JPEG") for n in range(1, 5)}
        self.captions = {n: [f"Caption {n}, one: 犬.", f"Caption {n}, two."] for n in self.pictures}
        for number, content in self.pictures.items():
            (self.images / f"{number}.jpg").write_bytes(content)

    def write(self, name: str, content: Any) -> Path:
        path = self.folder / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path

    def pairs(self) -> list[tuple[int, str]]:
        """The second captions after all first ones: rows of an image do not stand together."""
        return [(number, texts[which]) for which in (0, 1) for number, texts in self.captions.items()]


@pytest.fixture
def corpus(tmp_path: Path) -> Corpus:
    return Corpus(tmp_path)


def coco(corpus: Corpus) -> Path:
    images = [{"id": n, "file_name": f"{n}.jpg", "width": 1, "height": 1} for n in corpus.pictures]
    annotations = [{"id": i, "image_id": n, "caption": text} for i, (n, text) in enumerate(corpus.pairs())]
    return corpus.write("captions.json", {"info": {}, "images": images, "annotations": annotations})


def karpathy(corpus: Corpus) -> Path:
    images = [
        {"filename": f"{n}.jpg", "cocoid": n, "split": "train", "sentences": [{"raw": text} for text in texts]}
        for n, texts in corpus.captions.items()
    ]
    return corpus.write("dataset.json", {"images": images, "dataset": "coco"})


def flickr30k(corpus: Corpus) -> Path:
    return corpus.write("results.token", "".join(f"{n}.jpg#0\t{text}\n" for n, text in corpus.pairs()))


def visual_genome(corpus: Corpus) -> Path:
    regions = [
        {
            "id": n,
            "regions": [{"phrase": text, "x": 0, "y": 0, "width": 5, "height": 5, "image_id": n} for text in texts],
        }
        for n, texts in corpus.captions.items()
    ]
    return corpus.write("region_descriptions.json", regions)


def jsonl(corpus: Corpus) -> Path:
    lines = [json.dumps({"image": f"{n}.jpg", "caption": text}) for n, text in corpus.pairs()]
    return corpus.write("pairs.jsonl", "\n".join(lines))


def table(corpus: Corpus) -> Path:
    with open(corpus.folder / "pairs.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("image", "caption"), *((f"{n}.jpg", text) for n, text in corpus.pairs())])
    return corpus.folder / "pairs.csv"


def parquet(corpus: Corpus) -> Path:
    columns = {"image": [f"{n}.jpg" for n in corpus.captions], "caption": list(corpus.captions.values())}
    pyarrow.parquet.write_table(pyarrow.table(columns), corpus.folder / "pairs.parquet")
    return corpus.folder / "pairs.parquet"


def img2dataset(folder: Path, pictures: dict[int, bytes], captions: dict[int, str], name: str = "00000.tar") -> Path:
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / name, "w", format=tarfile.USTAR_FORMAT) as tar:
        for number, content in pictures.items():
            key = f"{number:09d}"
            meta = {"caption": captions[number], "key": key, "status": "success", "url": f"http://x/{number}"}
            members = {"jpg": content, "json": json.dumps(meta).encode(), "txt": captions[number].encode()}
            for extension, member in members.items():
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(member)
                tar.addfile(info, io.BytesIO(member))
    return folder


def streamed(tar: Path) -> list[dict[str, Any]]:
    """What plain webdataset reads, without its decoder."""
    return list(webdataset.WebDataset([str(tar)], shardshuffle=False))


def records_of(split: Path) -> dict[str, dict[str, Any]]:
    """Members and record by key, through our index, and checked to be what plain webdataset reads, byte for byte."""
    index = Index.open(split)
    ours: dict[str, dict[str, Any]] = {}
    for record in range(index.num_records):
        place = index.locate(index.samples_of(record)[0])
        members = read_record(place.path, place.offset, place.num_bytes)
        ours[parse_record(members["json"]).image_id] = {**members, "record": parse_record(members["json"])}
    samples = [sample for path in sorted(split.glob("*.tar")) for sample in streamed(path)]
    theirs = [{name: content for name, content in sample.items() if not name.startswith("__")} for sample in samples]
    assert theirs == [{name: m for name, m in members.items() if name != "record"} for members in ours.values()]
    return ours


def tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("name", "write", "image_id"),
    [
        ("coco", coco, "{:012d}"),
        ("karpathy", karpathy, "{:012d}"),
        ("flickr30k", flickr30k, "{}.jpg"),
        ("visual-genome", visual_genome, "{}"),
        ("jsonl", jsonl, "{}.jpg"),
        ("csv", table, "{}.jpg"),
        ("parquet", parquet, "{}.jpg"),
    ],
)
def test_a_corpus_becomes_shards(
    build: Build, corpus: Corpus, name: str, write: Callable[[Corpus], Path], image_id: str
) -> None:
    out = corpus.folder / "out"
    arguments = (name, write(corpus), "--images", corpus.images, "--out", out, "--records-per-shard", 3)
    code, output, errors = build(*arguments)
    assert code == 0, errors
    records = records_of(out / "train")
    assert set(records) == {image_id.format(n) for n in corpus.pictures}
    for number, content in corpus.pictures.items():
        members = records[image_id.format(number)]
        assert [caption.text for caption in members["record"].captions] == corpus.captions[number]
        assert members["png" if number == 3 else "jpg"] == content  # its extension is that of its content
        assert (members["record"].width, members["record"].height) == (32, 24)
    assert "records: 4" in output and "train: 2 shards, 4 records, 8 samples" in output
    summary = json.loads((out / "summary.json").read_text())
    assert summary["counts"]["captions"] == 8 and summary["dropped"] == {}
    assert sorted(path.name for path in out.iterdir()) == ["summary.json", "train"]
    # with all its arguments the same, a finished folder stays as it is; with others it is not touched
    before = tree(out)
    assert build(*arguments)[0] == 0 and tree(out) == before
    code, _, errors = build(*arguments, "--shuffle-seed", 1)
    assert code == 1 and "other arguments" in errors and tree(out) == before


def test_without_pictures_the_annotation_gives_the_sizes(build: Build, corpus: Corpus) -> None:
    out = corpus.folder / "out"
    code, _, errors = build("coco", coco(corpus), "--images", "none", "--out", out)
    assert code == 0, errors
    records = records_of(out / "train")
    assert all(set(members) == {"json", "record"} and members["record"].width == 1 for members in records.values())


def test_sentences(build: Build, corpus: Corpus) -> None:
    source = corpus.write("sentences.txt", "One dog runs.\nTwo dogs run.\n\nOne dog runs.\n")
    code, output, errors = build("text", source, "--out", corpus.folder / "out", "--keys", "number")
    assert code == 0, errors
    texts = [members["record"].captions[0].text for members in records_of(corpus.folder / "out/train").values()]
    assert sorted(texts) == ["One dog runs.", "Two dogs run."]
    assert "dropped 1: caption: repeated in its record" in output and "dropped 1: caption: empty" in output


def test_a_folder_of_pictures(build: Build, corpus: Corpus) -> None:
    (corpus.images / "more").mkdir()
    (corpus.images / "more/cut.jpg").write_bytes(corpus.pictures[1][:-100])
    code, output, errors = build("image-folder", corpus.images, "--out", corpus.folder / "out")
    assert code == 0, errors
    records = records_of(corpus.folder / "out/train")
    assert set(records) == {f"{n}.jpg" for n in corpus.pictures}
    assert all(not members["record"].captions for members in records.values())
    assert "dropped 1: picture: cannot be decoded (e.g. more/cut.jpg" in output


@pytest.mark.parametrize("options", [(), ("--reencode", 95)], ids=["stored", "encoded"])
def test_transparency_and_16_bits_are_counted_and_shown(
    build: Build, tmp_path: Path, options: tuple[object, ...]
) -> None:
    clear, deep = np.zeros((24, 32, 4), dtype=np.uint8), np.full((24, 32), 32768, dtype=np.uint16)
    arrays = {"clear": clear, "more": clear, "deep": deep, "plain": clear[:, :, :3]}
    (tmp_path / "images").mkdir()
    for name, array in arrays.items():
        Image.fromarray(array).save(tmp_path / "images" / f"{name}.png")
    Image.fromarray(deep.astype(np.float32)).save(tmp_path / "images" / "float.png", "TIFF")
    code, output, errors = build("image-folder", tmp_path / "images", "--out", tmp_path / "out", *options)
    assert code == 0, errors
    assert "pictures with transparency, drawn on white: 2\n" in output
    assert "pictures of 16-bit grey, scaled to 8 bit: 1\n" in output
    assert "dropped 1: picture: mode F does not say which number is white (e.g. float.png" in output
    shown = {}
    for name, members in records_of(tmp_path / "out/train").items():
        assert options == () or set(members) == {"jpg", "json", "record"}
        shown[Path(name).stem] = decode_image({name: c for name, c in members.items() if name in ("jpg", "png")}, 8)
    greys = {name: (int(square.min()), int(square.max())) for name, square in shown.items()}
    assert greys == {"clear": (255, 255), "more": (255, 255), "deep": (128, 128), "plain": (0, 0)}


@pytest.mark.parametrize("scheme", ["image-id", "number", "hash"])
def test_tars_of_img2dataset(build: Build, corpus: Corpus, scheme: str) -> None:
    captions = {n: texts[0] for n, texts in corpus.captions.items()}
    web = img2dataset(corpus.folder / "web", corpus.pictures, {**captions, 2: " "})
    more = {n: picture(n) for n in range(10, 16)}
    img2dataset(web, more, {n: f"caption {n}" for n in more}, "00001.tar")
    content = (web / "00001.tar").read_bytes()
    (web / "00001.tar").write_bytes(content[: content.index(b"000000013.txt")])
    out = corpus.folder / "out"
    code, output, errors = build(
        "img2dataset",
        web,
        "--out",
        out,
        "--keys",
        scheme,
        "--split",
        "train=0.6,held_out=0.4",
        "--reencode",
        80,
        processes=2 if scheme == "hash" else 1,
    )
    assert code == 0, errors
    splits = {split: records_of(out / split) for split in ("train", "held_out")}
    assert {int(key) for records in splits.values() for key in records} == {1, 3, 4, 10, 11, 12}
    assert all(splits.values()) and sum(map(len, splits.values())) == 6
    assert (
        splits["train" if "000000010" in splits["train"] else "held_out"]["000000010"]["record"].captions[0].text
        == "caption 10"
    )
    assert all("jpg" in members for records in splits.values() for members in records.values())
    for reason in ("tar: damaged, skipped from there on (e.g. 00001.tar", "caption: empty", "record: no caption left"):
        assert f"dropped 1: {reason}" in output


def test_a_key_in_two_tars_is_an_error_with_a_remedy(build: Build, corpus: Corpus) -> None:
    web = img2dataset(corpus.folder / "web", corpus.pictures, {n: "x" for n in corpus.pictures})
    shutil.copy(web / "00000.tar", web / "00001.tar")
    code, _, errors = build("img2dataset", web, "--out", corpus.folder / "a")
    assert code == 1 and "build with --keys number or hash" in errors
    assert build("img2dataset", web, "--out", corpus.folder / "b", "--keys", "hash")[0] == 0


def test_what_cannot_be_used_is_counted_with_its_reason(build: Build, corpus: Corpus) -> None:
    (corpus.images / "1.jpg").unlink()
    (corpus.images / "2.jpg").write_bytes(corpus.pictures[2][:-50])
    with open(jsonl(corpus), "a", encoding="utf-8") as file:
        file.write('\n{"image": "../outside.jpg", "caption": "x"}\n{broken\n{"image": "4.jpg", "caption": ""}')
    arguments = ("jsonl", corpus.folder / "pairs.jsonl", "--images", corpus.images, "--out", corpus.folder / "out")
    code, output, errors = build(*arguments)
    # of 8 + 3 captions and one line that is none, four are left
    assert code == 1 and "8 of 11 captions were dropped" not in errors, errors
    assert "7 of 11 captions were dropped, more than --max-dropped-fraction 0.5" in errors
    code, output, errors = build(*arguments, "--max-dropped-fraction", 0.8)
    assert code == 0, errors
    assert set(records_of(corpus.folder / "out/train")) == {"3.jpg", "4.jpg"}
    for reason in (
        "picture: file is missing (e.g. 1.jpg)",
        "picture: cannot be decoded (e.g. 2.jpg",
        "picture: its path leads out of --images (e.g. ../outside.jpg)",
        "row: cannot be read (e.g. pairs.jsonl, line 10",
        "caption: empty (e.g. 4.jpg",
    ):
        assert f"dropped 1: {reason}" in output
    shutil.rmtree(corpus.images)
    corpus.images.mkdir()
    code, _, errors = build(*arguments[:-1], corpus.folder / "nothing", "--max-dropped-fraction", 1)
    assert code == 1 and "no record is left of 11 captions" in errors


def test_splits_and_their_stability(build: Build, corpus: Corpus) -> None:
    def splits(num_lines: int, out: Path) -> dict[str, set[str]]:
        source = corpus.write(
            "a.jsonl", "\n".join(json.dumps({"image": f"{n}", "caption": "x"}) for n in range(num_lines))
        )
        shares = ("--split", "train=0.7,test=0.3", "--keys", "number")
        code, _, errors = build("jsonl", source, "--images", "none", "--out", out, *shares)
        assert code == 0, errors
        keys = [sample["__key__"] for path in out.rglob("*.tar") for sample in streamed(path)]
        assert len(keys) == len(set(keys)) == num_lines  # numbers go on from split to split: sidecars join by key
        return {split: set(records_of(out / split)) for split in ("train", "test")}

    few, many = splits(40, corpus.folder / "few"), splits(80, corpus.folder / "many")
    assert few["train"] < many["train"] and few["test"] < many["test"]


def test_karpathys_splits(build: Build, corpus: Corpus) -> None:
    content = json.loads(karpathy(corpus).read_text())
    for image, split in zip(content["images"], ("train", "restval", "val", "test"), strict=True):
        image["split"] = split
    source = corpus.write("dataset.json", content)
    for flags, train in (((), {"000000000001", "000000000002"}), (("--no-restval",), {"000000000001"})):
        out = corpus.folder / f"out{len(flags)}"
        code, _, errors = build("karpathy", source, "--images", corpus.images, "--out", out, *flags)
        assert code == 0, errors
        found = {path.name: set(records_of(path)) for path in out.iterdir() if path.is_dir()}
        assert found == {"train": train, "val": {"000000000003"}, "test": {"000000000004"}}
    content["images"].append({**content["images"][3], "split": "train"})
    source = corpus.write("twice.json", content)
    code, output, errors = build("karpathy", source, "--images", corpus.images, "--out", corpus.folder / "twice")
    assert code == 0 and "of an image that is in another split, too" in output + errors
    assert len(records_of(corpus.folder / "twice/train")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "FORMAT"),
        (("coco", "x.json", "--out", "o"), "--images"),
        (("csv", "x", "--images", "none", "--out", "o", "--split", "a=2"), "shares add up to 1"),
        (("csv", "x", "--images", "none", "--out", "o", "--max-side", "9"), "give --reencode"),
        (("csv", "x", "--images", "none", "--out", "o", "--reencode", "101"), "at most 100"),
        (("karpathy", "x", "--images", "none", "--out", "o", "--split", "a=1"), "unrecognized"),
    ],
)
def test_wrong_usage(build: Build, arguments: tuple[str, ...], message: str) -> None:
    code, _, errors = build(*arguments)
    assert code == 2 and message in errors


def test_mistakes_are_one_line(build: Build, corpus: Corpus) -> None:
    out = corpus.folder / "out"
    for arguments, message in {
        ("coco", "none.json", "--images", "none", "--out", out): "none.json is not a file",
        ("coco", jsonl(corpus), "--images", corpus.folder / "no", "--out", out): "is not a folder",
        ("coco", jsonl(corpus), "--images", "none", "--out", out): "no field 'images'",
        ("parquet", coco(corpus), "--images", "none", "--out", out): "cannot be read as Parquet",
    }.items():
        code, _, errors = build(*arguments)
        assert code == 1 and message in errors and errors.count("\n") == 1, errors
    (out / "train").mkdir(parents=True)
    (out / "train/shard-000000.tar").write_bytes(b"mine")
    code, _, errors = build("coco", coco(corpus), "--images", "none", "--out", out)
    assert code == 1 and "no build of this tool" in errors


def test_killed_at_any_moment_the_same_command_ends_with_the_same_bytes(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    contents = [picture(n, side=700) for n in range(4)]
    for number in range(64):
        (tmp_path / "images" / f"{number:03d}.jpg").write_bytes(contents[number % 4])
    lines = [json.dumps({"image": f"{n:03d}.jpg", "caption": "x" * (n % 3)}) for n in range(64)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))

    def command(out: str, processes: int) -> list[str]:
        arguments = ["jsonl", "a.jsonl", "--images", "images", "--out", out, "--records-per-shard", "4"]
        more = ["--split", "train=0.8,test=0.2", "--reencode", "95", "--processes", str(processes)]
        return [sys.executable, str(TOOL), *arguments, *more]

    subprocess.run(command("whole", 1), cwd=tmp_path, check=True, capture_output=True, timeout=100)
    process = subprocess.Popen(command("killed", 2), cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list((tmp_path / "killed").glob(".progress/0*.json")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = sorted((tmp_path / "killed").glob(".progress/0*.json"))
    assert 1 <= len(done) < 16, "it was not killed in the midst of its work"
    # what an even earlier kill would leave
    (tmp_path / "killed/.plan").mkdir(exist_ok=True)
    (tmp_path / "killed/.plan/train.jsonl").write_bytes(b"half a li")
    times = {path: path.stat().st_mtime_ns for path in (tmp_path / "killed").glob("*/*.tar")}
    again = subprocess.run(command("killed", 1), cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert again.returncode == 0, again.stderr
    assert "going on" in again.stderr
    kept = [path for path, time_ns in times.items() if path.stat().st_mtime_ns == time_ns]
    assert len(kept) >= len(done), "what was finished was made again"
    assert tree(tmp_path / "killed") == tree(tmp_path / "whole")
