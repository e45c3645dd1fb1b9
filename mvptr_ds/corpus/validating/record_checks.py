"""Finds all that is wrong with one record whose members were read, not only the first problem."""

from __future__ import annotations

import io
import math
import tokenize
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mvptr_ds.corpus.validating.repair import find_header
from mvptr_ds.data.features import read_features
from mvptr_ds.data.images import decode_square, image_content
from mvptr_ds.data.phrase_words import wrong_spans
from mvptr_ds.data.pixels import MAX_IMAGE_PIXELS, open_image
from mvptr_ds.data.schema import Caption, Record, SidecarEntry, parse_entry
from mvptr_ds.data.shards.index_builder import classify_entry, is_img2dataset
from mvptr_ds.data.shards.index_format import SIDECAR
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.errors import DataError

BOX_TOLERANCE_PX = 1.0  # detectors round outwards
_DECODED_SIZE = 32  # pixels; a JPEG is then decoded at an eighth, yet read to its end

IMG2DATASET = "a record of img2dataset"
FEATURES = "features that cannot be used"
Problem = tuple[str, str]  # what is counted, and the detail of one case


@dataclass(frozen=True)
class Checked:
    """What a record was found to be."""

    problems: list[Problem]
    is_sidecar: bool = False
    num_captions: int = 0
    feature_dim: int = 0  # F of its features; 0 without
    extractor: str | None = None  # name and version
    lacks_picture: bool = False  # says how large it is, and brings neither it nor features
    changes: tuple[str, ...] = ()  # what is done to its picture to show it, see pixels.Rgb; () where it is not decoded


def check_content(members: Mapping[str, bytes], decode: bool) -> Checked:
    """Returns everything that is wrong with the content of a record, or of a sidecar's entry."""
    try:
        entry = parse_entry(members["json"])
        kind, _ = classify_entry(entry, members, Counter())
    except DataError as error:
        if is_img2dataset(members, members["json"]):
            return Checked([(IMG2DATASET, str(error))])
        return Checked([("a record that does not follow the schema", str(error))])
    feature_dim, problems = _feature_problems(members, entry)
    problems += _swallowed_header(members)
    changes: tuple[str, ...] = ()
    if isinstance(entry, Record):
        picture_problems, changes = _picture_problems(members, entry, decode)
        problems += picture_problems
    problems += _box_problems(entry)
    problems += _phrase_problems(entry.captions or ())
    extractor = None if entry.extractor is None else str(entry.extractor)
    lacks_picture = isinstance(entry, Record) and entry.width > 0 and not set(members) & {"npy", *IMAGE_EXTENSIONS}
    num_captions = len(entry.captions or ())
    return Checked(problems, kind == SIDECAR, num_captions, feature_dim, extractor, lacks_picture, changes)


def _picture_problems(
    members: Mapping[str, bytes], record: Record, decode: bool
) -> tuple[list[Problem], tuple[str, ...]]:
    """Problems of the picture: the whole of it is decoded if asked for, else its header is read. And its changes."""
    names = [extension for extension in IMAGE_EXTENSIONS if extension in members]
    if not names:
        return [], ()
    problems: list[Problem] = [("more than one picture", f"it has {names}")] if len(names) > 1 else []
    content = image_content(members)
    try:
        changes = decode_square(content, _DECODED_SIZE).changes if decode else ()
        with open_image(content, MAX_IMAGE_PIXELS) as image:
            width, height = image.size
    except DataError as error:
        return [*problems, ("a picture that cannot be decoded", str(error))], ()
    if (width, height) != (record.width, record.height):
        sizes = f"the picture is {width} x {height}, the record says {record.width} x {record.height}"
        problems.append(("a picture of another size than the record says", sizes))
    return problems, changes


def _box_problems(entry: Record | SidecarEntry) -> Iterator[Problem]:
    """Boxes without area, and boxes outside the picture, where its size is known."""
    width, height = entry.width or math.inf, entry.height or math.inf
    empty, outside = _Cases("a box without area"), _Cases("a box outside the picture")
    for number, region in enumerate(entry.regions or ()):
        x1, y1, x2, y2 = region.box
        if x2 <= x1 or y2 <= y1:
            empty.add(f"region {number} has {region.box}")
        if min(x1, y1) < -BOX_TOLERANCE_PX or x2 > width + BOX_TOLERANCE_PX or y2 > height + BOX_TOLERANCE_PX:
            outside.add(f"region {number} has {region.box} in a picture of {width} x {height}")
    yield from (*empty.problems(), *outside.problems())


def _phrase_problems(captions: Sequence[Caption]) -> Iterator[Problem]:
    """Spans that do not hold the words of their phrase."""
    cases = _Cases("spans that are not of the phrase's words")
    for caption in captions:
        for phrase in caption.phrases:
            if (wrong := wrong_spans(caption.text, phrase)) is not None:
                cases.add(wrong)
    return cases.problems()


class _Cases:
    """Counts the cases of a problem within one record, and keeps the first."""

    def __init__(self, reason: str) -> None:
        self._reason = reason
        self._first = ""
        self._number = 0

    def add(self, detail: str) -> None:
        self._first = self._first or detail
        self._number += 1

    def problems(self) -> Iterator[Problem]:
        if self._number:
            others = f", and {self._number - 1} more" if self._number > 1 else ""
            yield self._reason, self._first + others


def _feature_problems(members: Mapping[str, bytes], entry: Record | SidecarEntry) -> tuple[int, list[Problem]]:
    """Returns F of the features, 0 where there are none or they are unusable, and their problems.

    Without regions a record's rows are cells of a grid: a square number. A sidecar's may be of the record's regions.
    """
    if "npy" not in members:
        return 0, []
    num_rows = len(entry.regions or ()) or _num_rows(members["npy"])
    try:
        feature_dim = read_features(members, num_rows, None).shape[1]
    except DataError as error:
        return 0, [(FEATURES, str(error))]
    if isinstance(entry, Record) and not entry.regions and math.isqrt(num_rows) ** 2 != num_rows:
        return 0, [(FEATURES, f"{num_rows} rows for a record without regions, and no square grid has that many")]
    return feature_dim, []


def _num_rows(content: bytes) -> int:
    stream = io.BytesIO(content)
    try:
        np.lib.format.read_magic(stream)
        shape = np.lib.format.read_array_header_1_0(stream)[0]
    except (ValueError, SyntaxError, TypeError, OverflowError, RecursionError, tokenize.TokenError):
        return 0  # read_features says what is wrong
    return shape[0] if shape else 0


def _swallowed_header(members: Mapping[str, bytes]) -> Iterator[Problem]:
    """Yields headers inside a member: one that was cut in a copy runs on over what was joined to it."""
    for extension, content in members.items():
        at = find_header(io.BytesIO(content), 0, len(content))
        if at is not None:
            yield "a member that runs over a tar header", f"{extension}: at its byte {at}"
