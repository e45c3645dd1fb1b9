"""Shards made to do harm: each is refused or its records are replaced, with a reason; little memory, no code run.

Every job runs in a process that may take 1 GiB more than it begins with (tests.support.memory_limit), and leaves no
file behind.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvptr_ds.data.images import MAX_IMAGE_PIXELS
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.tar_reader import MAX_JSON_BYTES
from tests.support.hostile import content, encoded, features, key, member_starts, named_members, npy, picture, write_tar
from tests.support.memory_limit import Limited
from tests.support.odd_pictures import png


@pytest.fixture(scope="module")
def limited() -> Iterator[Limited]:
    with Limited() as processes:
        yield processes


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "shards"
    path.mkdir()
    return path


def replaced(limited: Limited, folder: Path, source: str) -> str:
    """Loads the record 1 of three as training does: another one stands for it. The reason that was logged."""
    found = limited("load", folder=folder, number=2, source=source)["result"]
    assert found["num_bad"] >= 1
    assert "key 'k0001'" in found["reasons"][0]
    return found["reasons"][0]


def _three(**changes: bytes | None) -> list[tuple[str, bytes]]:
    """Three records of two captions, the middle one changed."""
    return [*named_members([0]), *named_members([1], **changes), *named_members([2])]


# ---- content that the index does not look at: the training reader meets it


class _Canary:
    """Unpickled, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("extension", ["pyd", "pkl", "pickle", "pth"])
def test_members_that_webdataset_would_unpickle_are_never_opened(
    limited: Limited, folder: Path, tmp_path: Path, extension: str
) -> None:
    canary = tmp_path / "canary"
    data = pickle.dumps(_Canary(canary))
    write_tar(folder / "s.tar", _three(**{extension: data}))
    assert limited("validate", folder=folder)["result"] == {}
    assert limited("index", folder=folder)["result"] == 3
    assert limited("load", folder=folder, number=2, source="features")["result"]["num_bad"] == 0
    assert not canary.exists()
    pickle.loads(data)
    assert canary.exists()  # the canary sings


@pytest.mark.parametrize("kind", ["a pickle", "an array of objects"])
def test_pickles_in_place_of_features(limited: Limited, folder: Path, tmp_path: Path, kind: str) -> None:
    canary = _Canary(tmp_path / "canary")
    array = np.array([[canary] * 4] * 2, dtype=object)
    data = pickle.dumps(canary) if kind == "a pickle" else npy(array, allow_pickle=True)
    write_tar(folder / "s.tar", _three(npy=data))
    assert limited("validate", folder=folder)["result"] == {"features that cannot be used": 1}
    limited("index", folder=folder)
    assert "npy member cannot be read" in replaced(limited, folder, "features")
    assert not canary.path.exists()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_features_that_are_not_finite(limited: Limited, folder: Path, value: float) -> None:
    array = features()
    array[1, 1] = value
    write_tar(folder / "s.tar", _three(npy=npy(array)))
    assert limited("validate", folder=folder)["result"] == {"features that cannot be used": 1}
    build_index(folder)
    assert "NaN or infinity" in replaced(limited, folder, "features")


def test_an_array_that_says_it_is_huge(limited: Limited, folder: Path) -> None:
    data = npy(features()).replace(b"(2, 4), }         ", b"(2, 40000000000), }")
    assert len(data) == len(npy(features())) + 1
    write_tar(folder / "s.tar", _three(npy=data))
    assert limited("validate", folder=folder)["result"] == {"features that cannot be used": 1}
    build_index(folder)
    assert "npy member cannot be read" in replaced(limited, folder, "features")


def _chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def _png(width: int, height: int, *chunks: bytes) -> bytes:
    """A PNG of one colour, its rows compressed to a thousandth."""
    head = _chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    packer = zlib.compressobj(9)
    row = bytes(1 + -(-width // 8))
    rows = b"".join(packer.compress(row * 1000) for _ in range(-(-height // 1000))) + packer.flush()
    return b"\x89PNG\r\n\x1a\n" + head + b"".join(chunks) + _chunk(b"IDAT", rows) + _chunk(b"IEND", b"")


def _webp(width: int, height: int) -> bytes:
    """The header of a lossless WebP; nothing behind it."""
    bits = struct.pack("<I", (width - 1) | (height - 1) << 14)
    data = b"VP8L" + struct.pack("<I", 5 + 64) + b"\x2f" + bits + bytes(64) + b"\0"
    return b"RIFF" + struct.pack("<I", len(data) + 4) + b"WEBP" + data


_BOMB = zlib.compress(bytes(400 << 20), 9)  # 400 MiB in 400 KiB
PICTURES: dict[str, tuple[bytes, str]] = {
    "PNG of 900 megapixels": (_png(30_000, 30_000), "pixels"),
    "PNG of 100 megapixels": (_png(10_000, 10_000), f"at most {MAX_IMAGE_PIXELS} are decoded"),
    "WebP of 268 megapixels": (_webp(16_384, 16_384), "the image"),
    "PNG with a text of 400 MiB": (_png(32, 24, _chunk(b"zTXt", b"a\0\0" + _BOMB)), "cannot be decoded"),
    "PNG with a colour profile of 400 MiB": (_png(32, 24, _chunk(b"iCCP", b"a\0\0" + _BOMB)), ""),
    "picture of zeros": (bytes(3 << 20), "cannot be decoded"),
    "picture of no pixels": (_png(0, 0), "cannot be decoded"),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_that_grow_when_they_are_decoded(limited: Limited, folder: Path, name: str) -> None:
    data, reason = PICTURES[name]
    write_tar(folder / "s.tar", [*named_members([0, 2]), *named_members([1], jpg=None, png=data)])
    limited("index", folder=folder)
    found = limited("validate", folder=folder)["result"]
    if reason:
        assert found == {"a picture that cannot be decoded": 1}
        assert reason in limited("load", folder=folder, number=4, source="image")["result"]["reasons"][0]
    else:  # passed over unread, or refused: as Pillow does, within the limit
        limited("load", folder=folder, number=4, source="image")


def test_a_picture_of_one_pixel_is_a_picture(limited: Limited, folder: Path) -> None:
    boxes = encoded(content(width=1, height=1, regions=[{"box": [0, 0, 1, 1], "tag": "dog"}] * 2))
    write_tar(folder / "s.tar", _three(jpg=picture(size=(1, 1)), json=boxes))
    assert limited("validate", folder=folder)["result"] == {}
    for source in ("image", "features"):
        assert limited("load", folder=folder, number=2, source=source)["result"]["num_bad"] == 0


def test_the_largest_picture_that_is_decoded_stays_within_the_limit(limited: Limited, folder: Path) -> None:
    side = int(MAX_IMAGE_PIXELS**0.5)
    write_tar(folder / "s.tar", _three(jpg=None, png=_png(side, side)))
    assert limited("index", folder=folder)["result"] == 3
    assert limited("load", folder=folder, number=2, source="image")["result"]["num_bad"] == 0


def test_the_largest_jpeg_that_is_decoded_stays_within_the_limit(limited: Limited, folder: Path) -> None:
    """A progressive one without subsampling: all its coefficients are held at once."""
    side = int(MAX_IMAGE_PIXELS**0.5)
    stream = io.BytesIO()
    Image.new("RGB", (side, side), (200, 100, 50)).save(stream, "JPEG", progressive=True, subsampling=0)
    write_tar(folder / "s.tar", _three(jpg=stream.getvalue()))
    assert limited("index", folder=folder)["result"] == 3
    found = limited("load", folder=folder, number=2, source="image")
    assert found["result"]["num_bad"] == 0


def test_a_line_of_millions_of_pixels(limited: Limited, folder: Path) -> None:
    """Pillow's weights of a side of 40 million pixels are 1.2 GiB."""
    write_tar(folder / "s.tar", _three(jpg=None, png=png(40_000_000, 1, 0, bytes(5_000_000))))
    assert limited("index", folder=folder)["result"] == 3
    assert limited("load", folder=folder, number=2, source="image")["result"]["num_bad"] == 0


def test_the_largest_picture_with_alpha_stays_within_the_limit(limited: Limited, folder: Path) -> None:
    side = int(MAX_IMAGE_PIXELS**0.5)
    stream = io.BytesIO()
    Image.new("RGBA", (side, side), (200, 100, 50, 99)).save(stream, "PNG", compress_level=1)
    write_tar(folder / "s.tar", _three(jpg=None, png=stream.getvalue()))
    assert limited("index", folder=folder)["result"] == 3
    assert limited("load", folder=folder, number=2, source="image")["result"]["num_bad"] == 0


def test_a_jpeg_over_the_cap_is_refused(limited: Limited, folder: Path) -> None:
    data = bytearray(picture())
    start = data.index(b"\xff\xc0") + 5  # height and width of the frame
    data[start : start + 4] = struct.pack(">HH", 65_000, 65_000)
    write_tar(folder / "s.tar", _three(jpg=bytes(data)))
    limited("index", folder=folder)
    assert f"at most {MAX_IMAGE_PIXELS} are decoded" in replaced(limited, folder, "image")


# ---- content that the index refuses; the training reader meets it where a shard was exchanged after it was indexed


def _json_of(num_bytes: int, text: bytes) -> bytes:
    return text + b" " * (num_bytes - len(text))


JSONS: dict[str, tuple[bytes, str]] = {
    "invalid UTF-8": (encoded(content()).replace(b"brown", b"br\xffwn"), "not JSON"),
    "half a surrogate pair": (encoded(content(image_id="\ud800")), "surrogate"),
    "deeply nested": (b"[" * 200_000, "not JSON"),
    "deeply nested and closed": (b'{"schema": 1, "image_id": ' + b"[" * 900 + b"]" * 900 + b"}", ""),
    "a number of 100,000 digits": (
        encoded(content()).replace(b'"width": 32', b'"width": 1' + b"0" * 100_000),
        "wrong type",
    ),
    "a width of 400 digits": (encoded(content(width=10**400)), "width is 100000000000"),
    "a width below zero": (encoded(content(width=-1)), "width is -1"),
    "a box of NaN": (encoded(content(regions=[{"box": [0, 0, float("nan"), 4], "tag": "a"}] * 2)), "region box"),
    "a box of infinity": (encoded(content(regions=[{"box": [0, 0, 1e400, 4], "tag": "a"}] * 2)), "region box"),
    "a box of 400 digits": (encoded(content(regions=[{"box": [0, 0, 10**400, 4], "tag": "a"}] * 2)), "wrong type"),
    "a span of 400 digits": (
        encoded(content(captions=[{"text": "dog", "phrases": [{"tuple": ["dog"], "spans": [[0, 10**400]]}]}] * 2)),
        "spans",
    ),
    "a score of NaN": (
        encoded(content(regions=[{"box": [0, 0, 1, 1], "tag": "a", "score": float("nan")}] * 2)),
        "score",
    ),
    "a caption of 2 MiB": (
        encoded(content(captions=[{"text": "é" + "!" * 2**21, "phrases": []}] * 2)),
        "2,097,153 characters",
    ),
    "a tag of 2 MiB": (
        encoded(content(regions=[{"box": [0, 0, 1, 1], "tag": "é" + "!" * 2**21}] * 2)),
        "2,097,153 characters",
    ),
    "a list": (b"[]", "not a JSON object"),
    "nothing": (b" ", "not JSON"),
}


@pytest.mark.parametrize("name", JSONS)
def test_json(limited: Limited, folder: Path, name: str) -> None:
    data, reason = JSONS[name]
    sound = encoded(content(image_id="1"))
    num_bytes = max(len(data), len(sound))
    write_tar(folder / "s.tar", _three(json=_json_of(num_bytes, sound)))
    limited("index", folder=folder)
    write_tar(folder / "s.tar", _three(json=_json_of(num_bytes, data)))
    assert reason in replaced(limited, folder, "features")
    refused = limited("index", folder=folder)
    assert refused["end"] == "DataError" and reason in refused["result"] and "key 'k0001'" in refused["result"]
    assert limited("validate", folder=folder)["result"] == {"a record that does not follow the schema": 1}


PARTS: dict[str, tuple[bytes, str]] = {
    "objects": (b'{"schema": 1, "x": [%s], "image_id": "1"}', '{"":0}'),
    "phrases": (
        b'{"schema": 1, "image_id": "1", "width": 1, "height": 1, "captions": [{"text": "a", "phrases": [%s]}]}',
        '{"tuple":["b"],"spans":[[0,1]]}',
    ),
}


@pytest.mark.parametrize("kind", PARTS)
def test_a_json_of_as_many_parts_as_fit_its_cap(limited: Limited, folder: Path, kind: str) -> None:
    """The memory that they take when they are parsed is what the cap of a json member is for."""
    frame, part = PARTS[kind]
    number = (MAX_JSON_BYTES - len(frame)) // (len(part) + 1)
    data = frame % ",".join([part] * number).encode()
    write_tar(folder / "s.tar", [*named_members([0]), *named_members([1], json=data, npy=None)])
    if limited("index", folder=folder)["end"] == "DataError":
        assert limited("validate", folder=folder)["result"]
    else:
        limited("load", folder=folder, number=2, source="image")


NAMES = {"k0001.jpg": ["../k1.jpg", "/k001.jpg", "a/../.jpg", "k\udcff001.jpg", "k.001.jpg", "k0001/jpg", "k0002.jpg"]}


@pytest.mark.parametrize("name", NAMES["k0001.jpg"])
def test_names(limited: Limited, folder: Path, tmp_path: Path, name: str) -> None:
    """A member of another name, in a shard exchanged after it was indexed, and in one that is to be indexed."""
    assert len(name) == 9
    tar = write_tar(folder / "s.tar", _three())
    limited("index", folder=folder)
    write_tar(tar, [(name if member == "k0001.jpg" else member, data) for member, data in _three()])
    found = limited("load", folder=folder, number=2, source="features")["result"]
    assert found["num_bad"] >= 1
    assert limited("index", folder=folder)["end"] == "DataError"
    assert limited("validate", folder=folder)["result"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["shards"]
    assert sorted(path.name for path in folder.iterdir()) == ["index.npy", "manifest.json", "s.tar"]


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices(limited: Limited, folder: Path, kind: bytes) -> None:
    tar = write_tar(folder / "s.tar", _three())
    limited("index", folder=folder)
    data = bytearray(tar.read_bytes())
    header = tarfile.TarInfo("k0001.npy")
    header.type, header.linkname = kind, "/etc/passwd"
    start = member_starts(tar)["k0001.npy"]
    data[start : start + 512] = header.tobuf(tarfile.USTAR_FORMAT)
    tar.write_bytes(data)
    assert "is a link or device" in replaced(limited, folder, "features")
    assert "is a link or device" in limited("index", folder=folder)["result"]
    assert "a member that no shard may hold" in limited("validate", folder=folder)["result"]


# ---- shards that no index holds; the reader is asked for them all the same


def _sparse_member(path: Path, name: str, num_bytes: int, behind: bytes) -> int:
    """A tar of one member of zeros that takes no space on the disk, and what is behind it. Returns its size."""
    info = tarfile.TarInfo(name)
    info.size = num_bytes
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + -(-num_bytes // 512) * 512)
        file.write(behind)
    return path.stat().st_size


@pytest.mark.parametrize("extension", ["json", "npy", "jpg", "mp4"])
def test_members_of_a_gigabyte(limited: Limited, folder: Path, tmp_path: Path, extension: str) -> None:
    behind = write_tar(tmp_path / "behind.tar", named_members([1])).read_bytes()
    path = folder / "s.tar"
    size = _sparse_member(path, f"{key(0)}.{extension}", 1 << 30, behind)
    refused = limited("index", folder=folder)
    assert refused["end"] == "DataError" and "at most" in refused["result"] and refused["grown_mib"] < 100
    found = limited("validate", folder=folder)
    assert found["result"] == {"a member or record over its cap": 1} and found["grown_mib"] < 200
    assert "at most" in limited("read", path=path, num_bytes=size)["result"]
    assert "at most" in limited("read", path=path, num_bytes=(1 << 30) + 512)["result"]


def test_a_gigabyte_announced_and_not_there(limited: Limited, folder: Path) -> None:
    info = tarfile.TarInfo(f"{key(0)}.json")
    info.size = 1 << 40
    (folder / "s.tar").write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(2048))
    assert "is cut" in limited("index", folder=folder)["result"]
    assert limited("validate", folder=folder)["result"] == {"the tar is cut": 1}
    assert "is cut" in limited("read", path=folder / "s.tar", num_bytes=2560)["result"]


@pytest.mark.parametrize("kind", [tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.XGLTYPE])
def test_names_and_settings_of_a_gigabyte(limited: Limited, folder: Path, kind: bytes) -> None:
    info = tarfile.TarInfo("name")
    info.type, info.size = kind, 1 << 30
    path = folder / "s.tar"
    with open(path, "wb") as file:
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.seek(512 + (1 << 30))
        file.write(write_tar(folder / "b", named_members([1])).read_bytes())
    refused = limited("index", folder=folder)
    assert "at most" in refused["result"] and refused["grown_mib"] < 100
    assert "a member that no shard may hold" in limited("validate", folder=folder)["result"]


def test_a_hundred_thousand_members_of_one_key(limited: Limited, folder: Path) -> None:
    path = folder / "s.tar"
    header = tarfile.TarInfo(f"{key(1)}.x00000").tobuf(tarfile.USTAR_FORMAT)
    total = int(header[148:154], 8)
    numbers = (b"%05d" % number for number in range(100_000))
    block = b"".join(
        header[:7] + number + header[12:148] + b"%06o" % (total + sum(number) - 5 * ord("0")) + header[154:]
        for number in numbers
    )
    sound = write_tar(folder / "sound", named_members([0])).read_bytes()
    before = sound[: member_starts(folder / "sound")[f"{key(0)}.npy"] + 1024]
    path.write_bytes(before + block + bytes(1024))
    refused = limited("index", folder=folder)
    assert "members or more, at most" in refused["result"] and refused["grown_mib"] < 100
    found = limited("validate", folder=folder)
    assert found["result"] == {"a member or record over its cap": 1} and found["grown_mib"] < 200
    read = limited("read", path=path, num_bytes=path.stat().st_size)
    assert "at most" in read["result"]
    assert max(answer["cpu_s"] for answer in (refused, found, read)) < 20


def test_headers_within_headers_take_linear_time(limited: Limited, folder: Path) -> None:
    """Every member runs over the next one's header, and no end mark is where the outermost says."""
    num_headers = 5_000
    blocks = []
    for number in range(num_headers):
        info = tarfile.TarInfo(f"k{number}.json")
        info.size = 512 * (num_headers - number - 1)
        blocks.append(info.tobuf(tarfile.USTAR_FORMAT))
    (folder / "s.tar").write_bytes(b"".join(blocks) + b"x" * 512)
    found = limited("validate", folder=folder)
    assert found["result"] and found["cpu_s"] < 20


def test_a_manifest_of_lies(limited: Limited, folder: Path) -> None:
    """An index that points elsewhere gives no record."""
    write_tar(folder / "s.tar", _three())
    build_index(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    for change in ({"num_records": 10**12}, {"folder": "../.."}, {"sha256": "0"}):
        (folder / "manifest.json").write_text(json.dumps({**manifest, **change}))
        assert limited("load", folder=folder, number=0, source="features")["end"] == "DataError"
