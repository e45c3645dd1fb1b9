from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import webdataset

from mvptr_ds.data.shards.tar_writer import json_bytes, npy_bytes, write_tar
from mvptr_ds.errors import DataError

ITEMS = [
    ("a", {"json": json_bytes({"text": "Füße"}), "jpg": b"picture"}),
    ("b c-é", {"npy": npy_bytes(np.arange(6, dtype=np.float16).reshape(2, 3)), "json": b"{}"}),
]


def test_webdataset_reads_what_was_written_member_by_member(tmp_path: Path) -> None:
    path = tmp_path / "shard-000000.tar"
    assert write_tar(path, iter(ITEMS)) == 2
    read = list(webdataset.WebDataset(str(path), shardshuffle=False))
    for (key, members), sample in zip(ITEMS, read, strict=True):
        assert sample["__key__"] == key
        assert {name: content for name, content in sample.items() if not name.startswith("__")} == members
    assert [p.name for p in tmp_path.iterdir()] == ["shard-000000.tar"]
    assert np.array_equal(np.load(io.BytesIO(read[1]["npy"])), np.arange(6).reshape(2, 3))


def test_equal_items_give_equal_bytes_with_nothing_of_this_machine(tmp_path: Path) -> None:
    write_tar(tmp_path / "a.tar", ITEMS)
    write_tar(tmp_path / "b.tar", ((key, dict(reversed(members.items()))) for key, members in ITEMS))
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert {(m.uname, m.gname, m.uid, m.gid, m.mtime) for m in tar} == {("", "", 0, 0, 0)}


@pytest.mark.parametrize(
    ("items", "message"),
    [
        ([("a.b", {"json": b"{}"})], "key 'a.b'"),
        ([("a/b", {"json": b"{}"})], "key"),
        ([("", {"json": b"{}"})], "key"),
        ([("é" * 46, {"json": b"{}"})], "1 to 90 bytes"),
        ([("a\n", {"json": b"{}"})], "printable"),
        ([("\udc80", {"json": b"{}"})], "printable"),
        ([ITEMS[0], ITEMS[0]], "used twice"),
        ([("a", {"json": b"{}", "pkl": b"x"})], "'pkl'"),
        ([("a", {"jpg": b"x"})], "no json member"),
        ([("a", {"json": b"{}", "npy": b""})], "'npy'. are empty"),
    ],
)
def test_what_no_shard_may_hold_is_refused_and_leaves_nothing(
    tmp_path: Path, items: list[tuple[str, dict[str, bytes]]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_tar(tmp_path / "s.tar", items)
    assert not list(tmp_path.iterdir())


def test_the_name_is_there_only_when_the_tar_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"

    def items() -> Iterator[tuple[str, dict[str, bytes]]]:
        yield ITEMS[0]
        assert [p.name for p in tmp_path.iterdir()] == ["s.tar.partial"]
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_tar(path, items())
    assert not list(tmp_path.iterdir())


def test_arrays_of_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="allow_pickle"):
        npy_bytes(np.array([[print]], dtype=object))
    assert json.loads(json_bytes({"a": "é"})) == {"a": "é"} and json_bytes({"a": "é"}) == '{"a":"é"}'.encode()
