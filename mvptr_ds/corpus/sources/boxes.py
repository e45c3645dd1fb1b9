"""Makes boxes of a source into x1, y1, x2, y2 in pixels, inside the picture; counts those that cannot be used."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

from PIL import Image

from mvptr_ds.corpus.resumable_jobs import Summary

BOXES_CUT = "boxes cut at the edge of their picture"
_DIGITS = 4  # behind the point: x + w of two decimals is 12.340000000000002
_EDGE_PX = 1.0  # how far a box may stand out before it is counted: annotation tools round


class BoxError(ValueError):
    """Says that a box cannot be used; `reason` is one of a few, for counting."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason} {detail}")
        self.reason = reason
        self.detail = detail


def corners(box_xywh: Any) -> list[float]:
    """Returns x1, y1, x2, y2 of a box in COCO's form: x, y, width, height.

    Raises:
        BoxError: these are not four finite numbers.
    """
    x, y, width, height = _numbers(box_xywh)
    return [x, y, x + width, y + height]


def check_box(box: Any, size: tuple[int, int], summary: Summary) -> list[float]:
    """Returns a box x1, y1, x2, y2 cut to its picture; one that stood out by more than a pixel is counted.

    Args:
        size: width and height of the picture in pixels; 0, 0 where they are not known, and nothing is cut.

    Raises:
        BoxError: these are not four finite numbers, or nothing of the box lies in the picture, or it has no area.
    """
    x1, y1, x2, y2 = found = _numbers(box)
    if not (x1 < x2 and y1 < y2):
        raise BoxError("row: a box without an area", f"{found}")
    width, height = size
    if not width or not height:
        return [round(value, _DIGITS) for value in found]
    cut = [max(0.0, x1), max(0.0, y1), min(float(width), x2), min(float(height), y2)]
    if not (cut[0] < cut[2] and cut[1] < cut[3]):
        raise BoxError("row: a box outside its picture", f"{found} in {width} x {height}")
    if max(abs(a - b) for a, b in zip(cut, found, strict=True)) > _EDGE_PX:
        summary.counts[BOXES_CUT] += 1
    return [round(value, _DIGITS) for value in cut]


def _numbers(box: Any) -> list[float]:
    is_box = isinstance(box, (list, tuple)) and len(box) == 4
    if not is_box or not all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in box):
        raise BoxError("row: a box that is not four numbers", f"{box!r:.80}")
    try:
        numbers = [float(value) for value in box]
    except OverflowError:
        numbers = [math.inf]
    if not all(math.isfinite(value) for value in numbers):
        raise BoxError("row: a box that is not four numbers", f"{box!r:.80}")
    return numbers


@functools.lru_cache(maxsize=1024)  # the texts of a picture mostly stand together
def picture_size(images: Path | None, name: str) -> tuple[int, int]:
    """Returns width and height in pixels as the picture's file says them; 0, 0 where it cannot be read."""
    if images is None or not (images / name).is_file():
        return 0, 0
    try:
        with Image.open(images / name) as picture:
            return picture.size
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return 0, 0  # the builder reads the whole picture and says what is wrong
