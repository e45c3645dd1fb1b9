"""Finds COCO's pictures by their number: COCO_train2014_000000000009.jpg, in a folder of all or in train2014/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def coco_picture(images: Path | None, subset: str) -> Callable[[int], str]:
    """Returns what says the path below `images` of a picture of a subset, such as train2014, by its number.

    The pictures are looked for in a folder that bears the subset's name, where there is one, else in `images` itself.
    """
    folder = f"{subset}/" if images is not None and (images / subset).is_dir() else ""
    return lambda image_id: f"{folder}COCO_{subset}_{image_id:012d}.jpg"
