from __future__ import annotations

import dataclasses
import pickle
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mvptr_ds import builders, shard_folders
from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config, TrainConfig, load_config, override_config, save_config
from mvptr_ds.config_data import DataConfig, SourceConfig, VisualConfig
from mvptr_ds.data.collate import Sample, collate
from mvptr_ds.data.dataset import MixedDataset, ShardDataset, differences
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.mixture import MAX_BLOCK_SAMPLES, Mixture, default_block, shares_of, source_seed
from mvptr_ds.data.schema import Extractor, Record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.monitoring.meters import Meters
from mvptr_ds.tasks import TASKS
from tests.support.batch_equality import assert_equal_batches
from tests.unit.test_loader import _damage, _item

WORDS = WordPiece()
VOCABS = Vocabs(WORDS, PhraseVocab.build({(noun, "big"): 1 for noun in ("dog", "cat", "tree")}, WORDS, 1))
BATCH = 8


def needs_of(stage: str) -> SampleNeeds:
    return TASKS[stage].sample_needs(Config())


def counts(mixture: Mixture, start: int, end: int) -> list[int]:
    return np.bincount(mixture.places_at(np.arange(start, end))[0], minlength=len(mixture.shares)).tolist()


# --- the pure function


def test_whole_shares_are_exact_in_every_block() -> None:
    mixture = Mixture([3, 1], 8, seed=0)
    assert [counts(mixture, 8 * block, 8 * block + 8) for block in range(50)] == [[6, 2]] * 50
    orders = {tuple(mixture.places_at(np.arange(8 * block, 8 * block + 8))[0].tolist()) for block in range(50)}
    assert len(orders) > 10  # of 28 that are possible


@settings(max_examples=100, deadline=None, derandomize=True)
@given(
    weights=st.lists(st.floats(0.001, 1000, allow_nan=False), min_size=1, max_size=5),
    more=st.integers(0, 40),
    num_blocks=st.integers(1, 60),
    seed=st.integers(0, 2**40),
)
def test_shares_are_kept_to_a_sample_and_places_come_once(
    weights: list[float], more: int, num_blocks: int, seed: int
) -> None:
    block = min(default_block(weights, 1), 2_000) + more
    if block * min(shares_of(weights)) < 1:
        with pytest.raises(ValueError, match=r"less than one|need blocks of"):
            Mixture(weights, block, seed)
        return
    mixture = Mixture(weights, block, seed)
    end = min(num_blocks * block, 20_000) // block * block
    sources, places = mixture.places_at(np.arange(end))
    for source, share in enumerate(mixture.shares):
        own = places[sources == source]
        assert np.array_equal(np.sort(own), np.arange(len(own)))
        assert abs(len(own) - end * share) < 1
        of_block = np.bincount((np.arange(end) // block)[sources == source], minlength=end // block)
        assert (abs(of_block - float(block * share)) < 2).all()
        assert mixture.taken_before(end)[source] == len(own)


def test_what_is_left_of_a_block_goes_to_the_largest_remainder() -> None:
    mixture = Mixture([1, 2], 4, seed=0)  # after four samples each should have had 1.33 and 2.67
    assert [mixture.taken_before(4 * block) for block in (1, 2, 3)] == [[1, 3], [3, 5], [4, 8]]


def test_each_source_draws_from_numbers_of_its_own() -> None:
    assert len({source_seed(seed, name) for seed in (0, 1) for name in ("pairs", "texts")}) == 4


def test_any_part_can_be_asked_for_alone() -> None:
    """What a resume and another number of ranks need."""
    mixture = Mixture([0.1, 0.3, 0.25], 37, seed=5)
    sources, places = mixture.places_at(np.arange(5_000))
    some = np.random.default_rng(0).integers(0, 5_000, 400)
    again = pickle.loads(pickle.dumps(mixture)).places_at(some)
    assert np.array_equal(again[0], sources[some]) and np.array_equal(again[1], places[some])
    for position in (0, 1, 36, 37, 38, 1_234):
        assert mixture.taken_before(position) == np.bincount(sources[:position], minlength=3).tolist()
    far = Mixture([0.1, 0.3, 0.25], 37, seed=5).taken_before(37 * 10**9)
    assert sum(far) == 37 * 10**9 and abs(far[0] - 37 * 10**9 * Fraction(2, 13)) < 1


def test_the_order_itself_is_frozen() -> None:
    """A resume with a later version must go on in the order that the run began with."""
    sources, places = Mixture([2, 1], 6, seed=7).places_at(np.arange(12))
    assert sources.tolist() == [1, 0, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0]
    assert places.tolist() == [0, 0, 1, 1, 2, 3, 4, 2, 3, 5, 6, 7]
    assert source_seed(0, "coco") == 11617637852375307382


def test_weights_and_blocks_that_cannot_be_kept_are_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks of 9 samples .* share is 0\.1; they need 10 at least"):
        Mixture([9, 1], 9, 0)
    for weights in ([], [1, 0], [1, -2], [1, float("nan")], [float("inf")]):
        with pytest.raises(ValueError, match="expected positive numbers"):
            Mixture(weights, 100, 0)
    with pytest.raises(ValueError, match=r"weights 30000000, 1 need blocks of 30000001 samples.* than 1048576 are"):
        Mixture([3e7, 1], default_block([3e7, 1], 64), 0)
    with pytest.raises(ValueError, match=r"weights 1e\+300, 1e-300 need blocks of 1\.0000000e\+600 samples"):
        Mixture([1e300, 1e-300], default_block([1e300, 1e-300], 64), 0)
    with pytest.raises(ValueError, match=r"blocks of 1048577 samples are too long; choose at most 1048576"):
        Mixture([9, 1], MAX_BLOCK_SAMPLES + 1, 0)
    assert default_block([MAX_BLOCK_SAMPLES - 1, 1], 64) == MAX_BLOCK_SAMPLES  # the most that is drawn
    assert Mixture([MAX_BLOCK_SAMPLES - 1, 1], MAX_BLOCK_SAMPLES, 0).taken_before(MAX_BLOCK_SAMPLES)[1] == 1
    assert default_block([9, 1], 4) == 10 and default_block([9, 1], 64) == 64


# --- samples


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """`pairs`: 21 records, 42 samples; `texts`: 7 records of 1 to 3 captions, 13 samples; `images`: 5 records."""
    rng = np.random.default_rng(0)
    items = {"pairs": [_item(n, rng) for n in range(21)], "texts": [], "images": []}
    for number in range(7):
        key, record, _ = _item(number, rng)
        items["texts"].append((key, Record(record.image_id, 0, 0, record.captions), {}))
    for number in range(5):
        key, record, members = _item(number, rng)
        items["images"].append((key, dataclasses.replace(record, captions=()), members))
    for name, of_source in items.items():
        write_shards(tmp_path / name, of_source, 16)
    return {name: tmp_path / name for name in items}


def config_of(folders: dict[str, Path], **weights: float | None) -> Config:
    sources = {name: SourceConfig(str(folders[name]), weight) for name, weight in weights.items()}
    data = DataConfig(train=None, held_out=None, phrase_vocab=None, block_samples=4, window_blocks=3, sources=sources)
    return Config(data=data, visual=VisualConfig(feature_dim=4), train=TrainConfig(batch_size=BATCH))


def dataset_of(config: Config, stage: str = "stage1") -> MixedDataset:
    joins = Path(next(iter(config.data.sources.values())).shards).parent / "joins"
    dataset = builders.build_dataset(config, VOCABS, stage, needs_of(stage), 3, joins)
    assert isinstance(dataset, MixedDataset)
    return dataset


def content(sample: Sample) -> tuple[object, ...]:
    """What is in a sample, whatever its place in the run and among the sources."""
    fields = dataclasses.asdict(sample) | {"position": 0, "source": 0, "image_index": 0, "labels": ()}
    return tuple(v.tobytes() if isinstance(v, np.ndarray) else v for v in fields.values())


def test_a_source_gives_the_same_whatever_stands_beside_it(folders: dict[str, Path]) -> None:
    two, three = (
        dataset_of(config_of(folders, pairs=3, texts=1)),
        dataset_of(config_of(folders, images=5, texts=2, pairs=3)),
    )
    of_source = []
    for dataset in (two, three):
        samples = dataset.__getitems__(list(range(160)))
        of_source.append([content(s) for s in samples if dataset.names[s.source] == "pairs"])
    num = min(map(len, of_source))
    assert num > 42 and of_source[0][:num] == of_source[1][:num]  # more than an epoch
    assert len(set(of_source[0])) > 60  # masked in another way each time
    other_seed = builders.build_dataset(
        config_of(folders, pairs=3, texts=1), VOCABS, "stage1", needs_of("stage1"), 4, folders["pairs"]
    )
    assert content(other_seed[0]) != content(two[0])


def test_epochs_advance_by_the_weights(folders: dict[str, Path]) -> None:
    dataset = dataset_of(config_of(folders, pairs=1, images=1))
    samples = dataset.__getitems__(list(range(84)))
    images = [s.image_index for s in samples]
    assert sorted(images[n] for n in range(84) if samples[n].source == 0) == sorted(
        record for record in range(21) for _ in range(1 + record % 3)
    )  # one epoch of the pairs
    own = [image for image, s in zip(images, samples, strict=True) if s.source == 1]
    assert len(own) == 42 and set(own) == set(range(21, 26))  # images of another source are others
    assert max(np.bincount(own)[21:]) - min(np.bincount(own)[21:]) <= 1
    assert dataset.epochs_before(84) == {"pairs": 1.0, "images": 42 / 5}
    assert [s.position for s in samples] == list(range(84))


def test_weights_default_to_the_numbers_of_samples(folders: dict[str, Path]) -> None:
    dataset = dataset_of(config_of(folders, pairs=None, texts=None, images=None))
    assert dataset.mixture.shares == [Fraction(n, 60) for n in (42, 13, 5)]
    assert dataset.mixture.block_samples == 12  # the batch of 8 does not hold one of the images
    assert dataset.num_samples == 60
    assert dataset.epochs_before(60) == {"pairs": 1.0, "texts": 1.0, "images": 1.0}


@pytest.mark.parametrize("num_ranks", [2, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_ranks_workers_and_resumes_give_the_same_batches(
    folders: dict[str, Path], num_ranks: int, accumulation_steps: int
) -> None:
    config = config_of(folders, pairs=2, texts=1, images=1)
    dataset, batches = dataset_of(config), Batches(BATCH)
    whole = [dataset.__getitems__(batches.of_step(step).tolist()) for step in range(12)]
    for rank in range(num_ranks):
        num_workers = 1 if rank == 0 and accumulation_steps == 1 else 0
        loader = make_loader(
            dataset_of(config), batches, 5, 12, rank, num_ranks, accumulation_steps, num_workers=num_workers
        )
        micro_batches = iter(loader)
        for step in range(5, 12):
            for accumulation in range(accumulation_steps):
                share = BATCH // num_ranks // accumulation_steps
                start = (accumulation * num_ranks + rank) * share
                own = whole[step][start : start + share]
                assert_equal_batches(next(micro_batches), collate(own))


def test_substitutes_come_from_the_same_source(folders: dict[str, Path]) -> None:
    _damage(folders["images"], 2)
    dataset = dataset_of(config_of(folders, pairs=1, images=1))
    samples = dataset.__getitems__(list(range(80)))
    bad = [s for s in samples if s.num_bad]
    assert len(bad) == 8 and all(s.source == 1 and 21 <= s.image_index < 26 for s in bad)
    assert not any(s.image_index == 23 for s in samples)


def test_what_is_counted_by_source(folders: dict[str, Path]) -> None:
    _damage(folders["images"], 2)
    dataset = dataset_of(config_of(folders, pairs=2, texts=1, images=1))
    meters = Meters(torch.device("cpu"), dataset.names)
    for batch in make_loader(dataset, Batches(BATCH), 0, 10):
        meters.add_batch(batch, 0.0)
    report = meters.report()
    assert [report[f"source/{name}/samples"] for name in dataset.names] == [40, 20, 20]
    assert [report[f"source/{name}/share"] for name in dataset.names] == [0.5, 0.25, 0.25]
    assert report["source/images/bad_samples"] == report["data/bad_samples"] >= 4
    assert report["source/pairs/oov_phrases_frac"] > 0 == report["source/images/oov_phrases_frac"]


# --- configuration


def test_sources_are_sections_that_the_user_names(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(
        "extends: base\n"
        "data:\n  train: null\n"
        "  sources:\n    coco: {shards: shards/coco, weight: 3, sidecars: [boxes]}\n    news: {shards: n, weight: 1}\n",
        encoding="utf-8",
    )
    config = load_config(tmp_path / "a.yaml", ["data.sources.news.weight=1e-1", "data.sources.web.shards=w"])
    assert {name: (s.shards, s.weight, s.sidecars) for name, s in config.data.sources.items()} == {
        "coco": ("shards/coco", 3.0, ["boxes"]),
        "news": ("n", 0.1, []),
        "web": ("w", None, []),
    }
    save_config(config, tmp_path / "b.yaml")
    assert load_config(tmp_path / "b.yaml") == config
    assert list(override_config(config, ["data.sources.news=null"]).data.sources) == ["coco", "web"]
    assert override_config(config, ["data.sources=null"]).data.sources == {}
    for override, message in (
        (
            "data.sources.coco.wieght=2",
            r"unknown .* key 'data\.sources\.coco\.wieght'; did you mean .*weight",
        ),
        ("data.sources.coco.weight=much", r"data\.sources\.coco\.weight is 'much', expected float"),
        ("data.sources=[coco]", r"data\.sources is \['coco'\], expected sections by name"),
        ("data.sources.coco=3", r"data\.sources\.coco is 3, expected a section"),
    ):
        with pytest.raises(ValueError, match=message):
            load_config("base", [override])


def test_the_one_source_shorthand_keeps_its_order_and_draws(folders: dict[str, Path]) -> None:
    config = override_config(config_of(folders), [f"data.train={folders['pairs']}"])
    dataset = builders.build_dataset(config, VOCABS, "stage1", needs_of("stage1"), 3, folders["pairs"])
    assert isinstance(dataset, ShardDataset) and dataset.plan.seed == 3 and dataset.names == ()
    assert dataset.fingerprint == Index.open(folders["pairs"]).fingerprint


def test_what_sources_cannot_be_is_said(folders: dict[str, Path]) -> None:
    def refused(config: Config, message: str, stage: str = "stage1") -> None:
        with pytest.raises(DataError, match=message):
            builders.build_dataset(config, VOCABS, stage, needs_of(stage), 0, folders["pairs"] / "joins")

    refused(config_of(folders), "neither data.train nor data.sources is set")
    config = config_of(folders, pairs=1)
    with_sidecars = override_config(config, ["data.sidecars=[boxes]"])
    refused(with_sidecars, r"data\.sidecars=\['boxes'\] and data\.sources \(pairs\) are given both")
    sources = config.data.sources | {"a.b": config.data.sources["pairs"]}
    data = dataclasses.replace(config.data, sources=sources)
    refused(dataclasses.replace(config, data=data), r"a source 'a\.b': name it with letters")
    # text-only and image-only samples: stage 1 alone
    for stage in ("stage2", "joint"):
        refused(
            config_of(folders, pairs=1, images=1),
            rf"source images \(.*images\) holds 0 text-only and 5 image-only samples among 5; {stage} aligns both",
            stage,
        )
        dataset_of(config_of(folders, pairs=1), stage)


def test_another_mixture_is_told_from_this_one(folders: dict[str, Path]) -> None:
    one = dataset_of(config_of(folders, pairs=3, texts=1)).fingerprint
    assert dataset_of(config_of(folders, pairs=3, texts=1)).fingerprint == one
    assert dataset_of(config_of(folders, pairs=6, texts=2)).fingerprint == one  # the same shares
    other = dataset_of(config_of(folders, pairs=1, images=1)).fingerprint
    texts = [part.partition(":")[0] for part in differences(one, other)]
    assert texts == ["pairs", "texts", "images"]
    assert "share 3/4" in differences(one, other)[0] and "share 1/2" in differences(one, other)[0]
    assert "none here" in differences(one, other)[1] and "none there" in differences(one, other)[2]
    assert differences("0123", one)[0].startswith("data.train: 0123 there, none here")


def test_sources_and_held_out_need_one_extractor(folders: dict[str, Path], tmp_path: Path) -> None:
    config = config_of(folders, pairs=1, texts=1)
    items = []
    for number in range(3):
        key, record, members = _item(number, np.random.default_rng(number))
        items.append((key, dataclasses.replace(record, extractor=Extractor("detr", "3")), members))
    write_shards(tmp_path / "other", items, 4)
    shard_folders.prepare_shards(config.data, 0, 1)  # texts have no regions that could differ
    other = [f"data.sources.other.shards={tmp_path / 'other'}", "data.sources.other.weight=1"]
    config = override_config(config, other)
    with pytest.raises(DataError, match=r"data\.sources\.pairs are of an unnamed .* data\.sources\.other of detr 3"):
        shard_folders.prepare_shards(config.data, 0, 1)
