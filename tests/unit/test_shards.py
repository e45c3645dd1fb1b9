from __future__ import annotations

import io
import json
import pickle
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mvptr_ds.data.schema import Caption, DataError, Record, Region
from mvptr_ds.data.shards import Index, build_index, ensure_index, read_record, record_key, write_shards

ROOT = Path(__file__).resolve().parents[2]


def _item(number: int, num_captions: int = 1) -> tuple[str, Record, dict[str, bytes]]:
    captions = tuple(Caption(f"caption {number} {c}") for c in range(num_captions))
    record = Record(f"id{number}", 64, 48, captions, (Region((0, 0, 8, 8), "dog"), Region((1, 1, 9, 9), f"t{number}")))
    return f"k{number:04d}", record, {"npy": bytes([number]) * (100 + 700 * (number % 3))}


def _json(number: int) -> bytes:
    return json.dumps(_item(number)[1].to_json()).encode()


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
    with pytest.raises(DataError, match="neither an image"):
        write_shards(tmp_path / "b", [("k", _item(0)[1], {})], 1)
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
    with pytest.raises(DataError, match=r"shard-000001\.tar has .*index_shards"):
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
    with pytest.raises(DataError, match="index_shards"):
        Index.open(folder)
    assert len(ensure_index(folder)) == 19  # built again


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
    """Each of these loses samples silently in webdataset's reader (FACTS)."""
    tar = folder / "shard-000000.tar"
    tar.write_bytes(damage(tar.read_bytes()))
    with pytest.raises(DataError, match=r"shard-000000\.tar, key 'k\d+': byte \d+: .*; write that shard again"):
        build_index(folder)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("a.json", _json(0)), ("b.json", _json(1)), ("b.npy", b"1"), ("a.npy", b"0")], "neither an image"),
        ([("a.json", _json(0)), ("a.npy", b""), ("b.json", _json(1)), ("b.npy", b""), ("a.jpg", b"")], "seen before"),
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


def test_tool(folder: Path, tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        tool = [sys.executable, str(ROOT / "tools" / "index_shards.py")]
        return subprocess.run([*tool, *arguments], capture_output=True, text=True, timeout=60)

    done = run(str(folder))
    assert done.returncode == 0 and "3 shards, 10 records, 19 samples" in done.stdout
    bad = run(str(tmp_path / "none"))
    assert bad.returncode == 1 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr


def test_index_dtype_is_the_documented_one(folder: Path) -> None:
    rows = np.load(folder / "index.npy", allow_pickle=False)
    assert rows.dtype.names == ("offset", "num_bytes", "first_sample")
    assert rows["first_sample"].tolist() == [0, 1, 3, 6, 7, 9, 12, 13, 15, 18]
