"""A record's image member -> a square of pixels. Pictures come from anywhere: see docs/hostile_input.md.

A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves enough of it, by libjpeg-turbo itself (simplejpeg) where that is
installed; whatever it does not take without a complaint is Pillow's to read or to refuse, so the two accept the same.
All else than JPEG is Pillow's: pixels.py says what it makes of alpha and of 16 bits, before anything is resized.
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

_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # others (CMYK) are not the same in all programs: Pillow's way
_MAX_EXACT_SIDE = 1_000_000  # pixels; of a longer side, means are taken before it is resized
_REDUCTIONS = (8, 4, 2, 1)  # with kernels of their own; fractions between them cost more than they save


class Square(NamedTuple):
    image_3HW: np.ndarray  # uint8, RGB; the channels need not lie one behind the other in memory
    changes: tuple[str, ...]  # see pixels.Rgb


def decode_image(members: Mapping[str, bytes], image_size: int) -> np.ndarray:
    """The image member as RGB, uint8 [3, image_size, image_size], resized by antialiased bicubic interpolation.

    The channels need not lie one behind the other in memory.

    Raises:
        DataError: no image member, not JPEG, PNG or WebP, cut, or above MAX_IMAGE_PIXELS.
    """
    return decode_square(image_content(members), image_size).image_3HW


def image_content(members: Mapping[str, bytes]) -> bytes:
    """Raises DataError where there is no image member."""
    content = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
    if content is None:
        raise DataError(f"the record has no image, only {sorted(members)}; use visual.source=features")
    return content


def decode_square(content: bytes, image_size: int) -> Square:
    """`decode_image` of a picture, and what was done to show it."""
    if simplejpeg is not None and content.startswith(b"\xff\xd8"):
        image_HW3 = _decode_jpeg(content, image_size)
        if image_HW3 is not None:
            return Square(_resize(image_HW3, image_size), ())
    return _decode(content, image_size)


def _decode_jpeg(content: bytes, image_size: int) -> np.ndarray | None:
    """uint8 [H, W, 3], H and W at least image_size where the picture is; None when Pillow is to be asked."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in _JPEG_COLOURS:
            return None
        check_pixels(width, height, MAX_IMAGE_PIXELS)
        by = next((by for by in _REDUCTIONS if min(height, width) >= by * image_size), 1)
        least = {"min_height": height // by, "min_width": width // by, "min_factor": by}
        # strict: a picture that is cut would be grey below the cut otherwise
        return simplejpeg.decode_jpeg(content, colorspace="RGB", strict=True, **least)
    except ValueError as error:
        if isinstance(error, DataError):
            raise
        return None


def _resize(image_HW3: np.ndarray, image_size: int) -> np.ndarray:
    # torch's kernel for bytes gives Pillow's numbers in half the time. Unless the strides of the batch of one, too, say
    # that its channels lie beside each other, it sorts them apart and together again, for a quarter of that
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
