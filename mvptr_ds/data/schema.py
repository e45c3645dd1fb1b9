"""What one record of a shard says: `KEY.json` of schema 1, read and checked.

    {"schema": 1, "image_id": "...", "width": 640, "height": 480,
     "captions": [{"text": "A brown dog.", "phrases": [{"tuple": ["dog", "brown"], "spans": [[2, 7], [8, 11]]}]}],
     "regions": [{"box": [x1, y1, x2, y2], "tag": "dog", "score": 0.9}]}

Boxes are pixels of the original image, spans are half-open character ranges of the caption. A phrase may name the
regions it refers to (`"regions": [0]`, indices into the record's list): training never looks at them, the evaluation
of phrase grounding does.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any

SCHEMA_VERSION = 1
Words = tuple[str, ...]
Spans = tuple[tuple[int, int], ...]
Numbers = tuple[int, ...]


class DataError(ValueError):
    """Something is wrong with the user's data; the message says what, where and what to do."""


@dataclass(frozen=True)
class Phrase:
    tuple: Words  # (noun) | (noun, attribute) | (subject, relation, object)
    spans: Spans  # characters of the caption, half open
    regions: Numbers = ()  # ground truth of grounding, where it is known


@dataclass(frozen=True)
class Caption:
    text: str
    phrases: tuple[Phrase, ...] = ()


@dataclass(frozen=True)
class Region:
    box: tuple[float, float, float, float]  # x1, y1, x2, y2 in pixels
    tag: str
    score: float = 1.0


@dataclass(frozen=True)
class Record:
    image_id: str
    width: int
    height: int
    captions: tuple[Caption, ...]
    regions: tuple[Region, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """The JSON object written as `KEY.json`."""
        out: dict[str, Any] = {"schema": SCHEMA_VERSION, **asdict(self)}
        for caption in out["captions"]:
            for phrase in caption["phrases"]:
                if not phrase["regions"]:
                    del phrase["regions"]
        return out


def parse_record(content: bytes | dict[str, Any]) -> Record:
    """Reads one `KEY.json`.

    Raises:
        DataError: for anything that is not a record of schema 1, naming the field and its value.
    """
    if isinstance(content, bytes):
        try:
            content = json.loads(content)
        except (UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"the record is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise DataError(f"the record is a {type(content).__name__}, not a JSON object")
    if content.get("schema") != SCHEMA_VERSION:
        raise DataError(f"schema is {content.get('schema')!r}, this version reads {SCHEMA_VERSION}")
    try:
        record = Record(
            image_id=str(content["image_id"]),
            width=int(content["width"]),
            height=int(content["height"]),
            captions=tuple(_caption(c) for c in content["captions"]),
            regions=tuple(_region(r) for r in content.get("regions", ())),
        )
    except (KeyError, TypeError, ValueError, OverflowError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"a field is missing or of the wrong type: {error!r}") from error
    if record.width < 1 or record.height < 1:
        raise DataError(f"width x height is {record.width} x {record.height}, both must be at least 1")
    if not record.captions:
        raise DataError("the record has no caption")
    for caption in record.captions:
        for phrase in caption.phrases:
            if any(not 0 <= r < len(record.regions) for r in phrase.regions):
                raise DataError(f"phrase {phrase.tuple} names regions {phrase.regions} of {len(record.regions)}")
    return record


def _caption(content: dict[str, Any]) -> Caption:
    text = content["text"]
    if not isinstance(text, str) or not text.strip():
        raise DataError(f"caption text is {text!r}; empty captions are rejected when shards are built")
    return Caption(text, tuple(_phrase(p, len(text)) for p in content.get("phrases", ())))


def _phrase(content: dict[str, Any], text_len: int) -> Phrase:
    words = tuple(content["tuple"])
    if not 1 <= len(words) <= 3 or not all(isinstance(w, str) and w for w in words):
        raise DataError(f"phrase tuple is {words!r}, expected one to three words")
    spans = tuple((int(start), int(end)) for start, end in content["spans"])
    if any(not 0 <= start < end <= text_len for start, end in spans):
        raise DataError(f"phrase {words} has spans {spans} in a caption of {text_len} characters")
    return Phrase(words, spans, tuple(int(r) for r in content.get("regions", ())))


def _region(content: dict[str, Any]) -> Region:
    x1, y1, x2, y2 = (float(v) for v in content["box"])
    if not all(math.isfinite(v) for v in (x1, y1, x2, y2)) or x2 < x1 or y2 < y1:
        raise DataError(f"region box is {content['box']}, expected finite x1 <= x2 and y1 <= y2")
    return Region((x1, y1, x2, y2), str(content["tag"]), float(content.get("score", 1.0)))
