"""Describes one record as a card: its image with boxes, its captions with their phrases marked, its regions and facts.

The functions here say what the card holds; templates/card.html is its markup.
"""

from __future__ import annotations

import base64
import hashlib
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from markupsafe import Markup
from PIL import Image

from mvptr_ds.corpus.preview.measures import RECORD_ERRORS, key_of, reason
from mvptr_ds.corpus.preview.render import render, shortened
from mvptr_ds.data.features import read_features, region_geometry
from mvptr_ds.data.images import decode_image
from mvptr_ds.data.schema import Caption, Phrase, Record, check_size
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.errors import DataError

NUM_COLOURS = 12  # .c0 ... .c11 of the style sheet
KINDS = ("noun", "attribute", "relation")  # of a phrase with one, two, three words
MAX_PICTURE_SIZE = 480  # pixels of the longer side, and units of the drawing's
_MAX_ASPECT = 6.0  # of the drawing; a longer picture is shown squeezed
_JPEG_QUALITY = 82
_LABEL_HEIGHT, _LABEL_LETTER = 15.0, 6.7  # units of the drawing, for 12 units of type
# more than these of a record are counted, not shown: no record may swell the page
_MAX_CAPTIONS, _MAX_CAPTION_LEN, _MAX_PHRASES, _MAX_REGIONS, _MAX_NAME_LEN = 20, 2_000, 100, 100, 60

Rectangle = tuple[float, float, float, float]  # x1, y1, x2, y2 in units of the drawing


class Drawing(NamedTuple):
    """What stands behind the boxes: an image, or a plain sheet where there is none."""

    width: float
    height: float
    uri: str | None
    label: str  # for those who cannot see it


class ShownRegion(NamedTuple):
    """A region with its place in the drawing."""

    tag: str
    name: str  # the tag as the label shows it
    score: str
    colour: int
    box: Rectangle
    label: Rectangle
    crowded: bool  # the label covers another, and is shown on request only


class Piece(NamedTuple):
    """A run of a caption's characters that the same phrases cover."""

    text: str
    kinds: str = ""  # of the phrases; empty where no phrase covers it
    phrases: str = ""  # their numbers, as CAPTION.PHRASE
    title: str = ""


class ShownPhrase(NamedTuple):
    words: tuple[str, ...]
    kind: str
    regions: str  # numbers of the regions that it names
    has_span: bool


@dataclass
class ShownCaption:
    pieces: list[Piece]
    phrases: list[ShownPhrase]
    notes: list[str]  # what is left out


def card(index: SampleIndex, number: int, grid_size: int) -> Markup:
    """Returns the card of record `number`; where the record cannot be read, a card that says why."""
    key, path = key_of(index, number), index.place(number).path
    try:
        record, members = index.read(index.place(number))
        content = _content(f"record {number:,} in {Path(path).name}", record, members, grid_size)
    except RECORD_ERRORS as error:
        return render("card.html", key=key, unreadable=f"cannot be shown: {reason(error)}")
    return render("card.html", key=key, unreadable="", **content)


def _content(where: str, record: Record, members: Mapping[str, bytes], grid_size: int) -> dict[str, Any]:
    facts, problems = _facts(where, record, members, grid_size)
    drawing, regions = None, []
    has_image = any(extension in members for extension in IMAGE_EXTENSIONS)
    if has_image or record.regions:
        check_size(record.width, record.height)
        try:
            uri = _image_uri(record, members) if has_image else None
        except DataError as error:
            uri = None
            problems.append(reason(error))
        drawing = _drawing(record, uri)
        regions = _regions(record, drawing.width, drawing.height)
    return {
        "facts": facts,
        "problems": problems,
        "drawing": drawing,
        "regions": regions,
        "num_more_regions": len(record.regions) - len(regions),
        "captions": [_caption(caption, n) for n, caption in enumerate(record.captions[:_MAX_CAPTIONS])],
        "num_more_captions": max(0, len(record.captions) - _MAX_CAPTIONS),
    }


def _facts(where: str, record: Record, members: Mapping[str, bytes], grid_size: int) -> tuple[str, list[str]]:
    """Returns a line that says what the record consists of, and what is wrong with it."""
    parts = [where, f"image_id {shortened(record.image_id, 80)}"]
    problems = []
    if record.width and record.height:
        parts.append(f"{record.width} x {record.height} pixels")
        if not 1 / _MAX_ASPECT <= record.width / record.height <= _MAX_ASPECT:
            parts.append("shown squeezed")
    parts += [f"{ext} {len(members[ext]) / 1024:,.1f} KiB" for ext in IMAGE_EXTENSIONS if ext in members]
    if record.extractor is not None:
        parts.append(f"own extractor: {shortened(str(record.extractor), 120)}")
    if "npy" in members:
        try:
            features_RF = read_features(members, len(record.regions) or grid_size**2, None)
            parts.append(f"features {features_RF.shape[0]} x {features_RF.shape[1]}")
        except DataError as error:
            problems.append(reason(error))
    if not record.regions:
        text_only = set(members) == {"json"}
        parts.append("text-only" if text_only else f"no boxes, so a grid of {grid_size} x {grid_size} regions")
    outside = sum(_reaches_outside(record, region.box) for region in record.regions)
    if outside:
        problems.append(f"{outside} of {len(record.regions)} boxes reach outside the picture; training clips them")
    return " · ".join(parts), problems


def _reaches_outside(record: Record, box: Rectangle) -> bool:
    x1, y1, x2, y2 = box
    return x1 < -0.5 or y1 < -0.5 or x2 > record.width + 0.5 or y2 > record.height + 0.5


def _image_uri(record: Record, members: Mapping[str, bytes]) -> str:
    """Returns the image as training decodes it, scaled to at most MAX_PICTURE_SIZE pixels, as a JPEG data URI.

    Raises:
        DataError: it cannot be decoded.
    """
    longest = max(record.width, record.height)
    size = min(MAX_PICTURE_SIZE, longest)
    square = Image.fromarray(np.ascontiguousarray(decode_image(members, size).transpose(1, 2, 0)))
    shape = (max(1, round(size * record.width / longest)), max(1, round(size * record.height / longest)))
    buffer = io.BytesIO()
    square.resize(shape, Image.Resampling.BICUBIC).save(buffer, "JPEG", quality=_JPEG_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _drawing(record: Record, uri: str | None) -> Drawing:
    aspect = min(max(record.width / record.height, 1 / _MAX_ASPECT), _MAX_ASPECT)
    label = f"picture with {len(record.regions)} regions" if uri else f"{len(record.regions)} regions, no picture"
    return Drawing(MAX_PICTURE_SIZE * min(1.0, aspect), MAX_PICTURE_SIZE / max(1.0, aspect), uri, label)


def _regions(record: Record, width: float, height: float) -> list[ShownRegion]:
    """Returns the regions that are shown, placed in a drawing of width x height units."""
    regions = record.regions[:_MAX_REGIONS]
    names = [shortened(region.tag, 24) or "(no tag)" for region in regions]
    colours = colours_of([region.tag for region in regions])
    corners = region_geometry(record, 1)[: len(regions), :4] * np.array([width, height, width, height])
    boxes: list[Rectangle] = [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.tolist()]
    return [
        ShownRegion(region.tag, name, f"{region.score:.2f}", colours[region.tag], box, label, not fits)
        for region, name, box, (label, fits) in zip(
            regions, names, boxes, place_labels(boxes, names, width, height), strict=True
        )
    ]


def place_labels(
    boxes: Sequence[Rectangle], names: Sequence[str], width: float, height: float
) -> list[tuple[Rectangle, bool]]:
    """Returns the place of each box's label inside the drawing, and whether it covers no label before it."""
    placed: list[Rectangle] = []
    out: list[tuple[Rectangle, bool]] = []
    for (x1, y1, x2, y2), name in zip(boxes, names, strict=True):
        label_width = min(_text_width(name) + 8, width)
        corners = ((x1, y1 - _LABEL_HEIGHT), (x1, y1), (x2 - label_width, y1), (x1, y2), (x1, y2 - _LABEL_HEIGHT))
        candidates = [_kept_inside(x, y, label_width, width, height) for x, y in corners]
        free = next((c for c in candidates if not any(_overlap(c, other) for other in placed)), None)
        if free is not None:
            placed.append(free)
        out.append((free or candidates[0], free is not None))
    return out


def _text_width(text: str) -> float:
    wide = sum(unicodedata.east_asian_width(letter) in "WF" for letter in text)
    return _LABEL_LETTER * (len(text) + wide)


def _kept_inside(x: float, y: float, label_width: float, width: float, height: float) -> Rectangle:
    x = min(max(x, 0.0), max(0.0, width - label_width))
    y = min(max(y, 0.0), max(0.0, height - _LABEL_HEIGHT))
    return (x, y, x + label_width, y + _LABEL_HEIGHT)


def _overlap(a: Rectangle, b: Rectangle) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def colours_of(tags: Iterable[str]) -> dict[str, int]:
    """Returns a colour for each tag, the same in every record unless another tag of the record has it already."""
    out: dict[str, int] = {}
    for tag in dict.fromkeys(tags):
        wanted = int.from_bytes(hashlib.blake2b(tag.encode("utf-8", "replace"), digest_size=2).digest(), "big")
        taken = set(out.values()) if len(out) < NUM_COLOURS else set()
        out[tag] = next(c % NUM_COLOURS for c in range(wanted, wanted + NUM_COLOURS) if c % NUM_COLOURS not in taken)
    return out


def segments(text_len: int, phrases: Sequence[Phrase]) -> list[tuple[int, int, tuple[int, ...]]]:
    """Cuts a caption of `text_len` characters wherever a span begins or ends.

    Returns (start, end, numbers of the phrases that cover it) of each piece.
    """
    spans = [(start, end, number) for number, phrase in enumerate(phrases) for start, end in phrase.spans]
    cuts = sorted({0, text_len, *(place for start, end, _ in spans for place in (start, end) if place < text_len)})
    out = []
    for start, end in pairwise(cuts):
        covering = {number for first, last, number in spans if first <= start and end <= last}
        out.append((start, end, tuple(sorted(covering))))
    return out


def _caption(caption: Caption, caption_number: int) -> ShownCaption:
    text = caption.text[:_MAX_CAPTION_LEN]
    phrases = caption.phrases[:_MAX_PHRASES]
    pieces = []
    for start, end, covering in segments(len(text), phrases):
        kinds = sorted({KINDS[len(phrases[p].tuple) - 1] for p in covering}, key=KINDS.index)
        numbers = " ".join(f"{caption_number}.{p}" for p in covering)
        title = " | ".join(shortened(" · ".join(phrases[p].tuple), _MAX_NAME_LEN) for p in covering)
        pieces.append(Piece(text[start:end], " ".join(kinds), numbers, title))
    notes = []
    if len(caption.text) > len(text):
        notes.append(f"cut here; {len(caption.text):,} characters in all")
    if len(caption.phrases) > len(phrases):
        notes.append(f"{len(phrases)} of {len(caption.phrases):,} phrases shown")
    return ShownCaption(pieces, [_phrase(phrase) for phrase in phrases], notes)


def _phrase(phrase: Phrase) -> ShownPhrase:
    regions = " ".join(str(region) for region in phrase.regions if region < _MAX_REGIONS)
    return ShownPhrase(phrase.tuple, KINDS[len(phrase.tuple) - 1], regions, bool(phrase.spans))
