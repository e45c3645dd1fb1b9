"""Finds COCO's pictures by their number: COCO_train2014_000000000009.jpg, in a folder of all or in train2014/."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def subset_folder(images: Path | None, subset: str) -> str:
    """Returns what stands in front of the pictures of a subset: `train2014/` where `images` has it, else ""."""
    return f"{subset}/" if images is not None and (images / subset).is_dir() else ""


def coco_picture(images: Path | None, subset: str) -> Callable[[int], str]:
    """Returns what says the path below `images` of a picture of a subset, such as train2014, by its number."""
    folder = subset_folder(images, subset)
    return lambda image_id: f"{folder}COCO_{subset}_{image_id:012d}.jpg"
