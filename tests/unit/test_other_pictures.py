"""Records that are shown with the picture of another: which one, what goes along with it, and who reads it so."""

from __future__ import annotations

import io
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mvptr_ds import shard_folders
from mvptr_ds.builders import NOTHING_MASKED, build_dataset, build_vocabs
from mvptr_ds.config import Config
from mvptr_ds.config_data import DataConfig, VisualConfig
from mvptr_ds.data.dataset import ShardDataset
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.lengths import lengths_path, measure
from mvptr_ds.data.loader import eval_batches, make_loader
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import Caption, Extractor, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.other_pictures import Mode, OtherPictures
from mvptr_ds.data.shards.tar_writer import npy_bytes
from mvptr_ds.data.shards.urls import ReadOptions
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.streams import Stream, generator

WORDS = WordPiece()
VOCAB = PhraseVocab.empty(WORDS)
DETR = Extractor("detr", "3")
NUM, FEATURE_DIM, SIDE = 12, 4, 8


def num_regions(number: int) -> int:
    return 1 + number % 3


def captions(number: int) -> tuple[Caption, ...]:
    of_dog = (Phrase(("dog",), ((6, 9),), (0,)),)
    return tuple(Caption(f"seen: dog {number} {caption}", of_dog) for caption in range(1 + number % 2))


def regions(number: int) -> tuple[Region, ...]:
    return tuple(Region((0.0, 0.0, 1.0 + number, 1.0 + r), f"tag{number}", 0.5) for r in range(num_regions(number)))


def picture(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20 + number, 20), (10 * number,) * 3).save(buffer, "PNG")
    return buffer.getvalue()


def rows(number: int) -> np.ndarray:
    """Row r of record n is 10 n + r."""
    return 10.0 * number + np.arange(num_regions(number), dtype=np.float16)[:, None].repeat(FEATURE_DIM, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    items = [
        (
            f"k{n:02d}",
            Record(f"id{n}", 20 + n, 20, captions(n), regions(n), DETR),
            {"png": picture(n), "npy": npy_bytes(rows(n))},
        )
        for n in range(NUM)
    ]
    write_shards(tmp_path / "shards", items, 5)
    return tmp_path / "shards"


@pytest.mark.parametrize("seed", range(20))
def test_no_record_has_its_own_picture_and_each_picture_is_shown_once(folder: Path, seed: int) -> None:
    index = OtherPictures(Index.open(folder), "picture", seed)
    others = [index.other(n) for n in range(NUM)]
    assert sorted(others) == [*range(NUM)] and all(other != n for n, other in enumerate(others))
    # the circle as its definition says: each element of the permutation is shown with the next
    circle = generator(Stream.OTHER_PICTURES, seed).permutation(NUM).tolist()
    assert others == [circle[(circle.index(n) + 1) % NUM] for n in range(NUM)]
    assert others == [OtherPictures(Index.open(folder), "contents", seed).other(n) for n in range(NUM)]


def test_all_that_is_seen_is_of_the_other(folder: Path) -> None:
    plain = Index.open(folder)
    index = OtherPictures(plain, "picture", 3)
    assert (len(index), index.num_records, index.tags) == (len(plain), NUM, plain.tags)
    assert (index.num_text_only_samples, index.num_image_only_samples) == (0, 0)
    assert index.region_extractors() == {"detr 3"} and (index.key_hashes() == plain.key_hashes()).all()
    for sample in range(len(plain)):
        place = index.locate(sample)
        assert place == plain.locate(sample) and index.samples_of(place.record) == plain.samples_of(place.record)
        number, other = place.record, index.other(place.record)
        record, members = index.read(place)
        wanted = tuple(Caption(c.text, (Phrase(("dog",), ((6, 9),)),)) for c in captions(number))
        assert record == Record(f"id{number}", 20 + other, 20, wanted, regions(other), DETR)
        assert members["png"] == picture(other) and members["npy"] == npy_bytes(rows(other))
        assert index.read_sample(place)[0] == replace(record, captions=wanted[place.caption : place.caption + 1])
        described, names = index.describe(place)
        assert described == record and sorted(names) == ["json", "npy", "png"]
        assert index.key_of(place) == f"k{number:02d}"


def test_boxes_stay_and_show_what_is_in_the_other_picture(folder: Path) -> None:
    index = OtherPictures(Index.open(folder), "contents", 3)
    assert index.tags == {}
    cut, repeated = 0, 0
    for number in range(NUM):
        other = index.other(number)
        record, members = index.read(index.place(number))
        untagged = tuple(Region(region.box, "", 0.5) for region in regions(number))
        assert record == Record(f"id{number}", 20 + number, 20, captions(number), untagged, DETR)
        assert members["png"] == picture(other)
        found = np.load(io.BytesIO(members["npy"]))
        wanted = [10 * other + r % num_regions(other) for r in range(num_regions(number))]
        assert found.dtype == np.float16 and found.shape == (num_regions(number), FEATURE_DIM)
        assert (found == np.array(wanted)[:, None]).all()
        cut += num_regions(other) > num_regions(number)
        repeated += num_regions(other) < num_regions(number)
        described, names = index.describe(index.place(number))
        assert described == record and sorted(names) == ["json", "npy", "png"]
    assert cut and repeated


def test_the_fingerprint_tells_index_mode_and_seed(folder: Path) -> None:
    plain = Index.open(folder)
    modes: tuple[Mode, ...] = ("picture", "contents")
    found = {OtherPictures(plain, mode, seed).fingerprint for mode in modes for seed in (0, 1)}
    assert len(found) == 4 and plain.fingerprint not in found
    assert OtherPictures(Index.open(folder), "picture", 1).fingerprint in found


@pytest.mark.parametrize("mode", ["picture", "contents"])
@pytest.mark.parametrize("source", ["features", "image"])
def test_loader_and_evaluation_see_the_other_pictures(folder: Path, mode: Mode, source: str) -> None:
    index = OtherPictures(Index.open(folder), mode, 5)
    options = SampleOptions(
        visual_source=source,  # type: ignore[arg-type]
        feature_dim=FEATURE_DIM,
        image_size=SIDE,
        needs_regions=True,
    )
    builder = SampleBuilder(WORDS, VOCAB, options)
    dataset = ShardDataset(index, Plan(len(index), 0, 2, 3), builder)
    workers = 1 if source == "features" else 0
    seen = 0
    for batch in [*make_loader(dataset, Batches(6), 0, 3, num_workers=workers), *eval_batches(index, builder, 7)]:
        assert (batch.num_bad_B == 0).all()
        for row, number in enumerate(batch.image_index_B.tolist()):
            other = index.other(number)
            boxes_of = other if mode == "picture" else number
            assert int(batch.region_mask_BR[row].sum()) == num_regions(boxes_of)
            width = (1 + boxes_of) / (20 + boxes_of)
            assert batch.region_geometry_BR6[row, 0, 2].item() == pytest.approx(width)
            if source == "features":
                assert batch.region_features_BRF is not None
                assert batch.region_features_BRF[row, 0].tolist() == [10.0 * other] * FEATURE_DIM
            else:
                assert batch.images_B3HW is not None and (batch.images_B3HW[row] == 10 * other).all()
            tags = [WORDS.tokens[i] for i in batch.tag_ids_BG[row].tolist() if i not in (0, WORDS.cls_id, WORDS.sep_id)]
            assert "".join(tags).replace("##", "") == (f"tag{other}" if mode == "picture" else "")
            seen += 1
    assert seen == 2 * 18


def test_lengths_are_of_what_is_read(folder: Path) -> None:
    builder = SampleBuilder(WORDS, VOCAB, SampleOptions(feature_dim=FEATURE_DIM))
    index = OtherPictures(Index.open(folder), "picture", 5)
    table_N3 = measure(index, builder, range(NUM), show_progress=False)
    assert [row[2] for row in table_N3.tolist()] == [
        num_regions(index.other(n)) for n in range(NUM) for _ in captions(n)
    ]
    assert lengths_path(index, builder, "x") != lengths_path(Index.open(folder), builder, "x")


def test_both_places_are_fetched_behind_a_url(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("fsspec").filesystem("memory").put(str(folder), "/other/shards", recursive=True)
    plain = Index.open("memory://other/shards", ReadOptions(cache_dir=str(tmp_path / "cache")))
    index = pickle.loads(pickle.dumps(OtherPictures(plain, "picture", 2)))
    assert index.read_ahead_bytes == plain.read_ahead_bytes > 0
    for sample in range(len(index)):
        place = index.locate(sample)
        wanted = [place[:3], plain.place(index.other(place.record))[:3]]
        assert [(e.path, e.offset, e.num_bytes) for e in index.remote_extents(sample)] == wanted
    builder = SampleBuilder(WORDS, VOCAB, SampleOptions(feature_dim=FEATURE_DIM))
    for batch in eval_batches(index, builder, 5):
        assert batch.region_features_BRF is not None
        found = batch.region_features_BRF[:, 0, 0].tolist()
        assert found == [10.0 * index.other(n) for n in batch.image_index_B.tolist()]


def test_what_cannot_be_exchanged_is_told(tmp_path: Path, folder: Path) -> None:
    write_shards(tmp_path / "one", [("a", Record("a", 9, 9, captions(0), regions(0)), {"png": b"x"})], 1)
    with pytest.raises(DataError, match="one record alone, so no other picture"):
        OtherPictures(Index.open(tmp_path / "one"), "picture")
    texts = [(f"k{n}", Record(f"k{n}", 0, 0, (Caption("a"), Caption("b"))), {}) for n in range(3)]
    write_shards(tmp_path / "texts", texts, 9)
    with pytest.raises(DataError, match=r"6 of 6 samples are texts without a picture.* data\.permute_pictures=null"):
        OtherPictures(Index.open(tmp_path / "texts"), "picture")
    spoilt = [(f"k{n}", Record(f"k{n}", 9, 9, captions(0), regions(0)), {"npy": b"no array"}) for n in range(2)]
    write_shards(tmp_path / "spoilt", spoilt, 9)
    index = OtherPictures(Index.open(tmp_path / "spoilt"), "contents")
    with pytest.raises(DataError, match=r"the picture of 'k1', which is shown in its place: the npy member cannot be"):
        index.read(index.place(0))


def test_the_configuration_permutes_training_and_held_out_alike(tmp_path: Path, folder: Path) -> None:
    data = DataConfig(train=str(folder), held_out=str(folder), phrase_vocab=None, permute_pictures="contents")
    held_out = shard_folders.open_held_out(data, tmp_path)
    (trained,) = shard_folders.open_sources(data, "stage2", True, tmp_path).values()
    wanted = OtherPictures(Index.open(folder), "contents", 0)
    for index in (held_out, trained):
        assert isinstance(index, OtherPictures) and index.fingerprint == wanted.fingerprint
        assert [index.other(n) for n in range(NUM)] == [wanted.other(n) for n in range(NUM)]
    config = replace(Config(), data=data, visual=VisualConfig(feature_dim=FEATURE_DIM))
    dataset = build_dataset(config, build_vocabs(data), "stage1", NOTHING_MASKED, 0, tmp_path)
    assert dataset.fingerprint == wanted.fingerprint
    sample = dataset.__getitems__([4])[0]
    assert sample.region_features_RF is not None
    assert sample.region_features_RF[0, 0] == 10 * wanted.other(sample.image_index)
    plain = replace(config, data=replace(data, permute_pictures=None))
    assert build_dataset(plain, build_vocabs(data), "stage1", NOTHING_MASKED, 0, tmp_path).fingerprint != (
        wanted.fingerprint
    )
