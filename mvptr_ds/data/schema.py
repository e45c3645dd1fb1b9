"""Reads and checks `KEY.json` of schema 1: one record of a shard, or one entry of a sidecar.

    {"schema": 1, "image_id": "...", "width": 640, "height": 480,
     "captions": [{"text": "A brown dog.", "phrases": [{"tuple": ["dog", "brown"], "spans": [[2, 7], [8, 11]]}]}],
     "regions": [{"box": [x1, y1, x2, y2], "tag": "dog", "score": 0.9}]}

Boxes are pixels of the original image, spans are half-open character ranges of the caption. A phrase may name the
regions it refers to (`"regions": [0]`, indices into the record's list). Training never looks at them, but the
evaluation of phrase grounding does. Fields that the schema does not know may stand anywhere and are ignored.

`captions` may be empty (an image-only record), and width and height may be 0 where there is nothing to see (a text-only
record). `"extractor": {"name": "...", "version": "..."}` says what made the regions, features or phrases.

An entry of a sidecar has no image_id but an extractor, and any of width and height, regions, captions. What it has
takes the place of the record's (shards/sidecars.py).
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal, NamedTuple

import msgspec

from mvptr_ds.errors import DataError

SCHEMA_VERSION = 1
MAX_SIDE_PX = 1_000_000  # of an image
MAX_TEXT_CHARS = 100_000  # of a caption or tag: all of it is tokenised, and a character may take 600 bytes for that
_MAX_DIGITS = 600  # of a whole number, far more than a float can hold and fewer than Python reads
Text = Annotated[str, msgspec.Meta(max_length=MAX_TEXT_CHARS)]
Words = tuple[str, ...]
Spans = tuple[tuple[int, int], ...]
Numbers = tuple[int, ...]


# Phrase, Caption and Region are structs of msgspec, not dataclasses, because its parser makes dozens of them a record.
# They form no cycles, so the garbage collector need not track them (gc=False): tracking took 5 % of the loader's time.
class Phrase(msgspec.Struct, frozen=True, gc=False):
    """A phrase concept of a caption: its words as lemmas, and where the caption says them."""

    tuple: Words  # (noun) | (noun, attribute) | (subject, relation, object)
    spans: Spans  # characters of the caption, half open
    regions: Numbers = ()  # ground truth of grounding, where it is known


class Caption(msgspec.Struct, frozen=True, gc=False):
    """A text about an image, with its phrases, and the answers of downstream tasks by name."""

    text: Text
    phrases: tuple[Phrase, ...] = ()
    labels: dict[str, Any] | None = None  # whatever JSON holds; the task that reads one checks it


class Region(msgspec.Struct, frozen=True, gc=False):
    """A box of an image with its object tag."""

    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    tag: Text
    score: float = 1.0


class Extractor(NamedTuple):
    """What made regions, features or phrases: those that do not fit each other bear another name or version."""

    name: str
    version: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}"


@dataclass(frozen=True)
class Record:
    """One image with its captions and regions."""

    image_id: str
    width: int
    height: int
    captions: tuple[Caption, ...]
    regions: tuple[Region, ...] = field(default=())
    extractor: Extractor | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object written as `KEY.json`."""
        out: dict[str, Any] = {
            "schema": SCHEMA_VERSION,
            "image_id": self.image_id,
            "width": self.width,
            "height": self.height,
            "captions": captions_json(self.captions),
            "regions": [msgspec.structs.asdict(region) for region in self.regions],
        }
        if self.extractor is not None:
            out["extractor"] = self.extractor._asdict()
        return out


@dataclass(frozen=True)
class SidecarEntry:
    """What a sidecar says of one record; it says nothing of what is None."""

    extractor: Extractor
    width: int | None = None
    height: int | None = None
    captions: tuple[Caption, ...] | None = None
    regions: tuple[Region, ...] | None = None

    def to_json(self) -> dict[str, Any]:
        """Returns the JSON object written as `KEY.json`."""
        out: dict[str, Any] = {"schema": SCHEMA_VERSION, "extractor": self.extractor._asdict()}
        if self.width is not None and self.height is not None:
            out |= {"width": self.width, "height": self.height}
        if self.captions is not None:
            out["captions"] = captions_json(self.captions)
        if self.regions is not None:
            out["regions"] = [msgspec.structs.asdict(region) for region in self.regions]
        return out


def captions_json(captions: Sequence[Caption]) -> list[dict[str, Any]]:
    """Returns captions as they stand in `KEY.json`."""
    out: list[dict[str, Any]] = msgspec.to_builtins(captions)
    for caption in out:
        if caption["labels"] is None:
            del caption["labels"]
        for phrase in caption["phrases"]:
            if not phrase["regions"]:
                del phrase["regions"]
    return out


def parse_record(content: bytes | dict[str, Any]) -> Record:
    """Reads one `KEY.json` of a record.

    Raises:
        DataError: the content is no record of schema 1; the message names the field and its value.
    """
    return _usual_record(content, slice(None)) or _record(load_json(content))


def parse_sample_record(content: bytes, caption: int) -> Record:
    """Reads like `parse_record`, with one of the captions alone (none where the record has none); others may be bad.

    Raises:
        DataError: as `parse_record`, or there is no such caption.
    """
    record = _usual_record(content, slice(caption, caption + 1))
    if record is not None:
        return record
    fields = load_json(content)
    captions = fields.get("captions")
    if isinstance(captions, list) and captions:
        if not 0 <= caption < len(captions):
            raise DataError(f"caption {caption} of a record with {len(captions)}; rebuild the index")
        fields["captions"] = captions[caption : caption + 1]
    return _record(fields)


def parse_entry(content: bytes | dict[str, Any]) -> Record | SidecarEntry:
    """Reads one `KEY.json`, of a record or of a sidecar.

    Raises:
        DataError: the content is neither; the message names the field and its value.
    """
    record = _usual_record(content, slice(None))
    if record is not None:
        return record
    content = load_json(content)
    return _sidecar_entry(content) if "extractor" in content and "image_id" not in content else _record(content)


class _Maker(msgspec.Struct):
    """An extractor as it stands in a record, for the fast path."""

    name: str
    version: str


class _Usual(msgspec.Struct):
    """`KEY.json` of a record with every field of its own type, for the fast path; unknown fields are ignored."""

    schema: Literal[1]
    image_id: str
    width: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE_PX)]
    height: Annotated[int, msgspec.Meta(ge=0, le=MAX_SIDE_PX)]
    captions: tuple[Caption, ...]
    regions: tuple[Region, ...] = ()
    extractor: _Maker | msgspec.UnsetType = msgspec.UNSET


_usual_decoder = msgspec.json.Decoder(_Usual)
_FAR_PX = 1e300


def _usual_record(content: bytes | dict[str, Any], captions: slice) -> Record | None:
    """Fast path of `_record`, which is the specification; takes a third of its time.

    Returns the record with a slice of its captions, or None for anything unusual, which `_record` then parses or
    reports. Must accept a subset of what `_record` accepts, with equal results.
    """
    if not isinstance(content, bytes):
        return None
    try:
        if not content.isascii():
            content.decode()  # the parser does not look at the bytes of text in unknown fields
        fields = _usual_decoder.decode(content)
        made_by = fields.extractor
        extractor = _extractor(msgspec.structs.asdict(made_by)) if isinstance(made_by, _Maker) else None
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    chosen = fields.captions[captions]
    if fields.captions and not chosen:
        return None
    if min(fields.width, fields.height) < 1 and (fields.width or fields.height or fields.regions):
        return None
    for caption in chosen:
        if not _is_usual(caption, len(fields.regions)):
            return None
    for region in fields.regions:
        x1, y1, x2, y2 = region.box
        if not (-_FAR_PX < x1 <= x2 < _FAR_PX and -_FAR_PX < y1 <= y2 < _FAR_PX):
            return None
    return Record(fields.image_id, fields.width, fields.height, chosen, fields.regions, extractor)


def _is_usual(caption: Caption, num_regions: int) -> bool:
    text_len = len(caption.text)
    if caption.labels is not None:  # the parsers differ in numbers that no field declares
        return False
    for phrase in caption.phrases:
        if not 1 <= len(phrase.tuple) <= 3 or not all(phrase.tuple):
            return False
        for start, end in phrase.spans:
            if not 0 <= start < end <= text_len:
                return False
        if phrase.regions and not 0 <= min(phrase.regions) <= max(phrase.regions) < num_regions:
            return False
    return not caption.text.isspace() and text_len > 0


def load_json(content: bytes | dict[str, Any]) -> dict[str, Any]:
    """Decodes the JSON object of a `KEY.json` of this schema; its fields are still to be checked."""
    if isinstance(content, bytes):
        try:
            content = json.loads(content, parse_int=_whole_number)
        except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, nested too deep
            raise DataError(f"the record is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"the record is a {type(content).__name__}, not a JSON object")
    if content.get("schema") != SCHEMA_VERSION:
        raise DataError(f"schema is {content.get('schema')!r}, this version reads {SCHEMA_VERSION}")
    return content


def _whole_number(digits: str) -> int | float:
    """Decodes a number; one of so many digits that Python refuses becomes infinity, which every field refuses."""
    return int(digits) if len(digits) <= _MAX_DIGITS else float(digits)


def _record(content: dict[str, Any]) -> Record:
    with _naming_the_field():
        record = Record(
            image_id=_text(str(content["image_id"]), "image_id"),
            width=_side(content, "width"),
            height=_side(content, "height"),
            captions=tuple([_caption(c) for c in content["captions"]]),
            regions=tuple([_region(r) for r in content.get("regions", ())]),
            extractor=_extractor(content["extractor"]) if "extractor" in content else None,
        )
    if (record.width, record.height) != (0, 0) or record.regions:
        check_size(record.width, record.height)
    check_phrase_regions(record.captions, len(record.regions))
    return record


def _sidecar_entry(content: dict[str, Any]) -> SidecarEntry:
    with _naming_the_field():
        entry = SidecarEntry(
            extractor=_extractor(content["extractor"]),
            width=_side(content, "width") if "width" in content or "height" in content else None,
            height=_side(content, "height") if "width" in content or "height" in content else None,
            captions=tuple(_caption(c) for c in content["captions"]) if "captions" in content else None,
            regions=tuple(_region(r) for r in content["regions"]) if "regions" in content else None,
        )
    if entry.width is not None and entry.height is not None:
        check_size(entry.width, entry.height)
    if entry.regions is not None:
        check_phrase_regions(entry.captions or (), len(entry.regions))
    return entry


@contextmanager
def _naming_the_field() -> Iterator[None]:
    try:
        yield
    except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"a field is missing or of the wrong type: {error!r}") from error


def check_size(width: int, height: int) -> None:
    """Raises DataError for an image without an area."""
    if width < 1 or height < 1:
        raise DataError(f"width x height is {width} x {height}, both must be at least 1")


def check_phrase_regions(captions: Iterable[Caption], num_regions: int) -> None:
    """Raises DataError for a phrase that names a region that is not there."""
    for caption in captions:
        for phrase in caption.phrases:
            if phrase.regions and not 0 <= min(phrase.regions) <= max(phrase.regions) < num_regions:
                raise DataError(f"phrase {phrase.tuple} names regions {phrase.regions} of {num_regions}")


def _side(content: dict[str, Any], name: str) -> int:
    pixels = int(content[name])
    if not 0 <= pixels <= MAX_SIDE_PX:
        shown = str(pixels) if abs(pixels) < 10**12 else f"{str(pixels)[:12]}..."
        raise DataError(f"{name} is {shown}, expected 0 to {MAX_SIDE_PX} pixels")
    return pixels


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise DataError(f"{name} is {value!r}, expected text")
    if len(value) > MAX_TEXT_CHARS:
        raise DataError(f"{name} has {len(value):,} characters, at most {MAX_TEXT_CHARS:,} are read: {value[:40]!r}...")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise DataError(f"{name} is {value!r}, which is no valid Unicode: half of a surrogate pair") from error
    return value


def _extractor(content: dict[str, Any]) -> Extractor:
    name, version = (_text(content[key], f"extractor {key}").strip() for key in ("name", "version"))
    if not name or not version:
        raise DataError(f"extractor is {content!r}; its name and its version must not be empty")
    return Extractor(name, version)


def _caption(content: dict[str, Any]) -> Caption:
    text = _text(content["text"], "caption text")
    if not text.strip():
        raise DataError(f"caption text is {text[:16]!r}, and says nothing; write one, or leave it out")
    labels = content.get("labels")
    if labels is not None and not isinstance(labels, dict):
        raise DataError(f"caption labels are {labels!r}, expected an object such as {{'answer': 'red'}}")
    return Caption(text, tuple([_phrase(p, len(text)) for p in content.get("phrases", ())]), labels)


def _phrase(content: dict[str, Any], text_len: int) -> Phrase:
    # lists and loops, where generators read better: this runs for each phrase of each sample
    words = tuple(content["tuple"])
    if not 1 <= len(words) <= 3 or not all([_text(word, "phrase word") for word in words]):
        raise DataError(f"phrase tuple is {words!r}, expected one to three words")
    spans = tuple([(int(start), int(end)) for start, end in content["spans"]])
    for start, end in spans:
        if not 0 <= start < end <= text_len:
            raise DataError(f"phrase {words} has spans {spans} in a caption of {text_len} characters")
    return Phrase(words, spans, tuple([int(r) for r in content["regions"]]) if "regions" in content else ())


def _region(content: dict[str, Any]) -> Region:
    x1, y1, x2, y2 = map(float, content["box"])
    # the sum, for speed: it is finite unless a number is not, or is absurd
    if not (math.isfinite(x1 + y1 + x2 + y2) and x1 <= x2 and y1 <= y2):
        raise DataError(f"region box is {content['box']}, expected finite x1 <= x2 and y1 <= y2")
    score = float(content.get("score", 1.0))
    if not math.isfinite(score):
        raise DataError(f"region score is {score}, expected a finite number")
    return Region((x1, y1, x2, y2), _text(content["tag"], "region tag"), score)
