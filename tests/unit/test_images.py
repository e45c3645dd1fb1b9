"""Pictures become squares of pixels, by libjpeg-turbo where it is installed; it and Pillow accept and see the same."""

from __future__ import annotations

import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mvptr_ds.data import images
from mvptr_ds.data.images import decode_image
from mvptr_ds.errors import DataError

HAS_SIMPLEJPEG = images.simplejpeg is not None


def photograph(width: int, height: int, mode: str = "RGB", **options: object) -> bytes:
    """Smooth shades with some grain, as JPEG."""
    rng = np.random.default_rng(width * height)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 16 + 2, width // 16 + 2, 3), dtype=np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(float)
    pixels += rng.normal(0, 4, pixels.shape)
    stream = io.BytesIO()
    Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).convert(mode).save(stream, "JPEG", **options)
    return stream.getvalue()


def by_pillow(content: bytes, size: int, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    with monkeypatch.context() as patch:
        patch.setattr(images, "simplejpeg", None)
        return decode_image({"jpg": content}, size)


@pytest.mark.skipif(not HAS_SIMPLEJPEG, reason="simplejpeg is not installed: Pillow alone decodes here")
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (64, 48), (1600, 1200), (1, 1), (3, 900)])
@pytest.mark.parametrize(
    ("mode", "options"),
    [("RGB", {"quality": 90}), ("L", {}), ("RGB", {"progressive": True, "subsampling": 0}), ("CMYK", {})],
)
def test_the_decoders_see_the_same(
    size: tuple[int, int], mode: str, options: dict[str, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    content = photograph(*size, mode, **options)
    ours, theirs = decode_image({"jpg": content}, 96), by_pillow(content, 96, monkeypatch)
    assert ours.shape == theirs.shape == (3, 96, 96) and ours.dtype == np.uint8
    assert ours.strides == theirs.strides == (1, 3 * 96, 3)  # else a batch sorts the channels apart and together
    # versions of the library round colours and fractions of the scale otherwise; seen: 0.6 in the mean, 1.1 at (3, 900)
    assert np.abs(ours.astype(int) - theirs.astype(int)).mean() < 2


def test_jpeg_that_programs_complain_of_is_read_where_pillow_reads_it(monkeypatch: pytest.MonkeyPatch) -> None:
    content = photograph(64, 48)
    for odd in (content[:-2] + b"ab" + content[-2:], content + b"behind" * 9):
        assert np.array_equal(decode_image({"jpg": odd}, 32), by_pillow(odd, 32, monkeypatch)) or HAS_SIMPLEJPEG
        assert decode_image({"jpg": odd}, 32).std() > 10


@pytest.mark.parametrize("share", [0.02, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("progressive", [False, True])
def test_jpeg_that_is_cut_is_refused(share: float, progressive: bool) -> None:
    content = photograph(320, 240, progressive=progressive)
    with pytest.raises(DataError, match="cannot be decoded"):
        decode_image({"jpg": content[: int(share * len(content))]}, 64)


def test_a_jpeg_is_told_by_its_content() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (9, 9), (200, 100, 50)).save(stream, "PNG")
    assert decode_image({"jpg": stream.getvalue()}, 4)[:, 0, 0].tolist() == [200, 100, 50]
    assert decode_image({"png": photograph(32, 32)}, 4).shape == (3, 4, 4)


CONTENT = photograph(48, 32)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(place=st.floats(0, 1, exclude_max=True), value=st.integers(0, 255), length=st.floats(0, 1))
def test_what_simplejpeg_takes_pillow_takes_too(place: float, value: int, length: float) -> None:
    damaged = bytearray(CONTENT)
    damaged[int(place * len(CONTENT))] = value
    if place > length:
        del damaged[int(length * len(CONTENT)) :]
    content = bytes(damaged)
    try:
        accepted = images._decode_jpeg(content, 16) is not None if HAS_SIMPLEJPEG else False
    except DataError:
        return
    if accepted:
        images._decode(content, 16)
