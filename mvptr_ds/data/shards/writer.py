"""Writes a folder of shards: tars of records, then their index, through which one `pread` reads a record.

    folder/shard-000000.tar ...   records: KEY.json + an image and/or KEY.npy
    folder/manifest.json, index.npy

The index is built and validated once; nothing is ever extracted, unpickled or run.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.tar_writer import json_bytes, write_tar
from mvptr_ds.errors import DataError


def write_shards(
    folder: str | Path, items: Iterable[tuple[str, Record, dict[str, bytes]]], records_per_shard: int
) -> None:
    """Writes `shard-000000.tar` ... of (key, record, {extension: content}), then the manifest and the index.

    Equal items give equal bytes: owner and time of the members are fixed. Shards bear a partial name until all are
    written. So an interrupted run leaves nothing that reads as complete.

    Raises:
        DataError: the folder already holds tars, a key is repeated or has a dot or a slash, an extension is unknown,
            or a record has nothing to train on.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise DataError(f"{folder} already holds tars; remove them or write to another folder")
    if records_per_shard < 1:
        raise DataError(f"records_per_shard is {records_per_shard}, must be at least 1")
    for stale in folder.glob("*.tar.partial*"):
        stale.unlink()
    seen: set[str] = set()
    partials: list[Path] = []
    stream = iter(items)
    while (first := next(stream, None)) is not None:
        partials.append(folder / f"shard-{len(partials):06d}.tar.partial")
        chunk = itertools.chain([first], itertools.islice(stream, records_per_shard - 1))
        write_tar(partials[-1], _with_json(chunk, seen))
    for partial in partials:
        os.replace(partial, partial.with_suffix(""))
    build_index(folder)


def _with_json(
    items: Iterable[tuple[str, Record, dict[str, bytes]]], seen: set[str]
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for key, record, members in items:
        if key in seen:
            raise DataError(f"key {key!r} is used twice; keys name a record, they must be unique in the folder")
        seen.add(key)
        yield key, {**members, "json": json_bytes(record.to_json())}
