"""Decodes a record's image to a square of pixels. Images come from anywhere: see docs/hostile_input.md.

A JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves enough of it. libjpeg-turbo does that (simplejpeg),
where it is installed. Whatever it does not take without a complaint, and every other format, Pillow reads or refuses.
So both ways accept the same files. pixels.py says what becomes of alpha and of 16 bits, before anything is resized.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from mvptr_ds.data.pixels import MAX_IMAGE_PIXELS, check_pixels, open_image, read_rgb
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.errors import DataError

try:
    import simplejpeg
except ImportError:  # there are no wheels for this machine
    simplejpeg = None

_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # programs differ in others (CMYK), which are left to Pillow
_MAX_EXACT_SIDE = 1_000_000  # pixels; of a longer side, means are taken before it is resized
_REDUCTIONS = (8, 4, 2, 1)  # libjpeg has kernels for these; fractions between them cost more than they save


class Square(NamedTuple):
    """A square image, and what was changed to show it."""

    image_3HW: np.ndarray  # uint8, RGB; strides may be those of channels_last
    changes: tuple[str, ...]  # see pixels.Rgb


def decode_image(members: Mapping[str, bytes], image_size: int) -> np.ndarray:
    """Decodes the image member to RGB, uint8 [3, image_size, image_size]; strides may be those of channels_last.

    It is resized by antialiased bicubic interpolation.

    Raises:
        DataError: there is no image member, or it is not JPEG, PNG or WebP, is cut, or is above MAX_IMAGE_PIXELS.
    """
    return decode_square(image_content(members), image_size).image_3HW


def image_content(members: Mapping[str, bytes]) -> bytes:
    """Returns the bytes of the image member. Raises DataError where there is none."""
    content = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
    if content is None:
        raise DataError(f"the record has no image, only {sorted(members)}; use visual.source=features")
    return content


def decode_square(content: bytes, image_size: int) -> Square:
    """Decodes an image as `decode_image` does, and says what was changed to show it."""
    if simplejpeg is not None and content.startswith(b"\xff\xd8"):
        image_HW3 = _decode_jpeg(content, image_size)
        if image_HW3 is not None:
            return Square(_resize(image_HW3, image_size), ())
    return _decode(content, image_size)


def _decode_jpeg(content: bytes, image_size: int) -> np.ndarray | None:
    """Fast path of `_decode`, which is the specification of what is accepted; returns None where Pillow is to decode.

    The image is uint8 [H, W, 3]; H and W are at least image_size where its own are.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in _JPEG_COLOURS:
            return None
        check_pixels(width, height, MAX_IMAGE_PIXELS)
        by = next((by for by in _REDUCTIONS if min(height, width) >= by * image_size), 1)
        least = {"min_height": height // by, "min_width": width // by, "min_factor": by}
        # strict: else a file that is cut gives an image that is grey below the cut
        return simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True, **least)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        return None


def _resize(image_HW3: np.ndarray, image_size: int) -> np.ndarray:
    # Fast path of Pillow's resize: torch's kernel for bytes gives its numbers in half the time. The batch of one must
    # be channels_last by its strides, too, or the kernel copies to another layout and back, a quarter of that time.
    image_13HW = torch.from_numpy(image_HW3)[None].permute(0, 3, 1, 2)
    size = (image_size, image_size)
    out = torch.nn.functional.interpolate(image_13HW, size, mode="bicubic", antialias=True, align_corners=False)
    return out[0].numpy()


def _decode(content: bytes, image_size: int) -> Square:
    with open_image(content, MAX_IMAGE_PIXELS) as image:
        rgb, changes = read_rgb(image, least_side=image_size)
    # Pillow holds 32 bytes of weights for each pixel of a side; only a PNG can be a line of millions of pixels
    gap = 3.0 if max(rgb.size) > _MAX_EXACT_SIDE else None
    small = rgb.resize((image_size, image_size), Image.Resampling.BICUBIC, reducing_gap=gap)
    return Square(np.asarray(small, dtype=np.uint8).transpose(2, 0, 1), changes)
