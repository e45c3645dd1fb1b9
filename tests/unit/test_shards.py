from __future__ import annotations

import io
import json
import pickle
import re
import shutil
import tarfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mvptr_ds.corpus.phrases.captions import list_inputs
from mvptr_ds.corpus.validating.validation import validate
from mvptr_ds.data.schema import Caption, Extractor, Record, Region
from mvptr_ds.data.shards import index_builder
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import build_index, ensure_index
from mvptr_ds.data.shards.index_format import key_hash
from mvptr_ds.data.shards.tar_header import TarError, parse_header
from mvptr_ds.data.shards.tar_reader import read_record, record_key
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.errors import DataError
from mvptr_ds.preflight import checks
from tests.support.hostile import picture, sound_folder
from tests.support.rights import as_ordinary_user


def _item(number: int, num_captions: int = 1) -> tuple[str, Record, dict[str, bytes]]:
    captions = tuple(Caption(f"caption {number} {c}") for c in range(num_captions))
    record = Record(f"id{number}", 64, 48, captions, (Region((0, 0, 8, 8), "dog"), Region((1, 1, 9, 9), f"t{number}")))
    return f"k{number:04d}", record, {"npy": bytes([number]) * (100 + 700 * (number % 3))}


def _json(number: int) -> bytes:
    return json.dumps(_item(number)[1].to_json()).encode()


EMPTY = json.dumps(Record("0", 0, 0, ()).to_json()).encode()


def _sidecar(**content: object) -> bytes:
    return json.dumps({"schema": 1, "extractor": {"name": "detr", "version": "1"}, **content}).encode()


def _write_tar(path: Path, members: list[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> None:
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_shards(tmp_path / "shards", (_item(n, 1 + n % 3) for n in range(10)), records_per_shard=4)
    return tmp_path / "shards"


def test_a_folder_that_may_not_be_written_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = sound_folder(tmp_path / "shards")
    for name in ("manifest.json", "index.npy"):
        (folder / name).unlink()
    monkeypatch.chdir(tmp_path)
    tmp_path.chmod(0o777)
    folder.chmod(0o555)
    remedy = "write it elsewhere with python tools/validate_shards.py shards --out DIR, and name DIR in place of shards"
    with as_ordinary_user():
        with pytest.raises(
            DataError, match=rf"index of shards cannot be written into shards \(Permission .*: {remedy}"
        ):
            validate(Path("shards"))
        with pytest.raises(DataError, match=rf"shards \(data.train\) cannot be written .*: {remedy}"):
            ensure_index("shards", role="data.train")
        finding = checks._without_index("shards", "data.train", 10_240)
        assert finding.level == "error" and finding.remedy.startswith("write it elsewhere with python")
        assert validate(Path("shards"), out=Path("elsewhere")).index is not None
        assert len(ensure_index("elsewhere")) == 16


def test_a_folder_of_folders_of_shards_names_them(folder: Path, tmp_path: Path) -> None:
    for name in ("train", "held_out", "notes"):
        (tmp_path / "clip" / name).mkdir(parents=True)
    shutil.copy(folder / "shard-000000.tar", tmp_path / "clip/held_out")
    clip = tmp_path / "clip"
    for look in (build_index, ensure_index, validate):
        with pytest.raises(
            DataError, match=rf"clip holds no \.tar file; there are some below it, in held_out: .* {clip}/held_out$"
        ):
            look(clip)
    shutil.copy(folder / "shard-000000.tar", clip / "train")
    with pytest.raises(DataError, match=rf"in held_out, train: name one of these, such as {clip}/train$"):
        list_inputs([clip])
    with pytest.raises(DataError, match=r"nowhere holds no \.tar file; name a folder of shards$"):
        build_index("nowhere")


@pytest.mark.parametrize("extensions", ["jpg json txt", "jpg txt", "jpg json"])
def test_tars_of_img2dataset_name_what_makes_shards_of_them(tmp_path: Path, extensions: str) -> None:
    meta = json.dumps({"caption": "a dog", "url": "http://x", "key": "0", "status": "success", "width": 3}).encode()
    content = {"jpg": picture(), "json": meta, "txt": b"a dog"}
    (tmp_path / "raw").mkdir()
    members = [(f"{n:09d}.{name}", content[name]) for n in range(3) for name in extensions.split()]
    _write_tar(tmp_path / "raw/00000.tar", members)
    remedy = f"python tools/build_shards.py img2dataset {tmp_path / 'raw'} --out DIR makes shards of such tars"
    found = f"this is a record of img2dataset ({', '.join(extensions.split())}); {remedy}"
    for look in (build_index, index_builder.check_first_record):
        with pytest.raises(DataError, match=re.escape(found)):
            look(tmp_path / "raw")
    finding = checks._without_index(str(tmp_path / "raw"), "data.train", 10_240)
    assert finding.level == "error" and found in finding.text
    result = validate(tmp_path / "raw")
    assert result.summary.dropped == {"a record of img2dataset": 3} and result.index is None


def test_the_first_record_is_looked_at_alone(folder: Path) -> None:
    tar = folder / "shard-000000.tar"
    tar.write_bytes(tar.read_bytes()[:4096])  # cut behind the second record
    index_builder.check_first_record(folder)
    tar.write_bytes(tar.read_bytes().replace(b'{"schema":1', b'{"schema":2'))
    with pytest.raises(DataError, match="schema is 2, this version reads 1; write that shard again"):
        index_builder.check_first_record(folder)


def test_every_sample_is_found_where_it_was_written(folder: Path) -> None:
    index = Index.open(folder)
    assert (index.num_records, len(index), index.num_shards) == (10, 19, 3)
    expected = [(n, c) for n in range(10) for c in range(1 + n % 3)]
    for sample, (number, caption) in enumerate(expected):
        path, offset, num_bytes, record, caption_number = index.locate(sample)
        assert (record, caption_number) == (number, caption)
        members = read_record(path, offset, num_bytes)
        assert json.loads(members["json"])["image_id"] == f"id{number}"
        assert members["npy"] == _item(number)[2]["npy"]
        assert record_key(path, offset, num_bytes) == f"k{number:04d}"
        assert sample in index.samples_of(number)
    for outside in (-1, 19):
        with pytest.raises(IndexError):
            index.locate(outside)


def test_manifest_and_webdataset_agree(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    assert [s["num_records"] for s in manifest["shards"]] == [4, 4, 2]
    assert [s["num_samples"] for s in manifest["shards"]] == [7, 8, 4]
    assert list(manifest["tags"].items())[:2] == [("dog", 10), ("t0", 1)]
    urls = sorted(str(path) for path in folder.glob("*.tar"))
    keys = [sample["__key__"] for sample in webdataset.WebDataset(urls, shardshuffle=False)]
    assert keys == [f"k{n:04d}" for n in range(10)]


def test_equal_items_give_equal_bytes(folder: Path, tmp_path: Path) -> None:
    write_shards(tmp_path / "again", (_item(n, 1 + n % 3) for n in range(10)), records_per_shard=4)
    for path in sorted(folder.iterdir()):
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("key", ["a.b", "a/b", "", "k" * 200])
def test_writer_refuses_bad_keys(tmp_path: Path, key: str) -> None:
    with pytest.raises(DataError, match="key"):
        write_shards(tmp_path, [(key, *_item(0)[1:])], 4)
    assert not list(tmp_path.glob("*.tar"))


def test_writer_refuses_repeats_unknown_members_and_full_folders(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="used twice"):
        write_shards(tmp_path / "a", [_item(0), _item(1), _item(0)], 1)
    with pytest.raises(DataError, match="neither a caption nor an image"):
        write_shards(tmp_path / "b", [("k", Record("0", 0, 0, ()), {})], 1)
    with pytest.raises(DataError, match="pkl"):
        write_shards(tmp_path / "c", [("k", _item(0)[1], {"pkl": b""})], 1)
    with pytest.raises(DataError, match="already holds tars"):
        write_shards(folder, [_item(0)], 1)


def test_index_pickles_without_its_array(folder: Path) -> None:
    index = Index.open(folder)
    content = pickle.dumps(index)
    copy = pickle.loads(content)
    assert [copy.locate(n) for n in range(19)] == [index.locate(n) for n in range(19)]
    assert b"first_sample" not in content


def test_open_notices_missing_and_changed_files(folder: Path) -> None:
    tar = folder / "shard-000001.tar"
    content = tar.read_bytes()
    tar.write_bytes(content + b"\0" * 512)
    with pytest.raises(DataError, match=r"shard-000001\.tar has .*validate_shards"):
        Index.open(folder)
    tar.unlink()
    with pytest.raises(DataError, match=r"shard-000001\.tar is missing"):
        Index.open(folder)
    tar.write_bytes(content)
    rows = bytearray((folder / "index.npy").read_bytes())
    rows[-3] ^= 1
    (folder / "index.npy").write_bytes(rows)
    with pytest.raises(DataError, match="not the one the manifest names"):
        Index.open(folder)
    (folder / "manifest.json").unlink()
    with pytest.raises(DataError, match="validate_shards"):
        Index.open(folder)
    assert len(ensure_index(folder)) == 19  # built again


def test_opening_reads_places_of_the_index_and_verify_all_of_it(tmp_path: Path) -> None:
    """4,000 rows: more than is looked at when it is opened."""
    write_shards(tmp_path, ((f"k{n}", Record(f"{n}", 0, 0, (Caption("a"),)), {}) for n in range(4000)), 4000)
    path = tmp_path / "index.npy"
    content = path.read_bytes()
    Index.open(tmp_path).verify()
    for start, end in ((len(content) - 20, len(content)), (0, 128), (len(content) // 2, len(content))):
        path.write_bytes(content[:start] + bytes(end - start) + content[end:])
        with pytest.raises(DataError, match="not the one the manifest names"):
            Index.open(tmp_path)
    path.write_bytes(content[:-20])
    with pytest.raises(DataError, match="not the one the manifest names"):
        Index.open(tmp_path)
    changed = bytearray(content)
    changed[4096 + 100] ^= 1  # between the first two places
    path.write_bytes(changed)
    index = Index.open(tmp_path)
    with pytest.raises(DataError, match=r"index\.npy is not the one the manifest names; rebuild"):
        index.verify()


def test_more_samples_than_a_row_can_count_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_builder, "MAX_SAMPLES", 5)
    with pytest.raises(DataError, match="more than 5 samples; spread the shards over several"):
        write_shards(tmp_path, [_item(0, 3), _item(1, 3)], 2)


def _cut_member(tar: bytes) -> bytes:
    return tar[:1300]


def _cut_between_members(tar: bytes) -> bytes:
    return tar[:2048]  # record k0000 ends here


def _garbage_header(tar: bytes) -> bytes:
    return tar[:3072] + b"x" * 512 + tar[3584:]


def _two_joined(tar: bytes) -> bytes:
    return tar + tar


@pytest.mark.parametrize("damage", [_cut_member, _cut_between_members, _garbage_header, _two_joined])
def test_index_refuses_damaged_tars(folder: Path, damage: Callable[[bytes], bytes]) -> None:
    """Each of these loses samples silently in webdataset's reader."""
    tar = folder / "shard-000000.tar"
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(DataError, match=r"shard-000000\.tar, key 'k\d+': byte \d+: .*; write that shard again"):
        build_index(folder)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", _json(0)), ("b.json", _json(1)), ("b.npy", b"1"), ("a.npy", b"0")], "seen before"),
        ([("a.json", _json(0)), ("a.npy", b"")], "'a.npy' is empty"),
        ([("a.json", b""), ("a.npy", b"0")], "'a.json' is empty"),
        ([("a.json", EMPTY)], "neither a caption nor an image"),
        ([("a.json", EMPTY), ("a.jpg", b"0")], "0 x 0, both must be at least 1"),
        ([("a.json", _json(0)), ("../a.npy", b"0")], "leads out of the folder"),
        ([("/a.json", _json(0))], "leads out of the folder"),
        ([("a.json", _json(0)), *((f"a.x{n}", b"") for n in range(64))], "65 members or more, at most 64"),
        ([("a.json", _sidecar())], "neither regions, captions nor npy"),
        ([("a.json", _sidecar(regions=[])), ("a.jpg", b"0")], r"a sidecar holds json and npy.*'jpg'"),
        ([("a.json", _json(0)), ("b.json", _sidecar(regions=[]))], "kind 'sidecar', what came before to 'records'"),
        ([("a.npy", b"0")], "no json"),
        ([("a.json", b"{}"), ("a.npy", b"0")], "schema is None"),
        ([("a.json", b"{"), ("a.npy", b"0")], "not JSON"),
        ([("a.x.json", _json(0)), ("a.x.npy", b"0")], "without dots"),
        ([("a.json", _json(0)), ("a.npy", b"0"), ("a.npy", b"1")], "twice"),
        ([("readme", b"")], "not KEY.extension"),
    ],
)
def test_index_refuses_malformed_records(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    _write_tar(tmp_path / "s.tar", members)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)


def test_index_refuses_a_key_in_two_shards_links_and_empty_folders(tmp_path: Path) -> None:
    for name in ("a", "b"):
        _write_tar(tmp_path / f"{name}.tar", [("k.json", _json(0)), ("k.npy", b"0")])
    with pytest.raises(DataError, match=r"b\.tar, key 'k': .*not unique"):
        build_index(tmp_path)
    (tmp_path / "b.tar").unlink()
    with tarfile.open(tmp_path / "a.tar", "a") as tar:
        link = tarfile.TarInfo("z.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    with pytest.raises(DataError, match="link or device"):
        build_index(tmp_path)
    with pytest.raises(DataError, match=r"no \.tar"):
        build_index(tmp_path / "none")


@pytest.mark.parametrize("tar_format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_tars_with_long_names_and_other_members(tmp_path: Path, tar_format: int) -> None:
    keys = ["./" + letter * 150 + "é" for letter in "ab"]
    members = [
        (f"{key}.{ext}", content)
        for key in keys
        for ext, content in (("JPG", b"image" * 200), ("txt", b"ignored"), ("json", _json(3)), ("pkl", b"ignored"))
    ]
    _write_tar(tmp_path / "s.tar", members, tar_format)
    index = build_index(tmp_path)
    place = index.locate(1)
    out = read_record(place.path, place.offset, place.num_bytes)
    assert sorted(out) == ["jpg", "json"]
    assert out["jpg"] == b"image" * 200
    assert record_key(place.path, place.offset, place.num_bytes) == keys[1][2:]


def test_index_may_lie_elsewhere(folder: Path, tmp_path: Path) -> None:
    for name in ("manifest.json", "index.npy"):
        (folder / name).unlink()
    index = build_index(folder, tmp_path / "elsewhere")
    assert not (folder / "manifest.json").exists()
    assert Path(index.locate(0).path).samefile(folder / "shard-000000.tar")


def test_read_record_notices_a_stale_place(folder: Path) -> None:
    index = Index.open(folder)
    first, second = index.locate(0), index.locate(1)
    with pytest.raises(DataError, match="expected one record"):
        read_record(first.path, first.offset, first.num_bytes + second.num_bytes)
    with pytest.raises(DataError, match="too early"):
        read_record(first.path, first.offset, 10**7)
    with pytest.raises(DataError, match="damaged tar header"):
        read_record(first.path, first.offset + 512, first.num_bytes - 512)


def test_index_dtype_is_the_documented_one(folder: Path) -> None:
    rows = np.load(folder / "index.npy", allow_pickle=False)
    assert rows.dtype.names == ("block", "span", "first_sample", "key_hash") and rows.dtype.itemsize == 20
    assert rows["first_sample"].tolist() == [0, 1, 3, 6, 7, 9, 12, 13, 15, 18]
    assert rows["key_hash"].tolist() == [key_hash(f"k{number:04d}") for number in range(10)]


def test_a_tar_that_came_later_is_noticed(tmp_path: Path) -> None:
    record = Record("0", 8, 8, (Caption("a"),))
    write_shards(tmp_path / "a", [("a", record, {"jpg": b"x"})], 3)
    write_shards(tmp_path / "b", [("b", record, {"jpg": b"x"})], 3)
    (tmp_path / "b/shard-000000.tar").rename(tmp_path / "a/more.tar")
    with pytest.raises(DataError, match=r"1 tars are not in the index, such as more\.tar; rebuild"):
        Index.open(tmp_path / "a")
    assert len(build_index(tmp_path / "a")) == 2


def test_records_of_one_modality_are_samples_and_counted(tmp_path: Path) -> None:
    both, text, image = (
        Record("0", 8, 8, (Caption("a"), Caption("b")), extractor=Extractor("detr", "2")),
        Record("1", 0, 0, (Caption("c"), Caption("d"), Caption("e"))),
        Record("2", 8, 8, ()),
    )
    boxes = Record("3", 8, 8, (Caption("f"),), (Region((0, 0, 1, 1), "dog"),))  # its features come from a sidecar
    items = [("a", both, {"jpg": b"x"}), ("b", text, {}), ("c", image, {"jpg": b"x"}), ("d", boxes, {})]
    write_shards(tmp_path, items, 3)
    index = Index.open(tmp_path)
    assert [index.locate(n)[3:] for n in range(len(index))] == [(0, 0), (0, 1), (1, 0), (1, 1), (1, 2), (2, 0), (3, 0)]
    assert (index.num_text_only_samples, index.num_image_only_samples, index.kind) == (3, 1, "records")
    assert index.extractors == {"an unnamed extractor": 1, "detr 2": 1}  # the boxes of "d" name none
    assert index.holds == {"captions": 3, "image": 2, "regions": 1}
    assert [index.read(index.place(n))[0] for n in range(4)] == [both, text, image, boxes]
    assert index.flags().tolist() == [0, 1, 2, 0]
    samples = list(webdataset.WebDataset([str(p) for p in sorted(tmp_path.glob("*.tar"))], shardshuffle=False))
    assert [sorted(name for name in s if name[0] != "_") for s in samples] == [
        ["jpg", "json"], ["json"], ["jpg", "json"], ["json"]
    ]  # fmt: skip


def _header(name: str, size: int, kind: bytes = tarfile.REGTYPE) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.type = size, kind
    return info.tobuf(tarfile.USTAR_FORMAT)


def _member(name: str, content: bytes) -> bytes:
    return _header(name, len(content)) + content.ljust(-(-len(content) // 512) * 512, b"\0")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("k.json", (16 << 20) + 1, "'k.json' has 16777217 bytes, at most 16777216"),
        ("k.jpg", (64 << 20) + 1, "'k.jpg' has 67108865 bytes, at most 67108864"),
        ("k.npy", 200 << 20, "'k.npy' has 209715200 bytes, at most 67108864"),
        ("k.mp4", 1 << 30, "bytes or more, at most 268435456"),
    ],
)
def test_members_over_their_cap_are_refused_unread_by_index_and_reader(
    tmp_path: Path, name: str, size: int, message: str
) -> None:
    path = tmp_path / "s.tar"
    with open(path, "wb") as file:  # sparse: as large as it says, and no byte of it written
        head = b"" if name == "k.json" else _member("k.json", _json(0))
        file.write(head + _header(name, size))
        num_bytes = len(head) + 512 + -(-size // 512) * 512
        file.truncate(num_bytes + 1024)
    with pytest.raises(DataError, match=rf"s\.tar, key 'k': byte \d+: .*{message}"):
        build_index(tmp_path)
    with pytest.raises(DataError, match=message):
        read_record(str(path), 0, num_bytes)


def test_large_records_are_read_member_by_member(tmp_path: Path) -> None:
    """What the package does not read is skipped, also where it is 100 MB."""
    path = tmp_path / "s.tar"
    with open(path, "wb") as file:
        file.write(_member("k.json", _json(0)) + _header("k.mp4", 100 << 20))
        file.seek(100 << 20, 1)
        file.write(_member("k.npy", b"12345") + bytes(1024))
    place = build_index(tmp_path).place(0)
    assert place.num_bytes > 100 << 20
    tracemalloc.start()
    members = read_record(place.path, place.offset, place.num_bytes)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert members == {"json": _json(0), "npy": b"12345"} and peak < 1 << 20
    assert record_key(place.path, place.offset, place.num_bytes) == "k"


def _pax(settings: bytes, kind: bytes = tarfile.XHDTYPE) -> bytes:
    return _header("././@PaxHeader", len(settings), kind) + _member("", settings)[512:]


def _setting(name: str, value: bytes) -> bytes:
    rest = f" {name}=".encode() + value + b"\n"
    length = next(n for n in range(len(rest), len(rest) + 9) if n == len(rest) + len(str(n)))
    return str(length).encode() + rest


@pytest.mark.parametrize(
    ("before", "message"),
    [
        (_header("././@LongLink", (64 << 10) + 1, tarfile.GNUTYPE_LONGNAME) + bytes(130 << 9), "at most 65536 are"),
        (_pax(b"a" * 65537), "PAX header has 65537 bytes, at most 65536"),
        (_pax(b"99 path=x\n"), "damaged PAX"),
        (_pax(b"9" * 5000 + b" path=x\n"), "damaged PAX"),
        (_pax(_setting("size", "\u00b2".encode())), "PAX size '\u00b2' is not a number"),
        (_pax(_setting("size", b"9" * 5007)), "PAX size '9999"),
        (_pax(_setting("GNU.sparse.major", b"1")), "sets 'GNU.sparse.major'"),
        (_pax(_setting("path", b"b\0.json")), "holds a NUL"),
        (_pax(_setting("path", b"../a.jpg")), "leads out"),
        (_pax(_setting("path", b"\xff\xfe.json")), "not UTF-8"),
        (_pax(_setting("path", b"b.json"), tarfile.XGLTYPE), "sets 'path'"),
        (_header("k.jpg", 0, tarfile.GNUTYPE_SPARSE), "link or device or sparse"),
    ],
)
def test_headers_that_readers_do_not_agree_on_are_refused(tmp_path: Path, before: bytes, message: str) -> None:
    tail = _member("k.json", _json(0)) + bytes(1024)
    (tmp_path / "s.tar").write_bytes(before + tail)
    with pytest.raises(DataError, match=message):
        build_index(tmp_path)
    with pytest.raises(DataError, match=message):
        read_record(str(tmp_path / "s.tar"), 0, len(before + tail) - 1024)


def test_two_keys_of_one_hash_are_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No two such keys are known, so the hash is made worse."""
    monkeypatch.setattr(index_builder, "key_hash", lambda key: 7)
    with pytest.raises(DataError, match=r"shard-000001\.tar, key 'k0001': .*same 64-bit hash as key 'k0000' in .*0000"):
        write_shards(tmp_path, [_item(0), _item(1)], 1)


def test_an_index_of_an_older_version_is_built_again(folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    build_index(folder, elsewhere)
    for where in (folder, elsewhere):
        manifest = json.loads((where / "manifest.json").read_text())
        (where / "manifest.json").write_text(json.dumps({**manifest, "version": 1}))
        with pytest.raises(DataError, match="has version 1, schema 1; this version reads 3, 1"):
            Index.open(where)
        assert len(ensure_index(where)) == 19
    assert Path(Index.open(elsewhere).locate(0).path).samefile(folder / "shard-000000.tar")
    (folder / "manifest.json").write_text(json.dumps({**manifest, "version": 4}))
    with pytest.raises(DataError, match="has version 4"):
        ensure_index(folder)


@pytest.mark.parametrize("tar_format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT])
def test_headers_read_as_tarfile_reads_them(tar_format: int) -> None:
    """Every byte of a sound header set to several others, with a sum that holds."""
    header = bytearray(tarfile.TarInfo("a/k0001.json").tobuf(tar_format))
    num_read = 0
    for place in range(512):
        for value in (0, 0x20, 0x2F, 0x30, 0x37, 0x38, 0x5A, 0x80, 0xFF):
            block = header[:place] + bytes([value]) + header[place + 1 :]
            counted = sum(block[:148]) + sum(block[156:]) + 8 * 0x20
            for mended in (block, block[:148] + f"{counted:06o}\0 ".encode() + block[156:]):
                num_read += _headers_agree(bytes(mended))
    assert 4_000 < num_read < 9_000
    assert not _headers_agree(bytes(header[:511]))


def _headers_agree(block: bytes) -> bool:
    try:
        info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        with pytest.raises(TarError, match="byte 7: damaged tar header"):
            parse_header(block, 7)
        return False
    assert parse_header(block, 7) == (info.name, info.size, info.type)
    return True
