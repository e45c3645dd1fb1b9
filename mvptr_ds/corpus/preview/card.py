"""One record as a card: its picture with boxes, its captions with their phrases marked, its regions and facts."""

from __future__ import annotations

import base64
import hashlib
import io
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image

from mvptr_ds.corpus.preview.markup import Html, element, joined, shortened
from mvptr_ds.corpus.preview.measures import RECORD_ERRORS, key_of, reason
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


def card(index: SampleIndex, number: int, grid_size: int) -> Html:
    """The card of record `number`; where the record cannot be read, a card that says why."""
    key, path = key_of(index, number), index.place(number).path
    heading = element("h3", element("bdi", shortened(key, 120)))
    try:
        record, members = index.read(index.place(number))
        where = f"record {number:,} in {Path(path).name}"
        return _record_card(heading, where, record, members, grid_size)
    except RECORD_ERRORS as error:
        return element("article", heading, _problem(f"cannot be shown: {reason(error)}"), class_="card bad")


def _record_card(heading: Html, where: str, record: Record, members: Mapping[str, bytes], grid_size: int) -> Html:
    facts, problems = _facts(where, record, members, grid_size)
    picture: list[Html] = []
    has_picture = any(extension in members for extension in IMAGE_EXTENSIONS)
    if has_picture or record.regions:
        check_size(record.width, record.height)
        try:
            uri = _picture_uri(record, members) if has_picture else None
        except DataError as error:
            uri = None
            problems.append(reason(error))
        picture.append(element("figure", _drawing(record, uri), class_="picture"))
    shown = record.captions[:_MAX_CAPTIONS]
    captions = [_caption(caption, number) for number, caption in enumerate(shown)]
    if len(record.captions) > len(shown):
        captions.append(element("p", f"and {len(record.captions) - len(shown):,} more captions", class_="note"))
    words = joined(*captions) if captions else element("p", "image-only: no caption", class_="note")
    text = element("div", words, _region_list(record), class_="words")
    header = element("header", heading, element("p", facts, class_="note"), *map(_problem, problems))
    return element("article", header, element("div", *picture, text, class_="columns"), class_="card")


def _problem(text: str) -> Html:
    return element("p", shortened(text, 600), class_="problem")


def _facts(where: str, record: Record, members: Mapping[str, bytes], grid_size: int) -> tuple[str, list[str]]:
    """What the record consists of, in a line; and what is odd about it."""
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


def _picture_uri(record: Record, members: Mapping[str, bytes]) -> str:
    """The picture as training decodes it, scaled to at most MAX_PICTURE_SIZE pixels, as a JPEG data URI.

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


def _drawing(record: Record, uri: str | None) -> Html:
    """Picture, or a plain sheet where there is none, under the boxes and their tags."""
    aspect = min(max(record.width / record.height, 1 / _MAX_ASPECT), _MAX_ASPECT)
    width = MAX_PICTURE_SIZE * min(1.0, aspect)
    height = MAX_PICTURE_SIZE / max(1.0, aspect)
    ground = {"width": width, "height": height}
    if uri is None:
        layers = [element("rect", class_="sheet", **ground)]
    else:
        layers = [element("image", href=uri, preserveAspectRatio="none", **ground)]
    regions = record.regions[:_MAX_REGIONS]
    names = [shortened(region.tag, 24) or "(no tag)" for region in regions]
    colours = colours_of([region.tag for region in regions])
    scale = np.array([width, height, width, height])
    corners = region_geometry(record, 1)[: len(regions), :4] * scale
    boxes: list[Rectangle] = [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.tolist()]
    for number, (region, (x1, y1, x2, y2)) in enumerate(zip(regions, boxes, strict=True)):
        size = {"x": x1, "y": y1, "width": max(1.0, x2 - x1), "height": max(1.0, y2 - y1)}
        hint = element("title", f"{number} {names[number]} {region.score:.2f}")
        frame = joined(hint, element("rect", class_="halo", **size), element("rect", class_="box", **size))
        layers.append(element("g", frame, class_=f"region c{colours[region.tag]}", data_r=str(number)))
    for number, (region, place) in enumerate(zip(regions, place_labels(boxes, names, width, height), strict=True)):
        layers.append(_label(number, names[number], colours[region.tag], place))
    label = f"picture with {len(record.regions)} regions" if uri else f"{len(record.regions)} regions, no picture"
    view = f"0 0 {width:.0f} {height:.0f}"
    return element("svg", *layers, viewBox=view, width=width, role="img", aria_label=label)


def _label(number: int, name: str, colour: int, place: tuple[Rectangle, bool]) -> Html:
    (x1, y1, x2, y2), fits = place
    plate = element("rect", x=x1, y=y1, width=x2 - x1, height=y2 - y1, rx=2)
    text = element("text", name, x=(x1 + x2) / 2, y=y2 - 4, text_anchor="middle")
    kind = f"label c{colour}" if fits else f"label crowded c{colour}"
    return element("g", plate, text, class_=kind, data_r=str(number))


def place_labels(
    boxes: Sequence[Rectangle], names: Sequence[str], width: float, height: float
) -> list[tuple[Rectangle, bool]]:
    """Where each box's label goes, inside the drawing, and whether it covers none of those before it."""
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
    """A colour for each tag: everywhere the same one, unless another tag of the record has it already."""
    out: dict[str, int] = {}
    for tag in dict.fromkeys(tags):
        wanted = int.from_bytes(hashlib.blake2b(tag.encode("utf-8", "replace"), digest_size=2).digest(), "big")
        taken = set(out.values()) if len(out) < NUM_COLOURS else set()
        out[tag] = next(c % NUM_COLOURS for c in range(wanted, wanted + NUM_COLOURS) if c % NUM_COLOURS not in taken)
    return out


def _region_list(record: Record) -> Html:
    regions = record.regions[:_MAX_REGIONS]
    colours = colours_of([region.tag for region in regions])
    items = []
    for number, region in enumerate(regions):
        content = joined(
            element("span", str(number), class_="index"),
            element("bdi", shortened(region.tag, _MAX_NAME_LEN) or "(no tag)"),
            element("span", f"{region.score:.2f}", class_="score"),
        )
        kind = f"region c{colours[region.tag]}"
        items.append(element("li", element("button", content, type="button", class_=kind, data_r=str(number))))
    if len(record.regions) > len(regions):
        items.append(element("li", f"and {len(record.regions) - len(regions):,} more", class_="note"))
    return element("ul", *items, class_="chips regions") if items else Html("")


def segments(text_len: int, phrases: Sequence[Phrase]) -> list[tuple[int, int, tuple[int, ...]]]:
    """The caption in pieces (start, end, numbers of the phrases that cover it), cut wherever a span begins or ends."""
    spans = [(start, end, number) for number, phrase in enumerate(phrases) for start, end in phrase.spans]
    cuts = sorted({0, text_len, *(place for start, end, _ in spans for place in (start, end) if place < text_len)})
    out = []
    for start, end in pairwise(cuts):
        covering = {number for first, last, number in spans if first <= start and end <= last}
        out.append((start, end, tuple(sorted(covering))))
    return out


def _caption(caption: Caption, number: int) -> Html:
    text = caption.text[:_MAX_CAPTION_LEN]
    phrases = caption.phrases[:_MAX_PHRASES]
    pieces = []
    for start, end, covering in segments(len(text), phrases):
        if not covering:
            pieces.append(joined(text[start:end]))
            continue
        kinds = sorted({KINDS[len(phrases[p].tuple) - 1] for p in covering}, key=KINDS.index)
        names = " | ".join(shortened(" · ".join(phrases[p].tuple), _MAX_NAME_LEN) for p in covering)
        places = " ".join(f"{number}.{p}" for p in covering)
        pieces.append(element("span", text[start:end], class_="mark " + " ".join(kinds), data_p=places, title=names))
    rest = []
    if len(caption.text) > len(text):
        rest.append(element("p", f"cut here; {len(caption.text):,} characters in all", class_="note"))
    if len(caption.phrases) > len(phrases):
        rest.append(element("p", f"{len(phrases)} of {len(caption.phrases):,} phrases shown", class_="note"))
    return element("section", element("p", *pieces, class_="caption", dir="auto"), *rest, _phrase_list(phrases, number))


def _phrase_list(phrases: Sequence[Phrase], caption_number: int) -> Html:
    items = []
    for number, phrase in enumerate(phrases):
        words = [element("bdi", shortened(word, _MAX_NAME_LEN)) for word in phrase.tuple]
        content = [element("span", *_between(words, " · "), class_=f"mark {KINDS[len(words) - 1]}")]
        shown = [str(region) for region in phrase.regions if region < _MAX_REGIONS]
        if shown:
            content.append(element("span", "→ " + " ".join(shown), class_="score"))
        if not phrase.spans:
            content.append(element("span", "no span", class_="score"))
        place = {"data_p": f"{caption_number}.{number}", "data_r": " ".join(shown) or None}
        items.append(element("li", element("button", *content, type="button", class_="phrase", **place)))
    return element("ul", *items, class_="chips phrases") if items else Html("")


def _between(parts: Sequence[str], separator: str) -> list[str]:
    return [piece for part in parts for piece in (separator, part)][1:]
