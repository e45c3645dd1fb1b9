"""Shards for the tests of validation, hostile input and fuzzing: small sound ones, and tars with any member at all."""

from __future__ import annotations

import copy
import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mvptr_ds.data.schema import Record, parse_record
from mvptr_ds.data.shards.writer import write_shards

WIDTH, HEIGHT, NUM_REGIONS, FEATURE_DIM = 32, 24, 2, 4
TEXT = "A brown dog chases two women."
CONTENT: dict[str, Any] = {
    "schema": 1,
    "image_id": "7",
    "width": WIDTH,
    "height": HEIGHT,
    "captions": [
        {
            "text": TEXT,
            "phrases": [
                {"tuple": ["dog", "brown"], "spans": [[2, 7], [8, 11]]},
                {"tuple": ["dog", "chase", "woman"], "spans": [[8, 11], [12, 18], [23, 28]]},
            ],
        },
        {"text": "Nobody stands there."},
    ],
    "regions": [{"box": [0, 0, 16, 12], "tag": "dog", "score": 0.9}, {"box": [3, 4, 32, 24], "tag": "woman"}],
}


def content(**changes: Any) -> dict[str, Any]:
    """The JSON of a sound record, changed."""
    return {**copy.deepcopy(CONTENT), **changes}


def encoded(value: Any) -> bytes:
    return json.dumps(value).encode()


def npy(array: np.ndarray, allow_pickle: bool = False) -> bytes:
    stream = io.BytesIO()
    np.save(stream, array, allow_pickle=allow_pickle)
    return stream.getvalue()


def picture(image_format: str = "JPEG", size: tuple[int, int] = (WIDTH, HEIGHT), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, image_format)
    return stream.getvalue()


def features(rows: int = NUM_REGIONS, columns: int = FEATURE_DIM, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float16)


def members(number: int = 0) -> dict[str, bytes]:
    """The members of sound record `number`, in the order in which webdataset writes them."""
    return {
        "jpg": picture(seed=number),
        "json": encoded(content(image_id=str(number))),
        "npy": npy(features(seed=number)),
    }


def key(number: int) -> str:
    return f"k{number:04d}"


def write_tar(path: Path, named: Iterable[tuple[str, bytes]], tar_format: int = tarfile.USTAR_FORMAT) -> Path:
    """A tar of (name, content), with none of the checks of the package's own writer."""
    with tarfile.open(path, "w", format=tar_format) as tar:
        for name, data in named:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def named_members(numbers: Iterable[int], **changes: bytes | None) -> list[tuple[str, bytes]]:
    """(name, content) of sound records, with members replaced or, by None, left out."""
    return [
        (f"{key(number)}.{extension}", data)
        for number in numbers
        for extension, data in {**members(number), **changes}.items()
        if data is not None
    ]


def sound_folder(folder: Path, num_records: int = 8, records_per_shard: int = 4) -> Path:
    """Shards by the package's own writer, with their index."""
    write_shards(folder, (_item(number) for number in range(num_records)), records_per_shard)
    return folder


def _item(number: int) -> tuple[str, Record, dict[str, bytes]]:
    out = members(number)
    return key(number), parse_record(out.pop("json")), out


def member_starts(tar: Path) -> dict[str, int]:
    """Byte of each member's header."""
    with tarfile.open(tar) as archive:
        return {info.name: info.offset for info in archive}
