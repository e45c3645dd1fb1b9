"""Joins shards with their sidecars by key: the samples of the shards, each record merged with its partners when read.

    DIR/joined-0123456789abcdef.npy    one row a record that is kept: its number, its first sample, its partners
    DIR/joined-0123456789abcdef.json   counts, the size of the rows, and a checksum of rows and counts

The name is a hash of the indices of all folders and of what becomes of records without partner, so that a changed
folder gives another join. Rank 0 computes the join once, and every process maps it.

Worked example: 4 records with 2, 1, 3 and 1 captions, and two sidecars whose entries stand in orders of their own.

    keys of the records            a  b  c  d
    keys of sidecar 0              c  a  b
    keys of sidecar 1              b  d  c  a
    partners_SN                    1  2  0  -      numbers of the entries in sidecar 0; - is NO_PARTNER
                                   3  0  2  1      and in sidecar 1
    rows, missing_partners=drop    record 0 1 2    first_sample 0 2 3    partners [1 3] [2 0] [0 2]
    rows, missing_partners=keep    record 0 1 2 3  first_sample 0 2 3 6  the same, and [- 1]

Legend: S sidecars, N records of the shards.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mvptr_ds.data.schema import Record, SidecarEntry, parse_entry, parse_record
from mvptr_ds.data.shards.index import ByteRange, Index, RecordLocation, SampleIndex
from mvptr_ds.data.shards.index_format import NO_CAPTION, NO_REGIONS, NOT_VISUAL, RECORDS, SIDECAR, sha256
from mvptr_ds.data.shards.sidecars import merge_picture, merge_sidecar
from mvptr_ds.data.shards.tar_reader import MEMBER_EXTENSIONS, read_keyed_record
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing

logger = logging.getLogger(__name__)

DROP, KEEP = "drop", "keep"  # a record that lacks a partner
NO_PARTNER = np.uint32(0xFFFFFFFF)
_JOIN_VERSION = 2


def join_path(main: Index, sidecars: Sequence[Index], missing: str, folder: str | Path) -> Path:
    """Returns the path of the json file in which the join of these folders is kept."""
    content = [_JOIN_VERSION, main.fingerprint, *(sidecar.fingerprint for sidecar in sidecars), missing]
    name = hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]
    return Path(folder) / f"joined-{name}.json"


def ensure_join(main: Index, sidecars: Sequence[Index], missing: str, allow_mixed: bool, folder: str | Path) -> None:
    """Joins the records of `main` with their partners in each sidecar and writes the join, unless it is there whole.

    Args:
        missing: what becomes of records that lack a partner: drop, or keep (they are used as they are).
        allow_mixed: whether regions or features of several extractors may come together.

    Raises:
        DataError: a folder is of the wrong kind, extractors are mixed, a sidecar has no partner for any record, or no
            record has all of them.
    """
    check_kinds(main, sidecars)
    if not allow_mixed:
        for index in (main, *sidecars):
            check_extractors(index)
    path = join_path(main, sidecars, missing, folder)
    counts = _whole(path)
    if counts is not None:
        num_missing = [main.num_records - num for num in counts["partners"]]
    else:
        partners_SN = np.stack([_partners(main, sidecar) for sidecar in sidecars])
        num_missing = (partners_SN == NO_PARTNER).sum(1).tolist()
        _write(path, main, sidecars, partners_SN, missing)
    if missing == KEEP and not allow_mixed:
        _check_kept(main, sidecars, num_missing)


def check_kinds(main: Index, sidecars: Sequence[Index]) -> None:
    """Raises DataError where a sidecar stands for records, or records that show nothing for a sidecar."""
    if main.kind != RECORDS:
        raise DataError(
            f"{main.folder} is a sidecar; name it among the sidecars, and a folder of records as the shards"
        )
    for sidecar in sidecars:
        if sidecar.kind == RECORDS and not sidecar.holds.keys() & {"image", "npy", "regions"}:
            raise DataError(
                f"{sidecar.folder} holds captions alone: as a sidecar it gives neither pictures, regions nor features; "
                "take it out of the sidecars, or name the shards that hold the pictures"
            )


def check_extractors(index: Index) -> None:
    """Raises DataError where the folder's regions, features or phrases come from several extractors."""
    if len(index.extractors) > 1:
        found = ", ".join(f"{name}: {number} of {index.num_records}" for name, number in index.extractors.items())
        raise DataError(
            f"{index.folder} mixes extractors ({found}), whose regions and features do not fit each other; make it "
            "with one, or set data.allow_mixed_extractors=true"
        )


def visual_extractors(main: Index, sidecars: Sequence[Index], num_missing: Sequence[int]) -> set[str]:
    """Returns the extractors of the regions and features that are read.

    These are of the last sidecar that has some. Where partners are missing, what comes before it is read, too.
    """
    found: set[str] = set()
    for index, missing in [*zip(reversed(sidecars), reversed(num_missing), strict=True), (main, 0)]:
        if of_index := index.region_extractors():
            found |= of_index
            if not missing:
                break
    return found


def _check_kept(main: Index, sidecars: Sequence[Index], num_missing: Sequence[int]) -> None:
    """Refuses records without partner that would keep regions of another extractor than the rest."""
    found = visual_extractors(main, sidecars, num_missing)
    if len(found) > 1:
        lacking = ", ".join(f"{num} in {s.folder}" for s, num in zip(sidecars, num_missing, strict=True) if num)
        raise DataError(
            f"records of {main.folder} without a partner ({lacking}) would keep other regions than the rest: they are "
            f"of {', '.join(sorted(found))}; set data.missing_partners=drop, or data.allow_mixed_extractors=true"
        )


def _partners(main: Index, sidecar: Index) -> np.ndarray:
    """Returns the number of each record's entry in the sidecar, uint32 [N]; NO_PARTNER where it has none."""
    hashes = sidecar.key_hashes()
    order = np.argsort(hashes)
    hashes = hashes[order]
    wanted_N = main.key_hashes()
    # the place where a key's hash would stand among the sorted ones of the sidecar: its own, or another's
    at_N = np.minimum(np.searchsorted(hashes, wanted_N), len(hashes) - 1)
    partners_N = np.where(hashes[at_N] == wanted_N, order[at_N], int(NO_PARTNER)).astype(np.uint32)
    if not (partners_N != NO_PARTNER).any():
        keys = [index.key_of(index.place(0)) for index in (main, sidecar)]
        raise DataError(
            f"no record of {main.folder} has a partner in the sidecar {sidecar.folder}: a key there is {keys[1]!r}, a "
            f"key here {keys[0]!r}; make both with the same keys (each split has sidecars of its own)"
        )
    return partners_N


def _write(path: Path, main: Index, sidecars: Sequence[Index], partners_SN: np.ndarray, missing: str) -> None:
    not_visual_N, unseen_N = _what_is_seen(main, sidecars, partners_SN)
    is_kept_N = (partners_SN != NO_PARTNER).all(0)
    if not is_kept_N.any() and missing == DROP:
        raise DataError(
            f"no record of {main.folder} has a partner in each of {', '.join(str(s.folder) for s in sidecars)}; "
            "make sidecars of the same records (training keeps records without a partner with "
            "data.missing_partners=keep)"
        )
    num_unseen = int((unseen_N & is_kept_N).sum())
    kept = np.flatnonzero(is_kept_N & ~unseen_N) if missing == DROP else np.arange(main.num_records)
    if not len(kept):
        raise DataError(
            f"the sidecars give no record of {main.folder} a region, and there is no picture: take them out of "
            "data.sidecars, or find regions again"
        )
    first = np.append(main.first_samples(), main.num_samples)
    num_samples = np.diff(first)[kept]
    flags, not_visual = main.flags()[kept], not_visual_N[kept]
    row = np.dtype([("record", "<u4"), ("first_sample", "<u4"), ("partners", "<u4", (len(sidecars),))])
    rows = np.empty(len(kept), dtype=row)
    rows["record"] = kept
    rows["first_sample"] = np.cumsum(num_samples) - num_samples
    rows["partners"] = partners_SN[:, kept].T
    buffer = io.BytesIO()
    np.save(buffer, rows, allow_pickle=False)
    content: dict[str, Any] = {
        "version": _JOIN_VERSION,
        "num_records": len(kept),
        "num_samples": int(num_samples.sum()),
        "num_text_only_samples": int(num_samples[not_visual].sum()),
        "num_image_only_samples": int((flags & NO_CAPTION).astype(bool).sum()),
        "num_unseen_records": num_unseen,
        "partners": [int((partners != NO_PARTNER).sum()) for partners in partners_SN],
        "num_bytes": len(buffer.getbuffer()),
    }
    buffer.seek(0)
    content["sha256"] = _checksum(content, buffer)
    path.parent.mkdir(parents=True, exist_ok=True)
    # the counts last: they vouch for the rows
    text = json.dumps(content, indent=1) + "\n"
    for target, data in ((path.with_suffix(".npy"), buffer.getbuffer()), (path, text.encode())):
        with replacing(target, os.getpid()) as partial:
            partial.write_bytes(data)


def _what_is_seen(main: Index, sidecars: Sequence[Index], partners_SN: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns two bool [N]: whether nothing of a record can be seen, and whether that is because a sidecar says so.

    An entry of no regions takes the record's regions and features away. Where a folder holds images the index does
    not know which records have one. So none counts as unseen there, and one that is shows when it is read.
    """
    any_image = any(index.holds.get("image") for index in (main, *sidecars))
    not_visual_N = (main.flags() & NOT_VISUAL).astype(bool)
    emptied_N = np.zeros_like(not_visual_N)
    for sidecar, partners_N in zip(sidecars, partners_SN, strict=True):
        has_N = partners_N != NO_PARTNER
        flags = sidecar.flags()[partners_N[has_N]]
        if not any_image:
            emptied_N[has_N] |= (flags & NO_REGIONS).astype(bool)
            not_visual_N[has_N] |= emptied_N[has_N]
        # a later sidecar that brings regions or features makes the record visible again
        for gone_N in (not_visual_N, emptied_N):
            gone_N[has_N] &= (flags & NOT_VISUAL).astype(bool)
    return not_visual_N, emptied_N & not_visual_N


def _counts(path: Path) -> dict[str, Any] | None:
    """Reads the counts of a join whose rows have the size that they say; None where there is no such join."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        is_there = content["num_bytes"] == path.with_suffix(".npy").stat().st_size and len(content["partners"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return content if is_there else None


def _whole(path: Path) -> dict[str, Any] | None:
    """Reads the counts of a join that is as it was written, every byte of it. Logs one that is damaged."""
    counts = _counts(path)
    if counts is not None and "sha256" not in counts:  # of an older version
        return None
    if counts is not None:
        with path.with_suffix(".npy").open("rb") as rows:
            if _checksum(counts, rows) == counts["sha256"]:
                return counts
    if path.exists():
        logger.warning("the join %s is damaged: it is made again", path)
    return None


def _checksum(counts: dict[str, Any], rows: BinaryIO) -> str:
    said = json.dumps({name: value for name, value in counts.items() if name != "sha256"}, sort_keys=True)
    return hashlib.sha256(f"{sha256(rows)} {said}".encode()).hexdigest()


class JoinedIndex(SampleIndex):
    """Finds the samples of a folder of shards whose records are merged with sidecars.

    Raises:
        DataError: the join is missing (see `ensure_join`).
    """

    def __init__(self, main: Index, sidecars: Sequence[Index], missing: str, folder: str | Path) -> None:
        self.main, self.sidecars = main, list(sidecars)
        self._path = join_path(main, sidecars, missing, folder)
        content = _counts(self._path)
        if content is None:
            raise DataError(f"the join {self._path} is missing or cut; start again, rank 0 writes it")
        self.num_records = int(content["num_records"])
        self.num_samples = int(content["num_samples"])
        self.num_text_only_samples = int(content["num_text_only_samples"])
        self.num_image_only_samples = int(content["num_image_only_samples"])
        self.fingerprint = self._path.stem.removeprefix("joined-")
        self.tags = next((s.tags for s in reversed(self.sidecars) if "regions" in s.holds), main.tags)
        for sidecar, num in zip(self.sidecars, content["partners"], strict=True):
            others = "left out" if missing == DROP else "used as they are"
            logger.info(
                "sidecar %s (%s): %d of %d records have a partner%s",
                sidecar.folder, ", ".join(sidecar.extractors) or "pictures", num, main.num_records,
                f", the others are {others}" if num < main.num_records else "",
            )  # fmt: skip
        if num_unseen := int(content.get("num_unseen_records", 0)):
            logger.warning(
                "%d records have nothing to see, for the sidecars say that they have no regions: they are %s",
                num_unseen, "left out" if missing == DROP else "used as texts alone",
            )  # fmt: skip
        self._init_caches()

    def _rows_path(self) -> Path:
        return self._path.with_suffix(".npy")

    def place(self, record: int, caption: int = 0) -> RecordLocation:
        """Returns the location of the record in the main shards, numbered among the kept records."""
        return self.main.place(int(self._rows["record"][record]), caption)._replace(record=record)

    def read(self, place: RecordLocation) -> tuple[Record, dict[str, bytes]]:
        return self._read(place, MEMBER_EXTENSIONS)

    def describe(self, place: RecordLocation) -> tuple[Record, Collection[str]]:
        record, members = self._read(place, ("json",))
        return record, members.keys()

    def _read(self, place: RecordLocation, contents: Collection[str]) -> tuple[Record, dict[str, bytes]]:
        key, members = read_keyed_record(place.path, place.offset, place.num_bytes, self.main.files, contents)
        record = parse_record(members["json"])
        for sidecar, partner in self._sidecar_places(place.record):
            try:
                record, members = _read_partner(partner, sidecar, key, record, members, contents)
            except (DataError, OSError) as error:
                raise DataError(f"sidecar {partner.path}: {error}") from error
        return record, members

    def _sidecar_places(self, record: int) -> list[tuple[Index, RecordLocation]]:
        """Returns each sidecar that has a partner of the record, and the location of that partner."""
        partners = self._rows["partners"][record].tolist()
        pairs = zip(self.sidecars, partners, strict=True)
        return [(sidecar, sidecar.place(partner)) for sidecar, partner in pairs if partner != NO_PARTNER]

    def region_extractors(self) -> set[str]:
        return visual_extractors(self.main, self.sidecars, [0] * len(self.sidecars))

    def key_hashes(self) -> np.ndarray:
        return self.main.key_hashes()[self._rows["record"]]

    def key_of(self, place: RecordLocation) -> str:
        return self.main.key_of(place)

    @property
    def read_ahead_bytes(self) -> int:
        return max(index.read_ahead_bytes for index in (self.main, *self.sidecars))

    def remote_extents(self, sample: int) -> list[ByteRange]:
        place = self.locate(sample)
        locations = [(self.main, place), *self._sidecar_places(place.record)]
        return [extent for index, location in locations for extent in index.remote_extents_of(location)]


def _read_partner(
    place: RecordLocation,
    sidecar: Index,
    key: str,
    record: Record,
    members: dict[str, bytes],
    contents: Collection[str],
) -> tuple[Record, dict[str, bytes]]:
    own_key, own_members = read_keyed_record(place.path, place.offset, place.num_bytes, sidecar.files, contents)
    if own_key != key:
        raise DataError(f"key {own_key!r} stands where {key!r} was: the folder has changed; index it again")
    entry = parse_entry(own_members["json"])
    kind = SIDECAR if isinstance(entry, SidecarEntry) else RECORDS
    if kind != sidecar.kind:
        raise DataError(f"key {own_key!r} is of kind {kind!r} in a folder of kind {sidecar.kind!r}; index it again")
    if isinstance(entry, SidecarEntry):
        return merge_sidecar(record, members, entry, own_members.get("npy"))
    return merge_picture(record, members, entry, own_members)
