"""Pictures of a source: read, decoded in full to see that they are whole, passed through or encoded again."""

from __future__ import annotations

import io
import os
import stat
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import ExifTags, Image

from mvptr_ds.data.images import DECODE_ERRORS, MAX_IMAGE_PIXELS, decode_problem
from mvptr_ds.data.tars import MAX_MEMBER_BYTES

MAX_DECODED_PIXELS = 89_000_000  # above it a picture is not decoded at all
REENCODE_QUALITY = 95  # of what cannot be stored as it is
_STORED_AS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}  # MPO: a JPEG with more pictures behind it
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class PictureError(ValueError):
    """A picture cannot be used; `reason` is one of a few, for counting."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason} {detail}")
        self.reason = reason
        self.detail = detail


@dataclass(frozen=True)
class PictureOptions:
    """How pictures are stored. `reencode` None passes JPEG, PNG and WebP through byte by byte."""

    min_side: int = 1  # pixels
    reencode: int | None = None  # JPEG quality
    max_side: int | None = None  # pixels of the longer side, after encoding again


class Picture(NamedTuple):
    extension: str
    content: bytes
    width: int  # pixels, as the training reader decodes it: without EXIF's turn
    height: int


def read_picture(folder: Path, name: str) -> bytes:
    """Content of a picture below `folder`.

    Raises:
        PictureError: it lies elsewhere, is missing, no plain file, or too large.
    """
    root = os.path.abspath(folder)
    path = os.path.normpath(os.path.join(root, name))
    if os.path.commonpath((root, path)) != root:
        raise PictureError("picture: its path leads out of --images")
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise PictureError("picture: no plain file")
        if status.st_size > MAX_MEMBER_BYTES:
            raise PictureError(f"picture: over {MAX_MEMBER_BYTES >> 20} MiB", f"{status.st_size} bytes")
        return Path(path).read_bytes()
    except FileNotFoundError as error:
        raise PictureError("picture: file is missing") from error
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        if isinstance(error, PictureError):
            raise
        raise PictureError("picture: file cannot be read", str(error)) from error


def check_picture(content: bytes, options: PictureOptions) -> Picture:
    """The picture as it is to be stored.

    Its format is told by its content. JPEG, PNG and WebP pass through unchanged, EXIF included, which the training
    reader does not apply; what is encoded again is turned as EXIF says and holds no EXIF.

    Raises:
        PictureError: not decodable to its last byte, too large, or too small.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's on large pictures and odd metadata: the checks are here
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                return _check(image, content, options)
    except Image.DecompressionBombError as error:
        raise PictureError(f"picture: over {MAX_DECODED_PIXELS // 10**6} megapixels", str(error)) from error
    except DECODE_ERRORS as error:
        if isinstance(error, PictureError):
            raise
        raise PictureError("picture: cannot be decoded", decode_problem(error)) from error


def _check(image: Image.Image, content: bytes, options: PictureOptions) -> Picture:
    width, height = image.size
    if width * height > MAX_DECODED_PIXELS:
        raise PictureError(f"picture: over {MAX_DECODED_PIXELS // 10**6} megapixels", f"{width} x {height}")
    if min(width, height) < options.min_side:
        raise PictureError(f"picture: below {options.min_side} pixels", f"{width} x {height}")
    extension = _STORED_AS.get(image.format or "")
    image.load()
    pixels = image.convert("RGB")
    if extension is None or options.reencode is not None:
        pixels = _turned(pixels, image)
        if options.max_side is not None:
            pixels.thumbnail((options.max_side, options.max_side), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        pixels.save(buffer, "JPEG", quality=options.reencode or REENCODE_QUALITY)
        extension, content = "jpg", buffer.getvalue()
    width, height = pixels.size
    if width * height > MAX_IMAGE_PIXELS:
        limit = f"picture: over the {MAX_IMAGE_PIXELS // 10**6} megapixels that training reads"
        raise PictureError(limit, f"{width} x {height}; --reencode 95 --max-side 4096 makes it smaller")
    if len(content) > MAX_MEMBER_BYTES:
        raise PictureError(f"picture: over {MAX_MEMBER_BYTES >> 20} MiB", f"{len(content)} bytes")
    return Picture(extension, content, width, height)


def _turned(pixels: Image.Image, image: Image.Image) -> Image.Image:
    try:
        turn = _TURNS.get(image.getexif().get(ExifTags.Base.Orientation, 1))
    except (*DECODE_ERRORS, AttributeError):  # EXIF of the web is often damaged; the pixels are not
        turn = None
    return pixels if turn is None else pixels.transpose(turn)
