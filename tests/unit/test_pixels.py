"""One decoder of pictures: what transparency, depths and modes come to, wherever a picture is read."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image

from mvptr_ds.corpus.building.source_images import ImageError, ImageOptions, check_image
from mvptr_ds.corpus.regions.extraction import decode_picture, open_picture
from mvptr_ds.data.images import decode_image
from mvptr_ds.data.pixels import MAX_IMAGE_PIXELS, PixelsError, open_image, read_rgb
from mvptr_ds.errors import DataError
from mvptr_ds.evaluation.pictures import small_picture
from tests.support.odd_pictures import BUILT, DAMAGED, MEANINGLESS, STORED, Shown, png

ALL = {**STORED, **BUILT}
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")


def member(content: bytes) -> dict[str, bytes]:
    return {"png": content}


@pytest.mark.parametrize("name", ALL)
def test_what_a_picture_shows(name: str) -> None:
    shown = ALL[name]
    with open_image(shown.content, MAX_IMAGE_PIXELS, FORMATS) as image:
        rgb, changes = read_rgb(image)
    assert rgb.mode == "RGB" and changes == shown.changes
    assert np.asarray(rgb)[0].tolist() == pytest.approx(np.array(shown.row), abs=1)


@pytest.mark.parametrize("name", STORED)
def test_every_place_sees_the_same(name: str) -> None:
    shown = STORED[name]
    expected = np.asarray([shown.row], dtype=np.uint8)
    detector = decode_picture(open_picture(member(shown.content)))
    drawing = small_picture(member(shown.content))
    assert drawing is not None
    for seen in (detector, drawing):
        assert np.abs(np.asarray(seen).astype(int) - expected).max() <= 1
    square = Image.fromarray(expected).resize((4, 4), Image.Resampling.BICUBIC)  # resized when all else is done
    assert np.abs(decode_image(member(shown.content), 4).transpose(1, 2, 0).astype(int) - square).max() <= 1


def enlarged(shown: Shown) -> np.ndarray:
    return np.asarray([shown.row] * 16, dtype=np.uint8).repeat(16, axis=1)


@pytest.mark.parametrize("name", ALL)
def test_what_is_encoded_again_shows_the_same(name: str) -> None:
    shown, counts = ALL[name], Counter[str]()
    picture = check_image(shown.content, ImageOptions(reencode=100), counts)
    assert (picture.extension, picture.width, picture.height) == ("jpg", len(shown.row), 1)
    stored = np.asarray(Image.open(io.BytesIO(picture.content)).convert("L"))[0].astype(int)
    expected = np.asarray(Image.fromarray(np.asarray([shown.row], dtype=np.uint8)).convert("L"))[0]
    assert np.abs(stored - expected).max() < 40  # JPEG mixes the colours of neighbours
    assert counts == Counter(shown.changes)
    if name in STORED:
        assert check_image(shown.content, ImageOptions()).content == shown.content


@pytest.mark.parametrize("name", MEANINGLESS)
def test_modes_that_are_no_picture_are_refused_by_name(name: str) -> None:
    content, mode = MEANINGLESS[name]
    with pytest.raises(ImageError, match=f"picture: {mode} does not say which number is white"):
        check_image(content, ImageOptions())
    with open_image(content, MAX_IMAGE_PIXELS, FORMATS) as image, pytest.raises(PixelsError, match=mode):
        read_rgb(image)


@pytest.mark.parametrize("name", DAMAGED)
def test_damage_is_refused_everywhere(name: str) -> None:
    content = member(DAMAGED[name])
    readers: tuple[Callable[[], object], ...] = (
        lambda: decode_image(content, 4),
        lambda: small_picture(content),
        lambda: decode_picture(open_picture(content)),
    )
    for read in readers:
        with pytest.raises(DataError, match="cannot be decoded"):
            read()
    with pytest.raises(ImageError, match="picture: cannot be decoded"):
        check_image(DAMAGED[name], ImageOptions())


def test_opaque_pictures_are_decoded_as_ever() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 60, 4), dtype=np.uint8)
    pixels[:, :, 3] = 255
    for mode in ("RGB", "RGBA", "L", "P", "1"):
        stream = io.BytesIO()
        Image.fromarray(pixels).convert("RGB").convert(mode).save(stream, "PNG")
        plain = Image.open(stream).convert("RGB").resize((32, 32), Image.Resampling.BICUBIC)
        assert np.array_equal(decode_image(member(stream.getvalue()), 32).transpose(1, 2, 0), plain)


def test_transparency_is_drawn_before_the_picture_is_resized() -> None:
    """A fine pattern of white and hidden black: mixed first, it would come out grey."""
    pixels = np.zeros((64, 64, 4), dtype=np.uint8)
    pixels[::2, ::2] = 255
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "PNG")
    assert (decode_image(member(stream.getvalue()), 16) == 255).all()


def _with_exif(exif: bytes) -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8)).save(stream, "JPEG")
    segment = b"Exif\0\0" + exif
    plain = stream.getvalue()
    start = plain.index(b"\xff\xdb")  # without JFIF's density Pillow looks for one in EXIF
    return plain[:2] + b"\xff\xe1" + (len(segment) + 2).to_bytes(2, "big") + segment + plain[start:]


WARNED_OF = {
    "P with partial alpha": STORED["P with partial alpha"].content,
    "over 89 megapixels": png(9000, 8, 2, b"", height=11_000),
    "EXIF cut": _with_exif(b"II*\0\x08\0\0\0\x09\0\x1a\x01"),
    "EXIF that points behind its end": _with_exif(b"II*\0\x08\0\0\0\x01\0\x1a\x01\x05\0\x01\0\0\0\xff\xff\xff\x0f"),
    "an animation of no frames": png(1, 8, 2, b"\0\0\0", acTL=bytes(8)),
}


@pytest.mark.parametrize("name", WARNED_OF)
def test_pillow_warns_of_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A warning would stand once a process between the lines of the steps."""
    monkeypatch.setattr("mvptr_ds.data.images.simplejpeg", None)  # Pillow is to meet all of them
    content = WARNED_OF[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(Warning), Image.open(io.BytesIO(content)) as image:
            image.convert("RGB")
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(2):
            with contextlib.suppress(DataError):
                decode_image(member(content), 4)
            with contextlib.suppress(ImageError):
                check_image(content, ImageOptions(reencode=90))
        warnings.warn("of somebody else", UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in seen] == ["of somebody else"]


def test_the_warnings_of_others_still_come_once() -> None:
    """`catch_warnings`, around each picture, would let them come again after each."""
    registry: dict[str, object] = {}
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("default")
        for _ in range(3):
            decode_image(member(STORED["RGBA"].content), 4)
            warnings.warn_explicit("once", UserWarning, "there", 1, registry=registry)
    assert len(seen) == 1
