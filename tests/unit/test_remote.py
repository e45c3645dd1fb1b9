"""Shards behind a URL, read from a real server: the same batches as from the folder, and what a bad server does."""

from __future__ import annotations

import json
import logging
import pickle
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest

from mvptr_ds.data import read_ahead
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.dataset import MixedDataset, ShardDataset
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.loader import eval_batches, make_loader
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.read_ahead import ReadAhead, runs_of
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.mixture import Mixture
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import Extractor, Region
from mvptr_ds.data.shards import remote
from mvptr_ds.data.shards.index import ByteRange, Index, SampleIndex
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.remote import RemoteFiles
from mvptr_ds.data.shards.sidecar_join import JoinedIndex, ensure_join
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_writer import write_tar
from mvptr_ds.data.shards.urls import ReadOptions
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from tests.support.batch_equality import assert_equal_batches
from tests.support.hostile import FEATURE_DIM, key, sound_folder
from tests.support.http_server import Behave, Served

WORDS = WordPiece()
NUM_RECORDS, PER_SHARD, BATCH, STEPS = 24, 6, 8, 9  # two captions each: 48 samples, an epoch and a half


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sound_folder(tmp_path_factory.mktemp("remote") / "shards", NUM_RECORDS, PER_SHARD)


@pytest.fixture(autouse=True)
def no_long_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_FIRST_WAIT_S", 0.01)


@pytest.fixture
def options(tmp_path: Path) -> ReadOptions:
    return ReadOptions(ahead_mib=1, retries=2, timeout_s=20.0, cache_dir=str(tmp_path / "cache"))


@pytest.fixture
def in_memory(folder: Path) -> Iterator[str]:
    store = fsspec.filesystem("memory")
    for path in folder.iterdir():
        store.pipe_file(f"/shards/{path.name}", path.read_bytes())
    yield "memory://shards"
    store.rm("/shards", recursive=True)


def dataset_of(index: SampleIndex) -> ShardDataset:
    builder = SampleBuilder(WORDS, PhraseVocab.empty(WORDS), SampleOptions(feature_dim=FEATURE_DIM, word_prob=0.3))
    return ShardDataset(index, Plan(len(index), seed=3, block_samples=8, window_blocks=2), builder)


def batches_of(index: SampleIndex, **arguments: Any) -> list[Batch]:
    dataset = dataset_of(index)
    return list(make_loader(dataset, Batches(BATCH), 1, STEPS, **arguments))


def assert_same(first: list[Batch], second: list[Batch]) -> None:
    for one, other in zip(first, second, strict=True):
        assert_equal_batches(one, other)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_over_http_are_those_of_the_folder(folder: Path, options: ReadOptions, num_workers: int) -> None:
    with Served(folder) as served:
        index = Index.open(served.url, options)
        assert index.fingerprint == Index.open(folder).fingerprint
        found = batches_of(index, num_workers=num_workers)
        assert_same(found, batches_of(Index.open(folder)))
        num_requests = sum(served.requests.values())
    # four of them are for manifest and index, and for the check of the first and the last tar; 64 samples were read
    assert num_requests - 4 <= 12 * max(1, num_workers), served.requests


def test_batches_from_memory_are_those_of_the_folder(folder: Path, options: ReadOptions, in_memory: str) -> None:
    assert_same(batches_of(Index.open(in_memory, options)), batches_of(Index.open(folder)))
    index = Index.open(in_memory + "/", options)
    assert index.folder == in_memory
    copy = pickle.loads(pickle.dumps(index))
    assert_same(batches_of(copy), batches_of(Index.open(folder)))


@pytest.mark.parametrize("ahead_mib", [1, 64])
def test_evaluation_reads_ahead(folder: Path, options: ReadOptions, in_memory: str, ahead_mib: int) -> None:
    builder = SampleBuilder(WORDS, PhraseVocab.empty(WORDS), SampleOptions(feature_dim=FEATURE_DIM))
    index = Index.open(in_memory, ReadOptions(ahead_mib, cache_dir=options.cache_dir))
    assert_same(list(eval_batches(index, builder, 10)), list(eval_batches(Index.open(folder), builder, 10)))
    numbers = [40, 3, 3, 17, 2]
    (one,), (other,) = (list(eval_batches(i, builder, 10, numbers)) for i in (index, Index.open(folder)))
    assert_equal_batches(one, other)


def test_a_sidecar_elsewhere_than_its_shards(folder: Path, options: ReadOptions, tmp_path: Path) -> None:
    beside = tmp_path / "sidecar"
    beside.mkdir()
    entries = (
        (
            key(n),
            {"json": sidecar_json(Extractor("d", "1"), width=8, height=8, regions=[Region((0, 0, 4, 4), f"t{n}")])},
        )
        for n in range(0, NUM_RECORDS, 2)
    )
    write_tar(beside / "s.tar", entries)
    ensure_index(beside)
    tags = []
    with Served(beside) as served, Served(folder) as records:
        for pair in ((folder, beside), (folder, served.url), (records.url, beside), (records.url, served.url)):
            main, sidecar = (Index.open(place, options) for place in pair)
            ensure_join(main, [sidecar], "drop", True, tmp_path / "joins")
            index = JoinedIndex(main, [sidecar], "drop", tmp_path / "joins")
            assert len(index) == NUM_RECORDS
            tags.append([index.read(index.locate(n))[0].regions[0].tag for n in range(len(index))])
            extents = index.remote_extents(2)
            assert len(extents) == sum(isinstance(place, str) for place in pair)
            assert bool(index.read_ahead_bytes) == bool(extents)
    assert tags[0] == [f"t{n // 2 * 2}" for n in range(NUM_RECORDS)] and tags[1:] == tags[:1] * 3


def test_a_mixture_of_places(folder: Path, options: ReadOptions, in_memory: str) -> None:
    found = []
    for places in ((folder, folder), (folder, in_memory), (in_memory, in_memory)):
        sources = {name: dataset_of(Index.open(place, options)) for name, place in zip("ab", places, strict=True)}
        dataset = MixedDataset(sources, Mixture([3, 1], BATCH, seed=0))
        assert bool(dataset.read_ahead_bytes) == (in_memory in places)
        assert len(dataset.remote_extents(list(range(BATCH)))) == (0, 2, 8)[places.count(in_memory)]
        found.append(list(make_loader(dataset, Batches(BATCH), 0, STEPS)))
    assert_same(found[0], found[1])
    assert_same(found[0], found[2])


def test_the_index_is_fetched_once_and_again_when_it_changes(
    folder: Path, options: ReadOptions, tmp_path: Path
) -> None:
    shards = shutil.copytree(folder, tmp_path / "shards")
    with Served(shards) as served:
        for _ in range(3):
            Index.open(served.url, options)
        assert served.requests["index.npy"] == 1
        (shards / "shard-000003.tar").unlink()
        (shards / "manifest.json").unlink()
        fewer = ensure_index(shards)
        assert Index.open(served.url, options).num_records == fewer.num_records == NUM_RECORDS - PER_SHARD
        assert served.requests["index.npy"] == 2
    assert sorted(path.name for path in options.index_folder.glob("*/*.npy")) == ["index.npy"] * 2
    assert not list(options.index_folder.glob("*/*.partial"))


# ---- servers that fail


def open_and_read(served: Served, options: ReadOptions, caplog: pytest.LogCaptureFixture) -> tuple[list[Batch], str]:
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        batches = batches_of(Index.open(served.url, options))
    return batches, caplog.text


def after_opening(behaviour: str, times: int) -> Behave:
    """The tars' first request is of `Index.open`; the next ones meet this."""
    return lambda name, number: behaviour if name.endswith(".tar") and 1 <= number <= times else "fine"


@pytest.mark.parametrize("behaviour", ["503", "429", "cut", "stall"])
def test_what_fails_twice_is_read_at_the_third_try(
    folder: Path, options: ReadOptions, caplog: pytest.LogCaptureFixture, behaviour: str
) -> None:
    short = ReadOptions(1, retries=2, timeout_s=0.5 if behaviour == "stall" else 20.0, cache_dir=options.cache_dir)
    with Served(folder, after_opening(behaviour, 2)) as served:
        batches, logged = open_and_read(served, short, caplog)
    assert logged == ""
    assert_same(batches, batches_of(Index.open(folder)))


@pytest.mark.parametrize(
    ("behaviour", "reason", "num_tries"),
    [
        ("503", "3 tries failed; the last: OSError: HTTP 503 Service Unavailable", 3),
        ("cut", "3 tries failed; the last: ClientPayloadError", 3),
        ("stall", "3 tries failed; the last: FSTimeoutError", 3),
        ("404", "HTTP 404 Not Found", 1),
        ("403", "HTTP 403 Forbidden", 1),
        ("whole", "the server gives whole files only", 1),
    ],
)
def test_what_cannot_be_read_is_replaced_and_counted(
    folder: Path, options: ReadOptions, caplog: pytest.LogCaptureFixture, behaviour: str, reason: str, num_tries: int
) -> None:
    short = ReadOptions(1, retries=2, timeout_s=0.3 if behaviour == "stall" else 20.0, cache_dir=options.cache_dir)

    def behave(name: str, number: int) -> str:
        return behaviour if name == "shard-000001.tar" else "fine"  # neither the first nor the last: not checked

    with Served(folder, behave) as served:
        first, logged = open_and_read(served, short, caplog)
        assert served.requests["shard-000001.tar"] % num_tries == 0
        second, _ = open_and_read(served, short, caplog)
    assert_same(first, second)
    assert sum(int(batch.num_bad_B.sum()) for batch in first) == logged.count("replaced by another") > 10
    assert re.search(r"shard-000001\.tar, key '\?', byte \d+, caption \d", logged) and reason in logged
    lost = range(PER_SHARD, 2 * PER_SHARD)
    assert not any(number in lost for batch in first for number in batch.image_index_B.tolist())


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("whole", "the server gives whole files only; take one that answers range requests, or copy the folder"),
        ("404", r"HTTP 404 Not Found.*manifest\.json and index\.npy must lie beside the shards"),
        ("500", "3 tries failed; the last: OSError: HTTP 500"),
    ],
)
def test_a_server_that_cannot_serve_shards_is_refused_when_they_are_opened(
    folder: Path, options: ReadOptions, behaviour: str, message: str
) -> None:
    with Served(folder, lambda name, number: behaviour) as served, pytest.raises(DataError, match=message):
        Index.open(served.url, options)
    assert not list(options.index_folder.glob("*/index.npy*"))


def test_nothing_listens_there(options: ReadOptions, folder: Path) -> None:
    with Served(folder) as served:
        url = served.url
    with pytest.raises(DataError, match="3 tries failed; the last: ClientConnectorError"):
        Index.open(url, options)


def test_files_that_are_not_of_the_manifest(folder: Path, options: ReadOptions, tmp_path: Path) -> None:
    shards = shutil.copytree(folder, tmp_path / "shards")
    manifest = (shards / "manifest.json").read_text()
    with Served(shards) as served:
        rows = (shards / "index.npy").read_bytes()
        (shards / "index.npy").write_bytes(rows[:-1] + b"\x01")
        with pytest.raises(DataError, match="is not the one the manifest names; copy both again"):
            Index.open(served.url, options)
        (shards / "index.npy").write_bytes(rows)
        for change in ({"index_bytes": None}, {"sha256": 7}, {"version": 2}, {"folder": "../.."}, {"index_bytes": 9}):
            (shards / "manifest.json").write_text(json.dumps({**json.loads(manifest), **change}))
            with pytest.raises(DataError):
                Index.open(served.url, options)
        for name in ("../other.tar", "http://127.0.0.1/x.tar", "/etc/passwd"):
            content = json.loads(manifest)
            content["shards"][1]["name"] = name
            (shards / "manifest.json").write_text(json.dumps(content))
            for place in (served.url, shards):
                with pytest.raises(DataError, match="names a shard"):
                    Index.open(place, options)
        (shards / "manifest.json").write_text(manifest)
        last = shards / "shard-000003.tar"
        last.write_bytes(last.read_bytes() + bytes(512))
        with pytest.raises(DataError, match=r"shard-000003\.tar .*bytes, the index was built for"):
            Index.open(served.url, options)


@pytest.mark.parametrize(
    "url",
    ["pipe:cat x.tar", "pipe://cat x.tar", "simplecache::http://a/b", "zip://a::http://b/c", "git://a/b", "ref://a"],
)
def test_what_runs_programs_or_unpacks_is_no_folder_of_shards(url: str, options: ReadOptions) -> None:
    for opening in (Index.open, ensure_index):
        with pytest.raises(DataError, match="cannot be read as a folder of shards; give a folder of this machine, or"):
            opening(url, options)


def test_a_filesystem_whose_package_is_missing(options: ReadOptions) -> None:
    with pytest.raises(DataError, match=r"reading it needs another package \(.*ocifs.*\): pip install it"):
        Index.open("oci://bucket/shards", options)


# ---- reading ahead


def _extent(files: RemoteFiles, path: str, first: int, num_kib: int) -> ByteRange:
    return ByteRange(files, path, first << 10, num_kib << 10)


def test_neighbours_become_runs_in_the_order_in_which_they_are_needed() -> None:
    files, others = RemoteFiles(ReadOptions(), {}), RemoteFiles(ReadOptions(), {})
    extents = [
        _extent(files, "d", 70, 10), _extent(files, "a", 10, 10), _extent(files, "c", 0, 5),
        _extent(files, "a", 20, 4), _extent(files, "d", 90, 10), _extent(files, "a", 200, 10),
        _extent(files, "a", 10, 10), _extent(others, "a", 30, 5),
    ]  # fmt: skip
    runs = [(run.files is files, run.path, run.start >> 10, run.end >> 10) for run in runs_of(extents)]
    assert runs == [
        (True, "d", 70, 100), (True, "a", 10, 24), (True, "c", 0, 5), (True, "a", 200, 210), (False, "a", 30, 35),
    ]  # fmt: skip
    long = [_extent(files, "a", 1024 * n, 1024) for n in range(20)]
    assert [(run.end - run.start) >> 20 for run in runs_of(long)] == [8, 8, 4]


class _Counting(RemoteFiles):
    """Files of zeros; says what is held after every request."""

    def __init__(self) -> None:
        super().__init__(ReadOptions(), {})
        self.fetched = 0

    def fetch(self, path: str, start: int, end: int) -> bytes:
        self.fetched += end - start
        return bytes(end - start)


def test_what_is_held_stays_within_its_bound() -> None:
    files = _Counting()
    rng = np.random.default_rng(0)
    places = (rng.integers(0, 4000, (40, 16)) * 8192).tolist()
    wanted = [[ByteRange(files, "a", at, 6000) for at in batch] for batch in places]
    max_bytes = 8 << 20
    ahead = ReadAhead(lambda n: wanted[n] if n < len(wanted) else None, max_bytes)
    held = []
    for number, batch in enumerate(wanted):
        ahead.reach(number)
        for extent in batch:
            assert files.read("a", extent.offset, 6000) == bytes(6000)
        runs = {id(future): len(future.result()) for _, future in files.held.values()}
        held.append(sum(runs.values()))
    assert 0 < max(held) <= max_bytes
    assert files.fetched <= 40 * 16 * 2 * 6000
    ahead.close()
    assert not files.held


def test_records_too_large_to_be_held_are_read_when_they_are_needed() -> None:
    files = _Counting()
    large, small = ByteRange(files, "a", 0, read_ahead.MAX_RUN_BYTES + 1), ByteRange(files, "a", 1 << 30, 100)
    ahead = ReadAhead(lambda n: [large, small] if n < 3 else None, 4 << 20)
    ahead.reach(0)
    assert set(files.held) == {("a", 1 << 30)}
    ahead.close()
