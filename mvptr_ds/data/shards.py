"""Shards: tar files of records, written with webdataset's writer, read through an index by one `pread` a record.

    folder/shard-000000.tar ...   records: KEY.json + an image and/or KEY.npy
    folder/manifest.json          shards, counts, tags, sha256 of the index
    folder/index.npy              one row a record: offset, num_bytes, first_sample

The index is built and validated once; nothing is ever extracted, unpickled or run.
"""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import webdataset
from tqdm import tqdm

from mvptr_ds.data.schema import SCHEMA_VERSION, DataError, Record, parse_record
from mvptr_ds.data.tars import (
    MEMBER_EXTENSIONS,
    REBUILD,
    Member,
    TarError,
    iter_members,
    open_files,
    read_record,
    record_key,
    split_name,
)

__all__ = ["Index", "Place", "build_index", "ensure_index", "read_record", "record_key", "write_shards"]

MANIFEST_NAME = "manifest.json"
INDEX_NAME = "index.npy"
INDEX_VERSION = 1
ROW = np.dtype([("offset", "<u8"), ("num_bytes", "<u4"), ("first_sample", "<u8")])
_MAX_KEY_LEN = 90  # bytes; USTAR names end at 100
_MAX_TAGS = 5_000


def write_shards(
    folder: str | Path, items: Iterable[tuple[str, Record, dict[str, bytes]]], records_per_shard: int
) -> None:
    """Writes `shard-000000.tar` ... of (key, record, {extension: content}), then the manifest and the index.

    Equal items give equal bytes: owner and time of the members are fixed. Shards bear a temporary name until all are
    written, so that an interrupted run leaves nothing that reads as complete.

    Raises:
        DataError: the folder already holds tars, a key is repeated or has a dot or a slash, an extension is unknown,
            or a record has neither image nor features.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.glob("*.tar")):
        raise DataError(f"{folder} already holds tars; remove them or write to another folder")
    if records_per_shard < 1:
        raise DataError(f"records_per_shard is {records_per_shard}, must be at least 1")
    for stale in folder.glob("*.tar.partial"):
        stale.unlink()
    seen: set[str] = set()
    partials: list[Path] = []
    stream = iter(items)
    while (first := next(stream, None)) is not None:
        partials.append(folder / f"shard-{len(partials):06d}.tar.partial")
        chunk = itertools.chain([first], itertools.islice(stream, records_per_shard - 1))
        with (
            open(partials[-1], "wb") as file,
            webdataset.TarWriter(file, user="", group="", mtime=0, encoder=False) as writer,
        ):
            for key, record, members in chunk:
                writer.write(_members_to_write(key, record, members, seen))
    for partial in partials:
        os.replace(partial, partial.with_suffix(""))
    build_index(folder)


def _members_to_write(key: str, record: Record, members: dict[str, bytes], seen: set[str]) -> dict[str, Any]:
    if not key or any(c in key for c in "./\\\0") or len(key.encode()) > _MAX_KEY_LEN:
        raise DataError(f"key {key!r} must be 1 to {_MAX_KEY_LEN} bytes without dot, slash or backslash")
    if key in seen:
        raise DataError(f"key {key!r} is used twice; keys name a record, they must be unique in the folder")
    seen.add(key)
    unknown = [ext for ext in members if ext == "json" or ext not in MEMBER_EXTENSIONS]
    if unknown:
        raise DataError(f"key {key!r}: members {unknown} cannot be stored, expected {sorted(MEMBER_EXTENSIONS)}")
    if not members:
        raise DataError(f"key {key!r} has neither an image nor npy features; give at least one")
    content = json.dumps(record.to_json(), ensure_ascii=False, separators=(",", ":")).encode()
    return {"__key__": key, "json": content, **members}


@dataclass
class _Scan:
    """What a walk over the shards has found so far."""

    rows: list[tuple[int, int, int]]
    keys: set[str]
    tags: Counter[str]
    num_samples: int = 0


def build_index(folder: str | Path, out: str | Path | None = None) -> Index:
    """Scans and validates every tar of `folder`, writes manifest and index (into `out` if given), opens them.

    Raises:
        DataError: names shard, offset, key and remedy of the first thing that is wrong.
    """
    folder, out = Path(folder), Path(out if out is not None else folder)
    tars = sorted(folder.glob("*.tar"))
    if not tars:
        raise DataError(f"{folder} holds no .tar file; set data.train / data.held_out to a folder of shards")
    scan = _Scan([], set(), Counter())
    shards = []
    num_bytes = sum(tar.stat().st_size for tar in tars)
    with tqdm(total=num_bytes, unit="B", unit_scale=True, desc="index", delay=2.0) as bar:
        for tar in tars:
            before, samples_before = len(scan.rows), scan.num_samples
            _scan_shard(tar, scan)
            size = tar.stat().st_size
            num_records, num_samples = len(scan.rows) - before, scan.num_samples - samples_before
            shards.append({"name": tar.name, "num_bytes": size, "num_records": num_records, "num_samples": num_samples})
            bar.update(size)
    _write_index(folder, out, scan, shards)
    return Index.open(out)


def _scan_shard(tar: Path, scan: _Scan) -> None:
    with open(tar, "rb") as file:
        end = tar.stat().st_size
        members: list[tuple[str, Member]] = []  # of the record being read
        key = None
        try:
            for member in iter_members(file, end, whole=True):
                member_key, extension = split_name(member)
                if member_key != key:
                    _add_record(file, key, members, scan)
                    key, members = member_key, []
                    if key in scan.keys:
                        raise TarError(
                            member.start, "this key was seen before: it is not unique, or its members are not adjacent"
                        )
                members.append((extension, member))
            _add_record(file, key, members, scan)
        except DataError as error:
            raise DataError(
                f"{tar}, key {key!r}: {error}; write that shard again or take it out of the folder"
            ) from error


def _add_record(file: BinaryIO, key: str | None, members: list[tuple[str, Member]], scan: _Scan) -> None:
    if key is None:
        return
    start = members[0][1].start
    extensions = [extension for extension, _ in members]
    repeated = [extension for extension, count in Counter(extensions).items() if count > 1]
    if repeated:
        raise TarError(start, f"the record has {repeated} twice")
    if "json" not in extensions:
        raise TarError(start, f"the record has no json member, only {extensions}")
    if not any(extension in MEMBER_EXTENSIONS for extension in extensions if extension != "json"):
        raise TarError(start, f"the record has neither an image nor npy features, only {extensions}")
    num_bytes = members[-1][1].end - start
    if num_bytes >= 1 << 32:
        raise TarError(start, f"the record has {num_bytes} bytes; at most 4 GiB fit the index")
    content = members[extensions.index("json")][1]
    file.seek(content.data)
    try:
        record = parse_record(file.read(content.size))
    except DataError as error:
        raise TarError(content.start, str(error)) from error
    scan.keys.add(key)
    scan.rows.append((start, num_bytes, scan.num_samples))
    scan.num_samples += len(record.captions)
    scan.tags.update(region.tag for region in record.regions)


def _write_index(folder: Path, out: Path, scan: _Scan, shards: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, np.array(scan.rows, dtype=ROW), allow_pickle=False)
    tags = sorted(scan.tags.items(), key=lambda item: (-item[1], item[0]))[:_MAX_TAGS]
    manifest = {
        "schema": SCHEMA_VERSION,
        "version": INDEX_VERSION,
        "folder": os.path.relpath(folder, out),
        "shards": shards,
        "num_records": len(scan.rows),
        "num_samples": scan.num_samples,
        "tags": dict(tags),
        "sha256": hashlib.sha256(buffer.getbuffer()).hexdigest(),
    }
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    # the manifest last: it vouches for the index by its hash
    for name, data in ((INDEX_NAME, buffer.getvalue()), (MANIFEST_NAME, content.encode())):
        partial = out / f"{name}.{os.getpid()}.partial"
        partial.write_bytes(data)
        os.replace(partial, out / name)


def ensure_index(folder: str | Path) -> Index:
    """Opens the folder's index, building it when there is none. One process only may call it on a fresh folder."""
    return Index.open(folder) if (Path(folder) / MANIFEST_NAME).exists() else build_index(folder)


class Place(NamedTuple):
    """Where a sample lies."""

    path: str  # of its shard
    offset: int  # bytes
    num_bytes: int
    record: int  # number of the record in the folder
    caption: int  # number of the caption in the record


class Index:
    """Sample number -> place of its record. `len()` counts samples (image-text pairs).

    Pickles without the array: another process maps the same file.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        self.folder = folder
        self.num_records = int(manifest["num_records"])
        self.num_samples = int(manifest["num_samples"])
        self.tags: dict[str, int] = dict(manifest["tags"])  # regions per tag, most frequent first
        self.fingerprint = str(manifest["sha256"])
        self.num_bytes = sum(int(shard["num_bytes"]) for shard in manifest["shards"])
        self.num_shards = len(manifest["shards"])
        tars = folder / manifest.get("folder", ".")
        self._paths = [str(tars / shard["name"]) for shard in manifest["shards"]]
        self._sizes = [int(shard["num_bytes"]) for shard in manifest["shards"]]
        self._record_ends = list(itertools.accumulate(int(shard["num_records"]) for shard in manifest["shards"]))
        self._map()

    def _map(self) -> None:
        self._rows = np.load(self.folder / INDEX_NAME, mmap_mode="r", allow_pickle=False)
        self._first = self._rows["first_sample"]

    @classmethod
    def open(cls, folder: str | Path) -> Index:
        """Maps the index and checks it cheaply: its hash, and the size of every tar.

        Raises:
            DataError: manifest or index missing, of another version, not of a pair, or a tar is missing or has changed.
        """
        folder = Path(folder)
        open_files.close()
        try:
            manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
            if manifest["version"] != INDEX_VERSION or manifest["schema"] != SCHEMA_VERSION:
                raise DataError(
                    f"{folder / MANIFEST_NAME} has version {manifest['version']}, schema {manifest['schema']}; this "
                    f"version reads {INDEX_VERSION}, {SCHEMA_VERSION}; {REBUILD}"
                )
            with open(folder / INDEX_NAME, "rb") as file:
                if _sha256(file) != manifest["sha256"]:
                    raise DataError(f"{folder / INDEX_NAME} is not the one the manifest names; {REBUILD}")
            index = cls(folder, manifest)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"cannot open the index of {folder}: {error}; {REBUILD}") from error
        except (KeyError, TypeError) as error:
            raise DataError(f"{folder / MANIFEST_NAME} is not a manifest: {error!r}; {REBUILD}") from error
        index._check_tars()
        return index

    def _check_tars(self) -> None:
        if self._rows.dtype != ROW or len(self._rows) != self.num_records or self.num_samples < 1:
            raise DataError(f"{self.folder / INDEX_NAME} does not fit its manifest; {REBUILD}")
        for path, expected in zip(self._paths, self._sizes, strict=True):
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise DataError(f"shard {path} is missing ({error}); bring it back or {REBUILD}") from error
            if size != expected:
                raise DataError(f"shard {path} has {size} bytes, the index was built for {expected}; {REBUILD}")

    def __len__(self) -> int:
        return self.num_samples

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("_rows", "_first")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._map()

    def locate(self, sample: int) -> Place:
        """Place of a sample. Raises IndexError outside 0 <= sample < len(self)."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        # bisect, not searchsorted: the column is strided in the file, and searchsorted would copy it at every call
        record = bisect.bisect_right(self._first, sample) - 1
        row = self._rows[record]
        path = self._paths[bisect.bisect_right(self._record_ends, record)]
        return Place(path, int(row["offset"]), int(row["num_bytes"]), record, sample - int(row["first_sample"]))

    def samples_of(self, record: int) -> range:
        """Numbers of the samples (captions) of a record."""
        if not 0 <= record < self.num_records:
            raise IndexError(f"record {record} of {self.num_records}")
        end = self._first[record + 1] if record + 1 < self.num_records else self.num_samples
        return range(int(self._first[record]), int(end))


def _sha256(file: BinaryIO) -> str:
    digest = hashlib.sha256()
    while chunk := file.read(1 << 20):
        digest.update(chunk)
    return digest.hexdigest()
