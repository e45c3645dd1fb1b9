"""The index of a folder of shards: sample number -> location of its record, from a mapped file (index_format.py).

The file is never read whole. `Index.open` compares a sampled digest (16 places), which detects a foreign, truncated or
zeroed index. `Index.verify` hashes every byte. A record that is read is checked by its own tar headers.
"""

from __future__ import annotations

import bisect
import itertools
import json
import os
from abc import ABC, abstractmethod
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import numpy as np

from mvptr_ds.data.pickling import PicklesWithoutCaches
from mvptr_ds.data.schema import SCHEMA_VERSION, Record, parse_record, parse_sample_record
from mvptr_ds.data.shards.index_format import (
    BLOCK,
    INDEX_NAME,
    INDEX_VERSION,
    MANIFEST_NAME,
    REBUILD,
    ROW,
    sampled_digest,
    sha256,
    span_bytes,
    span_flags,
)
from mvptr_ds.data.shards.storage import LOCAL, Files, open_files
from mvptr_ds.data.shards.tar_reader import read_keyed_record, read_record, record_key
from mvptr_ds.data.shards.urls import ReadOptions, is_url
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.tool_names import tool

if TYPE_CHECKING:  # it imports fsspec, which local shards do without
    from mvptr_ds.data.shards.remote import RemoteFiles


class RecordLocation(NamedTuple):
    """Where the record of a sample lies, and which of its captions the sample takes."""

    path: str  # of the shard
    offset: int  # bytes
    num_bytes: int
    record: int  # number of the record in the index
    caption: int  # number of the caption in the record


class ByteRange(NamedTuple):
    """Bytes behind a URL that a sample needs."""

    files: RemoteFiles
    path: str
    offset: int
    num_bytes: int


class SampleIndex(PicklesWithoutCaches, ABC):
    """Finds and reads samples by their number.

    `len()` counts samples: image-text pairs, captions of text-only records, image-only records. The arrays are not
    pickled: another process maps the same files.
    """

    _CACHES: ClassVar[tuple[str, ...]] = ("_rows", "_first")

    num_records: int
    num_samples: int
    num_text_only_samples: int  # of records with nothing to see
    num_image_only_samples: int  # one of each record without captions
    tags: dict[str, int]  # regions per tag, most frequent first
    fingerprint: str  # equal for equal samples in equal order
    _rows: np.ndarray  # one a record, mapped
    _first: np.ndarray  # its column first_sample

    @abstractmethod
    def _rows_path(self) -> Path:
        """Returns the path of the npy file of the rows."""

    def _init_caches(self) -> None:
        # as a plain array: numpy's own class for mapped ones takes a microsecond more for each access
        self._rows = np.asarray(np.load(self._rows_path(), mmap_mode="r", allow_pickle=False))
        self._first = self._rows["first_sample"]

    def __len__(self) -> int:
        return self.num_samples

    def locate(self, sample: int) -> RecordLocation:
        """Returns the location of a sample. Raises IndexError outside 0 <= sample < len(self)."""
        if not 0 <= sample < self.num_samples:
            raise IndexError(f"sample {sample} of {self.num_samples}")
        # bisect, not searchsorted: the column is strided in the file, and searchsorted would copy it at every call
        record = bisect.bisect_right(self._first, sample) - 1
        return self.place(record, sample - int(self._first[record]))

    def samples_of(self, record: int) -> range:
        """Returns the numbers of the samples (captions) of a record."""
        if not 0 <= record < self.num_records:
            raise IndexError(f"record {record} of {self.num_records}")
        end = self._first[record + 1] if record + 1 < self.num_records else self.num_samples
        return range(int(self._first[record]), int(end))

    @abstractmethod
    def place(self, record: int, caption: int = 0) -> RecordLocation:
        """Returns the location of a caption of a record, by the record's number."""

    @abstractmethod
    def read(self, place: RecordLocation) -> tuple[Record, dict[str, bytes]]:
        """Reads the record at a location, and its members by extension.

        Raises:
            DataError: the record cannot be used, with the reason.
            OSError: a file cannot be read.
        """

    def read_sample(self, place: RecordLocation) -> tuple[Record, dict[str, bytes]]:
        """Reads like `read`, with the caption of the location alone."""
        record, members = self.read(place)
        captions = record.captions[place.caption : place.caption + 1]
        if record.captions and not captions:
            raise DataError(f"caption {place.caption} of a record with {len(record.captions)}; rebuild the index")
        return replace(record, captions=captions), members

    @abstractmethod
    def describe(self, place: RecordLocation) -> tuple[Record, Collection[str]]:
        """Reads the record at a location, and the extensions of its members but not their content; raises as `read`."""

    @abstractmethod
    def region_extractors(self) -> set[str]:
        """Returns what made the regions and features that are read, as `name version`; empty where there are none."""

    @abstractmethod
    def key_hashes(self) -> np.ndarray:
        """Returns the key hashes of all records, uint64 [num_records]; a copy."""

    @abstractmethod
    def key_of(self, place: RecordLocation) -> str:
        """Returns the key of the record at a location, for messages; `?` when it cannot be read."""

    @abstractmethod
    def remote_extents(self, sample: int) -> list[ByteRange]:
        """Returns the ranges of a sample that are not on this machine, in the order in which they are read."""

    @property
    @abstractmethod
    def read_ahead_bytes(self) -> int:
        """Bytes that a process may fetch ahead; 0 where all is on this machine."""


class Index(SampleIndex):
    """Finds the samples of one folder of shards. In a folder of a sidecar each entry is a sample without captions."""

    def __init__(self, folder: Path | str, own_folder: Path, manifest: dict[str, Any], options: ReadOptions) -> None:
        self.folder = folder
        self._own_folder = own_folder
        self.kind = str(manifest["kind"])
        self.num_records = int(manifest["num_records"])
        self.num_samples = int(manifest["num_samples"])
        self.num_text_only_samples = int(manifest["num_text_only_samples"])
        self.num_image_only_samples = int(manifest["num_image_only_samples"])
        self.tags = dict(manifest["tags"])
        self.extractors: dict[str, int] = dict(manifest["extractors"])  # "name version" -> records that name it
        self.holds: dict[str, int] = dict(manifest["holds"])  # regions, npy, ... -> records that hold some
        self.fingerprint = str(manifest["sha256"])
        self.num_bytes = sum(int(shard["num_bytes"]) for shard in manifest["shards"])
        self.num_shards = len(manifest["shards"])
        names = [shard["name"] for shard in manifest["shards"]]
        strange = [name for name in names if "/" in name or not name.endswith(".tar")]
        if strange:
            raise DataError(f"{own_folder / MANIFEST_NAME} names a shard {strange[0]!r}; {REBUILD}")
        beside = manifest.get("folder", ".")
        if is_url(folder) and beside != ".":
            raise DataError(f"the index of {folder} was made of the shards in {beside!r}; put it beside its shards")
        tars = str(folder) if is_url(folder) else str(own_folder / beside)
        self._paths = [os.path.join(tars, name) for name in names]
        self._sizes = [int(shard["num_bytes"]) for shard in manifest["shards"]]
        self._record_ends = list(itertools.accumulate(int(shard["num_records"]) for shard in manifest["shards"]))
        self._remote: RemoteFiles | None = None
        if is_url(folder):
            from mvptr_ds.data.shards.remote import RemoteFiles

            self._remote = RemoteFiles(options, dict(zip(self._paths, self._sizes, strict=True)))
        self._init_caches()

    @property
    def files(self) -> Files:
        """The reader of the shards' bytes."""
        return self._remote or LOCAL

    def _rows_path(self) -> Path:
        return self._own_folder / INDEX_NAME

    @classmethod
    def open(cls, folder: str | Path, options: ReadOptions | None = None) -> Index:
        """Maps the index and checks it cheaply: its size, a few places of it, and the size of every tar.

        The index of shards behind a URL is copied to this machine first, and the sizes of two tars alone are checked.

        Raises:
            DataError: manifest or index missing, of another version, not of a pair, or a tar is missing or has changed.
        """
        options = options or ReadOptions()
        open_files.close()
        own_folder = _fetch(str(folder), options) if is_url(folder) else Path(folder)
        manifest_path = own_folder / MANIFEST_NAME
        try:
            manifest = json.loads(manifest_path.read_text(encoding="utf-8"))
            if manifest["version"] != INDEX_VERSION or manifest["schema"] != SCHEMA_VERSION:
                raise DataError(
                    f"{manifest_path} has version {manifest['version']}, schema {manifest['schema']}; this "
                    f"version reads {INDEX_VERSION}, {SCHEMA_VERSION}; {REBUILD}"
                )
            with open(own_folder / INDEX_NAME, "rb") as file:
                if sampled_digest(file, manifest["sha256"]) != manifest["probe"]:
                    raise DataError(f"{own_folder / INDEX_NAME} is not the one the manifest names; {REBUILD}")
            index = cls(str(folder).rstrip("/") if is_url(folder) else own_folder, own_folder, manifest, options)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(f"cannot open the index of {folder}: {error}; {REBUILD}") from error
        except (KeyError, TypeError, AttributeError) as error:
            raise DataError(f"{manifest_path} is not a manifest: {error!r}; {REBUILD}") from error
        index._check_tars()
        return index

    def _check_tars(self) -> None:
        if self._rows.dtype != ROW or len(self._rows) != self.num_records or self.num_samples < 1:
            raise DataError(f"{self._rows_path()} does not fit its manifest; {REBUILD}")
        if self._remote is not None:
            self._check_remote_tars(self._remote)
            return
        for path, expected in zip(self._paths, self._sizes, strict=True):
            try:
                size = os.stat(path).st_size
            except OSError as error:
                raise DataError(f"shard {path} is missing ({error}); bring it back or {REBUILD}") from error
            if size != expected:
                raise DataError(f"shard {path} has {size} bytes, the index was built for {expected}; {REBUILD}")
        known = {os.path.basename(path) for path in self._paths}
        listed = os.listdir(os.path.dirname(self._paths[0]))
        others = sorted(name for name in listed if name.endswith(".tar") and name not in known)
        if others:
            shown = others[0].encode(errors="backslashreplace").decode()
            raise DataError(f"{self.folder}: {len(others)} tars are not in the index, such as {shown}; {REBUILD}")

    def _check_remote_tars(self, files: RemoteFiles) -> None:
        """Checks the first and the last alone: a request for each of thousands would take minutes."""
        for path in {self._paths[0], self._paths[-1]}:
            try:
                files.check(path)
            except OSError as error:
                raise DataError(f"shard {path} cannot be read: {error}") from error

    def verify(self) -> None:
        """Reads the whole index, a second or two for ten million records, and compares it with its hash.

        Raises:
            DataError: it is not the one the manifest names.
        """
        with open(self._rows_path(), "rb") as file:
            if sha256(file) != self.fingerprint:
                raise DataError(f"{self._rows_path()} is not the one the manifest names; {REBUILD}")

    def place(self, record: int, caption: int = 0) -> RecordLocation:
        row = self._rows[record]
        path = self._paths[bisect.bisect_right(self._record_ends, record)]
        return RecordLocation(path, int(row["block"]) * BLOCK, span_bytes(int(row["span"])), record, caption)

    def read(self, place: RecordLocation) -> tuple[Record, dict[str, bytes]]:
        members = read_record(place.path, place.offset, place.num_bytes, self.files)
        return parse_record(members["json"]), members

    def read_sample(self, place: RecordLocation) -> tuple[Record, dict[str, bytes]]:
        members = read_record(place.path, place.offset, place.num_bytes, self.files)
        return parse_sample_record(members["json"], place.caption), members

    def describe(self, place: RecordLocation) -> tuple[Record, Collection[str]]:
        members = read_keyed_record(place.path, place.offset, place.num_bytes, self.files, contents=("json",))[1]
        return parse_record(members["json"]), members.keys()

    def key_of(self, place: RecordLocation) -> str:
        return record_key(place.path, place.offset, place.num_bytes, self.files)

    def remote_extents(self, sample: int) -> list[ByteRange]:
        return self.remote_extents_of(self.locate(sample))

    @property
    def read_ahead_bytes(self) -> int:
        return 0 if self._remote is None else self._remote.options.ahead_mib << 20

    def remote_extents_of(self, place: RecordLocation) -> list[ByteRange]:
        """Returns the ranges of the record at a location that are not on this machine."""
        return [] if self._remote is None else [ByteRange(self._remote, *place[:3])]

    def region_extractors(self) -> set[str]:
        return set(self.extractors) if "regions" in self.holds or "npy" in self.holds else set()

    def key_hashes(self) -> np.ndarray:
        return np.array(self._rows["key_hash"])

    def first_samples(self) -> np.ndarray:
        """Returns the number of the first sample of each record, int64 [num_records]; a copy."""
        return self._first.astype(np.int64)

    def flags(self) -> np.ndarray:
        """Returns NOT_VISUAL, NO_CAPTION and NO_REGIONS of all records, uint8 [num_records]; a copy."""
        return span_flags(self._rows["span"])


def _fetch(url: str, options: ReadOptions) -> Path:
    from mvptr_ds.data.shards.remote import fetch_index

    try:
        return fetch_index(url.rstrip("/"), options)
    except OSError as error:
        raise DataError(
            f"cannot fetch the index of {url}: {error}; manifest.json and index.npy must lie beside the shards "
            f"({tool('validate')} writes them where the shards are made)"
        ) from error
