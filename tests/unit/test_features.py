from __future__ import annotations

import dataclasses
import io
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mvptr_ds.data import features, images
from mvptr_ds.data.collate import IGNORE, Sample, collate
from mvptr_ds.data.features import SampleBuilder, SampleOptions, read_features, region_geometry
from mvptr_ds.data.images import decode_image
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Phrase, Record, Region
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError

WORDS = WordPiece()
TEXT = "A brown dog chases frisbees."
PHRASES = (
    Phrase(("dog", "brown"), ((2, 7), (8, 11))),
    Phrase(("unknown",), ((8, 11),)),
    Phrase(("dog", "chase", "frisbees"), ((8, 11), (12, 18), (19, 27))),
)
VOCAB = PhraseVocab.build({("dog", "brown"): 2, ("dog", "chase", "frisbees"): 1}, WORDS, 1)
REGIONS = (
    Region((0, 0, 32, 24), "dog"),
    Region((-5, 12, 700, 48), "frisbee"),
    Region((8, 8, 8, 9), "dog"),
)
RECORD = Record("7", 64, 48, (Caption("nothing"), Caption(TEXT, PHRASES)), REGIONS)


def _npy(array: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array)
    return stream.getvalue()


def _picture(image_format: str, mode: str = "RGB", size: tuple[int, int] = (64, 48)) -> bytes:
    stream = io.BytesIO()
    Image.new(mode, size, (200, 100, 50, 255)[: len(mode)] if mode != "L" else 90).save(stream, image_format)
    return stream.getvalue()


FEATURES = np.arange(12, dtype=np.float16).reshape(3, 4)
MEMBERS = {"json": json.dumps(RECORD.to_json()).encode(), "npy": _npy(FEATURES), "jpg": _picture("JPEG")}


def _build(members: dict[str, bytes] | None = None, caption: int = 1, seed: int = 0, **options: object) -> Sample:
    builder = SampleBuilder(WORDS, VOCAB, SampleOptions(**options))  # type: ignore[arg-type]
    return builder.build(members or MEMBERS, caption, 5, 9, np.random.default_rng(seed))


def _names(ids: np.ndarray) -> list[str]:
    return [WORDS.tokens[i] if i < len(WORDS) else "/".join(VOCAB.tuples[i - len(WORDS)]) for i in ids]


def test_an_unmasked_sample() -> None:
    sample = _build()
    expected = ["[CLS]", "a", "brown", "dog", "chases", "fr", "##is", "##bee", "##s", "."]
    assert _names(sample.text_ids_T) == [*expected, "dog/brown", "dog/chase/frisbees", "[SEP]"]
    assert np.flatnonzero(sample.phrase_mask_T).tolist() == [10, 11]
    assert _names(sample.tag_ids_G) == ["[CLS]", "dog", "fr", "##is", "##bee", "[SEP]"]  # distinct, in order
    for labels in (sample.mlm_labels_T, sample.phrase_labels_T, sample.tag_labels_G):
        assert (labels == IGNORE).all()
    assert np.array_equal(sample.region_features_RF, FEATURES)
    assert sample.region_features_RF is not None and sample.region_features_RF.dtype == np.float16
    assert (sample.num_oov_phrases, sample.num_phrases, sample.image_index, sample.position) == (1, 2, 5, 9)
    assert sample.image_3HW is None


def test_geometry_is_clipped_to_the_picture() -> None:
    geometry = region_geometry(RECORD, 4)
    expected = [[0, 0, 0.5, 0.5, 0.5, 0.5], [0, 0.25, 1, 1, 1, 0.75], [0.125, 1 / 6, 0.125, 9 / 48, 0, 1 / 48]]
    np.testing.assert_allclose(geometry, expected, atol=1e-6)  # float32
    assert geometry.dtype == np.float32


def test_no_boxes_gives_a_grid() -> None:
    geometry = region_geometry(dataclasses.replace(RECORD, regions=()), 2)
    np.testing.assert_allclose(geometry[1], [0.5, 0, 1, 0.5, 0.5, 0.5])
    np.testing.assert_allclose(geometry[:, 4:], 0.5)
    bare = {**MEMBERS, "json": json.dumps(dataclasses.replace(RECORD, regions=()).to_json()).encode()}
    assert len(_build(bare, visual_source="image", grid_size=3).region_geometry_R6) == 9
    with pytest.raises(DataError, match="3 rows of features for 16 regions"):
        _build(bare)


def _json_of(record: Record) -> dict[str, bytes]:
    return {"json": json.dumps(record.to_json()).encode()}


@pytest.mark.parametrize("size", [(0, 0), (640, 480)])
@pytest.mark.parametrize("source", ["features", "image"])
def test_a_record_with_nothing_to_see_has_no_regions(source: str, size: tuple[int, int]) -> None:
    members = _json_of(Record("7", *size, (Caption(TEXT, PHRASES),)))
    sample = _build(members, 0, visual_source=source, feature_dim=4, image_size=8)
    assert sample.num_phrases == 2 and _names(sample.tag_ids_G) == ["[CLS]", "[SEP]"]
    assert sample.region_geometry_R6.shape == (0, 6) and sample.region_geometry_R6.dtype == np.float32
    if source == "features":
        assert sample.region_features_RF is not None and sample.region_features_RF.shape == (0, 4)
        assert sample.image_3HW is None
    else:
        assert sample.image_3HW is not None and sample.image_3HW.shape == (3, 8, 8) and not sample.image_3HW.any()
        assert sample.region_features_RF is None


def test_a_record_without_captions_has_an_empty_text() -> None:
    members = {**MEMBERS, **_json_of(dataclasses.replace(RECORD, captions=()))}
    sample = _build(members, 0, word_prob=1.0, phrase_prob=1.0, predict_phrases=True)
    assert _names(sample.text_ids_T) == ["[CLS]", "[SEP]"] and not sample.phrase_mask_T.any()
    assert (sample.mlm_labels_T == IGNORE).all() and len(sample.region_geometry_R6) == 3
    with pytest.raises(DataError, match="caption 1 of a record with 1"):
        _build(members, 1)


@pytest.mark.parametrize("source", ["features", "image"])
def test_samples_of_one_modality_batch_with_each_other_and_with_pairs(source: str) -> None:
    options = {"visual_source": source, "image_size": 8}
    text = _build(_json_of(Record("7", 0, 0, (Caption(TEXT, PHRASES),))), 0, **options)
    image = _build({**MEMBERS, **_json_of(dataclasses.replace(RECORD, captions=()))}, 0, **options)
    batch = collate([text, image, _build(**options)])
    assert batch.region_mask_BR.tolist() == [[False] * 3, [True] * 3, [True] * 3]
    assert batch.text_mask_BT.sum(1).tolist() == [13, 2, 13]
    if source == "features":
        assert batch.region_features_BRF is not None and batch.region_features_BRF.shape == (3, 3, 4)
    alone = collate([text, text])
    assert alone.region_mask_BR.tolist() == [[False], [False]] and alone.region_geometry_BR6.shape == (2, 1, 6)


def test_a_record_that_was_read_already_is_not_parsed_again() -> None:
    builder = SampleBuilder(WORDS, VOCAB, SampleOptions())
    other = dataclasses.replace(RECORD, captions=(Caption("a dog"),))
    sample = builder.build(MEMBERS, 0, 0, 0, np.random.default_rng(0), other)
    assert _names(sample.text_ids_T) == ["[CLS]", "a", "dog", "[SEP]"]


def test_regions_are_cut_after_the_check() -> None:
    sample = _build(max_regions=2)
    assert sample.region_features_RF is not None
    assert len(sample.region_features_RF) == len(sample.region_geometry_R6) == 2


def test_tokens_of_a_phrase_are_those_its_spans_touch() -> None:
    words_of_PT = features._words_of_phrases([p.spans for p in PHRASES], WORDS.encode(TEXT)[1], 13)
    assert [np.flatnonzero(row).tolist() for row in words_of_PT] == [[2, 3], [3], [3, 4, 5, 6, 7, 8]]
    inside = [((21, 23),), ((1, 2),)]  # a wordpiece of its own; a space
    words_of_PT = features._words_of_phrases(inside, WORDS.encode(TEXT)[1], 13)
    assert [np.flatnonzero(row).tolist() for row in words_of_PT] == [[6], []]


def test_long_captions_are_cut_and_phrases_fill_the_rest() -> None:
    words = ["dog", "cat", "cup", "car", "bus", "bed", "bird", "bear", "boat"]
    text = "tree " * 40 + " ".join(words)
    caption = Caption(text, tuple(Phrase((w,), ((text.index(w), text.index(w) + len(w)),)) for w in words))
    members = {**MEMBERS, **_json_of(dataclasses.replace(RECORD, captions=(caption,)))}
    vocab = PhraseVocab.build({(word,): 1 for word in words}, WORDS, 1)
    options = SampleOptions(word_prob=0.5, phrase_prob=0.5, predict_phrases=True)
    sample = SampleBuilder(WORDS, vocab, options).build(members, 0, 5, 9, np.random.default_rng(0))
    assert len(sample.text_ids_T) == 40 and sample.num_phrases == 5


def _masked_alike(one: Record, other: Record) -> None:
    """Whether two records give equal samples, whatever is drawn."""
    chances = {"word_prob": 0.3, "phrase_prob": 0.5, "tag_prob": 0.5, "tag_drop_prob": 0.3, "tag_wrong_prob": 0.5}
    for seed in range(60):
        first, second = (
            _build({**MEMBERS, **_json_of(record)}, 0, seed, predict_phrases=True, tag_list=["DOG", "cat"], **chances)
            for record in (one, other)
        )
        for name in ("text_ids_T", "mlm_labels_T", "phrase_labels_T", "tag_ids_G", "tag_labels_G"):
            np.testing.assert_array_equal(getattr(first, name), getattr(second, name))


def _with_tags(*tags: str) -> Record:
    boxes = [(0, 0, 32, 24), (1, 1, 4, 4), (0, 0, 8, 8)]
    return dataclasses.replace(RECORD, captions=RECORD.captions[1:], regions=tuple(map(Region, boxes, tags)))


@pytest.mark.parametrize("equal", ["Dog", " dog", "DOG\t", "dóg", "do\u0301g", "d\u00adog", "\ufeffdog", "d\u200dog"])
def test_tags_that_are_one_to_the_model_come_once(equal: str) -> None:
    assert _names(_build({**MEMBERS, **_json_of(_with_tags("cup", "dog", equal))}, 0).tag_ids_G)[1:-1] == ["cup", "dog"]
    _masked_alike(_with_tags("cup", "dog", equal), _with_tags("cup", "dog", "dog"))


@pytest.mark.parametrize("other", ["dogs", "hot dog", "dog house", "dog."])
def test_tags_that_share_a_word_both_stay(other: str) -> None:
    names = _names(_build({**MEMBERS, **_json_of(_with_tags("dog", other, "dog"))}, 0).tag_ids_G)[1:-1]
    assert names[0] == "dog" and "".join(names[1:]) == other.replace(" ", "")


def _with_phrases(*phrases: Phrase) -> Record:
    return dataclasses.replace(RECORD, captions=(Caption(TEXT, phrases),))


@pytest.mark.parametrize("spans", [(), ((8, 11),), ((2, 4),), ((0, 1), (11, 12)), ((2, 7), (8, 9))])
def test_the_words_of_a_phrase_are_masked_with_it_whatever_its_spans(spans: tuple[tuple[int, int], ...]) -> None:
    sound = _with_phrases(PHRASES[0])
    known = Phrase(PHRASES[0].tuple, spans)
    sample = _build({**MEMBERS, **_json_of(_with_phrases(known))}, 0)
    assert (sample.num_phrases, sample.num_oov_phrases) == (1, 0)
    if (0, 1) not in spans:  # words that a span names stay with the phrase, though they are none of its own
        _masked_alike(_with_phrases(known), sound)
    for seed in range(60):
        sample = _build({**MEMBERS, **_json_of(_with_phrases(known))}, 0, seed, phrase_prob=1.0, predict_phrases=True)
        hidden = (sample.text_ids_T[2:4] != WORDS.encode("brown dog")[0]).any()
        assert not hidden or (sample.text_ids_T[2:4] == WORDS.mask_id).all()


def test_a_phrase_that_its_caption_does_not_say_is_left_out_and_counted() -> None:
    unsaid = Caption("A cat.", (Phrase(("dog", "brown"), ()), Phrase(("unknown",), ()), Phrase(("dog", "brown"), ())))
    sample = _build({**MEMBERS, **_json_of(dataclasses.replace(RECORD, captions=(unsaid,)))}, 0)
    assert (sample.num_phrases, sample.num_oov_phrases) == (0, 3)


def test_a_phrase_that_comes_twice_has_a_slot_each_time() -> None:
    """Runs of before go on with the same draws."""
    text = "A brown dog and another brown dog."
    twice = (Phrase(("dog", "brown"), ((2, 7), (8, 11))), Phrase(("dog", "brown"), ((24, 29), (30, 33))))
    sample = _build({**MEMBERS, **_json_of(dataclasses.replace(RECORD, captions=(Caption(text, twice),)))}, 0)
    assert (sample.num_phrases, sample.num_oov_phrases) == (2, 0)
    assert (sample.text_ids_T[sample.phrase_mask_T] == VOCAB.rows[VOCAB.index_of(("dog", "brown"))]).all()


def test_masking_touches_neither_specials_nor_padding_rules() -> None:
    for seed in range(200):
        sample = _build(seed=seed, word_prob=0.5, phrase_prob=0.5, tag_prob=0.5, predict_phrases=True)
        assert sample.text_ids_T[0] == WORDS.cls_id and sample.text_ids_T[-1] == WORDS.sep_id
        assert sample.tag_labels_G[0] == sample.tag_labels_G[-1] == IGNORE
        assert (sample.mlm_labels_T[sample.phrase_mask_T] == IGNORE).all()
        assert (sample.phrase_labels_T[~sample.phrase_mask_T] == IGNORE).all()
        assert set(sample.phrase_labels_T.tolist()) <= {IGNORE, 0, 1}


def test_tag_noise() -> None:
    tags = {"tag_list": ["cat"]}
    assert _names(_build(tag_withhold_prob=1.0).tag_ids_G) == ["[CLS]", "[SEP]"]
    dropped = {tuple(_names(_build(seed=s, tag_drop_prob=1.0).tag_ids_G)[1:-1]) for s in range(20)}
    assert dropped == {("dog",), ("fr", "##is", "##bee")}
    for seed in range(40):
        sample = _build(seed=seed, tag_wrong_prob=1.0, tag_prob=1.0, **tags)
        cat = WORDS.tokens.index("cat")
        assert (sample.tag_ids_G == cat).sum() == 1  # neither masked
        assert cat not in sample.tag_labels_G  # nor predicted
        assert (sample.tag_labels_G != IGNORE).sum() in (1, 3)  # "dog" or the three pieces of "frisbee"


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP"])
def test_image_formats(image_format: str) -> None:
    image = decode_image({image_format.lower(): _picture(image_format)}, 16)
    assert image.shape == (3, 16, 16) and image.dtype == np.uint8
    # a plain picture keeps its colour; 6 of 255 for what lossy coding rounds
    assert np.abs(image.reshape(3, -1).astype(int) - np.array([[200], [100], [50]])).max() <= 6


@pytest.mark.parametrize("mode", ["L", "RGBA"])
def test_other_modes_become_rgb(mode: str) -> None:
    assert decode_image({"png": _picture("PNG", mode)}, 8).shape == (3, 8, 8)


def test_resizing_is_antialiased_and_draft_changes_little() -> None:
    stripes = np.zeros((256, 256, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    stream = io.BytesIO()
    Image.fromarray(stripes).save(stream, "PNG")
    assert decode_image({"png": stream.getvalue()}, 32).std() < 10  # picking pixels would give 0 or 255
    gradient = np.broadcast_to(np.arange(256, dtype=np.uint8)[None, :, None], (256, 256, 3))
    stream = io.BytesIO()
    Image.fromarray(np.ascontiguousarray(gradient)).save(stream, "JPEG", quality=95)
    image = decode_image({"jpg": stream.getvalue()}, 32)[0].astype(float)
    assert np.abs(image - (np.arange(32) * 8 + 3.5)[None]).max() < 8  # one step of the ramp


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        ({"npy": None}, {}, "no npy"),
        ({"npy": b"garbage"}, {}, "cannot be read"),
        ({"npy": MEMBERS["npy"][:-4]}, {}, "cannot be read"),
        ({"npy": _npy(FEATURES[0])}, {}, r"expected float16 or float32 \[R, F\]"),
        ({"npy": _npy(FEATURES.astype(np.int64))}, {}, r"expected float16 or float32 \[R, F\]"),
        ({"npy": _npy(FEATURES[:2])}, {}, "2 rows of features for 3 regions"),
        ({"npy": _npy(np.full_like(FEATURES, np.nan))}, {}, "NaN or infinity"),
        ({}, {"feature_dim": 5}, "features have 4 numbers, visual.feature_dim is 5"),
        ({"jpg": None}, {"visual_source": "image"}, "no image"),
        ({"jpg": b"garbage"}, {"visual_source": "image"}, "cannot be decoded: its format is not known; replace"),
        ({"jpg": MEMBERS["jpg"][:200]}, {"visual_source": "image"}, "cannot be decoded"),
        ({"json": None}, {}, "no json"),
        ({"json": b"{}"}, {}, "schema is None"),
    ],
)
def test_bad_members_are_data_errors(change: dict, options: dict, message: str) -> None:
    members = {ext: content for ext, content in {**MEMBERS, **change}.items() if content is not None}
    with pytest.raises(DataError, match=message):
        _build(members, **options)


def test_every_float16_that_is_not_finite_is_refused() -> None:
    numbers = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = np.isfinite(numbers)
    assert len(read_features({"npy": _npy(numbers[finite][None])}, 1, None)) == 1
    for number in numbers[~finite]:
        with pytest.raises(DataError, match="NaN or infinity"):
            read_features({"npy": _npy(np.array([[1.0, number, -2.0]], dtype=np.float16))}, 1, 3)


@pytest.mark.parametrize("error", [KeyError("mode"), IndexError("index out of range"), TypeError("no bytes")])
def test_whatever_pillow_stumbles_over_is_a_data_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def stumble(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("mvptr_ds.data.images.Image.open", stumble)
    with pytest.raises(DataError, match="the image cannot be decoded"):
        _build({**MEMBERS, "jpg": b"no JPEG"}, visual_source="image")


def test_pickled_arrays_are_never_loaded() -> None:
    stream = io.BytesIO()
    np.save(stream, np.array([[print]], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match="object"):
        read_features({"npy": stream.getvalue()}, 1, None)


def test_decompression_bombs_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(DataError, match="64 x 48 pixels, at most 1000"):
        decode_image(MEMBERS, 8)


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    member=st.sampled_from(["npy", "jpg", "json"]),
    place=st.floats(0, 1, exclude_max=True),
    value=st.integers(0, 255),
    length=st.floats(0, 1),
)
def test_damage_is_a_data_error_or_harmless(member: str, place: float, value: int, length: float) -> None:
    content = bytearray(MEMBERS[member])
    content[int(place * len(content))] = value
    if place > length:
        del content[int(length * len(content)) :]
    try:
        _build({**MEMBERS, member: bytes(content)}, visual_source="image" if member == "jpg" else "features")
    except DataError:
        return


def test_options_are_checked() -> None:
    for wrong in ({"word_prob": 1.5}, {"max_regions": 0}, {"image_size": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            SampleOptions(**wrong)  # type: ignore[arg-type]
