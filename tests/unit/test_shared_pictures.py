"""Shards of records among the sidecars: the texts of one folder take the pictures of another by key."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvptr_ds import shard_folders
from mvptr_ds.config_data import DataConfig
from mvptr_ds.corpus.validating.validation import validate
from mvptr_ds.data.dataset import ShardDataset
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import Caption, Extractor, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.sidecar_join import JoinedIndex, ensure_join
from mvptr_ds.data.shards.sidecars import merge_picture, sidecar_json
from mvptr_ds.data.shards.tar_writer import npy_bytes, write_tar
from mvptr_ds.data.shards.urls import ReadOptions
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.errors import DataError
from tests.unit.test_sidecars import VOCAB, WORDS

DETR = Extractor("detr", "3")
NUM, FEATURE_DIM, SIDE = 9, 4, 8
QUESTION = Caption("is the dog brown?", (Phrase(("dog",), ((7, 10),)),), {"answers": {"dog": 1.0}})


def key(number: int) -> str:
    return f"{number:012d}"


def regions(number: int) -> tuple[Region, ...]:
    return tuple(Region((0.0, 0.0, 8.0 + r, 8.0), f"tag{number}", 0.5) for r in range(1 + number % 3))


def features(number: int) -> bytes:
    return npy_bytes(np.full((1 + number % 3, FEATURE_DIM), number, dtype=np.float16))


def picture(number: int) -> bytes:
    """A grey picture, whose every pixel is ten times the number."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 48), (10 * number,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    """Texts alone, in shards of two records: every third record has two questions."""
    items = [
        (key(n), Record(f"q{n}", 0, 0, (QUESTION,) + (Caption(f"is it {n}?"),) * (n % 3 == 0)), {}) for n in range(NUM)
    ]
    write_shards(tmp_path / "questions", items, 2)
    return tmp_path / "questions"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Whole records of other captions in another order, in shards of four; two of them belong to no question."""
    items = [
        (
            key(n),
            Record(f"p{n}", 64, 48, (Caption("a dog"), Caption("a cat")), regions(n), DETR),
            {"png": picture(n), "npy": features(n)},
        )
        for n in range(NUM + 1, -1, -1)
    ]
    write_shards(tmp_path / "pictures", items, 4)
    return tmp_path / "pictures"


def data(questions: Path, *sidecars: Path, **changes: str) -> DataConfig:
    return DataConfig(train=str(questions), held_out=None, sidecars=[str(s) for s in sidecars], **changes)  # type: ignore[arg-type]


def opened(tmp_path: Path, config: DataConfig, stage: str = "stage2") -> JoinedIndex:
    index = shard_folders.open_sources(config, stage, stage != "stage1", tmp_path / "joins")[""]
    assert isinstance(index, JoinedIndex)
    return index


# --- one record


def test_what_is_seen_comes_together_and_the_captions_stay() -> None:
    grounded = Caption("is the dog brown?", (Phrase(("dog",), ((7, 10),), (0,)),), {"answers": {"dog": 1.0}})
    own = Record("q", 32, 24, (grounded,), regions(2))
    other = Record("p", 64, 48, (Caption("a dog"),), regions(1), DETR)
    merged, members = merge_picture(own, {"json": b"own"}, other, {"json": b"other", "jpg": b"j", "npy": b"n"})
    assert merged == Record("q", 64, 48, (QUESTION,), regions(1), DETR)
    assert members == {"json": b"own", "jpg": b"j", "npy": b"n"}


def test_a_picture_alone_leaves_regions_with_the_size_that_they_lie_in() -> None:
    own = Record("q", 32, 24, (QUESTION,), regions(1), DETR)
    alone = Record("p", 64, 48, (Caption("a dog"),))
    merged, members = merge_picture(own, {"json": b"", "png": b"old", "npy": b"n"}, alone, {"jpg": b"new"})
    assert merged == own and members == {"json": b"", "npy": b"n", "jpg": b"new"}
    text_only = Record("q", 0, 0, (QUESTION,))
    merged, members = merge_picture(text_only, {"json": b""}, alone, {"jpg": b"new"})
    assert merged == Record("q", 64, 48, (QUESTION,)) and members == {"json": b"", "jpg": b"new"}


def test_features_of_a_grid_replace_regions_that_they_do_not_belong_to() -> None:
    own = Record("q", 32, 24, (QUESTION,), regions(1), DETR)
    grid = Record("p", 64, 48, (Caption("a dog"),), (), Extractor("grid", "1"))
    merged, members = merge_picture(own, {"npy": b"old"}, grid, {"npy": b"cells"})
    assert (merged.width, merged.height, merged.regions, merged.extractor) == (64, 48, (), Extractor("grid", "1"))
    assert members == {"npy": b"cells"} and merged.captions[0].phrases[0].regions == ()
    merged, members = merge_picture(own, {"npy": b"old"}, Record("p", 0, 0, (Caption("a dog"),)), {"json": b""})
    assert merged == own and members == {"npy": b"old"}  # a text has nothing to give


# --- folders


def test_texts_become_pairs_by_key(tmp_path: Path, questions: Path, pictures: Path) -> None:
    index = opened(tmp_path, data(questions, pictures))
    assert (index.num_records, len(index)) == (NUM, 12)
    assert (index.num_text_only_samples, index.num_image_only_samples) == (0, 0)
    assert index.region_extractors() == {"detr 3"}
    assert index.tags == Index.open(pictures).tags and index.tags["tag8"] == 3
    for number in range(NUM):
        place = index.place(number)
        record, members = index.read(place)
        assert record.image_id == f"q{number}" and index.key_of(place) == key(number)
        assert (record.width, record.height, record.regions) == (64, 48, regions(number))
        assert record.extractor == DETR and len(record.captions) == 1 + (number % 3 == 0)
        assert record.captions[0].labels == {"answers": {"dog": 1.0}}
        assert members["png"] == picture(number) and members["npy"] == features(number)
        described, names = index.describe(place)
        assert described == record and set(names) == {"json", "png", "npy"}


def test_a_folder_alone_is_still_of_texts(tmp_path: Path, questions: Path) -> None:
    with pytest.raises(DataError, match="12 text-only and 0 image-only samples among 12"):
        shard_folders.open_sources(data(questions), "stage2", True, tmp_path)


@pytest.mark.parametrize(("source", "num_workers"), [("features", 0), ("features", 2), ("image", 0)])
def test_samples_show_the_pictures_of_their_keys(
    tmp_path: Path, questions: Path, pictures: Path, source: str, num_workers: int
) -> None:
    index = opened(tmp_path, data(questions, pictures))
    options = SampleOptions(
        visual_source=source,  # type: ignore[arg-type]
        feature_dim=FEATURE_DIM,
        image_size=SIDE,
        needs_regions=True,
    )
    dataset = ShardDataset(index, Plan(len(index), 0, 2, 3), SampleBuilder(WORDS, VOCAB, options))
    seen = []
    for batch in make_loader(dataset, Batches(4), 0, 3, num_workers=num_workers):
        assert (batch.num_bad_B == 0).all()
        for row, number in enumerate(batch.image_index_B.tolist()):
            seen.append(number)
            assert int(batch.region_mask_BR[row].sum()) == 1 + number % 3
            if source == "features":
                assert batch.region_features_BRF is not None
                assert (batch.region_features_BRF[row, : 1 + number % 3] == number).all()
            else:
                assert batch.images_B3HW is not None and (batch.images_B3HW[row] == 10 * number).all()
    assert sorted(seen) == sorted([*range(NUM), 0, 3, 6])


def test_records_without_a_picture_are_left_out_or_stay_texts(tmp_path: Path, questions: Path) -> None:
    items = [(key(n), Record(f"p{n}", 64, 48, ()), {"png": picture(n)}) for n in (7, 3, 5)]
    write_shards(tmp_path / "some", items, 2)
    index = opened(tmp_path, data(questions, tmp_path / "some"))
    assert [index.read(index.place(n))[0].image_id for n in range(index.num_records)] == ["q3", "q5", "q7"]
    assert (len(index), index.num_text_only_samples, index.num_image_only_samples) == (4, 0, 0)
    kept = opened(tmp_path, data(questions, tmp_path / "some", missing_partners="keep"), "stage1")
    assert (kept.num_records, len(kept), kept.num_text_only_samples) == (NUM, 12, 8)
    write_shards(tmp_path / "elsewhere", [("99", Record("99", 9, 9, ()), {"png": b"x"})], 1)
    with pytest.raises(DataError, match=r"no record of .*questions has a partner in the sidecar .*elsewhere: a key th"):
        opened(tmp_path, data(questions, tmp_path / "elsewhere"))


def test_a_text_among_the_pictures_gives_nothing_to_see(tmp_path: Path, questions: Path) -> None:
    mixed = [(key(n), Record(f"p{n}", 64 * (n > 4), 48 * (n > 4), (Caption("a"),)), {"png": b"x"} if n > 4 else {})
             for n in range(NUM)]  # fmt: skip
    write_shards(tmp_path / "mixed", mixed, 9)
    index = opened(tmp_path, data(questions, tmp_path / "mixed"), "stage1")
    assert (len(index), index.num_text_only_samples) == (12, 7)  # questions of 0 to 4: 0 and 3 have two


def boxes_of(folder: Path, numbers: range, tag: str) -> Path:
    folder.mkdir()
    box = (Region((1.0, 1.0, 5.0, 5.0), tag),)
    items = [(key(n), {"json": sidecar_json(DETR, width=32, height=24, regions=box)}) for n in numbers]
    write_tar(folder / "shard-000000.tar", items)
    build_index(folder)
    return folder


def test_the_last_folder_with_regions_wins(tmp_path: Path, questions: Path, pictures: Path) -> None:
    beside = boxes_of(tmp_path / "boxes", range(NUM), "cat")
    last = opened(tmp_path, data(questions, pictures, beside))
    record, members = last.read(last.place(4))
    assert (record.width, record.height, [r.tag for r in record.regions]) == (32, 24, ["cat"])
    assert members["png"] == picture(4) and "npy" not in members and last.tags == {"cat": NUM}
    first = opened(tmp_path, data(questions, beside, pictures))
    record, members = first.read(first.place(4))
    assert (record.width, record.regions, members["npy"]) == (64, regions(4), features(4))
    assert first.fingerprint != last.fingerprint and "tag8" in first.tags


def test_no_regions_found_still_leaves_the_shared_picture(tmp_path: Path, questions: Path, pictures: Path) -> None:
    folder = tmp_path / "none"
    folder.mkdir()
    nothing = sidecar_json(DETR, width=32, height=24, regions=())
    write_tar(folder / "shard-000000.tar", [(key(n), {"json": nothing}) for n in range(NUM)])
    build_index(folder)
    index = opened(tmp_path, data(questions, pictures, folder))
    assert (index.num_records, index.num_text_only_samples) == (NUM, 0)
    record, members = index.read(index.place(2))
    assert record.regions == () and members["png"] == picture(2) and "npy" not in members


def test_regions_of_two_extractors_are_told(tmp_path: Path, questions: Path, pictures: Path) -> None:
    others = [(key(n), Record(f"p{n}", 9, 9, (), regions(n), Extractor("vinvl", "1")), {}) for n in range(NUM)]
    write_shards(tmp_path / "others", others, 9)
    config = DataConfig(
        train=str(questions), sidecars=[str(pictures)],
        held_out=str(questions), held_out_sidecars=[str(tmp_path / "others")],
    )  # fmt: skip
    with pytest.raises(DataError, match=r"data\.train are of detr 3, those of data\.held_out of vinvl 1"):
        shard_folders.prepare_shards(config, 0, 1)


def test_a_folder_that_has_changed_its_kind_is_told(tmp_path: Path, questions: Path, pictures: Path) -> None:
    index = opened(tmp_path, data(questions, pictures))
    index.sidecars[0].kind = "sidecar"
    with pytest.raises(DataError, match=r"sidecar .*: key '0{12}' is of kind 'records' in a folder of kind 'sidecar'"):
        index.read(index.place(0))


def test_both_folders_are_valid_and_are_read_behind_urls(tmp_path: Path, questions: Path, pictures: Path) -> None:
    fsspec = pytest.importorskip("fsspec")
    for folder in (questions, pictures):
        assert validate(folder, num_processes=1).is_clean
    memory = fsspec.filesystem("memory")
    for folder in (questions, pictures):
        memory.put(str(folder), f"/shared/{folder.name}", recursive=True)
    options = ReadOptions(cache_dir=str(tmp_path / "cache"))
    main, other = (Index.open(f"memory://shared/{folder.name}", options) for folder in (questions, pictures))
    ensure_join(main, [other], "drop", False, tmp_path / "joins")
    index = pickle.loads(pickle.dumps(JoinedIndex(main, [other], "drop", tmp_path / "joins")))
    for sample in range(len(index)):
        first, second = index.remote_extents(sample)
        place = index.locate(sample)
        assert (first.path, first.offset) == (place.path, place.offset)
        partner = next(other.place(n) for n in range(NUM + 2) if other.key_of(other.place(n)) == index.key_of(place))
        assert (second.path, second.offset, second.num_bytes) == partner[:3]
        assert index.read(place)[1]["png"] == picture(place.record)
