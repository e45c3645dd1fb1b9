"""Every kind of damage, made on a real tar: what is found, what a repair keeps, and what webdataset makes of it."""

from __future__ import annotations

import io
import json
import os
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset

from mvptr_ds.corpus.resumable_jobs import PROGRESS_NAME
from mvptr_ds.corpus.sources.img2dataset import list_tars
from mvptr_ds.corpus.validating import validation
from mvptr_ds.corpus.validating.validation import Result, validate
from mvptr_ds.data.pixels import TRANSPARENT, WIDE_GREY
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.tar_reader import MAX_JSON_BYTES, MAX_MEMBER_BYTES, MAX_RECORD_MEMBERS
from mvptr_ds.errors import DataError
from tests.support.hostile import (
    HEIGHT,
    TEXT,
    WIDTH,
    content,
    encoded,
    features,
    key,
    member_starts,
    members,
    named_members,
    npy,
    picture,
    sound_folder,
    write_tar,
)
from tests.support.odd_pictures import STORED

ALL = [key(number) for number in range(8)]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return sound_folder(tmp_path / "shards")


def repaired(folder: Path) -> tuple[Result, list[str]]:
    """Validates with a repair: the result, and the keys that it kept; each of their members is what it was."""
    out = folder.parent / "repaired"
    result = validate(folder, repair=out)
    kept = list(webdataset.WebDataset(sorted(map(str, out.glob("*.tar"))), shardshuffle=False))
    for sample in kept:
        number = int(sample["__key__"][1:])
        for extension, data in members(number).items():
            if extension != "json":
                assert sample[extension] == data
        assert json.loads(sample["json"])["image_id"] == str(number)
    assert result.index is not None and len(result.index) == 2 * len(kept)
    assert validate(out).is_clean
    return result, [sample["__key__"] for sample in kept]


def read_by_webdataset(*tars: Path) -> list[dict[str, Any]]:
    return list(webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=False))


def is_whole(sample: dict[str, Any]) -> bool:
    return {"jpg", "json", "npy"} <= set(sample)


def refused(folder: Path) -> Result:
    """Validates; the index is refused, by the validation and by the index itself."""
    with pytest.raises(DataError):
        build_index(folder)
    result = validate(folder)
    assert not result.is_clean and result.index is None
    assert not list(folder.glob(".validation-*"))
    return result


Damage = Callable[[bytes, dict[str, int]], bytes]


def _overwrite(at: str, data: bytes, shift: int = 0) -> Damage:
    def damage(tar: bytes, starts: dict[str, int]) -> bytes:
        place = starts[at] + shift
        return tar[:place] + data + tar[place + len(data) :]

    return damage


def _insert(at: str, data: bytes, shift: int = 0) -> Damage:
    def damage(tar: bytes, starts: dict[str, int]) -> bytes:
        place = starts[at] + shift
        return tar[:place] + data + tar[place:]

    return damage


def _remove(at: str, num_bytes: int, shift: int = 0) -> Damage:
    return lambda tar, starts: tar[: starts[at] + shift] + tar[starts[at] + shift + num_bytes :]


def _cut(at: str, shift: int = 0) -> Damage:
    return lambda tar, starts: tar[: starts[at] + shift]


def _then_another(at: str, shift: int = 0) -> Damage:
    """Cut, and a whole tar of the records 20 and 21 joined to it."""

    def damage(tar: bytes, starts: dict[str, int]) -> bytes:
        return tar[: starts[at] + shift] + tar.replace(b"k000", b"k002").replace(b"k0020", b"k0020")

    return damage


ZEROS, GARBAGE, CUT = "zero blocks inside, or another tar", "no valid header where one belongs", "the tar is cut"
TAIL = slice(4, None)  # the records of the second shard
# name: damage of the first shard (records 0 to 3), reasons found, records kept of it, whole ones webdataset yields
DAMAGES: dict[str, tuple[Damage, set[str], list[int], int | None]] = {
    "cut between records": (_cut("k0002.jpg"), {CUT}, [0, 1], 2),
    "cut between members": (_cut("k0002.npy"), {CUT, "beside damage"}, [0, 1], 2),
    "cut in a header": (_cut("k0002.npy", 100), {CUT, "beside damage"}, [0, 1], None),
    "cut in content": (_cut("k0002.npy", 600), {CUT, "damage in a record"}, [0, 1], None),
    "cut before the end mark": (_cut("k0003.npy", 1024), {CUT}, [0, 1, 2, 3], 4),
    "garbage over a header": (
        _overwrite("k0001.json", b"x" * 512),
        {GARBAGE, "damage in a record", "no json member"},
        [0, 2, 3],
        1,
    ),
    "garbage over a record": (
        _overwrite("k0001.jpg", b"x" * 4096),
        {GARBAGE, "damage in a record"},
        [2, 3],
        1,
    ),
    "garbage between records": (_insert("k0002.jpg", b"x" * 1536), {GARBAGE, "damage in a record"}, [0, 2, 3], 2),
    "zeros over a header": (_overwrite("k0001.json", bytes(512)), {ZEROS, "no json member"}, [0, 2, 3], 1),
    "zeros over a record": (_overwrite("k0001.jpg", bytes(4096)), {ZEROS}, [0, 2, 3], 1),
    "zeros between records": (_insert("k0002.jpg", bytes(1536)), {ZEROS}, [0, 1, 2, 3], 2),
    "one bit of a header": (
        _overwrite("k0002.npy", b"\1", 100),
        {GARBAGE, "damage in a record"},
        [0, 1, 3],
        2,
    ),
    "bytes lost": (
        _remove("k0001.jpg", 100, 700),
        {GARBAGE, "damage in a record", "beside damage"},
        [0, 2, 3],
        None,
    ),
    "bytes doubled": (
        _insert("k0001.jpg", b"y" * 100, 700),
        {GARBAGE, "damage in a record", "beside damage"},
        [0, 2, 3],
        None,
    ),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_damaged_tars(folder: Path, name: str) -> None:
    damage, reasons, kept, num_whole_by_webdataset = DAMAGES[name]
    tar = folder / "shard-000000.tar"
    tar.write_bytes(damage(tar.read_bytes(), member_starts(tar)))
    found = refused(folder).summary.dropped
    assert len(found) >= len(reasons)
    assert all(any(reason in name for name in found) for reason in reasons), found
    assert repaired(folder)[1] == [ALL[number] for number in kept] + ALL[TAIL]
    if num_whole_by_webdataset is not None:  # without an error
        assert sum(map(is_whole, read_by_webdataset(tar))) == num_whole_by_webdataset


def test_records_of_another_shard_behind_the_end_mark(folder: Path) -> None:
    first, second = sorted(folder.glob("*.tar"))
    first.write_bytes(first.read_bytes() + second.read_bytes())
    second.unlink()
    assert [reason for reason in refused(folder).summary.dropped if ZEROS in reason]
    assert repaired(folder)[1] == ALL
    assert [sample["__key__"] for sample in read_by_webdataset(first)] == ALL[:4]


def test_a_cut_tar_with_another_joined_to_it(folder: Path) -> None:
    """The cut member runs on over the first headers of the other tar; webdataset mixes two pictures and stops."""
    first, second = sorted(folder.glob("*.tar"))
    cut = first.read_bytes()[: member_starts(first)["k0002.jpg"] + 700]
    first.write_bytes(cut + second.read_bytes())
    second.unlink()
    found = refused(folder)
    assert any("'k0002.jpg' runs over the tar header" in case for cases in found.examples.values() for case in cases)
    assert repaired(folder)[1] == ALL[:2] + ALL[4:]
    assert [sample["__key__"] for sample in read_by_webdataset(first)] == ALL[:3]


def test_a_cut_member_that_runs_on_to_a_valid_header(tmp_path: Path) -> None:
    """No header is broken: only the content tells. webdataset yields the mixture as a sound sample."""
    good = members(0)
    inner = write_tar(tmp_path / "inner.tar", [("z.npy", good["npy"])]).read_bytes()[:1024]
    mixed = good["npy"] + bytes(512 - len(good["npy"])) + inner
    folder = tmp_path / "shards"
    folder.mkdir()
    tar = write_tar(folder / "a.tar", [*named_members([0], txt=mixed), *named_members([1], jpg=mixed)])
    assert len(read_by_webdataset(tar)) == 2
    result = validate(folder, decode=False)
    assert "a member that runs over a tar header" in result.summary.dropped


def test_a_cut_picture_and_the_caption_of_the_next_shard_are_not_paired(tmp_path: Path) -> None:
    """Joined by `cat`, webdataset yields picture A with caption B as one sample."""
    folder = tmp_path / "shards"
    folder.mkdir()
    first = write_tar(folder / "a.tar", named_members([0, 1]))
    second = write_tar(folder / "b.tar", [item for item in named_members([1, 2]) if item[0] != "k0001.jpg"])
    first.write_bytes(first.read_bytes()[: member_starts(first)["k0001.json"]])
    joined = tmp_path / "joined.tar"
    joined.write_bytes(first.read_bytes() + second.read_bytes())
    assert [is_whole(sample) for sample in read_by_webdataset(joined)] == [True, True, True]

    found = refused(folder).summary.dropped
    assert {CUT, "no json member", "members of one key that are not neighbours"} <= set(found)
    assert repaired(folder)[1] == [ALL[0], ALL[2]]


def test_a_cut_record_and_the_whole_one_of_the_next_tar(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    tar = write_tar(folder / "a.tar", named_members([0, 1]))
    cut = tar.read_bytes()[: member_starts(tar)["k0001.json"]]
    tar.write_bytes(cut + write_tar(tmp_path / "b.tar", named_members([1, 2])).read_bytes())
    assert "a member twice" in refused(folder).summary.dropped
    assert repaired(folder)[1] == [ALL[0], ALL[2]]


def _shards(tmp_path: Path, *tars: list[tuple[str, bytes]]) -> Path:
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, named in enumerate(tars):
        write_tar(folder / f"s{number}.tar", named)
    return folder


def test_members_that_are_not_neighbours(tmp_path: Path) -> None:
    """webdataset yields two half samples."""
    first, *rest = named_members([0])
    folder = _shards(tmp_path, [first, *named_members([1]), *rest, *named_members([2])])
    found = read_by_webdataset(folder / "s0.tar")
    assert [(sample["__key__"], is_whole(sample)) for sample in found][:3] == [
        (ALL[0], False), (ALL[1], True), (ALL[0], False),
    ]  # fmt: skip
    refused(folder)
    assert repaired(folder)[1] == [ALL[1], ALL[2]]


def test_json_and_picture_that_are_not_neighbours(tmp_path: Path) -> None:
    """The json alone would be a record without a picture, the rest one without a json."""
    picture_of_0, json_of_0, _ = named_members([0])
    folder = _shards(tmp_path, [json_of_0, *named_members([1]), picture_of_0])
    assert "members of one key that are not neighbours" in refused(folder).summary.dropped
    assert repaired(folder)[1] == [ALL[1]]


def test_dots_in_keys(tmp_path: Path) -> None:
    """webdataset splits at the first dot: it makes one sample of two."""
    dotted = [(name.replace("k000", "k.000"), data) for name, data in named_members([1, 2])]
    folder = _shards(tmp_path, [*named_members([0]), *dotted])
    samples = read_by_webdataset(folder / "s0.tar")
    assert len(samples) == 2 and {"0001.jpg", "0002.jpg"} <= set(samples[1])
    assert refused(folder).summary.dropped == {"a name that is not KEY.extension": 2}
    assert repaired(folder)[1] == [ALL[0]]


def test_keys_that_come_twice(tmp_path: Path) -> None:
    folder = _shards(tmp_path, [*named_members([0, 1]), *named_members([3, 0])], named_members([1, 2]))
    result = refused(folder)
    assert result.summary.dropped == {"a key that comes twice": 2}
    assert "s0.tar, byte" in result.examples["a key that comes twice"][0]
    assert "s1.tar, byte 0, key 'k0001'" in result.examples["a key that comes twice"][1]
    assert repaired(folder)[1] == [ALL[0], ALL[1], ALL[3], ALL[2]]
    samples = read_by_webdataset(*sorted(folder.glob("*.tar")))
    assert [sample["__key__"] for sample in samples].count(ALL[1]) == 2


def _link(name: str, kind: bytes) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, "/etc/passwd"
    return info


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(tmp_path: Path, kind: bytes) -> None:
    """webdataset passes over them: it yields a record without its picture."""
    folder = _shards(tmp_path, [])
    with tarfile.open(folder / "s0.tar", "w") as tar:
        for number in range(3):
            for name, data in named_members([number]):
                info = tarfile.TarInfo(name)
                info.size = len(data)
                tar.addfile(*((_link(name, kind),) if name == "k0001.jpg" else (info, io.BytesIO(data))))
    assert [is_whole(sample) for sample in read_by_webdataset(folder / "s0.tar")] == [True, False, True]
    result = refused(folder)
    assert "key 'k0001': 'k0001.jpg' is a link or device" in str(result.examples["a member that no shard may hold"])
    assert repaired(folder)[1] == [ALL[0], ALL[2]]


def phrase(words: list[str], *spans: tuple[int, int]) -> bytes:
    """The JSON of a record whose only phrase is this one."""
    caption = {"text": TEXT, "phrases": [{"tuple": words, "spans": spans}]}
    return encoded(content(captions=[caption, {"text": "more"}]))


def boxes(*corners: list[float]) -> dict[str, bytes]:
    regions = [{"box": box, "tag": "dog"} for box in corners]
    return {"json": encoded(content(regions=regions)), "npy": npy(features(len(corners)))}


def _nan() -> np.ndarray:
    array = features()
    array[1, 2] = np.nan
    return array


SCHEMA, PICTURE, FEATURES = "does not follow the schema", "cannot be decoded", "features that cannot be used"
SPANS, NOT_READ = "spans that are not of the phrase's words", "members that may not be read"
CONTENTS: dict[str, tuple[dict[str, bytes | None], str]] = {
    "no json": ({"json": None}, "no json member"),
    "empty json": ({"json": b""}, "an empty member"),
    "empty picture": ({"jpg": b""}, "an empty member"),
    "empty features": ({"npy": b""}, "an empty member"),
    "not JSON": ({"json": b"{"}, SCHEMA),
    "invalid UTF-8": ({"json": encoded(content()).replace(b"brown", b"br\xffwn")}, SCHEMA),
    "unknown schema": ({"json": encoded(content(schema=2))}, SCHEMA),
    "no schema": ({"json": encoded({"text": "a dog"})}, SCHEMA),
    "span outside": ({"json": phrase(["dog"], (8, len(TEXT) + 1))}, SCHEMA),
    "box of NaN": (boxes([0, 0, float("nan"), 4]), SCHEMA),
    "span shifted": ({"json": phrase(["dog"], (9, 12))}, SPANS),
    "span of another word": ({"json": phrase(["dog"], (2, 7))}, SPANS),
    "spans exchanged between words of two phrases": ({"json": phrase(["dog", "brown"], (8, 11), (23, 28))}, SPANS),
    "span too short": ({"json": phrase(["woman"], (23, 26))}, SPANS),
    "too few spans": ({"json": phrase(["dog", "brown"], (8, 11))}, SPANS),
    "too many spans": ({"json": phrase(["dog"], (8, 11), (2, 7))}, SPANS),
    "picture cut": ({"jpg": picture()[:-200]}, PICTURE),
    "picture of zeros": ({"jpg": bytes(3000)}, PICTURE),
    "picture of another format": ({"jpg": picture("GIF")}, PICTURE),
    "picture of another size": ({"jpg": picture(size=(HEIGHT, WIDTH))}, "a picture of another size"),
    "two pictures": ({"png": picture("PNG")}, "more than one picture"),
    "box outside": (boxes([0, 0, WIDTH + 1.5, 5]), "a box outside the picture"),
    "box left of the picture": (boxes([-2, 0, 5, 5]), "a box outside the picture"),
    "box without width": (boxes([4, 4, 4, 9]), "a box without area"),
    "box without height": (boxes([0, 0, 4, 4], [4, 4, 6, 4]), "a box without area"),
    "features of objects": ({"npy": npy(np.array([[{}]]), allow_pickle=True)}, FEATURES),
    "features of NaN": ({"npy": npy(_nan())}, FEATURES),
    "features of infinity": ({"npy": npy(features() * np.float16(np.inf))}, FEATURES),
    "features for other regions": ({"npy": npy(features(3))}, FEATURES),
    "features cut": ({"npy": npy(features())[:-2]}, FEATURES),
    "features without a header": ({"npy": b"0" * 200}, FEATURES),
    "features of another size": ({"npy": npy(features(columns=5))}, "features of another size"),
    "features for a grid that is none": ({"json": encoded(content(regions=[]))}, FEATURES),
    "pickled features": ({"npy": pickle.dumps(features())}, FEATURES),
}


@pytest.mark.parametrize("name", CONTENTS)
def test_contents(tmp_path: Path, name: str) -> None:
    changes, reason = CONTENTS[name]
    folder = _shards(tmp_path, [*named_members([0]), *named_members([1], **changes), *named_members([2, 3])])
    result = validate(folder)
    assert len(result.summary.dropped) == 1 and reason in next(iter(result.summary.dropped))
    (cases,) = result.examples.values()
    assert len(cases) == 1 and cases[0].startswith("s0.tar, byte ") and "key 'k0001': " in cases[0]
    assert repaired(folder)[1] == [ALL[0], ALL[2], ALL[3]]


def test_boxes_may_reach_a_pixel_out(tmp_path: Path) -> None:
    folder = _shards(tmp_path, named_members([0], **boxes([-1, -1, WIDTH + 1, HEIGHT + 1])))
    assert validate(folder).is_clean


def test_all_of_a_record_that_is_wrong_is_found(tmp_path: Path) -> None:
    changes = boxes([-9, 0, 5, 5], [4, 4, 4, 9]) | {"jpg": picture(size=(8, 8)), "npy": npy(features(1))}
    found = validate(_shards(tmp_path, named_members([0], **changes))).summary.dropped
    assert len(found) == 4 and set(found.values()) == {1}


def test_without_decoding_only_the_header_of_a_picture_counts(tmp_path: Path) -> None:
    folder = _shards(tmp_path, named_members([0], jpg=picture()[:-200]))
    assert validate(folder, decode=False).is_clean
    assert not validate(folder, decode=True).is_clean


def test_features_of_a_grid(tmp_path: Path) -> None:
    changes = {"json": encoded(content(regions=[])), "npy": npy(features(16))}
    assert validate(_shards(tmp_path, named_members([0], **changes))).is_clean


def test_caps(tmp_path: Path) -> None:
    large = {
        1: {"json": encoded(content()) + b" " * MAX_JSON_BYTES},
        3: {"npy": bytes(MAX_MEMBER_BYTES + 1)},
        5: {f"x{number}": b"1" for number in range(MAX_RECORD_MEMBERS)},
    }
    folder = _shards(tmp_path, [item for n in range(7) for item in named_members([n], **large.get(n, {}))])
    result = refused(folder)
    assert result.summary.dropped == {"a member or record over its cap": 3}
    cases = "".join(result.examples["a member or record over its cap"])
    assert f"at most {MAX_JSON_BYTES} are read" in cases and f"has {MAX_RECORD_MEMBERS + 1} members" in cases
    assert repaired(folder)[1] == [ALL[0], ALL[2], ALL[4], ALL[6]]


@pytest.mark.parametrize("name", ["../k0001.jpg", "/k0001.jpg", "a/../k0001.jpg", "k\udcff1.jpg"])
def test_names_that_lead_elsewhere_or_are_no_text(tmp_path: Path, name: str) -> None:
    folder = _shards(tmp_path, [*named_members([0]), (name, picture()), *named_members([2])])
    result = refused(folder)
    assert result.summary.dropped == {"a member that no shard may hold": 1}
    assert repr(name) in result.examples["a member that no shard may hold"][0]
    assert repaired(folder)[1] == [ALL[0], ALL[2]]


def _entry(version: str = "1", **changes: Any) -> dict[str, bytes]:
    """The members of a sidecar's entry."""
    value = content(extractor={"name": "detector", "version": version}, **changes)
    for field in ("image_id", *(name for name, given in changes.items() if given is None)):
        del value[field]
    return {"json": encoded(value), "npy": npy(features())}


def _named(entries: dict[int, dict[str, bytes]]) -> list[tuple[str, bytes]]:
    return [(f"{key(n)}.{extension}", data) for n, entry in entries.items() for extension, data in entry.items()]


def test_sidecars(tmp_path: Path) -> None:
    shifted = [{"text": TEXT, "phrases": [{"tuple": ["dog"], "spans": [[7, 10]]}]}]
    entries = {
        0: _entry(),
        1: _entry(captions=shifted),
        2: _entry(regions=[{"box": [9, 9, WIDTH + 9, 12], "tag": "dog"}] * 2),
        3: _entry(width=None, height=None, regions=[{"box": [9, 9, WIDTH + 9, 12], "tag": "dog"}] * 2),
        4: {"npy": npy(features(7)), "json": _entry(regions=None)["json"]},
        5: {"npy": npy(features()), "json": encoded({"schema": 1, "extractor": {"name": "", "version": "1"}})},
        6: _entry() | {"jpg": picture()},
        7: _entry(regions=[{"box": [9, 9, 12, 12], "tag": "dog"}]),
    }
    folder = _shards(tmp_path, _named(entries))
    assert refused(folder).summary.dropped == {
        "a box outside the picture": 1,
        SPANS: 1,
        "a record that does not follow the schema": 2,
        FEATURES: 1,
    }
    result = validate(folder, repair=tmp_path / "repaired")
    assert result.index is not None and result.index.kind == "sidecar" and result.index.num_records == 3
    (tar,) = (tmp_path / "repaired").glob("*.tar")
    assert [sample["__key__"] for sample in read_by_webdataset(tar)] == [ALL[0], ALL[3], ALL[4]]


def test_records_among_the_entries_of_a_sidecar(tmp_path: Path) -> None:
    folder = _shards(tmp_path, [*_named({0: _entry()}), *named_members([1]), *_named({2: _entry()})])
    assert refused(folder).summary.dropped == {"records and entries of a sidecar in one folder": 1}


def test_several_extractors_are_a_warning(tmp_path: Path) -> None:
    folder = _shards(tmp_path, _named({0: _entry(), 1: _entry(), 2: _entry("2")}))
    result = validate(folder)
    assert result.is_clean and result.index is not None
    assert "2 records by detector 1, 1 records by detector 2" in result.warnings[0]


def test_records_without_captions_or_without_pictures(tmp_path: Path) -> None:
    text_only = encoded(content(width=0, height=0, regions=[]))
    changes: dict[int, dict[str, bytes | None]] = {
        0: {"json": encoded(content(captions=[]))},
        1: {"json": text_only, "jpg": None, "npy": None},
        2: {"json": encoded(content(captions=[], regions=[])), "jpg": None, "npy": None},
    }
    folder = _shards(tmp_path, [item for n, changed in changes.items() for item in named_members([n], **changed)])
    assert refused(folder).summary.dropped == {"a record that does not follow the schema": 1}
    result = validate(folder, repair=tmp_path / "repaired")
    assert result.index is not None and result.index.num_records == 2


def test_a_zeroed_tail(folder: Path) -> None:
    """As a download that allocates first leaves it; webdataset reads what is before."""
    tar = min(folder.glob("*.tar"))
    with tarfile.open(tar) as opened:
        keys = [(member.name.split(".")[0], member.offset) for member in opened]
    border = next(offset for name, offset in keys if name == keys[-1][0])  # where the last record begins
    num_before = len({name for name, _ in keys}) - 1
    tar.write_bytes(tar.read_bytes()[:border] + bytes(1 << 20))
    assert len(read_by_webdataset(tar)) == num_before
    result = refused(folder)
    assert any("its tail was lost" in case for cases in result.examples.values() for case in cases)


@pytest.mark.parametrize("blocks", [1, 20, 100, 1000, 2048, 8192])
def test_any_blocking_factor_of_tar_is_padding(tmp_path: Path, blocks: int) -> None:
    """The last member ends in zeros, as a lost tail's would."""
    tar = write_tar(tmp_path / "whole.tar", named_members([0, 1], npy=npy(np.zeros((2, 4), dtype=np.float16))))
    with tarfile.open(tar) as opened:
        end = 512 * (-(-max(m.offset_data + m.size for m in opened) // 512) + 2)
    size = -(-end // (512 * blocks)) * 512 * blocks
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "s.tar").write_bytes(tar.read_bytes()[:end].ljust(size, b"\0"))
    assert validate(folder).is_clean and build_index(folder).num_records == 2


def test_zeros_alone_are_no_tar_but_for_the_usual_padding(tmp_path: Path) -> None:
    (tmp_path / "s.tar").write_bytes(bytes(1 << 20))
    assert "its tail was lost" in str(refused(tmp_path).examples)


def as_macos_writes_it(tar: Path, named: list[tuple[str, bytes]]) -> Path:
    """Before each member its attributes, in a file of its own and in PAX headers; folders and their settings."""
    with tarfile.open(tar, "w", format=tarfile.PAX_FORMAT) as opened:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        opened.addfile(folder)
        attributes = b"\0\5\x16\7\0\2\0\0Mac OS X".ljust(163, b"\0")
        for name, data in [("._.", attributes), (".DS_Store", b"\0\0\0\1Bud1"), *named, ("__MACOSX/._x", attributes)]:
            for path, content in ((f"./._{name}", attributes), (f"./{name}", data)):
                info = tarfile.TarInfo(path)
                info.size = len(content)
                info.pax_headers = {
                    "LIBARCHIVE.xattr.com.apple.quarantine": "MDA=",
                    "SCHILY.xattr.com.apple.x": "\0=\n",
                }
                opened.addfile(info, io.BytesIO(content))
    return tar


def test_a_tar_as_macos_writes_it_is_sound(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    tar = as_macos_writes_it(folder / "s.tar", named_members([0, 1, 2]))
    result = validate(folder)
    assert result.is_clean and result.summary.counts["files that a Mac added (._NAME, .DS_Store), passed over"] == 13
    index = build_index(folder)
    assert (index.num_records, [index.key_of(index.place(n)) for n in range(3)]) == (3, ALL[:3])
    assert [index.read(index.place(n))[1] for n in range(3)] == [members(n) for n in range(3)]
    assert sum(map(is_whole, read_by_webdataset(tar))) == 3
    assert repaired(folder)[1] == ALL[:3]


def test_a_damaged_tar_of_a_mac_keeps_what_is_sound(tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    tar = as_macos_writes_it(folder / "s.tar", named_members([0, 1, 2]))
    tar.write_bytes(tar.read_bytes()[: member_starts(tar)["./._k0002.npy"] + 700])
    refused(folder)
    assert repaired(folder)[1] == ALL[:2]


def test_a_shard_whose_name_is_not_utf_8_is_named(folder: Path) -> None:
    named = os.fsencode(folder) + b"/caf\xe9.tar"
    os.rename(folder / "shard-000000.tar", named)
    with pytest.raises(DataError, match=r"such as caf.udce9.tar; rebuild the index|shard .* is missing"):
        Index.open(folder)
    for look in (build_index, validate, lambda path: list_tars([path])):
        with pytest.raises(DataError, match=r"the name of the shard '.*caf\\udce9.tar' is not UTF-8; rename it"):
            look(folder)


def test_a_picture_that_is_missing_among_others(tmp_path: Path) -> None:
    folder = _shards(tmp_path, [*named_members([0, 1]), *named_members([2], jpg=None, npy=None)])
    result = validate(folder)
    assert not result.is_clean and result.summary.dropped == {validation.NO_PICTURE: 1}
    assert ALL[2] in result.examples[validation.NO_PICTURE][0]


def test_pieces_of_a_foreign_tar(tmp_path: Path) -> None:
    """Long names, folders and other members are sound; their keys cannot be written again, and a repair says so."""
    long = [("d/" + "x" * 120 + name, data) for name, data in named_members([0])]
    folder = _shards(tmp_path, [*named_members([1], txt=b"ignored", cls=b"3")])
    write_tar(folder / "long.tar", long, tarfile.PAX_FORMAT)
    result = validate(folder)
    assert result.is_clean and result.summary.counts["members of other kinds, not read"] == 2
    again, kept = repaired(folder)
    assert kept == [ALL[1]] and again.summary.dropped == {"a key that cannot be written again": 1}


def test_a_clean_folder_gets_the_index_that_build_index_makes(folder: Path, tmp_path: Path) -> None:
    before = {name: (folder / name).read_bytes() for name in ("index.npy", "manifest.json")}
    for name in before:
        (folder / name).unlink()
    result = validate(folder)
    assert result.is_clean and result.summary.counts["records sound"] == 8
    assert {name: (folder / name).read_bytes() for name in before} == before
    assert sorted(path.suffix for path in folder.iterdir()) == [".json", ".npy", ".tar", ".tar"]
    elsewhere = validate(folder, out=tmp_path / "elsewhere").index
    assert elsewhere is not None and elsewhere.folder == tmp_path / "elsewhere"


def test_a_repair_of_a_sound_folder_is_the_folder(folder: Path, tmp_path: Path) -> None:
    validate(folder, repair=tmp_path / "out")
    for tar in folder.glob("*.tar"):
        assert (tmp_path / "out" / tar.name).read_bytes() == tar.read_bytes()


def test_an_index_that_exists_is_left_and_said_to_be_stale(folder: Path) -> None:
    before = (folder / "index.npy").read_bytes()
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    assert "of other shards" in validate(folder).warnings[0]
    assert (folder / "index.npy").read_bytes() == before


def test_processes_and_interruptions_change_nothing(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:5000])
    one = validate(folder)

    def interrupt(number: int) -> None:
        if number:
            raise SystemExit(143)

    inspect = validation.inspect_shard
    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(validation, "inspect_shard", lambda unit, **rest: interrupt(unit[0]) or inspect(unit, **rest))
        validate(folder)
    (work,) = folder.glob(".validation-*")
    assert len(list((work / PROGRESS_NAME).glob("0*.json"))) == 1
    for num_processes in (1, 2):
        again = validate(folder, num_processes=num_processes)
        assert (again.summary, again.examples) == (one.summary, one.examples)
    assert not list(folder.glob(".validation-*"))


def test_examples_are_limited(tmp_path: Path) -> None:
    folder = _shards(tmp_path, *(named_members(range(n, n + 4), jpg=b"no picture") for n in (0, 4)))
    for most, shown in ((0, 0), (3, 3), (7, 7), (50, 8)):
        result = validate(folder, max_examples=most)
        assert result.summary.dropped == {"a picture that cannot be decoded": 8}
        assert len(result.examples["a picture that cannot be decoded"]) == shown


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_settings_without_a_member_and_twice_for_one(folder: Path, tmp_path: Path, tar_format: int) -> None:
    """Found by fuzzing: readers differ in what they make of these."""
    long = write_tar(tmp_path / "long.tar", [("é" * 120 + ".txt", b"1")], tar_format).read_bytes()
    settings = long[: long.index(b".txt") // 512 * 512 + 512]
    tar = folder / "shard-000000.tar"
    sound = tar.read_bytes()
    end, first = sound.index(bytes(1024), member_starts(tar)["k0003.npy"] + 1024), member_starts(tar)["k0002.jpg"]
    for damaged, reason in (
        (sound[:end] + settings + sound[end:], "before the end mark"),
        (sound[:first] + settings + settings + sound[first:], "a second long name"),
    ):
        tar.write_bytes(damaged)
        with pytest.raises(DataError, match=reason):
            build_index(folder)
        assert not validate(folder).is_clean


def test_nothing_sound(tmp_path: Path) -> None:
    folder = _shards(tmp_path, [])
    empty = validate(folder)
    assert empty.is_clean and empty.index is None and "no sound record" in empty.warnings[0]
    write_tar(folder / "s0.tar", named_members([0], npy=b""))
    for repair in (None, tmp_path / "repaired"):
        result = validate(folder, repair=repair)
        assert not result.is_clean and result.index is None and "no sound record" in result.warnings[0]
    assert not list((tmp_path / "repaired").glob("*"))


def test_what_cannot_be_done(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"holds no \.tar"):
        validate(tmp_path / "none")
    with pytest.raises(DataError, match="is what is read"):
        validate(folder, repair=folder)
    with pytest.raises(DataError, match="already holds tars"):
        validate(folder, repair=sound_folder(tmp_path / "full"))
    (folder / "z.tar").symlink_to(tmp_path / "nowhere")
    assert "a shard that cannot be read" in validate(folder).summary.dropped


@pytest.mark.parametrize("decode", [True, False])
def test_transparency_and_16_bits_are_counted(tmp_path: Path, decode: bool) -> None:
    odd = [STORED["P with partial alpha"], STORED["16-bit grey with tRNS"], STORED["RGBA, opaque"]]
    named = []
    for number, shown in enumerate(odd):
        json_member = encoded(content(image_id=str(number), width=len(shown.row), height=1, regions=[]))
        named += [(f"{key(number)}.png", shown.content), (f"{key(number)}.json", json_member)]
    (tmp_path / "shards").mkdir()
    write_tar(tmp_path / "shards" / "s.tar", named)
    result = validate(tmp_path / "shards", decode=decode)
    assert result.is_clean
    counted = {name: result.summary.counts[name] for name in (TRANSPARENT, WIDE_GREY)}
    assert counted == ({TRANSPARENT: 2, WIDE_GREY: 1} if decode else {TRANSPARENT: 0, WIDE_GREY: 0})
