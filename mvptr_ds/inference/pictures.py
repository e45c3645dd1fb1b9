"""Pictures as people have them, with or without regions, as the samples that the model reads.

Legend: R regions, F feature size, H W height and width.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mvptr_ds.data.images import decode_square
from mvptr_ds.data.pixels import MAX_IMAGE_PIXELS, check_pixels, open_image, read_rgb
from mvptr_ds.data.schema import Record, Region
from mvptr_ds.errors import DataError


@dataclass(frozen=True)
class Picture:
    """A picture and what is known of its regions.

    Attributes:
        image: a PIL image, a path, the bytes of a JPEG, PNG or WebP file, an array [H, W, 3] (uint8, or floats 0..1),
            or a tensor [3, H, W] of either. None: its features are all that there is.
        boxes: [R, 4], x1 y1 x2 y2 in pixels. None: those of the detector, or without one the cells of a grid.
        tags: the object tag of each box.
        features: [R, F], for a model that reads region features.
        size: width and height in pixels, where there is no image.
    """

    image: Any = None
    boxes: Any = None
    tags: Sequence[str] | None = None
    features: Any = None
    size: tuple[int, int] | None = None


@dataclass(frozen=True)
class Seen:
    """A picture as it is encoded: its record, pixels and features."""

    record: Record  # without captions
    image_3HW: np.ndarray | None  # uint8 RGB, resized to a square
    features_RF: np.ndarray | None  # float32


def is_one(pictures: Any) -> bool:
    """Returns whether this is a lone picture, not several."""
    if isinstance(pictures, np.ndarray | torch.Tensor):
        return pictures.ndim == 3
    return isinstance(pictures, Picture | Image.Image | str | os.PathLike | bytes)


def as_list(pictures: Any) -> list[Picture]:
    """Returns pictures, of which any may be given bare: one of them, or several in a list, tuple or batch."""
    if is_one(pictures):
        pictures = [pictures]
    elif not isinstance(pictures, Iterable):
        raise DataError(f"pictures are {type(pictures).__name__}, expected PIL images, paths, bytes, arrays or tensors")
    return [picture if isinstance(picture, Picture) else Picture(picture) for picture in pictures]


def see(picture: Picture, image_size: int, needs_pixels: bool) -> Seen:
    """Reads a picture.

    Args:
        image_size: pixels of the square that it is resized to.
        needs_pixels: whether the model reads pixels, else features.

    Raises:
        DataError: the picture cannot be read, or its regions do not fit it, with the reason.
    """
    image_3HW, size = None, picture.size
    if picture.image is not None:
        image_3HW, size = _read(picture.image, image_size if needs_pixels else None)
    elif needs_pixels:
        raise DataError("there is no image, and this model reads pixels")
    if size is None:
        raise DataError("there is neither an image nor its size: give size=(width, height), which boxes are shares of")
    features_RF = None
    if not needs_pixels:
        if picture.features is None:
            raise DataError("this model reads region features: give boxes and features, or load it with a detector")
        features_RF = np.asarray(picture.features, dtype=np.float32)
    return Seen(Record("", *size, (), _regions(picture, size, features_RF)), image_3HW, features_RF)


def _regions(picture: Picture, size: tuple[int, int], features_RF: np.ndarray | None) -> tuple[Region, ...]:
    if picture.boxes is None:
        if picture.tags or features_RF is not None:
            raise DataError("there are tags or features, but no boxes: give the box of each")
        return ()
    boxes_R4 = np.asarray(picture.boxes, dtype=np.float64)
    if boxes_R4.ndim != 2 or boxes_R4.shape[1] != 4 or not np.isfinite(boxes_R4).all():
        raise DataError(f"boxes have shape {boxes_R4.shape}, expected [R, 4] of finite numbers x1 y1 x2 y2 in pixels")
    tags = [""] * len(boxes_R4) if picture.tags is None else list(picture.tags)
    if len(tags) != len(boxes_R4):
        raise DataError(f"{len(tags)} tags for {len(boxes_R4)} boxes; give one a box, an empty one where it has none")
    if features_RF is not None and (features_RF.ndim != 2 or len(features_RF) != len(boxes_R4)):
        raise DataError(f"features have shape {features_RF.shape} for {len(boxes_R4)} boxes; give [R, F]")
    width, height = size
    for number, (x1, y1, x2, y2) in enumerate(boxes_R4.tolist()):
        if x2 <= x1 or y2 <= y1 or x2 <= 0 or y2 <= 0 or x1 >= width or y1 >= height:
            raise DataError(
                f"box {number} is {x1:g} {y1:g} {x2:g} {y2:g}, which holds nothing of the {width} x {height} picture"
            )
    return tuple(
        Region((box[0], box[1], box[2], box[3]), tag) for box, tag in zip(boxes_R4.tolist(), tags, strict=True)
    )


def rgb_of(image: Any) -> Image.Image:
    """Returns the picture as a PIL image in RGB, of its own size. Raises DataError where it cannot be read."""
    if isinstance(image, str | os.PathLike):
        image = _content(image)
    if isinstance(image, bytes):
        with open_image(image, MAX_IMAGE_PIXELS) as opened:
            return read_rgb(opened).image
    if not isinstance(image, Image.Image):
        image = Image.fromarray(_as_bytes(image))
    width, height = image.size
    check_pixels(width, height, MAX_IMAGE_PIXELS)
    return read_rgb(image.copy()).image


def _read(image: Any, image_size: int | None) -> tuple[np.ndarray | None, tuple[int, int]]:
    """Returns the pixels, where `image_size` asks for them, and the size of the picture."""
    if isinstance(image, str | os.PathLike):
        image = _content(image)
    if isinstance(image, bytes):  # as training decodes it, to the bit
        with open_image(image, MAX_IMAGE_PIXELS) as opened:
            size = opened.size
        return (None if image_size is None else decode_square(image, image_size).image_3HW), size
    rgb = rgb_of(image)
    if image_size is None:
        return None, rgb.size
    square = rgb.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return np.asarray(square, dtype=np.uint8).transpose(2, 0, 1), rgb.size


def _content(path: str | os.PathLike) -> bytes:
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise DataError(f"{os.fspath(path)} cannot be read ({error.strerror})") from error


def _as_bytes(image: Any) -> np.ndarray:
    """Returns an array or tensor as uint8 [H, W, 3]."""
    if isinstance(image, torch.Tensor):
        pixels = image.detach().cpu().numpy()
        pixels = pixels.transpose(1, 2, 0) if pixels.ndim == 3 else pixels
    elif isinstance(image, np.ndarray):
        pixels = image
    else:
        raise DataError(f"a picture is {type(image).__name__}, expected a PIL image, path, bytes, array or tensor")
    if pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        raise DataError(f"a picture has shape {tuple(image.shape)}, expected an array [H, W, 3] or a tensor [3, H, W]")
    if np.issubdtype(pixels.dtype, np.floating):
        if not (np.isfinite(pixels).all() and pixels.min() >= 0.0 and pixels.max() <= 1.0):
            raise DataError("a picture of floats must lie within 0 to 1; give uint8, or numbers before normalisation")
        return np.asarray((pixels * 255.0).round(), dtype=np.uint8)
    if pixels.dtype != np.uint8:
        raise DataError(f"a picture is {pixels.dtype}, expected uint8 or floats within 0 to 1")
    return np.ascontiguousarray(pixels)
