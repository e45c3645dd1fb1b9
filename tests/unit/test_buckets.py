from __future__ import annotations

import dataclasses
import io
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvptr_ds import builders
from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config, override_config
from mvptr_ds.data.collate import Sample, collate
from mvptr_ds.data.dataset import MixedDataset, SampleDataset, ShardDataset
from mvptr_ds.data.lengths import Lengths, lengths_path, measure
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.buckets import ENCODERS_3, BucketedBatches, balanced_order, cut
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.tar_writer import npy_bytes
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.tasks import TASKS
from tests.support.batch_equality import assert_equal_batches
from tests.support.tools import run_tool
from tests.unit.test_loader import _damage, _item
from tests.unit.test_mixture import BATCH, VOCABS, config_of, content, folders

__all__ = ["folders"]  # the fixture


def needs_of(stage: str) -> SampleNeeds:
    return TASKS[stage].sample_needs(Config())


def lengths_of(num: int, seed: int = 0) -> np.ndarray:
    """Slots as COCO's captions with 10-50 regions give them, int64 [num, 3]."""
    rng = np.random.default_rng(seed)
    text_N = np.interp(rng.random(num), [0, 0.05, 0.25, 0.5, 0.75, 0.95, 1], [9, 13, 15, 17, 20, 24, 40])
    return np.stack([text_N.astype(int), rng.integers(5, 21, num), rng.integers(10, 51, num)], 1)


def bucketed(lengths_N3: np.ndarray, batch_size: int, pool_batches: int, seed: int = 0) -> BucketedBatches:
    return BucketedBatches(batch_size, pool_batches, seed, lambda positions: lengths_N3[positions])


def padded_frac(batches: Batches, num_steps: int, num_ranks: int, lengths_N3: np.ndarray) -> float:
    real = slots = 0
    for step in range(num_steps):
        for rank in range(num_ranks):
            own_B3 = lengths_N3[batches.positions(step, 0, rank, num_ranks, 1)]
            real += int((own_B3 @ ENCODERS_3).sum())
            slots += len(own_B3) * int(own_B3.max(0) @ ENCODERS_3)
    return 1 - real / slots


# --- the pure functions


@settings(max_examples=60, deadline=None, derandomize=True)
@given(batch=st.integers(1, 12), pool=st.integers(1, 20), seed=st.integers(0, 2**40))
def test_a_pool_is_dealt_out_once(batch: int, pool: int, seed: int) -> None:
    lengths_N3 = lengths_of(3 * batch * pool)
    batches = bucketed(lengths_N3, batch, pool, seed)
    for number in (2, 0, 1):  # in any order
        of_pool = np.concatenate([batches.of_step(number * pool + place) for place in range(pool)])
        assert np.array_equal(np.sort(of_pool), np.arange(number * batch * pool, (number + 1) * batch * pool))


def test_padding_is_small_and_ranks_are_equal() -> None:
    """Source: the issue: under 8 % at batch 32, against about 40 %; here also for 8 ranks."""
    for num_ranks, pool in ((1, 256), (8, 256)):
        lengths_N3 = lengths_of(32 * num_ranks * pool)
        batches = bucketed(lengths_N3, 32 * num_ranks, pool)
        assert padded_frac(Batches(32 * num_ranks), pool, num_ranks, lengths_N3) > 0.35
        assert padded_frac(batches, pool, num_ranks, lengths_N3) < 0.08
    for step in range(0, pool, 16):
        slots = [int((lengths_N3[batches.positions(step, 0, r, 8, 1)] @ ENCODERS_3).sum()) for r in range(8)]
        assert max(slots) < 1.01 * np.mean(slots)


def test_any_step_can_be_asked_for_alone() -> None:
    lengths_N3 = lengths_of(8 * 40)
    whole = [bucketed(lengths_N3, 8, 10).of_step(step).tolist() for step in range(40)]
    for step in (39, 11, 0, 25):
        assert bucketed(lengths_N3, 8, 10).of_step(step).tolist() == whole[step]
    assert bucketed(lengths_N3, 8, 10, seed=1).of_step(0).tolist() != whole[0]
    longest = [lengths_N3[batch, 2].max() for batch in whole[:10]]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)  # batches in drawn order


def test_the_order_itself_is_frozen() -> None:
    """A resume with a later version must go on with the batches that the run began with."""
    batches = bucketed(lengths_of(32), 4, 4, seed=7)
    assert [batches.of_step(step).tolist() for step in range(5)] == [
        [3, 9, 8, 5],
        [15, 6, 7, 13],
        [11, 10, 1, 0],
        [2, 12, 4, 14],
        [31, 18, 20, 19],
    ]


def test_parts_are_cut_along_what_saves_most() -> None:
    regions = np.random.default_rng(0).permutation(np.arange(10, 50))
    same = np.full(40, 12)
    parts = cut(np.stack([same, same, regions], 1), 4)
    assert [sorted(regions[part]) for part in parts] == [list(range(s, s + 10)) for s in (10, 20, 30, 40)]
    parts = cut(np.stack([regions, same, same], 1), 5)  # no power of two
    assert [sorted(regions[part]) for part in parts] == [list(range(s, s + 8)) for s in range(10, 50, 8)]


def test_shares_of_a_batch_cost_the_same() -> None:
    order = balanced_order(np.array([70, 10, 30, 20, 0, 60, 50, 40]))
    # by cost: 4 1 3 2 7 6 5 0, dealt to two: 4 . . 2 7 . . 0 and . 1 3 . . 6 5 .
    assert set(order[:4].tolist()) == {4, 2, 7, 0} and set(order[4:].tolist()) == {1, 3, 6, 5}
    rng = np.random.default_rng(0)
    for size in (1, 2, 7, 32, 48, 256):
        costs_B = np.sort(rng.integers(60, 200, size))
        order = balanced_order(costs_B)
        assert np.array_equal(np.sort(order), np.arange(size))
        for num_shares in (2, 4, 8, 3, 6):
            if size % num_shares == 0 and size // num_shares > 3:
                sums = costs_B[order].reshape(num_shares, -1).sum(1)
                assert sums.max() < (1.05 if num_shares % 3 else 1.10) * sums.mean()


def test_sizes_below_1_are_refused() -> None:
    with pytest.raises(ValueError, match="pool_batches is 0"):
        bucketed(lengths_of(8), 8, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        bucketed(lengths_of(8), 0, 8)


# --- lengths of samples


def lengths_built(sample: Sample) -> list[int]:
    return [len(sample.text_ids_T), len(sample.tag_ids_G), len(sample.region_geometry_R6)]


@pytest.mark.parametrize("name", ["pairs", "texts", "images"])
def test_lengths_are_those_of_the_built_samples(folders: dict[str, Path], name: str) -> None:
    caps = ["max_tokens=9", "max_text_slots=12", "max_tag_slots=4", "max_regions=3"]
    config = override_config(config_of(folders), [f"data.{cap}" for cap in caps])
    index = Index.open(folders[name])
    builder = builders.build_samples(config, VOCABS, index, builders.NOTHING_MASKED, tag_noise=False)
    table = measure(index, builder, range(index.num_records), show_progress=False)
    rng = np.random.default_rng(0)
    wanted = []
    for number in range(len(index)):
        place = index.locate(number)
        record, members = index.read(place)
        wanted.append(lengths_built(builder.build(members, place.caption, place.record, number, rng, record)))
    assert table.dtype == np.uint8 and table.tolist() == wanted
    parts = [measure(index, builder, range(a, b), False) for a, b in ((0, 2), (2, 2), (2, index.num_records))]
    assert np.array_equal(np.concatenate(parts), table)


def test_tags_behind_a_text_count(folders: dict[str, Path], tmp_path: Path) -> None:
    config, index = config_of(folders), Index.open(folders["pairs"])
    needs = dataclasses.replace(builders.NOTHING_MASKED, tags_in_text=True)
    plain, builder = (
        builders.build_samples(config, VOCABS, index, wanted, tag_noise=False)
        for wanted in (builders.NOTHING_MASKED, needs)
    )
    table = measure(index, builder, range(index.num_records), show_progress=False)
    rng = np.random.default_rng(0)
    for number in range(len(index)):
        place = index.locate(number)
        record, members = index.read(place)
        built = builder.build(members, place.caption, place.record, number, rng, record)
        assert table[number].tolist() == lengths_built(built)
    assert (table[:, 0] > measure(index, plain, range(index.num_records), show_progress=False)[:, 0]).any()
    assert lengths_path(index, builder, tmp_path) != lengths_path(index, plain, tmp_path)


def test_lengths_are_kept_for_these_samples_vocabularies_and_caps(folders: dict[str, Path], tmp_path: Path) -> None:
    config = override_config(config_of(folders, pairs=1, images=1), ["data.bucket_batches=4"])
    joins = tmp_path / "joins"
    dataset = builders.build_dataset(config, VOCABS, "stage1", needs_of("stage1"), 0, joins)
    assert isinstance(dataset, MixedDataset)
    first = builders.build_batches(config, dataset, 0, joins).of_step(0)
    paths = sorted(joins.glob("lengths-*.npy"))
    assert len(paths) == 2 and sorted(len(np.load(path)) for path in paths) == [5, 42]
    times = [path.stat().st_mtime_ns for path in paths]
    assert np.array_equal(builders.build_batches(config, dataset, 0, joins).of_step(0), first)
    assert [path.stat().st_mtime_ns for path in paths] == times
    source = dataset.sources[0]
    one = lengths_path(source.index, source.builder, joins)
    config = override_config(config, [f"data.max_tokens={config.data.max_tokens - 1}"])
    other = builders.build_samples(config, VOCABS, source.index, builders.NOTHING_MASKED, tag_noise=False)
    assert one in paths and lengths_path(source.index, other, joins) not in paths
    assert lengths_path(dataset.sources[1].index, source.builder, joins) != one


def zip_of(content: bytes) -> bytes:
    out = io.BytesIO()
    np.savez(out, lengths=np.load(io.BytesIO(content)))
    return out.getvalue()


def npy_of(lengths_N3: np.ndarray) -> bytes:
    out = io.BytesIO()
    np.save(out, lengths_N3)
    return out.getvalue()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:60],  # within the header
        lambda content: content[:140],
        lambda content: content[:-1],
        lambda content: content[:140] + bytes(len(content) - 140),  # a tail that was lost to zeros
        lambda content: content + b"x",
        lambda content: b"{}" * 100,
        zip_of,
        lambda content: npy_of(np.zeros((42, 3))),
        lambda content: npy_of(np.zeros((41, 3), np.uint8)),
    ],
)
def test_damaged_lengths_are_measured_again(
    folders: dict[str, Path], tmp_path: Path, damage: Callable[[bytes], bytes], caplog: pytest.LogCaptureFixture
) -> None:
    config = override_config(config_of(folders, pairs=1), ["data.bucket_batches=4"])
    dataset = builders.build_dataset(config, VOCABS, "stage1", needs_of("stage1"), 0, tmp_path)
    first = builders.build_batches(config, dataset, 0, tmp_path).of_step(0)
    (path,) = tmp_path.glob("lengths-*.npy")
    content = path.read_bytes()
    path.write_bytes(damage(content))
    assert np.array_equal(builders.build_batches(config, dataset, 0, tmp_path).of_step(0), first)
    assert path.read_bytes() == content
    (said,) = [message for message in caplog.messages if "is damaged" in message]
    assert said.startswith(str(path)) and said.endswith("measured again")


def test_lengths_of_an_older_version_are_taken(folders: dict[str, Path], tmp_path: Path) -> None:
    """They have no checksum behind them."""
    config = override_config(config_of(folders, pairs=1), ["data.bucket_batches=4"])
    dataset = builders.build_dataset(config, VOCABS, "stage1", needs_of("stage1"), 0, tmp_path)
    builders.build_batches(config, dataset, 0, tmp_path)
    (path,) = tmp_path.glob("lengths-*.npy")
    older = npy_of(np.load(path))
    path.write_bytes(older)
    builders.build_batches(config, dataset, 0, tmp_path)
    assert path.read_bytes() == older


def test_a_record_that_cannot_be_read_counts_as_empty(folders: dict[str, Path]) -> None:
    index = Index.open(folders["pairs"])
    place = index.place(2)
    content_ = bytearray(Path(place.path).read_bytes())
    content_[place.offset : place.offset + 512] = bytes(512)
    Path(place.path).write_bytes(content_)
    config = config_of(folders)
    builder = builders.build_samples(config, VOCABS, index, builders.NOTHING_MASKED, tag_noise=False)
    table = measure(index, builder, range(index.num_records), show_progress=False)
    empty = np.flatnonzero((table == 0).all(1)).tolist()
    assert empty == list(index.samples_of(2)) and len(empty) == 3


# --- buckets of a run


def run_of(folders: dict[str, Path], tmp_path: Path, **weights: float) -> tuple[SampleDataset, Batches]:
    train = [] if weights else [f"data.train={folders['pairs']}"]
    config = override_config(config_of(folders, **weights), ["data.bucket_batches=5", *train])
    dataset = builders.build_dataset(config, VOCABS, "stage1", needs_of("stage1"), 3, tmp_path / "joins")
    return dataset, builders.build_batches(config, dataset, 3, tmp_path / "joins")


@pytest.mark.parametrize("weights", [{}, {"pairs": 2.0, "texts": 1.0, "images": 1.0}], ids=["one source", "mixture"])
def test_positions_keep_their_samples_on_any_number_of_ranks(
    folders: dict[str, Path], tmp_path: Path, weights: dict[str, float]
) -> None:
    dataset, batches = run_of(folders, tmp_path, **weights)
    as_they_come = dataset.__getitems__(list(range(10 * BATCH)))
    seen = []
    for batch in make_loader(dataset, batches, 0, 10):
        seen += batch.position_B.tolist()
        for row, position in enumerate(batch.position_B.tolist()):
            assert (
                batch.text_ids_BT[row][batch.text_mask_BT[row]].tolist() == as_they_come[position].text_ids_T.tolist()
            )
    assert seen != sorted(seen) == list(range(10 * BATCH))
    for num_ranks, accumulation_steps in ((2, 1), (2, 2), (4, 1)):
        fresh, fresh_batches = run_of(folders, tmp_path, **weights)
        loaders = [make_loader(fresh, fresh_batches, 3, 10, r, num_ranks, accumulation_steps) for r in range(num_ranks)]
        shares = [iter(loader) for loader in loaders]  # steps 3 and 4 lie inside of a pool
        resumed = [next(share) for _ in range(7 * accumulation_steps) for share in shares]
        assert [p for batch in resumed for p in batch.position_B.tolist()] == seen[3 * BATCH :]
    whole = next(iter(make_loader(dataset, batches, 4, 5)))
    assert_equal_batches(whole, collate(fresh.__getitems__(seen[4 * BATCH : 5 * BATCH])))


def test_each_source_of_a_mixture_has_its_own_lengths(folders: dict[str, Path], tmp_path: Path) -> None:
    dataset, batches = run_of(folders, tmp_path, pairs=1.0, texts=1.0, images=1.0)
    assert isinstance(batches, BucketedBatches)
    samples = dataset.__getitems__(list(range(60)))
    assert {sample.source for sample in samples} == {0, 1, 2}
    wanted = [lengths_built(sample) for sample in samples]
    assert batches.lengths_at(np.arange(60))[:, [0, 2]].tolist() == [[text, regions] for text, _, regions in wanted]


def test_samples_of_like_lengths_come_together(folders: dict[str, Path], tmp_path: Path) -> None:
    dataset, batches = run_of(folders, tmp_path)
    assert isinstance(batches, BucketedBatches) and isinstance(batches.lengths_at, Lengths)
    table = batches.lengths_at(np.arange(40))
    assert isinstance(dataset, ShardDataset)
    assert [lengths_built(dataset[position])[2] for position in range(40)] == table[:, 2].tolist()
    lengths_N3 = table.astype(int)
    assert padded_frac(batches, 5, 1, lengths_N3) < 0.7 * padded_frac(Batches(BATCH), 5, 1, lengths_N3)


def test_a_bad_sample_is_replaced_as_without_buckets(folders: dict[str, Path], tmp_path: Path) -> None:
    _damage(folders["pairs"], 5)
    dataset, batches = run_of(folders, tmp_path)
    plain = dataset.__getitems__(list(range(40)))
    got = {
        p: s for step in range(5) for s in dataset.__getitems__(batches.of_step(step).tolist()) for p in [s.position]
    }
    assert sum(sample.num_bad > 0 for sample in plain) == 3
    assert all(content(got[position]) == content(plain[position]) for position in range(40))


def test_off_by_default() -> None:
    assert Config().data.bucket_batches == 0


def test_the_bench_says_what_buckets_save() -> None:
    done = run_tool("bench/bench_buckets.py", "--batch", 16, "--pool", 64, "--ranks", 2)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    one, two = report["1 ranks"], report["2 ranks"]
    assert one["padded_fixed"] > one["padded_as_they_come"] > 0.3
    assert max(one["padded_buckets"], two["padded_buckets"]) < 0.12
    assert two["slowest_rank_buckets"] < 1.01 < two["slowest_rank_as_they_come"] < two["slowest_rank_buckets_per_rank"]


def test_features_are_not_read_to_measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, record, _ = _item(2, np.random.default_rng(0))
    write_shards(tmp_path, [(key, record, {"npy": npy_bytes(np.zeros((3, 20_000), dtype=np.float16))})], 1)
    index = Index.open(tmp_path)
    read: list[int] = []
    pread = os.pread

    def counted(descriptor: int, num_bytes: int, offset: int) -> bytes:
        read.append(num_bytes)
        return pread(descriptor, num_bytes, offset)

    monkeypatch.setattr(os, "pread", counted)
    described, extensions = index.describe(index.place(0))
    assert 0 < sum(read) <= 48 << 10
    read.clear()
    whole, members = index.read(index.place(0))
    assert sum(read) == index.place(0).num_bytes > 120_000
    assert described == whole and set(extensions) == set(members) == {"json", "npy"}
