"""Reads an image as RGB by Pillow; the whole package opens images here.

This file decides what an image shows, for each mode of Pillow:

- 1, L, P, RGB, CMYK, YCbCr, HSV and LAB are converted; a colour profile is not applied.
- An alpha channel, a palette with alpha and a transparent colour are drawn on white. Dropped, they would show the
  colour that is hidden under what is transparent, which mostly is black.
- 16-bit grey is scaled to 8 bit, 12 bit too. Pillow's own conversion makes all of its numbers above 255 white.
- I, integers of 32 bit, are taken for 16-bit grey where the largest lies within 256 ... 65535 and none is negative.
- All others are refused by their name: nothing says which number is white in floats (F) and in other integers (I).

Pillow warns of some of this, once a process and in the middle of other lines. Its warnings are silenced, because this
file decides what they are about.
"""

from __future__ import annotations

import functools
import io
import re
import struct
import warnings
import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from mvptr_ds.errors import DataError

MAX_IMAGE_PIXELS = 64_000_000  # a larger image is refused before it is decoded (decompression bombs)
STORED_FORMATS = ("JPEG", "PNG", "WEBP")  # of shards; Pillow's others start programs, or their readers are not tested
TRANSPARENT = "pictures with transparency, drawn on white"
WIDE_GREY = "pictures of 16-bit grey, scaled to 8 bit"

DECODE_ERRORS = (  # what Pillow raises on damaged or hostile images
    *(OSError, ValueError, TypeError, SyntaxError, EOFError, LookupError, struct.error, zlib.error),
    *(ArithmeticError, AssertionError, AttributeError, ImportError, RuntimeError),
    Image.DecompressionBombError,
)
_CONVERTED = frozenset({"1", "L", "P", "RGB", "RGBX", "CMYK", "YCbCr", "HSV", "LAB"})
_WITH_ALPHA = frozenset({"LA", "La", "PA", "RGBA", "RGBa"})
_WIDE_GREY = frozenset({"I", "I;16", "I;16B", "I;16L", "I;16N"})
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0  # a tag of TIFF, and one of its values
_PILLOW = r"PIL\."
_PILLOW_IS_QUIET = ("ignore", None, Warning, re.compile(_PILLOW), 0)


class PixelsError(DataError):
    """An image cannot be shown; `reason` is one of a few, for counting, and `detail` is this one's own."""

    def __init__(self, message: str, reason: str = "", detail: str = "") -> None:
        super().__init__(message)  # alone: loader processes send an error on as its class and a message
        self.reason = reason
        self.detail = detail


class Rgb(NamedTuple):
    """An image as RGB, and what was changed to show it."""

    image: Image.Image  # of mode RGB
    changes: tuple[str, ...]  # what was done to show it, for counting: TRANSPARENT, WIDE_GREY


def open_image(content: bytes, max_pixels: int, formats: tuple[str, ...] = STORED_FORMATS) -> Image.Image:
    """Opens an image: its header is read, its pixels are not yet.

    Raises:
        PixelsError: its format is not one of `formats`, its header is damaged, or it has more than `max_pixels`.
    """
    _silence_pillow()
    try:
        image = Image.open(io.BytesIO(content), formats=formats)
    except Image.DecompressionBombError as error:  # before the size can be asked for
        raise PixelsError(f"the image is too large: {error}", _over(max_pixels), str(error)) from error
    except DECODE_ERRORS as error:
        raise _damaged(error) from error
    check_pixels(*image.size, max_pixels)
    return image


def check_pixels(width: int, height: int, max_pixels: int) -> None:
    """Raises PixelsError where there are more pixels than that."""
    if width * height > max_pixels:
        size = f"{width} x {height}"
        raise PixelsError(f"the image has {size} pixels, at most {max_pixels} are decoded", _over(max_pixels), size)


def read_rgb(image: Image.Image, least_side: int | None = None) -> Rgb:
    """Reads the pixels of an image of `open_image`, which stays open for its metadata.

    Args:
        least_side: a JPEG is decoded at 1/2, 1/4 or 1/8 of its size where that leaves so many pixels of either side.

    Raises:
        PixelsError: the image is cut or damaged, or its mode has no meaning as an image.
    """
    _silence_pillow()
    try:
        if least_side is not None:
            image.draft("RGB", (least_side, least_side))
        raw_mode = _raw_mode(image)
        image.load()
        if image.mode in _WIDE_GREY:
            return _narrowed(image, raw_mode)
        if image.mode in _CONVERTED | _WITH_ALPHA:
            return _on_white(image, raw_mode)
    except DECODE_ERRORS as error:
        if isinstance(error, PixelsError):
            raise
        raise _damaged(error) from error
    raise _meaningless(image.mode)


def _raw_mode(image: Image.Image) -> str:
    """Returns how the file holds its pixels, such as `RGB;16B` or `L;4`; Pillow forgets it once they are loaded."""
    tile = getattr(image, "tile", None)  # of ImageFile: one that was made in memory has none
    arguments = tile[0][3] if tile else ""
    return str(arguments[0] if isinstance(arguments, tuple) and arguments else arguments)


def _on_white(image: Image.Image, raw_mode: str) -> Rgb:
    key = image.info.get("transparency")
    if image.format == "PNG" and image.mode != "P" and key is not None:
        image.info["transparency"] = _at_8_bits(key, raw_mode)
    if not image.has_transparency_data:
        return Rgb(image.convert("RGB"), ())
    rgba = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    if rgba.getextrema()[-1] == (255, 255):
        return Rgb(rgba.convert("RGB"), ())
    return Rgb(_pasted_on_white(rgba, rgba), (TRANSPARENT,))


def _pasted_on_white(image: Image.Image, mask: Image.Image) -> Image.Image:
    white = Image.new("L" if image.mode == "L" else "RGB", image.size, "white")
    white.paste(image, mask=mask)
    return white


def _at_8_bits(colour: int | tuple[int, ...], raw_mode: str) -> int | tuple[int, ...]:
    """Converts the transparent colour of a PNG from the depth of the file to that of the loaded pixels.

    Pillow converts it for one bit alone. In any other depth of the file no loaded pixel would equal it.
    """
    if isinstance(colour, tuple):
        return tuple(value >> 8 if raw_mode.startswith("RGB;16") else value & 255 for value in colour)
    most = {"L;2": 3, "L;4": 15}.get(raw_mode, 255)
    return (colour & most) * (255 // most)


def _narrowed(image: Image.Image, raw_mode: str) -> Rgb:
    """Scales 16-bit grey to RGB: 0 becomes 0, and the largest number of its depth 255."""
    wide = image.convert("I")
    if image.mode == "I" and image.format != "PNG":  # older versions of Pillow read PNG's 16 bits as I
        extrema: Any = wide.getextrema()
        least, most = extrema
        if least < 0 or not 256 <= most <= 65535:
            raise _meaningless("I", f", and they go from {least} to {most}")
    tags: Mapping[int, Any] = getattr(image, "tag_v2", {})
    from_white = image.mode != "I" and tags.get(_PHOTOMETRIC) == _WHITE_IS_ZERO  # Pillow does not look at 16 bits
    grey = wide.point(_to_8_bits(4095 if raw_mode == "I;12" else 65535, from_white), "L")
    key = image.info.get("transparency")
    mask = None if key is None else wide.point([255 * (value != key) for value in range(65536)], "L")
    del wide  # four times the size of the others
    if mask is None or mask.getextrema()[0] == 255:
        return Rgb(grey.convert("RGB"), (WIDE_GREY,))
    return Rgb(_pasted_on_white(grey, mask).convert("RGB"), (WIDE_GREY, TRANSPARENT))


@functools.cache
def _to_8_bits(most: int, from_white: bool) -> list[int]:
    """Returns the 8-bit number of each 16-bit one, `most` being white, or black where 0 is white."""
    table = [min(255, (2 * 255 * value + most) // (2 * most)) for value in range(65536)]
    return [255 - value for value in table] if from_white else table


def _over(max_pixels: int) -> str:
    return f"over {max_pixels // 10**6} megapixels"


def _damaged(error: Exception) -> PixelsError:
    # Pillow's own text of an unknown format holds an address in memory
    detail = "its format is not known" if isinstance(error, UnidentifiedImageError) else str(error)
    return PixelsError(f"the image cannot be decoded: {detail}; replace or remove it", "cannot be decoded", detail)


def _meaningless(mode: str, detail: str = "") -> PixelsError:
    reason = f"mode {mode} does not say which number is white"
    return PixelsError(f"the image's {reason}{detail}; save it with 8 or 16 bits", reason, detail.removeprefix(", "))


def _silence_pillow() -> None:
    # one filter in front of all: catch_warnings is not safe in threads, and makes other warnings repeat
    if warnings.filters[:1] != [_PILLOW_IS_QUIET]:
        warnings.filterwarnings("ignore", module=_PILLOW)
