"""Builds the shards of all splits from planned records or tars of img2dataset; each shard is a unit of work.

OUT/SPLIT/shard-000000.tar ... manifest.json index.npy      what training reads
OUT/summary.json                                             counts, and what was dropped and why
OUT/.plan, OUT/.progress                                     only while it is being built
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from mvptr_ds.corpus.building.group_by_image import (
    REPEATED_CAPTION,
    GatherOptions,
    PlannedRecord,
    PlannedShard,
    check_captions,
    gather,
    read_plan,
)
from mvptr_ds.corpus.building.source_images import ImageError, ImageOptions, StoredImage, check_image, read_image
from mvptr_ds.corpus.record_keys import make_key
from mvptr_ds.corpus.resumable_jobs import PROGRESS_NAME, SUMMARY_NAME, Summary, run_units
from mvptr_ds.corpus.sources.img2dataset import list_tars, read_caption, scan_tar
from mvptr_ds.corpus.sources.rows import Row
from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS, MAX_JSON_BYTES, MAX_MEMBER_BYTES
from mvptr_ds.data.shards.tar_writer import json_bytes, write_tar
from mvptr_ds.errors import DataError

DEFAULT_SPLIT = "train"
_PLAN_FOLDER = ".plan"


@dataclass(frozen=True)
class BuildOptions:
    """All that decides the bytes of the shards, besides the source."""

    images: str | None = None  # folder of the pictures; None: records without pictures
    key_scheme: str = "image-id"
    records_per_shard: int = 10_000
    shares: tuple[tuple[str, float], ...] = ()  # of the splits, by a hash of the image id; none: all is train
    seed: int = 0  # of the order
    max_caption_chars: int = 1000
    image_only: bool = False
    pictures: ImageOptions = field(default_factory=ImageOptions)


def parse_shares(text: str) -> tuple[tuple[str, float], ...]:
    """Parses `train=0.98,held_out=0.02` into names and shares.

    Raises:
        ValueError: not of this form, a name twice, or the shares do not add up to 1.
    """
    shares = []
    for part in text.split(","):
        name, _, share = part.partition("=")
        if not re.fullmatch(r"[A-Za-z0-9_-]+", name) or not re.fullmatch(r"[0-9]*\.?[0-9]+", share) or not float(share):
            raise ValueError(f"{part!r} is not NAME=SHARE with a share above 0, as in train=0.98,held_out=0.02")
        shares.append((name, float(share)))
    if len({name for name, _ in shares}) < len(shares) or abs(sum(share for _, share in shares) - 1) > 1e-9:
        raise ValueError(f"{text!r}: names must differ and shares add up to 1, as in train=0.98,held_out=0.02")
    return tuple(shares)


def split_by_hash(image_id: str, shares: tuple[tuple[str, float], ...]) -> str:
    """Returns the split of an image, by its id alone, so that more images move none. Without shares it is train."""
    if not shares:
        return DEFAULT_SPLIT
    digest = hashlib.blake2b(image_id.encode("utf-8", "surrogatepass"), digest_size=8, person=b"split").digest()
    left = int.from_bytes(digest, "little") / 2**64
    for name, share in shares:
        left -= share
        if left < 0:
            return name
    return shares[-1][0]


class ListedUnit(NamedTuple):
    shard: PlannedShard
    planned: dict[str, Any]  # what planning counted and dropped, in the first unit; empty in the others


class StreamedUnit(NamedTuple):
    tar: str
    number: int


def build_listed(
    rows: Iterable[Row],
    row_summary: Summary,
    out: Path,
    options: BuildOptions,
    source: dict[str, Any],
    num_processes: int,
    apart: bool = False,
) -> Summary:
    """Builds the shards of all rows; `row_summary` is what their reader counts into, `source` names them.

    With `apart`, an image that several splits name gets a record in each of them.

    Raises:
        DataError: `out` holds something else, nothing is left, or two images come to one key.
    """
    _check_out(out)
    gather_options = GatherOptions(
        options.key_scheme,
        options.records_per_shard,
        options.seed,
        options.max_caption_chars,
        options.image_only,
        options.images,
        apart,
    )
    plan_folder = out / _PLAN_FOLDER

    def split_of(row: Row) -> str:
        return row.split if row.split is not None else split_by_hash(row.image_id, options.shares)

    try:
        shards, digest = gather(rows, plan_folder, split_of, gather_options, row_summary)
        units = [ListedUnit(shard, {} if number else row_summary.to_json()) for number, shard in enumerate(shards)]
        arguments = {"source": source, "plan": digest, **asdict(options)}
        work = functools.partial(_build_listed_shard, str(out), options)
        return run_units(out, arguments, units, work, num_processes, "shards")
    finally:
        shutil.rmtree(plan_folder, ignore_errors=True)  # made anew when the build resumes


def build_streamed(
    sources: Iterable[Path], out: Path, options: BuildOptions, source: dict[str, Any], num_processes: int
) -> Summary:
    """Builds a shard of each split from every tar of img2dataset, record by record in the order of the tar.

    Raises:
        DataError: `out` holds something else, or there are no tars.
    """
    tars = list_tars(sources)
    _check_out(out)
    units = [StreamedUnit(str(tar), number) for number, tar in enumerate(tars)]
    arguments = {"source": source, "tars": [[tar.name, tar.stat().st_size] for tar in tars], **asdict(options)}
    work = functools.partial(_build_streamed_shards, str(out), options)
    return run_units(out, arguments, units, work, num_processes, "tars")


def _check_out(out: Path) -> None:
    known = any((out / name).exists() for name in (SUMMARY_NAME, PROGRESS_NAME))
    if not known and next(out.glob("*/*.tar"), None) is not None:
        raise DataError(f"{out} holds shards that no build of this tool left there; choose another folder")


def _build_listed_shard(out: str, options: BuildOptions, unit: ListedUnit) -> Summary:
    summary = Summary.from_json(unit.planned) if unit.planned else Summary()
    shard = unit.shard
    records = read_plan(shard.plan, shard.offset, shard.num_records)
    items = _listed_items(records, shard.first_record, options, summary)
    _write(Path(out, shard.split, f"shard-{shard.number:06d}.tar"), items, summary)
    return summary


def _listed_items(
    records: Iterable[PlannedRecord], first_record: int, options: BuildOptions, summary: Summary
) -> Iterator[tuple[str, dict[str, bytes]]]:
    for number, planned in enumerate(records, start=first_record):
        picture = None
        if options.images is not None and planned.image is not None:
            try:
                content = read_image(Path(options.images), planned.image)
                picture = check_image(content, options.pictures, summary.counts)
            except ImageError as error:
                summary.drop(error.reason, f"{planned.image} {error.detail}".strip())
                continue
        key = make_key(options.key_scheme, planned.image_id, number)
        yield from _item(key, planned, picture, summary)


def _item(
    key: str, planned: PlannedRecord, picture: StoredImage | None, summary: Summary
) -> Iterator[tuple[str, dict[str, bytes]]]:
    size = (planned.width, planned.height) if picture is None else (picture.width, picture.height)
    record = Record(planned.image_id, *size, _captions(planned))
    content = json_bytes(record.to_json())
    if len(content) > MAX_JSON_BYTES:
        summary.drop(f"record: over {MAX_JSON_BYTES >> 20} MiB of captions", planned.image_id)
        return
    summary.counts["records"] += 1
    summary.counts["captions"] += len(planned.captions)
    yield key, {"json": content} if picture is None else {"json": content, picture.extension: picture.content}


def _captions(planned: PlannedRecord) -> tuple[Caption, ...]:
    labels = planned.labels or [None] * len(planned.captions)
    return tuple(Caption(text, (), own) for text, own in zip(planned.captions, labels, strict=True))


def _write(path: Path, items: Iterator[tuple[str, dict[str, bytes]]], summary: Summary) -> None:
    """Writes a shard, and none where no record is left."""
    first = next(items, None)
    if first is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_tar(path, itertools.chain([first], items))
        summary.counts["shards"] += 1
        summary.counts["bytes"] += path.stat().st_size


def _build_streamed_shards(out: str, options: BuildOptions, unit: StreamedUnit) -> Summary:
    summary = Summary(Counter(source_tars=1))
    tar = Path(unit.tar)
    with open(tar, "rb") as file:
        records = scan_tar(tar, file, summary)
        for split, _ in options.shares or ((DEFAULT_SPLIT, 1.0),):
            chosen = {key: number for number, key in enumerate(records) if split_by_hash(key, options.shares) == split}
            items = _streamed_items(file, unit, records, chosen, options, summary)
            _write(Path(out, split, f"shard-{unit.number:06d}.tar"), items, summary)
    return summary


def _streamed_items(
    file: Any,
    unit: StreamedUnit,
    records: Mapping[str, Mapping[str, Any]],
    chosen: Mapping[str, int],
    options: BuildOptions,
    summary: Summary,
) -> Iterator[tuple[str, dict[str, bytes]]]:
    """Items of the records `chosen` (key -> its number in the tar)."""
    for source_key, number in chosen.items():
        members = records[source_key]
        where = f"{Path(unit.tar).name}, {source_key}"
        summary.counts["source_images"] += 1
        summary.counts["source_captions"] += 1
        found = check_captions([(read_caption(file, members), None)], where, options.max_caption_chars, summary)
        captions = [text for text, _ in found]
        if not captions:
            summary.drop("record: no caption left", where)
            continue
        member = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        try:
            if member is None:
                raise ImageError("picture: none in the record", f"only {sorted(members)}")
            if member.size > MAX_MEMBER_BYTES:
                raise ImageError(f"picture: over {MAX_MEMBER_BYTES >> 20} MiB", f"{member.size} bytes")
            file.seek(member.data)
            picture = check_image(file.read(member.size), options.pictures, summary.counts)
        except ImageError as error:
            summary.drop(error.reason, f"{where} {error.detail}".strip())
            continue
        name = f"{Path(unit.tar).stem}/{source_key}" if options.key_scheme == "hash" else source_key
        key = make_key(options.key_scheme, name, unit.number * 10**6 + number)
        yield from _item(key, PlannedRecord(source_key, None, 0, 0, captions), picture, summary)


def finish(out: Path, summary: Summary, image_only: bool, max_dropped_fraction: float) -> dict[str, Index]:
    """Builds the index of every split; returns them by name.

    Raises:
        DataError: nothing is left, more was dropped than allowed, or a key is there twice.
    """
    counts, dropped = summary.counts, summary.dropped
    kept, seen = counts["captions"] + dropped[REPEATED_CAPTION], counts["source_captions"]
    if image_only:
        kept, seen = counts["records"], counts["source_images"]
    seen += sum(number for reason, number in dropped.items() if reason.startswith("row:"))
    kind = "pictures" if image_only else "captions"
    if not counts["records"]:
        raise DataError(f"no record is left of {seen} {kind}; {out / SUMMARY_NAME} says why")
    if seen - kept > max_dropped_fraction * seen:
        raise DataError(
            f"{seen - kept} of {seen} {kind} were dropped, more than --max-dropped-fraction {max_dropped_fraction}; "
            f"{out / SUMMARY_NAME} says why. Mend the source, or run again with a higher fraction"
        )
    splits = sorted(path for path in out.iterdir() if next(path.glob("*.tar"), None) is not None)
    try:
        return {path.name: ensure_index(path) for path in splits}
    except DataError as error:
        if counts["source_tars"] < 2:  # then the plan has seen to it that no key is there twice
            raise
        raise DataError(f"{error}; if two tars of the source use one key, build with --keys number or hash") from error
