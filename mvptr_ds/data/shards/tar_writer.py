"""Writes one tar of records or of sidecar entries, whole or not at all, through webdataset's own writer."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mvptr_ds.data.shards.tar_reader import MEMBER_EXTENSIONS, max_member_bytes
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing

MAX_KEY_LEN = 90  # bytes; USTAR names end at 100


def json_bytes(content: dict[str, Any]) -> bytes:
    """Encodes a JSON object as `KEY.json` holds it: compact, UTF-8."""
    return json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()


def npy_bytes(array: np.ndarray) -> bytes:
    """Encodes an array as `KEY.npy` holds it. Raises ValueError for an array of objects."""
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=False)
    return buffer.getvalue()


def write_tar(path: Path, items: Iterable[tuple[str, dict[str, bytes]]]) -> int:
    """Writes one tar of (key, {extension: content}) and returns the number of its records.

    The file bears the name `path.partial` until it is whole; an error leaves nothing. Equal items give equal bytes:
    owner and time of the members are fixed, and the members of a record stand in the order of their extensions.

    Raises:
        DataError: a key is repeated, too long or has a dot or a slash, an extension is unknown, the json member is
            missing, or a member is empty or larger than is read again.
    """
    import webdataset  # imported only where shards are written: who reads them, or uses a model, does without

    path = Path(path)
    num_records = 0
    with (
        replacing(path) as partial,
        open(partial, "wb") as file,
        webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as writer,
    ):
        for key, members in _checked(items):
            writer.write({"__key__": key, **members})
            num_records += 1
    return num_records


def _checked(items: Iterable[tuple[str, dict[str, bytes]]]) -> Iterator[tuple[str, dict[str, bytes]]]:
    seen: set[str] = set()
    for key, members in items:
        check_key(key)
        if key in seen:
            raise DataError(f"key {key!r} is used twice; keys name a record, they must be unique in the folder")
        seen.add(key)
        unknown = [extension for extension in members if extension not in MEMBER_EXTENSIONS]
        if unknown:
            raise DataError(f"key {key!r}: members {unknown} cannot be stored, expected {sorted(MEMBER_EXTENSIONS)}")
        if "json" not in members:
            raise DataError(
                f"key {key!r} has no json member, only {sorted(members)}; give one, it says what the rest is"
            )
        empty = [extension for extension, content in members.items() if not content]
        if empty:
            raise DataError(f"key {key!r}: members {empty} are empty; leave them out")
        for extension, content in members.items():
            if len(content) > max_member_bytes(extension):
                raise DataError(
                    f"key {key!r}: the {extension} member has {len(content)} bytes, at most "
                    f"{max_member_bytes(extension)} are read again"
                )
        yield key, members


def check_key(key: str) -> None:
    """Raises DataError for a key that cannot name a record: webdataset splits names at the first dot."""
    if (
        not key
        or any(character in key for character in "./\\\0")
        or len(key.encode("utf-8", "surrogatepass")) > MAX_KEY_LEN
        or not key.isprintable()
    ):
        raise DataError(
            f"key {key!r} must be 1 to {MAX_KEY_LEN} bytes of printable text without dot, slash or backslash"
        )
