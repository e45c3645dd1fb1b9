"""Small pictures of every mode that a file can bring, and what they show."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image

from mvptr_ds.data.pixels import TRANSPARENT, WIDE_GREY

WHITE, BLACK, RED = (255, 255, 255), (0, 0, 0), (255, 0, 0)
GREY, PALETTE, RGB, GREY_ALPHA, RGB_ALPHA = 0, 3, 2, 4, 6  # kinds of PNG


class Shown(NamedTuple):
    content: bytes
    row: Sequence[tuple[int, int, int]]  # what it shows; each picture is one row
    changes: tuple[str, ...] = ()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, bits: int, kind: int, row: bytes, height: int = 1, **chunks: bytes) -> bytes:
    """One row, whatever the header says, with chunks before it (`PLTE`, `tRNS`)."""
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    between = b"".join(chunk(name.encode(), data) for name, data in chunks.items())
    packed = chunk(b"IDAT", zlib.compress(b"\0" + row))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + between + packed + chunk(b"IEND", b"")


def tiff(width: int, bits: Sequence[int], row: bytes, photometric: int = 1, extra: int | None = None) -> bytes:
    """One row. `photometric`: 0 white is zero, 1 black is zero; `extra`: 1 premultiplied alpha, 2 straight alpha."""
    tags = {256: (width,), 257: (1,), 258: bits, 259: (1,), 262: (photometric,), 277: (len(bits),), 278: (1,)}
    tags |= {279: (len(row),)} | ({} if extra is None else {338: (extra,)})
    start = 8 + 2 + 12 * (len(tags) + 1) + 4
    behind = b""
    entries = {273: (1, struct.pack("<HH", start, 0))}
    for tag, values in tags.items():
        packed = struct.pack(f"<{len(values)}H", *values)
        if len(packed) > 4:
            behind, packed = behind + packed, struct.pack("<I", start + len(row) + len(behind))
        entries[tag] = (len(values), packed.ljust(4, b"\0"))
    table = b"".join(struct.pack("<HHI", tag, 3, number) + packed for tag, (number, packed) in sorted(entries.items()))
    return struct.pack("<2sHIH", b"II", 42, 8, len(entries)) + table + bytes(4) + row + behind


def saved(pixels: object, picture_format: str, mode: str | None = None, **options: object) -> bytes:
    """An array, or bytes of a mode, as Pillow writes it."""
    if isinstance(pixels, bytes):
        image = Image.frombytes(str(mode), (len(pixels) // (2 if mode == "I;16B" else 1), 1), pixels)
    else:
        image = Image.fromarray(np.asarray(pixels))
        image = image if mode is None else image.convert(mode)
    stream = io.BytesIO()
    image.save(stream, picture_format, **options)
    return stream.getvalue()


def grey(*values: int) -> list[tuple[int, int, int]]:
    return [(value, value, value) for value in values]


_WIDE = (0, 257, 32768, 65535)
_WIDE_SHOWN = grey(0, 1, 128, 255)
_RGBA = np.array([[[0, 0, 0, 0], [255, 0, 0, 255], [0, 0, 0, 128]]], dtype=np.uint8)  # hidden black, red, half of black
_RGBA_SHOWN = [WHITE, RED, (127, 127, 127)]
_OPAQUE = np.array([[[0, 0, 0, 255], [255, 0, 0, 255]]], dtype=np.uint8)
_COLOURS = b"\xff\0\0\0\xff\0\0\0\xff"

# by formats that are stored as they are, and that training reads
STORED: dict[str, Shown] = {
    "RGBA": Shown(saved(_RGBA, "PNG"), _RGBA_SHOWN, (TRANSPARENT,)),
    "RGBA, opaque": Shown(saved(_OPAQUE, "PNG"), [BLACK, RED]),
    "RGBA of 16 bits": Shown(
        png(2, 16, RGB_ALPHA, struct.pack(">8H", 9, 9, 9, 0, 65535, 0, 0, 65535)), [WHITE, RED], (TRANSPARENT,)
    ),
    "LA": Shown(png(3, 8, GREY_ALPHA, b"\0\0\x40\x80\x10\xff"), grey(255, 159, 16), (TRANSPARENT,)),
    "LA of 16 bits": Shown(png(1, 16, GREY_ALPHA, struct.pack(">2H", 256, 0)), [WHITE], (TRANSPARENT,)),
    "one bit": Shown(png(8, 1, GREY, b"\xf0"), grey(255, 255, 255, 255, 0, 0, 0, 0)),
    "one bit, black is transparent": Shown(png(8, 1, GREY, b"\xf0", tRNS=b"\0\0"), [WHITE] * 8, (TRANSPARENT,)),
    "two bits, 1 of 3 is transparent": Shown(
        png(4, 2, GREY, b"\x1b", tRNS=b"\0\1"), grey(0, 255, 170, 255), (TRANSPARENT,)
    ),
    "four bits, 2 of 15 is transparent": Shown(
        png(4, 4, GREY, b"\x01\x2f", tRNS=b"\0\2"), grey(0, 17, 255, 255), (TRANSPARENT,)
    ),
    "L with tRNS": Shown(png(3, 8, GREY, b"\0\x10\x20", tRNS=b"\0\x10"), grey(0, 255, 32), (TRANSPARENT,)),
    "L with tRNS of more bits": Shown(png(2, 8, GREY, b"\0\x10", tRNS=b"\1\x10"), grey(0, 255), (TRANSPARENT,)),
    "L with tRNS that nothing has": Shown(png(2, 8, GREY, b"\0\x10", tRNS=b"\0\x11"), grey(0, 16)),
    "RGB with tRNS": Shown(png(2, 8, RGB, b"\1\2\3\4\5\6", tRNS=b"\0\1\0\2\0\3"), [WHITE, (4, 5, 6)], (TRANSPARENT,)),
    "RGB of 16 bits with tRNS": Shown(
        png(2, 16, RGB, struct.pack(">6H", 256, 512, 768, 0, 0, 65535), tRNS=struct.pack(">3H", 256, 512, 768)),
        [WHITE, (0, 0, 255)],
        (TRANSPARENT,),
    ),
    "P": Shown(png(3, 8, PALETTE, b"\0\1\2", PLTE=_COLOURS), [RED, (0, 255, 0), (0, 0, 255)]),
    "P with one transparent colour": Shown(
        png(3, 8, PALETTE, b"\0\1\2", PLTE=_COLOURS, tRNS=b"\xff\0"), [RED, WHITE, (0, 0, 255)], (TRANSPARENT,)
    ),
    "P with partial alpha": Shown(
        png(3, 8, PALETTE, b"\0\1\2", PLTE=_COLOURS, tRNS=b"\x80\0"),
        [(255, 127, 127), WHITE, (0, 0, 255)],
        (TRANSPARENT,),
    ),
    "P of one bit": Shown(
        png(2, 1, PALETTE, b"\x40", PLTE=_COLOURS[:6], tRNS=b"\0"), [WHITE, (0, 255, 0)], (TRANSPARENT,)
    ),
    "P with more alphas than colours": Shown(
        png(1, 8, PALETTE, b"\0", PLTE=_COLOURS, tRNS=bytes(30)), [WHITE], (TRANSPARENT,)
    ),
    "16-bit grey": Shown(png(4, 16, GREY, struct.pack(">4H", *_WIDE)), _WIDE_SHOWN, (WIDE_GREY,)),
    "16-bit grey with tRNS": Shown(
        png(4, 16, GREY, struct.pack(">4H", *_WIDE), tRNS=struct.pack(">H", 257)),
        grey(0, 255, 128, 255),
        (WIDE_GREY, TRANSPARENT),
    ),
    "APNG": Shown(
        saved(_RGBA, "PNG", save_all=True, append_images=[Image.fromarray(255 - _RGBA)]), _RGBA_SHOWN, (TRANSPARENT,)
    ),
    "WebP": Shown(saved(_RGBA, "WEBP", lossless=True, exact=True), _RGBA_SHOWN, (TRANSPARENT,)),
    "animated WebP": Shown(
        saved(_RGBA, "WEBP", lossless=True, exact=True, save_all=True, append_images=[Image.fromarray(255 - _RGBA)]),
        _RGBA_SHOWN,
        (TRANSPARENT,),
    ),
}
# by formats that builders encode again
BUILT: dict[str, Shown] = {
    "GIF": Shown(saved(_RGBA[:, :2], "GIF"), [WHITE, RED], (TRANSPARENT,)),
    "animated GIF": Shown(
        saved(_RGBA[:, :2], "GIF", save_all=True, append_images=[Image.fromarray(255 - _RGBA[:, :2])]),
        [WHITE, RED],
        (TRANSPARENT,),
    ),
    "grey GIF": Shown(saved(bytes((5, 9)), "GIF", "L", transparency=5), grey(255, 9), (TRANSPARENT,)),
    "BMP": Shown(saved(_OPAQUE[:, :, :3], "BMP"), [BLACK, RED]),
    "TIFF RGBA": Shown(saved(_RGBA, "TIFF"), _RGBA_SHOWN, (TRANSPARENT,)),
    "TIFF RGBa": Shown(
        tiff(2, (8,) * 4, bytes((0, 0, 0, 0, 128, 0, 0, 128)), 2, extra=1), [WHITE, (255, 127, 127)], (TRANSPARENT,)
    ),
    "TIFF LA": Shown(tiff(2, (8, 8), b"\0\0\x10\xff", extra=2), grey(255, 16), (TRANSPARENT,)),
    "TIFF La": Shown(tiff(2, (8, 8), b"\0\0\x40\x80", extra=1), grey(255, 190), (TRANSPARENT,)),
    "TIFF PA": Shown(saved(_RGBA, "TIFF", "PA"), _RGBA_SHOWN, (TRANSPARENT,)),
    "TIFF CMYK": Shown(saved(_OPAQUE[:, :, :3], "TIFF", "CMYK"), [BLACK, RED]),
    "TIFF YCbCr": Shown(saved(_OPAQUE[:, :1, :3], "TIFF", "YCbCr"), [BLACK]),
    "TIFF LAB": Shown(tiff(2, (8,) * 3, b"\0\0\0\xff\0\0", 8), [BLACK, WHITE]),
    "TIFF I;16": Shown(saved(np.array([_WIDE], dtype=np.uint16), "TIFF"), _WIDE_SHOWN, (WIDE_GREY,)),
    "TIFF I;16, packed": Shown(
        saved(np.array([_WIDE], dtype=np.uint16), "TIFF", compression="tiff_lzw"), _WIDE_SHOWN, (WIDE_GREY,)
    ),
    "TIFF I;16B": Shown(saved(struct.pack(">4H", *_WIDE), "TIFF", "I;16B"), _WIDE_SHOWN, (WIDE_GREY,)),
    "TIFF I;16, white is zero": Shown(
        tiff(4, (16,), struct.pack("<4H", *_WIDE), photometric=0), grey(255, 254, 127, 0), (WIDE_GREY,)
    ),
    "TIFF of 12 bits": Shown(tiff(2, (12,), b"\xff\xf8\x00"), grey(255, 128), (WIDE_GREY,)),
    "TIFF I": Shown(saved(np.array([_WIDE], dtype=np.int32), "TIFF"), _WIDE_SHOWN, (WIDE_GREY,)),
}
MEANINGLESS: dict[str, tuple[bytes, str]] = {  # and the mode that the message names
    "TIFF F": (saved(np.array([[0.0, 0.5, 1.0]], dtype=np.float32), "TIFF"), "mode F"),
    "TIFF I beyond 16 bits": (saved(np.array([[0, 1 << 20]], dtype=np.int32), "TIFF"), "mode I"),
    "TIFF I below zero": (saved(np.array([[-1, 300]], dtype=np.int32), "TIFF"), "mode I"),
    "TIFF I of 8 bits": (saved(np.array([[0, 255]], dtype=np.int32), "TIFF"), "mode I"),
}
_NOISE = saved(np.random.default_rng(0).integers(0, 256, (9, 9, 4), dtype=np.uint8), "PNG")
DAMAGED: dict[str, bytes] = {
    "tRNS of too many alphas": png(1, 8, PALETTE, b"\0", PLTE=_COLOURS, tRNS=bytes(300)),
    "tRNS cut": png(2, 8, RGB, b"\1\2\3\4\5\6", tRNS=b"\0\1\0"),
    "cut": _NOISE[: len(_NOISE) // 2],
    "PostScript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\nquit\n",
}
