"""Builds the index of tars: every header and every json member is read and checked once, in a stream."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
from array import array
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mvptr_ds.data.schema import SCHEMA_VERSION, Record, SidecarEntry, check_size, parse_entry
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_format import (
    BLOCK,
    INDEX_NAME,
    INDEX_VERSION,
    MANIFEST_NAME,
    MAX_SAMPLES,
    NO_CAPTION,
    NO_REGIONS,
    NOT_VISUAL,
    RECORDS,
    ROW,
    SIDECAR,
    UNNAMED_EXTRACTOR,
    key_hash,
    pack_span,
    sampled_digest,
    span_bytes,
)
from mvptr_ds.data.shards.tar_header import TarError
from mvptr_ds.data.shards.tar_reader import (
    IMAGE_EXTENSIONS,
    Member,
    check_member,
    check_record,
    iter_members,
    list_tars,
    record_key,
    split_name,
)
from mvptr_ds.data.shards.urls import ReadOptions, is_url
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.tool_names import command

NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)
_MAX_TAGS = 5_000
_WRITE_AGAIN = "write that shard again or take it out of the folder"
_IMG2DATASET_FIELDS = frozenset(("caption", "url", "status"))
_MAX_IMG2DATASET_BYTES = 1 << 18  # of a json that is parsed a second time, to tell whose it is


class ForeignRecord(DataError):
    """The record is one of img2dataset, of which shards can be made."""


def where_tars_are(folder: str | Path) -> str:
    """Says what to do about a folder without tars: often those below it were meant."""
    below = sorted(path.name for path in Path(folder).glob("*/") if next(path.glob("*.tar"), None) is not None)
    if not below:
        return "name a folder of shards"
    shown = ", ".join(below[:5]) + (f" and {len(below) - 5} more" if len(below) > 5 else "")
    one = Path(folder, "train" if "train" in below else below[0])
    return f"there are some below it, in {shown}: name one of these, such as {one}"


def use_build_shards(folder: str | Path) -> str:
    """Says what to do about tars of img2dataset."""
    return f"{command('shards')} img2dataset {folder} --out DIR makes shards of such tars"


def is_img2dataset(extensions: Collection[str], content: bytes | None) -> bool:
    """Tells whether a record that is none of ours is one of img2dataset.

    Such a record has KEY.jpg, KEY.txt, and KEY.json without a schema.

    Args:
        content: the bytes of KEY.json; None where there is none.
    """
    if content is None:
        return "txt" in extensions
    if len(content) > _MAX_IMG2DATASET_BYTES:
        return False
    try:
        fields = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(fields, dict) and "schema" not in fields and not _IMG2DATASET_FIELDS.isdisjoint(fields)


@dataclass
class _Scan:
    """Collects what a walk over the shards finds; in arrays, because a corpus has ten million records."""

    blocks: array[int] = field(default_factory=lambda: array("I"))
    spans: array[int] = field(default_factory=lambda: array("I"))
    first_samples: array[int] = field(default_factory=lambda: array("I"))
    key_hashes: array[int] = field(default_factory=lambda: array("Q"))
    tags: Counter[str] = field(default_factory=Counter)
    extractors: Counter[str] = field(default_factory=Counter)
    holds: Counter[str] = field(default_factory=Counter)
    kind: str | None = None
    num_samples: int = 0
    num_text_only_samples: int = 0
    num_image_only_samples: int = 0

    def rows(self) -> np.ndarray:
        rows = np.empty(len(self.blocks), dtype=ROW)
        rows["block"], rows["span"] = self.blocks, self.spans
        rows["first_sample"], rows["key_hash"] = self.first_samples, self.key_hashes
        return rows


def build_index(folder: str | Path, out: str | Path | None = None, role: str = "") -> Index:
    """Scans and validates every tar of `folder`, writes manifest and index (into `out` if given), opens them.

    Args:
        role: what names the folder, for messages: data.train, say.

    Raises:
        DataError: names shard, offset, key and remedy of the first thing that is wrong.
    """
    folder, out = Path(folder), Path(out if out is not None else folder)
    tars = list_tars(folder)
    if not tars:
        raise DataError(f"{_named(folder, role)} holds no .tar file; {where_tars_are(folder)}")
    scan = _Scan()
    shards: list[dict[str, Any]] = []
    num_bytes = sum(tar.stat().st_size for tar in tars)
    with progress_bar(total=num_bytes, unit="B", unit_scale=True, desc="index", delay=2.0) as bar:
        for tar in tars:
            before, samples_before = len(scan.blocks), scan.num_samples
            _scan_shard(tar, scan)
            size = tar.stat().st_size
            num_records, num_samples = len(scan.blocks) - before, scan.num_samples - samples_before
            shards.append({"name": tar.name, "num_bytes": size, "num_records": num_records, "num_samples": num_samples})
            bar.update(size)
    rows = scan.rows()
    _check_unique(tars, [shard["num_records"] for shard in shards], rows)
    try:
        _write_index(folder, out, scan, rows, shards)
    except OSError as error:
        if error.errno not in NOT_WRITABLE:
            raise
        raise DataError(not_writable(folder, out, error, role)) from error
    return Index.open(out)


def _named(folder: Path, role: str) -> str:
    return f"{folder} ({role})" if role else str(folder)


def not_writable(folder: Path, out: Path, error: OSError, role: str = "") -> str:
    """Returns the message that an index of `folder` may not be written into `out`."""
    return (
        f"the index of {_named(folder, role)} cannot be written into {out} ({error.strerror}): write it elsewhere with "
        f"{command('validate')} {folder} --out DIR, and name DIR in place of {folder}"
    )


def check_first_record(folder: str | Path) -> None:
    """Checks the first record of a folder of tars without reading further.

    Raises:
        DataError: the record is wrong, as `build_index` would say.
    """
    _scan_shard(min(Path(folder).glob("*.tar")), _Scan(), max_records=1)


def ensure_index(folder: str | Path, options: ReadOptions | None = None, role: str = "") -> Index:
    """Opens the folder's index, building it when there is none or an older version wrote it.

    One process only may call it on a fresh folder. Behind a URL the index must be there.

    Args:
        role: what names the folder, for messages.
    """
    if is_url(folder):
        return Index.open(folder, options)
    path = Path(folder) / MANIFEST_NAME
    if not path.exists():
        return build_index(folder, role=role)
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        if manifest["schema"] == SCHEMA_VERSION and manifest["version"] < INDEX_VERSION:
            return build_index(Path(folder) / manifest.get("folder", "."), folder, role)
    except (OSError, ValueError, KeyError, TypeError) as error:
        if isinstance(error, DataError):
            raise
    return Index.open(folder)  # which says what is wrong with it


def _scan_shard(tar: Path, scan: _Scan, max_records: int | None = None) -> None:
    seen: set[str] = set()  # of this shard
    with open(tar, "rb") as file:
        end = tar.stat().st_size
        members: dict[str, Member] = {}  # of the record being read, by extension
        key = None
        try:
            for member in iter_members(file, end, whole=True):
                member_key, extension = split_name(member)
                if member_key != key:
                    _add_record(file, key, members, scan)
                    if len(scan.blocks) == max_records:
                        return
                    key, members = member_key, {}
                    if key in seen:
                        raise TarError(
                            member.start, "this key was seen before: it is not unique, or its members are not adjacent"
                        )
                    seen.add(key)
                start = next(iter(members.values()), member).start
                if extension in members:
                    raise TarError(start, f"the record has {extension!r} twice")
                check_member(member, extension)
                check_record(len(members) + 1, start, member.end)
                members[extension] = member
            _add_record(file, key, members, scan)
        except DataError as error:
            remedy = use_build_shards(tar.parent) if isinstance(error, ForeignRecord) else _WRITE_AGAIN
            raise DataError(f"{tar}, key {key!r}: {error}; {remedy}") from error


def _add_record(file: BinaryIO, key: str | None, members: dict[str, Member], scan: _Scan) -> None:
    if key is None:
        return
    start = next(iter(members.values())).start
    if "json" not in members:
        if is_img2dataset(members, None):
            raise ForeignRecord(f"this is a record of img2dataset ({', '.join(members)})")
        raise TarError(start, f"the record has no json member, only {sorted(members)}")
    content = members["json"]
    file.seek(content.data)
    encoded = file.read(content.size)
    try:
        entry = parse_entry(encoded)
        kind, flags = classify_entry(entry, members, scan.holds)
    except DataError as error:
        if is_img2dataset(members, encoded):
            raise ForeignRecord(f"this is a record of img2dataset ({', '.join(members)})") from error
        raise TarError(content.start, str(error)) from error
    if scan.kind not in (None, kind):
        raise TarError(
            start, f"this belongs to a folder of kind {kind!r}, what came before to {scan.kind!r}: part them"
        )
    scan.kind = kind
    num_blocks = (next(reversed(members.values())).end - start) // BLOCK
    if start // BLOCK >= 1 << 32:
        raise TarError(start, "the record begins behind 2 TiB; write smaller shards")
    scan.blocks.append(start // BLOCK)
    scan.spans.append(pack_span(num_blocks, flags))
    scan.first_samples.append(scan.num_samples)
    scan.key_hashes.append(key_hash(key))
    num_samples = max(1, len(entry.captions)) if isinstance(entry, Record) else 1
    scan.num_samples += num_samples
    if scan.num_samples > MAX_SAMPLES:
        raise TarError(start, f"the folder holds more than {MAX_SAMPLES} samples; spread the shards over several")
    if isinstance(entry, Record):
        scan.num_text_only_samples += num_samples * bool(flags & NOT_VISUAL)
        scan.num_image_only_samples += bool(flags & NO_CAPTION)
    scan.tags.update(region.tag for region in entry.regions or ())
    if entry.extractor is not None:
        scan.extractors[str(entry.extractor)] += 1
    elif entry.regions or "npy" in members:
        scan.extractors[UNNAMED_EXTRACTOR] += 1


def classify_entry(entry: Record | SidecarEntry, members: Collection[str], holds: Counter[str]) -> tuple[str, int]:
    """Returns kind and flags of a record or a sidecar's entry with members of these extensions.

    Counts in `holds` what it holds: image, npy, regions, captions.

    Raises:
        DataError: the entry has nothing to train on, or a member that its kind cannot have.
    """
    images = [extension for extension in members if extension in IMAGE_EXTENSIONS]
    has_npy, has_regions = "npy" in members, bool(entry.regions)
    is_record = isinstance(entry, Record)
    if not is_record and images:
        raise DataError(f"a sidecar holds json and npy members, but here is {images}")
    if not is_record and not has_npy and entry.regions is None and entry.captions is None:
        raise DataError("the sidecar's entry has neither regions, captions nor npy features: it says nothing")
    visual = bool(images) or has_npy or has_regions
    if is_record and not visual and not entry.captions:
        raise DataError("the record has neither a caption nor an image, npy features or regions: nothing to train on")
    if isinstance(entry, Record) and visual:
        check_size(entry.width, entry.height)
    held = {
        "image": bool(images),
        "npy": has_npy,
        "regions": has_regions if is_record else entry.regions is not None,
        "captions": bool(entry.captions) if is_record else entry.captions is not None,
    }
    holds.update(name for name, is_held in held.items() if is_held)
    flags = (0 if visual else NOT_VISUAL) | (NO_CAPTION if is_record and not entry.captions else 0)
    flags |= NO_REGIONS if not is_record and entry.regions is not None and not visual else 0
    return (RECORDS if is_record else SIDECAR), flags


def _check_unique(tars: list[Path], num_records: list[int], rows: np.ndarray) -> None:
    """Compares the keys of different shards by their hashes.

    Raises:
        DataError: a key is in two shards, or two keys have one hash.
    """
    order = np.argsort(rows["key_hash"], kind="stable")
    hashes = rows["key_hash"][order]
    repeats = np.flatnonzero(hashes[1:] == hashes[:-1])
    if not len(repeats):
        return
    ends = np.cumsum(num_records)
    places = []
    for record in order[repeats[0] : repeats[0] + 2]:
        tar = tars[int(np.searchsorted(ends, record, side="right"))]
        offset = int(rows["block"][record]) * BLOCK
        places.append((tar, offset, record_key(str(tar), offset, span_bytes(int(rows["span"][record])))))
    (first, _, first_key), (second, offset, key) = places
    found = f"{second}, key {key!r}: byte {offset}"
    if key == first_key:
        raise DataError(f"{found}: this key was seen before, in {first}: it is not unique; {_WRITE_AGAIN}")
    raise DataError(f"{found}: it has the same 64-bit hash as key {first_key!r} in {first}; rename one of them")


def _write_index(folder: Path, out: Path, scan: _Scan, rows: np.ndarray, shards: list[dict[str, Any]]) -> None:
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    sha256 = hashlib.sha256(buffer.getbuffer()).hexdigest()
    tags = sorted(scan.tags.items(), key=lambda item: (-item[1], item[0]))[:_MAX_TAGS]
    manifest = {
        "schema": SCHEMA_VERSION,
        "version": INDEX_VERSION,
        "kind": scan.kind or RECORDS,
        "folder": os.path.relpath(folder, out),
        "shards": shards,
        "num_records": len(rows),
        "num_samples": scan.num_samples,
        "num_text_only_samples": scan.num_text_only_samples,
        "num_image_only_samples": scan.num_image_only_samples,
        "holds": dict(sorted(scan.holds.items())),
        "extractors": dict(sorted(scan.extractors.items())),
        "tags": dict(tags),
        "sha256": sha256,
        "probe": sampled_digest(buffer, sha256),
        "index_bytes": len(buffer.getbuffer()),
    }
    out.mkdir(parents=True, exist_ok=True)
    content = json.dumps(manifest, ensure_ascii=False, indent=1) + "\n"
    # the manifest last: it vouches for the index by its hash
    for name, data in ((INDEX_NAME, buffer.getbuffer()), (MANIFEST_NAME, content.encode())):
        with replacing(out / name, os.getpid()) as partial:
            partial.write_bytes(data)
