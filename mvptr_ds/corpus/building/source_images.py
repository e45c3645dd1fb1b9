"""Reads the images of a source, decodes them in full to see that they are whole, and encodes them again if asked."""

from __future__ import annotations

import io
import os
import stat
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from mvptr_ds.data.pixels import DECODE_ERRORS, MAX_IMAGE_PIXELS, STORED_FORMATS, PixelsError, open_image, read_rgb
from mvptr_ds.data.shards.tar_reader import MAX_MEMBER_BYTES

MAX_DECODED_PIXELS = 89_000_000  # larger images are not decoded at all
REENCODE_QUALITY = 95  # of what cannot be stored as it is
_STORED_AS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more pictures behind it
_FORMATS = (*STORED_FORMATS, "GIF", "BMP", "TIFF")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class ImageError(ValueError):
    """Says that an image cannot be used; `reason` is one of a few, for counting."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class ImageOptions:
    """How images are stored. With `reencode` None, JPEG, PNG and WebP are stored byte by byte."""

    min_side: int = 1  # pixels
    reencode: int | None = None  # JPEG quality
    max_side: int | None = None  # pixels of the longer side, after encoding again


class StoredImage(NamedTuple):
    extension: str
    content: bytes
    width: int  # pixels, as the training reader decodes it: without EXIF's turn
    height: int


def read_image(folder: Path, name: str) -> bytes:
    """Returns the content of an image file below `folder`.

    Raises:
        ImageError: it lies elsewhere, is missing, no plain file, or too large.
    """
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if os.path.commonpath((root, path)) != root:
        raise ImageError("picture: its path leads out of --images")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise ImageError("picture: no plain file")
        if status.st_size > MAX_MEMBER_BYTES:
            raise ImageError(f"picture: over {MAX_MEMBER_BYTES >> 20} MiB", f"{status.st_size} bytes")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise ImageError("picture: file is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, ImageError):
            raise
        raise ImageError("picture: file cannot be read", str(error)) from error


def check_image(content: bytes, options: ImageOptions, counts: Counter[str] | None = None) -> StoredImage:
    """Returns the image as it is to be stored.

    Its format is told by its content. JPEG, PNG and WebP pass through unchanged, EXIF included, which the training
    reader does not apply; what is encoded again is turned as EXIF says, holds no EXIF, and is what the training reader
    would see: transparency on white, 16-bit grey scaled.

    Args:
        counts: the picture is counted there by what the training reader does to it, see `pixels.Rgb`.

    Raises:
        ImageError: not decodable to its last byte, of no mode that is a picture, too large, or too small.
    """
    try:
        with open_image(content, MAX_DECODED_PIXELS, _FORMATS) as image:
            picture, changes = _check(image, content, options)
    except PixelsError as error:
        raise ImageError(f"picture: {error.reason}", error.detail) from error
    if counts is not None:
        counts.update(changes)
    return picture


def _check(image: Image.Image, content: bytes, options: ImageOptions) -> tuple[StoredImage, tuple[str, ...]]:
    width, height = image.size
    if min(width, height) < options.min_side:
        raise ImageError(f"picture: below {options.min_side} pixels", f"{width} x {height}")
    extension = _STORED_AS.get(image.format or "")
    pixels, changes = read_rgb(image)
    if extension is None or options.reencode is not None:
        pixels = _turned(pixels, image)
        if options.max_side is not None:
            pixels.thumbnail((options.max_side, options.max_side), Image.Resampling.LANCZOS)
        extension, content = "jpg", _encoded(pixels, options.reencode or REENCODE_QUALITY)
    width, height = pixels.size
    if width * height > MAX_IMAGE_PIXELS:
        limit = f"picture: over the {MAX_IMAGE_PIXELS // 10**6} megapixels that training reads"
        raise ImageError(limit, f"{width} x {height}; --reencode 95 --max-side 4096 makes it smaller")
    if len(content) > MAX_MEMBER_BYTES:
        raise ImageError(f"picture: over {MAX_MEMBER_BYTES >> 20} MiB", f"{len(content)} bytes")
    return StoredImage(extension, content, width, height), changes


def _encoded(pixels: Image.Image, quality: int) -> bytes:
    buffer = io.BytesIO()
    try:
        pixels.save(buffer, "JPEG", quality=quality)
    except (OSError, ValueError) as error:  # a side of more than 65,535 pixels
        size = f"{pixels.width} x {pixels.height}"
        detail = f"{size}: {error}; --max-side 4096 makes it smaller"
        raise ImageError("picture: cannot be encoded as JPEG", detail) from error
    return buffer.getvalue()


def _turned(pixels: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except DECODE_ERRORS:  # EXIF of the web is often damaged; the pixels are not
        turn = None
    return pixels if turn is None else pixels.transpose(turn)
