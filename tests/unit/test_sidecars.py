"""Sidecars: merged record by record, joined by key whatever the shards, read by ranks and workers, trained on."""

from __future__ import annotations

import io
import json
import logging
import pickle
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

from mvptr_ds import shard_folders
from mvptr_ds.config import Config, TaskConfig
from mvptr_ds.config_data import DataConfig
from mvptr_ds.data.collate import Sample
from mvptr_ds.data.dataset import ShardDataset, load_samples, read_sample_record
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import Caption, Extractor, Phrase, Record, Region, SidecarEntry, parse_entry
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.sidecar_join import JoinedIndex, ensure_join, join_path
from mvptr_ds.data.shards.sidecars import merge_sidecar, sidecar_json
from mvptr_ds.data.shards.storage import open_files
from mvptr_ds.data.shards.tar_writer import npy_bytes, write_tar
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from tests.support.batch_equality import assert_equal_batches
from tests.unit.test_loader import _rows

WORDS = WordPiece()
VOCAB = PhraseVocab.build({("dog",): 1, ("dog", "brown"): 1}, WORDS, 1)
DETR, RULES = Extractor("detr", "3"), Extractor("rules", "1.0")
NUM, FEATURE_DIM = 20, 4


def key(number: int) -> str:
    return f"k{number:03d}"


def text(number: int, caption: int = 0) -> str:
    return f"a brown dog number {number} of {caption}"


def regions(number: int, tag: str = "dog") -> tuple[Region, ...]:
    return tuple(Region((0, 0, 8 + r, 8), tag, 0.5) for r in range(1 + number % 3))


def features(number: int) -> np.ndarray:
    return np.full((1 + number % 3, FEATURE_DIM), number, dtype=np.float16)


def phrases(number: int, caption: int = 0) -> Caption:
    return Caption(text(number, caption), (Phrase(("dog", "brown"), ((2, 7), (8, 11)), (0,)),))


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """20 records without regions: 10 with one caption, 10 with two; 3 shards."""
    items = [
        (key(n), Record(f"id{n}", 64, 48, tuple(Caption(text(n, c)) for c in range(1 + n % 2))), {"jpg": b"picture"})
        for n in range(NUM)
    ]
    write_shards(tmp_path / "images", items, 8)
    return tmp_path / "images"


Items = list[tuple[str, dict[str, bytes]]]


def boxes_of(numbers: range | list[int], extractor: Extractor = DETR, tag: str = "dog") -> Items:
    return [
        (
            key(n),
            {
                "json": sidecar_json(extractor, width=32, height=24, regions=regions(n, tag)),
                "npy": npy_bytes(features(n)),
            },
        )
        for n in numbers
    ]


def phrases_of(numbers: range | list[int]) -> Items:
    return [
        (key(n), {"json": sidecar_json(RULES, captions=[phrases(n, c) for c in range(1 + n % 2)])}) for n in numbers
    ]


def write(folder: Path, items: Items, records_per_shard: int = 5) -> Path:
    folder.mkdir()
    for start in range(0, len(items), records_per_shard):
        write_tar(folder / f"shard-{start:06d}.tar", items[start : start + records_per_shard])
    build_index(folder)
    return folder


@pytest.fixture
def boxes(tmp_path: Path) -> Path:
    """Regions and features of every record, in another order and other shards than the images."""
    return write(tmp_path / "boxes", boxes_of([*range(NUM - 1, -1, -1)]))


def config(images: Path, *sidecars: Path, **changes: Any) -> DataConfig:
    return DataConfig(train=str(images), held_out=None, sidecars=[str(s) for s in sidecars], **changes)


def opened(tmp_path: Path, data: DataConfig, stage: str = "stage2") -> JoinedIndex:
    index = shard_folders.open_sources(data, stage, stage != "stage1", tmp_path / "joins")[""]
    assert isinstance(index, JoinedIndex)
    return index


# --- one record


RECORD = Record(
    "1", 64, 48, (Caption("a dog", (Phrase(("dog",), ((2, 5),), (1,)),)),), regions(1), Extractor("old", "1")
)


def test_an_entry_says_what_it_was_given_and_nothing_else() -> None:
    content = sidecar_json(DETR, width=3, height=2, regions=regions(1))
    assert json.loads(content) == {
        "schema": 1,
        "extractor": {"name": "detr", "version": "3"},
        "width": 3,
        "height": 2,
        "regions": [
            {"box": [0, 0, 8, 8], "tag": "dog", "score": 0.5},
            {"box": [0, 0, 9, 8], "tag": "dog", "score": 0.5},
        ],
    }
    assert parse_entry(content) == SidecarEntry(DETR, 3, 2, None, regions(1))
    captions = (phrases(4),)
    assert parse_entry(sidecar_json(RULES, captions=captions)) == SidecarEntry(RULES, captions=captions)
    assert parse_entry(sidecar_json(RULES, regions=())) == SidecarEntry(RULES, regions=())
    with pytest.raises(DataError, match="width is 3 and height None"):
        sidecar_json(DETR, width=3)
    with pytest.raises(DataError, match="must not be empty"):
        sidecar_json(Extractor("detr", " "))


def test_regions_take_the_place_of_the_records_with_what_hangs_on_them() -> None:
    members = {"json": b"", "jpg": b"x", "npy": b"old"}
    merged, kept = merge_sidecar(RECORD, members, SidecarEntry(DETR, 32, 24, None, regions(0, "cat")), None)
    assert (merged.width, merged.height, merged.regions, merged.extractor) == (32, 24, regions(0, "cat"), DETR)
    assert merged.captions == (Caption("a dog", (Phrase(("dog",), ((2, 5),)),)),)  # named region 1 of the old ones
    assert kept == {"json": b"", "jpg": b"x"} and "npy" in members
    _, kept = merge_sidecar(RECORD, members, SidecarEntry(DETR, regions=regions(0)), b"new")
    assert kept["npy"] == b"new"
    merged, kept = merge_sidecar(RECORD, members, SidecarEntry(DETR), b"new")  # features of the record's own regions
    assert merged.regions == RECORD.regions and kept["npy"] == b"new" and merged.captions == RECORD.captions


def test_phrases_take_the_place_of_the_records() -> None:
    captions = (Caption("a dog", (Phrase(("a", "dog"), ((0, 1), (2, 5)), (0,)),)),)
    merged, _ = merge_sidecar(RECORD, {}, SidecarEntry(RULES, captions=captions), None)
    assert merged.captions == captions and merged.regions == RECORD.regions and merged.extractor == RECORD.extractor
    for wrong, message in (
        ((), "0 captions, the record 1"),
        ((Caption("a cat"),), "caption 0 is 'a dog' in the record and 'a cat' in the sidecar"),
        ((Caption("a dog", (Phrase(("dog",), ((2, 5),), (2,)),)),), r"names regions \(2,\) of 2"),
    ):
        with pytest.raises(DataError, match=message):
            merge_sidecar(RECORD, {}, SidecarEntry(RULES, captions=wrong), None)
    text_only = Record("1", 0, 0, (Caption("a"),))
    with pytest.raises(DataError, match="0 x 0, both must be at least 1"):
        merge_sidecar(text_only, {}, SidecarEntry(DETR, regions=regions(0)), None)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"extractor": {"name": "", "version": "1"}, "regions": []}, "must not be empty"),
        ({"extractor": {"name": "a"}, "regions": []}, "field is missing.*version"),
        ({"extractor": "a 1", "regions": []}, "wrong type"),
        ({"regions": []}, "field is missing.*image_id"),
        ({"extractor": {"name": "a", "version": "1"}, "width": 3, "regions": []}, "field is missing.*height"),
        ({"extractor": {"name": "a", "version": "1"}, "width": 3, "height": 0}, "3 x 0, both"),
        ({"extractor": {"name": "a", "version": "1"}, "regions": None}, "wrong type"),
        ({"extractor": {"name": "a", "version": "\ud800"}, "regions": []}, "no valid Unicode"),
    ],
)
def test_entries_that_are_none(content: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_entry({"schema": 1, **content})


# --- folders


def test_the_index_of_a_sidecar_says_what_it_holds(tmp_path: Path, boxes: Path) -> None:
    index = Index.open(boxes)
    assert (index.kind, index.num_records, index.extractors) == ("sidecar", 20, {"detr 3": 20})
    assert index.holds == {"npy": 20, "regions": 20} and index.tags == {"dog": 39}
    assert Index.open(write(tmp_path / "p", phrases_of(range(3)))).holds == {"captions": 3}
    urls = sorted(str(path) for path in boxes.glob("*.tar"))
    read = {s["__key__"]: s for s in webdataset.WebDataset(urls, shardshuffle=False)}
    assert {k: sorted(n for n in s if n[0] != "_") for k, s in read.items()} == {
        key(n): ["json", "npy"] for n in range(NUM)
    }


def test_two_sidecars_of_other_shards_are_joined_by_key(tmp_path: Path, images: Path, boxes: Path) -> None:
    beside = write(tmp_path / "phrases", phrases_of([*range(7, NUM), *range(7)]), 3)
    index = opened(tmp_path, config(images, boxes, beside))
    main = Index.open(images)
    assert (index.num_records, len(index)) == (NUM, 30) and index.tags == {"dog": 39}
    for sample in range(30):
        place = index.locate(sample)
        assert place == main.locate(sample) and sample in index.samples_of(place.record)
        record, members = index.read(place)
        number, caption = place.record, place.caption
        assert record.captions == tuple(phrases(number, c) for c in range(1 + number % 2))
        assert (record.width, record.height, record.regions) == (32, 24, regions(number))
        assert members["jpg"] == b"picture" and members["npy"] == npy_bytes(features(number))
        assert read_sample_record(index, sample) == (record, caption)
    assert not (index.num_text_only_samples or index.num_image_only_samples)


def test_later_sidecars_win(tmp_path: Path, images: Path, boxes: Path) -> None:
    other = write(tmp_path / "other", boxes_of(range(NUM), Extractor("vinvl", "1"), "cat"))
    index = opened(tmp_path, config(images, boxes, other))
    assert {region.tag for region in index.read(index.place(4))[0].regions} == {"cat"} and "cat" in index.tags
    swapped = opened(tmp_path, config(images, other, boxes))
    assert {region.tag for region in swapped.read(swapped.place(4))[0].regions} == {"dog"}
    assert swapped.fingerprint != index.fingerprint


def test_records_without_partner_are_dropped_or_kept(
    tmp_path: Path, images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    beside = write(tmp_path / "some", boxes_of([3, 4, 5, 11, 99]))
    with caplog.at_level(logging.INFO, logger="mvptr_ds"):
        index = opened(tmp_path, config(images, beside))
    assert f"sidecar {beside} (detr 3): 4 of 20 records have a partner, the others are left out" in caplog.text
    with caplog.at_level(logging.INFO, logger="mvptr_ds"):
        opened(tmp_path, config(images, write(tmp_path / "all", boxes_of(range(20)))))
    assert f"sidecar {tmp_path / 'all'} (detr 3): 20 of 20 records have a partner\n" in caplog.text
    assert (index.num_records, len(index)) == (4, 7)
    found = [(index.read(index.locate(n))[0].image_id, *index.locate(n)[3:]) for n in range(7)]
    assert found == [
        ("id3", 0, 0), ("id3", 0, 1), ("id4", 1, 0), ("id5", 2, 0), ("id5", 2, 1), ("id11", 3, 0), ("id11", 3, 1)
    ]  # fmt: skip
    with caplog.at_level(logging.INFO, logger="mvptr_ds"):
        kept = opened(tmp_path, config(images, beside, missing_partners="keep"))
    assert "4 of 20 records have a partner, the others are used as they are" in caplog.text
    assert (kept.num_records, len(kept)) == (NUM, 30)
    assert [len(kept.read(kept.place(n))[0].regions) for n in (2, 3, 4, 5)] == [0, 1, 2, 3]


def test_no_partner_at_all_shows_a_key_of_either_side(tmp_path: Path, images: Path) -> None:
    beside = write(tmp_path / "none", [("391895", boxes_of([0])[0][1])])
    for missing in ("drop", "keep"):
        with pytest.raises(DataError, match=r"no record of .*images has a partner .*'391895', a key here 'k000'"):
            opened(tmp_path, config(images, beside, missing_partners=missing))
    first, second = write(tmp_path / "a", boxes_of(range(5))), write(tmp_path / "b", phrases_of(range(5, 9)))
    with pytest.raises(DataError, match=r"no record of .* has a partner in each of .*a, .*b; "):
        opened(tmp_path, config(images, first, second))


def test_mixed_extractors_are_refused_unless_allowed(tmp_path: Path, images: Path) -> None:
    mixed = write(tmp_path / "mixed", boxes_of(range(12)) + boxes_of(range(12, NUM), Extractor("detr", "4")))
    with pytest.raises(DataError, match=r"mixed mixes extractors \(detr 3: 12 of 20, detr 4: 8 of 20\)"):
        opened(tmp_path, config(images, mixed))
    assert len(opened(tmp_path, config(images, mixed, allow_mixed_extractors=True))) == 30
    own = [
        (
            key(n),
            Record(str(n), 9, 9, (Caption("a"),), regions(0), Extractor("e", str(n))),
            {"npy": npy_bytes(features(0))},
        )
        for n in range(2)
    ]
    write_shards(tmp_path / "own", own, 9)
    with pytest.raises(DataError, match=r"own mixes extractors \(e 0: 1 of 2, e 1: 1 of 2\)"):
        shard_folders.open_sources(config(tmp_path / "own"), "stage1", False, tmp_path)
    mixed = config(tmp_path / "own", allow_mixed_extractors=True)
    assert len(shard_folders.open_sources(mixed, "stage1", False, tmp_path)[""]) == 2


def test_kept_records_with_regions_of_their_own_are_a_mixture(tmp_path: Path) -> None:
    own = [
        (key(n), Record(str(n), 9, 9, (Caption(text(n)),), regions(0), Extractor("vinvl", "1")), {"npy": b"1"})
        for n in (0, 2)
    ]
    write_shards(tmp_path / "own", own, 9)
    some = write(tmp_path / "some", boxes_of([0]))
    assert len(opened(tmp_path, config(tmp_path / "own", some))) == 1
    for _ in range(2):  # also when the join is there already
        with pytest.raises(
            DataError, match=r"records of .*own without a partner \(1 in .*some\) would keep .* of detr 3, vinvl 1;"
        ):
            opened(tmp_path, config(tmp_path / "own", some, missing_partners="keep"))
    beside = write(tmp_path / "phrases", phrases_of([0]))  # says nothing of regions
    assert len(opened(tmp_path, config(tmp_path / "own", beside, missing_partners="keep"))) == 2


def test_kept_records_with_the_regions_of_an_earlier_sidecar_are_a_mixture(tmp_path: Path, images: Path) -> None:
    first = write(tmp_path / "first", boxes_of(range(12)))
    second = write(tmp_path / "second", boxes_of(range(12, NUM), Extractor("detr", "4")))
    with pytest.raises(DataError, match=r"of detr 3, detr 4; set data\.missing_partners=drop"):
        opened(tmp_path, config(images, first, second, missing_partners="keep"))
    everywhere = write(tmp_path / "everywhere", boxes_of(range(NUM), Extractor("detr", "5")))
    assert len(opened(tmp_path, config(images, first, everywhere, missing_partners="keep"))) == 30


def test_regions_that_name_no_extractor_are_of_one_of_their_own(tmp_path: Path) -> None:
    captions = (Caption("a"),)
    own = [
        (key(n), Record(str(n), 9, 9, captions, regions(0), DETR if n else None), {"npy": npy_bytes(features(0))})
        for n in range(2)
    ]
    write_shards(tmp_path / "own", own, 9)
    with pytest.raises(DataError, match=r"mixes extractors \(an unnamed extractor: 1 of 2, detr 3: 1 of 2\)"):
        shard_folders.open_sources(config(tmp_path / "own"), "stage1", False, tmp_path)


def test_train_and_held_out_shards_need_one_extractor(tmp_path: Path, images: Path, boxes: Path) -> None:
    other = write(tmp_path / "other", boxes_of(range(NUM), Extractor("detr", "4")))
    data = config(images, boxes)
    data = replace(data, held_out=str(images), held_out_sidecars=[str(other)])
    with pytest.raises(DataError, match=r"data\.train are of detr 3, those of data\.held_out of detr 4"):
        shard_folders.prepare_shards(data, 0, 1)
    shard_folders.prepare_shards(replace(data, allow_mixed_extractors=True), 0, 1)
    shard_folders.prepare_shards(replace(data, held_out_sidecars=None), 0, 1)


def test_folders_of_the_wrong_kind_are_named(tmp_path: Path, images: Path, boxes: Path) -> None:
    with pytest.raises(DataError, match=r"boxes is a sidecar; name it among the sidecars"):
        shard_folders.open_sources(config(boxes), "stage1", False, tmp_path)
    texts = [(key(n), Record(str(n), 0, 0, (Caption(text(n)),)), {}) for n in range(NUM)]
    write_shards(tmp_path / "texts", texts, 9)
    with pytest.raises(DataError, match=r"texts holds captions alone: as a sidecar it gives neither pictures, regions"):
        opened(tmp_path, config(images, tmp_path / "texts"))


def test_stages_that_align_refuse_what_is_no_pair(tmp_path: Path) -> None:
    items = [
        (key(0), Record("0", 9, 9, (Caption(text(0)),)), {"jpg": b"x"}),
        (key(1), Record("1", 9, 9, (Caption(text(1)), Caption(text(1, 1)))), {}),
        (key(2), Record("2", 9, 9, ()), {"jpg": b"x"}),
    ]
    write_shards(tmp_path / "all", items, 9)
    data = config(tmp_path / "all")
    assert len(shard_folders.open_sources(data, "stage1", False, tmp_path)[""]) == 4
    for stage in ("stage2", "joint"):
        with pytest.raises(DataError, match=rf"2 text-only and 1 image-only samples among 4; {stage} aligns both"):
            shard_folders.open_sources(data, stage, stage != "stage1", tmp_path)
    data = replace(data, held_out=data.train)
    with pytest.raises(DataError, match=r"2 text-only and 1 image-only samples among 4; evaluation needs"):
        shard_folders.open_held_out(data, tmp_path)
    beside = write(tmp_path / "beside", boxes_of([0, 1]))  # gives the texts their regions, and drops the image
    index = opened(tmp_path, config(tmp_path / "all", beside), "stage2")
    assert (len(index), index.num_text_only_samples, index.num_image_only_samples) == (3, 0, 0)
    with pytest.raises(DataError, match="0 text-only and 1 image-only samples among 4"):
        opened(tmp_path, config(tmp_path / "all", beside, missing_partners="keep"), "stage2")


def seen_records(tmp_path: Path, members: Callable[[int], dict[str, bytes]]) -> Path:
    """Six records with regions of their own."""
    items = [(key(n), Record(str(n), 9, 9, (Caption(text(n)),), regions(n)), members(n)) for n in range(6)]
    write_shards(tmp_path / "seen", items, 4)
    return tmp_path / "seen"


def emptied(tmp_path: Path, name: str, numbers: list[int]) -> Path:
    """Entries of no regions for some records, and of other regions for the rest."""
    nothing = {"json": sidecar_json(DETR, width=9, height=9, regions=())}
    items = [*((key(n), nothing) for n in numbers), *boxes_of([n for n in range(6) if n not in numbers])]
    return write(tmp_path / name, items)


def test_records_whose_regions_a_sidecar_takes_away_are_left_out_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shards = seen_records(tmp_path, lambda n: {"npy": npy_bytes(features(n))})
    beside, phrased = emptied(tmp_path, "beside", [1, 4]), write(tmp_path / "p", phrases_of([0, 2, 4]))
    with caplog.at_level("WARNING"):
        index = opened(tmp_path, config(shards, beside, allow_mixed_extractors=True))
    assert "2 records have nothing to see, for the sidecars say that they have no regions: they are left" in caplog.text
    assert [index.read(index.locate(n))[0].image_id for n in range(len(index))] == ["0", "2", "3", "5"]
    for joined, num in (([beside, phrased], 2), ([beside, write(tmp_path / "all", boxes_of([*range(6)]))], 6)):
        data = config(shards, *joined, allow_mixed_extractors=True)
        assert (len(opened(tmp_path, data)), opened(tmp_path, data).num_text_only_samples) == (num, 0)
    data = config(shards, beside, allow_mixed_extractors=True, missing_partners="keep")
    assert opened(tmp_path, data, "stage1").num_text_only_samples == 2
    with pytest.raises(DataError, match="2 text-only and 0 image-only samples among 6"):
        opened(tmp_path, data)
    with pytest.raises(DataError, match=r"the sidecars give no record of .* a region, and there is no picture"):
        opened(tmp_path, config(shards, emptied(tmp_path, "none", [*range(6)]), allow_mixed_extractors=True))


@pytest.mark.parametrize("empty", ["no features", "features of no rows"])
def test_what_the_join_cannot_know_is_replaced_when_it_is_read(tmp_path: Path, empty: str) -> None:
    """One record has a picture, so an entry of no regions need not leave the others blind."""
    shards = seen_records(
        tmp_path, lambda n: {"npy": npy_bytes(features(n)), **({"jpg": b"picture"} if n == 5 else {})}
    )
    nothing = {"json": sidecar_json(DETR, width=9, height=9, regions=())}
    if empty != "no features":
        nothing["npy"] = npy_bytes(features(0)[:0])
    beside = write(tmp_path / "beside", [(key(1), nothing), *boxes_of([0, 2, 3, 4, 5])])
    index = opened(tmp_path, config(shards, beside, allow_mixed_extractors=True))
    assert len(index) == 6
    dataset = dataset_of(index, needs_regions=True)
    samples = [dataset[position] for position in range(6)]
    assert sum(sample.num_bad > 0 for sample in samples) == 1 and all(len(s.region_geometry_R6) for s in samples)


def test_pictures_without_boxes_get_their_grid(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (9, 9)).save(stream, "PNG")
    shards = seen_records(tmp_path, lambda n: {"png": stream.getvalue()})
    index = opened(tmp_path, config(shards, emptied(tmp_path, "beside", [1, 4]), allow_mixed_extractors=True))
    builder = SampleBuilder(WORDS, VOCAB, SampleOptions(visual_source="image", image_size=8, needs_regions=True))
    found = load_samples(index, builder, [(n, n, np.random.default_rng(0)) for n in range(6)])
    assert [len(s.region_geometry_R6) for s in found if isinstance(s, Sample)] == [1, 16, 3, 1, 16, 3]


def test_held_out_shards_may_have_sidecars_of_their_own(tmp_path: Path, images: Path, boxes: Path) -> None:
    write_shards(tmp_path / "held", [("h", Record("h", 9, 9, (Caption(text(0)),)), {})], 1)
    data = replace(config(images, boxes), held_out=str(tmp_path / "held"))
    with pytest.raises(DataError, match=r"each split has sidecars of its own"):
        shard_folders.open_held_out(data, tmp_path / "joins")
    own = write(tmp_path / "own", [("h", boxes_of([0])[0][1])])
    data = replace(data, held_out_sidecars=[str(own)])
    for name in ("manifest.json", "index.npy"):
        (tmp_path / "own" / name).unlink()  # made on first use
    assert len(shard_folders.open_held_out(data, tmp_path / "joins")) == 1
    shard_folders.prepare_shards(data, 0, 1)


# --- the join


def files(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in folder.iterdir()}


def test_a_join_is_used_again_until_a_folder_changes(tmp_path: Path, images: Path, boxes: Path) -> None:
    index = opened(tmp_path, config(images, boxes))
    before = files(tmp_path / "joins")
    assert len(before) == 2 and opened(tmp_path, config(images, boxes)).fingerprint == index.fingerprint
    assert files(tmp_path / "joins") == before
    (boxes / "shard-000015.tar").unlink()
    build_index(boxes)
    changed = opened(tmp_path, config(images, boxes))
    assert changed.num_records == 15 and changed.fingerprint != index.fingerprint
    assert len(files(tmp_path / "joins")) == 4


def test_a_cut_join_is_made_again_and_a_missing_one_named(tmp_path: Path, images: Path, boxes: Path) -> None:
    index = opened(tmp_path, config(images, boxes))
    parts = index.main, index.sidecars, "drop"
    rows = join_path(*parts, tmp_path / "joins").with_suffix(".npy")
    content = rows.read_bytes()
    rows.write_bytes(content[:-8])
    with pytest.raises(DataError, match="missing or cut"):
        JoinedIndex(*parts, tmp_path / "joins")
    ensure_join(*parts, False, tmp_path / "joins")
    assert rows.read_bytes() == content
    with pytest.raises(DataError, match="missing or cut"):
        JoinedIndex(*parts, tmp_path / "elsewhere")


@pytest.mark.parametrize("part", ["rows", "counts"])
def test_a_damaged_join_is_made_again(
    tmp_path: Path, images: Path, boxes: Path, part: str, caplog: pytest.LogCaptureFixture
) -> None:
    index = opened(tmp_path, config(images, boxes))
    before, wanted = files(tmp_path / "joins"), [index.locate(n) for n in range(30)]
    path = next((tmp_path / "joins").glob("*.npy" if part == "rows" else "*.json"))
    content = path.read_bytes()
    if part == "rows":  # the tail was lost to zeros
        path.write_bytes(content[:200] + bytes(len(content) - 200))
    else:
        path.write_bytes(content.replace(b'"num_samples": 30', b'"num_samples": 20'))
    assert path.read_bytes() != content
    again = opened(tmp_path, config(images, boxes))
    assert [again.locate(n) for n in range(30)] == wanted and again.fingerprint == index.fingerprint
    assert {name: made[1] for name, made in files(tmp_path / "joins").items()} == {n: b[1] for n, b in before.items()}
    (said,) = [message for message in caplog.messages if "is damaged" in message]
    assert str(path.with_suffix(".json")) in said


def test_a_join_of_an_older_version_is_made_again_without_a_word(
    tmp_path: Path, images: Path, boxes: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """It has no checksum; what is trained on stays the same."""
    index = opened(tmp_path, config(images, boxes))
    path = next((tmp_path / "joins").glob("*.json"))
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({name: content[name] for name in content if name != "sha256"}), encoding="utf-8")
    assert opened(tmp_path, config(images, boxes)).fingerprint == index.fingerprint
    assert json.loads(path.read_text(encoding="utf-8")) == content and "damaged" not in caplog.text


def test_a_joined_index_pickles_without_its_arrays(tmp_path: Path, images: Path, boxes: Path) -> None:
    index = opened(tmp_path, config(images, boxes))
    content = pickle.dumps(index)
    copy = pickle.loads(content)
    assert [copy.read(copy.locate(n)) for n in range(30)] == [index.read(index.locate(n)) for n in range(30)]
    assert b"first_sample" not in content
    for outside in (-1, 30):
        with pytest.raises(IndexError):
            copy.locate(outside)


def test_a_partner_must_bear_the_records_key(tmp_path: Path, images: Path) -> None:
    """A shard that was replaced by one of the same size, behind the index's back; or two keys of one hash."""
    beside = write(tmp_path / "beside", boxes_of([0, 3]))
    index = opened(tmp_path, config(images, beside))
    write_as(beside, boxes_of([3, 0]))
    with pytest.raises(DataError, match=r"sidecar .*shard-000000\.tar: key 'k003' stands where 'k000' was"):
        index.read(index.place(0))
    write_as(beside, [(key(n), {**members, "json": b"{}".ljust(len(members["json"]))}) for n, (_, members) in zip(
        (0, 3), boxes_of([0, 3]), strict=True
    )])  # fmt: skip
    with pytest.raises(DataError, match="schema is None"):
        index.read(index.place(0))


def write_as(folder: Path, items: Items) -> None:
    write_tar(folder / "shard-000000.tar", items)
    open_files.close()  # as in another process


def test_captions_of_another_record_are_a_bad_sample(tmp_path: Path, images: Path) -> None:
    items = phrases_of(range(NUM))
    items[5] = (key(5), phrases_of([7])[0][1])
    dataset = dataset_of(opened(tmp_path, config(images, write(tmp_path / "p", items))), visual_source="features")
    place = dataset.index.place(5)
    with pytest.raises(DataError, match="number 5 of 0' in the record and 'a brown dog number 7 of 0' in the sidecar"):
        dataset.index.read(place)


# --- training


def dataset_of(index: Any, **changes: Any) -> ShardDataset:
    options: dict[str, Any] = {
        "feature_dim": FEATURE_DIM, "word_prob": 0.3, "phrase_prob": 0.5, "tag_prob": 0.5, "predict_phrases": True
    }  # fmt: skip
    builder = SampleBuilder(WORDS, VOCAB, SampleOptions(**{**options, **changes}))
    return ShardDataset(index, Plan(len(index), 0, block_samples=4, window_blocks=2), builder)


def test_ranks_and_workers_give_the_same_batches_of_joined_data(tmp_path: Path, images: Path, boxes: Path) -> None:
    beside = write(tmp_path / "phrases", phrases_of(range(NUM)))
    whole, _, *ranks = (dataset_of(opened(tmp_path, config(images, boxes, beside))) for _ in range(4))
    batches = list(make_loader(whole, Batches(8), 0, 5))
    assert all((batch.num_bad_B == 0).all() and (batch.num_phrases_B == 1).all() for batch in batches)
    for alone, helped in zip(batches, make_loader(whole, Batches(8), 0, 5, num_workers=2), strict=True):
        assert_equal_batches(alone, helped)
    shares = [list(make_loader(d, Batches(8), 0, 5, rank, 2, num_workers=1)) for rank, d in enumerate(ranks)]
    for step, batch in enumerate(batches):
        assert [row for share in shares for row in _rows(share[step])] == _rows(batch)
    for batch in batches:
        for row, image in enumerate(batch.image_index_B.tolist()):
            assert batch.region_features_BRF is not None
            num = int(batch.region_mask_BR[row].sum())
            assert num == 1 + image % 3 and (batch.region_features_BRF[row, :num] == image).all()


def of_one_modality() -> Iterator[tuple[str, Record, dict[str, bytes]]]:
    for n in range(NUM):
        if n % 3 == 0:
            yield key(n), Record(str(n), 0, 0, (Caption(text(n)),)), {}  # text-only
        elif n % 3 == 1:
            yield key(n), Record(str(n), 64, 48, (), regions(n)), {"npy": npy_bytes(features(n))}  # image-only
        else:
            yield key(n), Record(str(n), 64, 48, (Caption(text(n)),)), {}  # waits for its sidecar


def joined_pairs(tmp_path: Path, images: Path, boxes: Path) -> DataConfig:
    return config(images, boxes, write(tmp_path / "phrases", phrases_of(range(NUM))))


def mixed_modalities(tmp_path: Path, images: Path, boxes: Path) -> DataConfig:
    write_shards(tmp_path / "mixed", of_one_modality(), 7)
    beside = write(tmp_path / "some", boxes_of(range(2, NUM, 3)))
    return config(tmp_path / "mixed", beside, missing_partners="keep", allow_mixed_extractors=True)


@pytest.mark.parametrize("kind", [joined_pairs, mixed_modalities])
def test_stage_1_learns_from_joined_data(
    tmp_path: Path, images: Path, boxes: Path, kind: Callable[[Path, Path, Path], DataConfig]
) -> None:
    index = opened(tmp_path, kind(tmp_path, images, boxes), "stage1")
    if kind is mixed_modalities:
        assert (len(index), index.num_text_only_samples, index.num_image_only_samples) == (20, 7, 7)
    dataset = dataset_of(index)
    torch.manual_seed(0)
    model = Mvptr(
        MvptrConfig(
            num_words=len(WORDS), num_rows=VOCAB.num_rows, num_phrases=len(VOCAB), hidden_size=16,
            num_attention_heads=2, intermediate_size=32, num_text_layers=1, num_visual_layers=1, num_cross_layers=1,
            max_positions=64, hidden_dropout=0.0, attention_dropout=0.0, region_feature_dim=FEATURE_DIM,
        )
    )  # fmt: skip
    model.set_phrase_rows(torch.from_numpy(VOCAB.rows))
    weights = Config().stage("stage1").weights
    task = PretrainingLosses(model, STAGES["stage1"], weights, TaskConfig(), max_text_slots=40, max_steps=40, seed=0)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for step, batch in enumerate(make_loader(dataset, Batches(8), 0, 40)):
        assert int(batch.num_bad_B.sum()) == 0
        optimizer.zero_grad()
        loss = task(batch, step).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.isfinite(losses).all()
    assert np.mean(losses[-8:]) < 0.5 * np.mean(losses[:4])  # the captions are nearly the same: quickly learnt
