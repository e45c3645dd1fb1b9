"""A record's image member -> a square of pixels. Pictures come from anywhere: see docs/hostile_input.md.

A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves enough of it, by libjpeg-turbo itself (simplejpeg) where that is
installed; whatever it does not take without a complaint is Pillow's to read or to refuse, so the two accept the same.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from mvptr_ds.data.schema import DataError
from mvptr_ds.data.tars import IMAGE_EXTENSIONS

try:
    import simplejpeg
except ImportError:  # there are no wheels for this machine
    simplejpeg = None

MAX_IMAGE_PIXELS = 64_000_000  # a larger picture is refused before it is decoded (decompression bombs)
DECODE_ERRORS = (  # what Pillow raises on damaged or hostile pictures
    *(OSError, ValueError, TypeError, SyntaxError, EOFError, KeyError, IndexError, struct.error, zlib.error),
    Image.DecompressionBombError,
)
_JPEG_COLOURS = ("YCbCr", "Gray", "RGB")  # others (CMYK) are not the same in all programs: Pillow's way
_REDUCTIONS = (8, 4, 2, 1)  # with kernels of their own; fractions between them cost more than they save


def decode_image(members: Mapping[str, bytes], image_size: int) -> np.ndarray:
    """The image member as RGB, uint8 [3, image_size, image_size], resized by antialiased bicubic interpolation.

    The channels need not lie one behind the other in memory.

    Raises:
        DataError: no image member, not JPEG, PNG or WebP, cut, or above MAX_IMAGE_PIXELS.
    """
    content = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
    if content is None:
        raise DataError(f"the record has no image, only {sorted(members)}; use visual.source=features")
    if simplejpeg is not None and content.startswith(b"\xff\xd8"):
        image_HW3 = _decode_jpeg(content, image_size)
        if image_HW3 is not None:
            return _resize(image_HW3, image_size)
    return _decode(content, image_size)


def _decode_jpeg(content: bytes, image_size: int) -> np.ndarray | None:
    """uint8 [H, W, 3], H and W at least image_size where the picture is; None when Pillow is to be asked."""
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(content)
        if colours not in _JPEG_COLOURS:
            return None
        _check_pixels(width, height)
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


def _decode(content: bytes, image_size: int) -> np.ndarray:
    try:
        with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
            _check_pixels(*image.size)
            image.draft("RGB", (image_size, image_size))  # JPEG decodes at 1/2, 1/4, 1/8 where that is enough
            small = image.convert("RGB").resize((image_size, image_size), Image.Resampling.BICUBIC)
    except DECODE_ERRORS as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"the image cannot be decoded: {decode_problem(error)}; replace or remove it") from error
    return np.asarray(small, dtype=np.uint8).transpose(2, 0, 1)


def _check_pixels(width: int, height: int) -> None:
    if width * height > MAX_IMAGE_PIXELS:
        raise DataError(f"the image has {width} x {height} pixels, at most {MAX_IMAGE_PIXELS} are decoded")


def decode_problem(error: Exception) -> str:
    """What Pillow says, without the address in memory that it names where it knows no format."""
    return "its format is not known" if isinstance(error, UnidentifiedImageError) else str(error)
