"""Builds one masked, unpadded Sample from the members of one record.

Legend: T text slots, P phrases of the caption, G tag slots, R regions, F feature size, H W image size.
"""

from __future__ import annotations

import bisect
import functools
import io
import math
import tokenize
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

from mvptr_ds.data.caption_phrases import phrases_with_slots
from mvptr_ds.data.collate import IGNORE, Sample
from mvptr_ds.data.images import decode_image
from mvptr_ds.data.masking import TextMasking, mask_text, mask_words
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Record, Spans, check_size, parse_record
from mvptr_ds.data.sequence_layout import layout_tags, layout_text, num_phrases_that_fit
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError

_MAX_KNOWN_TAGS, _MAX_KNOWN_CHARS = 100_000, 64
_NO_CAPTION = Caption("")  # of an image-only record
_NO_GEOMETRY = np.zeros((0, 6), dtype=np.float32)
# what a task makes of a caption's labels, given the record; raises DataError for labels that are no use
ReadLabels = Callable[[Mapping[str, Any], Record], dict[str, Any]]
_NPY_ERRORS = (OSError, ValueError, EOFError, SyntaxError, OverflowError, TypeError, tokenize.TokenError)


@dataclass(frozen=True)
class SampleOptions:
    """Sizes and probabilities of a SampleBuilder; in an evaluation all probabilities are 0."""

    visual_source: Literal["features", "image"] = "features"  # features: KEY.npy | image: pixels
    feature_dim: int | None = None  # F of KEY.npy; None accepts any
    image_size: int = 224  # pixels, square
    grid_size: int = 4  # regions a side for an image without boxes
    max_tokens: int = 33
    max_text_slots: int = 40
    max_tag_slots: int = 20
    max_regions: int = 50
    word_prob: float = 0.0
    phrase_prob: float = 0.0
    tag_prob: float = 0.0
    predict_phrases: bool = False  # stage 1: phrases carry labels
    tag_drop_prob: float = 0.0  # one tag is left out
    tag_wrong_prob: float = 0.0  # one tag is replaced by a random other one
    tag_withhold_prob: float = 0.0  # all tags are left out
    needs_regions: bool = False  # a sample with nothing to see cannot be used
    tags_in_text: bool = False  # the tags of all regions also stand behind the text, with repeats
    labels: Mapping[str, Any] = field(default_factory=dict)  # names in the labels of a caption, each with an example
    read_labels: ReadLabels | None = None
    tag_list: Sequence[str] = field(default=())  # tags that a wrong one is drawn from (those of the manifest)

    def __post_init__(self) -> None:
        for name in ("word_prob", "phrase_prob", "tag_prob", "tag_drop_prob", "tag_wrong_prob", "tag_withhold_prob"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a probability")
        for name, least in (("max_tokens", 1), ("max_text_slots", 3), ("max_tag_slots", 2), ("max_regions", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}, must be at least {least}")
        if self.image_size < 1 or self.grid_size < 1:
            raise ValueError(f"image_size {self.image_size} and grid_size {self.grid_size} must be at least 1")


class SampleBuilder:
    """Builds a Sample from the members of a record and the number of a caption."""

    def __init__(self, words: WordPiece, phrases: PhraseVocab, options: SampleOptions) -> None:
        self.words = words
        self.phrases = phrases
        self.options = options
        self._tag_pieces: dict[str, tuple[int, ...]] = {}
        self._text_masking = TextMasking(
            word_prob=options.word_prob,
            phrase_prob=options.phrase_prob,
            mask_id=words.mask_id,
            random_word_ids=words.ordinary_ids,
            random_phrase_rows=phrases.rows,
            predict_phrases=options.predict_phrases,
        )

    def build(
        self,
        members: Mapping[str, bytes],
        caption_number: int,
        image_index: int,
        position: int,
        rng: np.random.Generator,
        record: Record | None = None,
    ) -> Sample:
        """Builds the sample of caption `caption_number`; every draw is made from `rng`.

        A record without captions gives the text `[CLS] [SEP]`. One with nothing to see gives no regions.

        Args:
            record: the record, where it has been parsed already; else the json member is.

        Raises:
            DataError: the record, its features or its image cannot be used, with the reason.
        """
        if record is None:
            if "json" not in members:
                raise DataError(f"the record has no json member, only {sorted(members)}")
            record = parse_record(members["json"])
        sample = self.begin(record, members, caption_number, image_index, position, rng)
        self.add_visual(sample, members)
        return sample

    def begin(
        self,
        record: Record,
        members: Mapping[str, bytes],
        caption_number: int,
        image_index: int,
        position: int,
        rng: np.random.Generator,
    ) -> Sample:
        """Builds the sample without features or image.

        Every draw is made here, and none depends on how features and images are stored.
        """
        captions = record.captions or (_NO_CAPTION,)
        if not 0 <= caption_number < len(captions):
            raise DataError(f"caption {caption_number} of a record with {len(captions)}; rebuild the index")
        caption = captions[caption_number]
        labels = self._labels(caption, record)
        text = self._text(caption, rng)
        tag_ids_G, tag_labels_G = self._tags(record, rng)
        text_ids_T, tags_in_text_T = text.ids_T, None
        if self.options.tags_in_text:
            text_ids_T, tags_in_text_T = self._with_tags_behind(text.ids_T, record, withheld=len(tag_ids_G) == 2)
        geometry_R6 = _NO_GEOMETRY
        if can_be_seen(record, members):
            check_size(record.width, record.height)
            geometry_R6 = region_geometry(record, self.options.grid_size)
        elif self.options.needs_regions:
            raise DataError(
                "there is nothing to see: neither picture, features nor regions (or a sidecar took them away with an "
                "entry of no regions); this stage aligns texts with regions"
            )
        return Sample(
            text_ids_T=text_ids_T,
            phrase_mask_T=_extended(text.phrase_mask_T, len(text_ids_T), False),
            mlm_labels_T=_extended(text.word_labels_T, len(text_ids_T), IGNORE),
            phrase_labels_T=_extended(text.phrase_labels_T, len(text_ids_T), IGNORE),
            tag_ids_G=tag_ids_G,
            tag_labels_G=tag_labels_G,
            region_geometry_R6=geometry_R6,
            region_features_RF=None,
            image_3HW=None,
            image_index=image_index,
            position=position,
            num_oov_phrases=text.num_dropped,
            num_phrases=text.num_phrases,
            labels=labels,
            tags_in_text_T=tags_in_text_T,
        )

    def _labels(self, caption: Caption, record: Record) -> dict[str, Any]:
        options, given = self.options, caption.labels or {}
        for name, example in options.labels.items():
            if name not in given:
                raise DataError(f"the caption has no label {name!r} (such as {example!r}), which the task learns from")
        if options.read_labels is not None:
            return options.read_labels(given, record)
        return {name: given[name] for name in options.labels}

    def add_visual(self, sample: Sample, members: Mapping[str, bytes]) -> None:
        """Adds the features or the image; a sample with nothing to see has no regions."""
        options = self.options
        num_regions = len(sample.region_geometry_R6)
        if options.visual_source == "features":
            sample.region_features_RF = np.zeros((0, options.feature_dim or 0), dtype=np.float16)
            if num_regions:
                sample.region_features_RF = read_features(members, num_regions, options.feature_dim)
                sample.region_features_RF = sample.region_features_RF[: options.max_regions]
        elif num_regions:
            sample.image_3HW = decode_image(members, options.image_size)
        else:
            sample.image_3HW = np.zeros((3, options.image_size, options.image_size), dtype=np.uint8)
        sample.region_geometry_R6 = sample.region_geometry_R6[: options.max_regions]

    def _text(self, caption: Caption, rng: np.random.Generator) -> _Text:
        options = self.options
        token_ids, offsets = self.words.encode(caption.text)
        most = num_phrases_that_fit(len(token_ids), options.max_tokens, options.max_text_slots)
        chosen = phrases_with_slots(caption, self.phrases, most)
        indices_P = np.array(chosen.indices, dtype=np.int64)
        ids_T, phrase_mask_T = layout_text(
            token_ids,
            self.phrases.rows[indices_P].tolist(),
            self.words.cls_id,
            self.words.sep_id,
            options.max_tokens,
            options.max_text_slots,
        )
        num_tokens = len(ids_T) - len(indices_P) - 2
        words_of_PT = _words_of_phrases(chosen.spans, offsets[:num_tokens], len(ids_T))
        masked = mask_text(ids_T, phrase_mask_T, words_of_PT, indices_P, rng, self._text_masking)
        return _Text(*masked, phrase_mask_T, chosen.num_dropped, len(indices_P))

    def _tags(self, record: Record, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Returns tag ids and labels, int64 [G] each, after tag noise and masking."""
        options = self.options
        tags = self.tags_of(record)
        wrong = self._add_noise(tags, rng)
        pieces: list[int] = []
        candidates = [False]
        known = self._tag_pieces
        for number, tag in enumerate(tags):
            of_tag = known.get(tag) or self.pieces_of(tag)
            pieces += of_tag
            candidates += [number != wrong] * len(of_tag)
            if len(pieces) >= options.max_tag_slots - 2:
                break
        ids_G = layout_tags(pieces, self.words.cls_id, self.words.sep_id, options.max_tag_slots)
        candidates_G = np.array([*candidates[: len(ids_G) - 1], False])
        return mask_words(ids_G, candidates_G, rng, options.tag_prob, self.words.mask_id, self.words.ordinary_ids)

    def _with_tags_behind(
        self, text_ids_T: np.ndarray, record: Record, withheld: bool
    ) -> tuple[np.ndarray, np.ndarray]:
        """Returns the text with the tags of all regions behind it, repeats included, and which slots those are."""
        pieces = [piece for region in record.regions if region.tag for piece in self.pieces_of(region.tag)]
        ids_T = np.append(text_ids_T, [] if withheld else pieces).astype(np.int64)[: self.options.max_text_slots]
        return ids_T, np.arange(len(ids_T)) >= len(text_ids_T)

    def _add_noise(self, tags: list[str], rng: np.random.Generator) -> int | None:
        """Changes the list in place; returns the number of the wrong tag, which is no target of MCR."""
        options = self.options
        drop, wrong, withhold = rng.random(3).tolist()
        if withhold < options.tag_withhold_prob:
            tags.clear()
        if drop < options.tag_drop_prob and tags:
            del tags[int(rng.integers(len(tags)))]
        if wrong >= options.tag_wrong_prob or not tags or not options.tag_list:
            return None
        number = int(rng.integers(len(tags)))
        other = options.tag_list[int(rng.integers(len(options.tag_list)))]
        if self.pieces_of(other) in map(self.pieces_of, tags):  # it would be right, or give a masked tag away
            return None
        tags[number] = other
        return number

    def tags_of(self, record: Record) -> list[str]:
        """Returns the tags of a record's regions, without those that equal another to the model ("Dog", "dog").

        A masked tag could be read off its equal.
        """
        tags = [tag for tag in dict.fromkeys([region.tag for region in record.regions]) if tag]
        known = self._tag_pieces  # looked up here: a call for each tag of each sample costs
        pieces = [known.get(tag) or self.pieces_of(tag) for tag in tags]
        if len(set(pieces)) == len(tags):
            return tags
        distinct: dict[tuple[int, ...], str] = {}
        for of_tag, tag in zip(pieces, tags, strict=True):
            distinct.setdefault(of_tag, tag)
        return list(distinct.values())

    def pieces_of(self, tag: str) -> tuple[int, ...]:
        """Returns the wordpiece ids of a tag. Cached: most tags come again and again."""
        pieces = self._tag_pieces.get(tag)
        if pieces is None:
            pieces = tuple(self.words.encode(tag)[0])
            if len(tag) <= _MAX_KNOWN_CHARS:
                if len(self._tag_pieces) >= _MAX_KNOWN_TAGS:
                    self._tag_pieces.clear()
                self._tag_pieces[tag] = pieces
        return pieces


def can_be_seen(record: Record, members: Collection[str]) -> bool:
    """Tells whether a record with these members has something to see; else it is text-only."""
    return bool(record.regions) or "npy" in members or any(extension in members for extension in IMAGE_EXTENSIONS)


class _Text(NamedTuple):
    ids_T: np.ndarray
    word_labels_T: np.ndarray
    phrase_labels_T: np.ndarray
    phrase_mask_T: np.ndarray
    num_dropped: int
    num_phrases: int


def _extended(values_T: np.ndarray, num_slots: int, fill: Any) -> np.ndarray:
    """Returns the values with `fill` up to so many slots; as they are where these are all, as of nearly every text."""
    if len(values_T) == num_slots:  # np.pad takes as long as the rest of a short text
        return values_T
    return np.pad(values_T, (0, num_slots - len(values_T)), constant_values=fill)


def _words_of_phrases(
    spans_of_phrases: Sequence[Spans], offsets: Sequence[tuple[int, int]], num_slots: int
) -> np.ndarray:
    """Returns bool [P, T]: the slots whose token shares a character with one of the phrase's spans.

    Args:
        offsets: characters of each token, half open; token n stands in slot n + 1, behind [CLS].
    """
    words_of_PT = np.zeros((len(spans_of_phrases), num_slots), dtype=bool)
    starts, ends = [start for start, _ in offsets], [end for _, end in offsets]
    for row_T, spans in zip(words_of_PT, spans_of_phrases, strict=True):
        for start, end in spans:
            row_T[1 + bisect.bisect_right(ends, start) : 1 + bisect.bisect_left(starts, end)] = True
    return words_of_PT


def region_geometry(record: Record, grid_size: int) -> np.ndarray:
    """Returns float32 [R, 6]: x1/W y1/H x2/W y2/H w/W h/H of the boxes clipped to the image, each within 0..1.

    A record without boxes gets the cells of a grid_size x grid_size grid, row by row.

    Source: the published code, Inputs.
    """
    if not record.regions:
        return _grid(grid_size)
    size = np.array([record.width, record.height, record.width, record.height], dtype=np.float64)
    corners_R4 = np.array([region.box for region in record.regions]) / size
    np.maximum(corners_R4, 0.0, out=corners_R4)
    return _with_sizes(np.minimum(corners_R4, 1.0, out=corners_R4))


@functools.cache
def _grid(grid_size: int) -> np.ndarray:
    y, x = np.divmod(np.arange(grid_size**2), grid_size)
    return _with_sizes(np.stack([x, y, x + 1, y + 1], axis=1) / grid_size)


def _with_sizes(corners_R4: np.ndarray) -> np.ndarray:
    return np.concatenate([corners_R4, corners_R4[:, 2:] - corners_R4[:, :2]], axis=1).astype(np.float32)


def read_features(members: Mapping[str, bytes], num_regions: int, feature_dim: int | None) -> np.ndarray:
    """Reads `KEY.npy` [R, F], one row a region, float16 or float32 as it is stored.

    The array is a view of the member and must not be written. The model widens it, on its own device.

    Raises:
        DataError: the member is absent, no plain array, of a shape that fits neither regions nor `feature_dim`, or not
            finite.
    """
    if "npy" not in members:
        raise DataError(f"the record has no npy features, only {sorted(members)}; use visual.source=image")
    content = members["npy"]
    try:
        dtype, shape, start = _npy_layout(content[: 10 + int.from_bytes(content[8:10], "little")])
        features_RF: np.ndarray = np.frombuffer(content, dtype, math.prod(shape), start).reshape(shape)
    except _NPY_ERRORS as error:
        raise DataError(f"the npy member cannot be read: {error}; write it with numpy.save, float16 [R, F]") from error
    if num_regions and not len(features_RF):
        raise DataError(
            "the npy member has no rows, so there is nothing to see; give the picture regions, or leave the record out"
        )
    if len(features_RF) != num_regions:
        raise DataError(f"{len(features_RF)} rows of features for {num_regions} regions; write one row a region")
    if feature_dim is not None and features_RF.shape[1] != feature_dim:
        raise DataError(f"features have {features_RF.shape[1]} numbers, visual.feature_dim is {feature_dim}")
    features_RF = features_RF.astype(dtype.newbyteorder("="), copy=False)
    if not _all_finite(features_RF):
        raise DataError("features hold NaN or infinity; extract them again")
    return features_RF


def _all_finite(numbers: np.ndarray) -> bool:
    """Has for float16 a fast path of `np.isfinite`, which is the specification."""
    if numbers.dtype != np.float16:
        return bool(np.isfinite(numbers).all())
    # numpy widens float16 one by one; as integers, NaN and infinity are the largest of either sign
    return bool(numbers.view(np.int16).max(initial=0) < 0x7C00 and numbers.view(np.uint16).max(initial=0) < 0xFC00)


@functools.lru_cache(maxsize=1024)
def _npy_layout(header: bytes) -> tuple[np.dtype, tuple[int, int], int]:
    """Returns dtype, shape and start of the content of an npy file, by numpy's own parser.

    Cached, because that compiles the header as Python. Fast path of `np.load`, which is the specification.

    Raises:
        ValueError: not an npy of version 1, or not floats of at most 32 bits [R, F] in C order (so never objects).
    """
    stream = io.BytesIO(header)
    if np.lib.format.read_magic(stream) != (1, 0):
        raise ValueError("npy format version is not 1.0")
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if len(shape) != 2 or fortran_order or dtype.kind != "f" or dtype.itemsize > 4:
        raise ValueError(f"{dtype} of shape {shape}, expected float16 or float32 [R, F] in C order")
    num_regions, feature_dim = shape
    return dtype, (num_regions, feature_dim), len(header)
