"""Groups the rows of a source into planned shards on disk: one record an image, captions checked, a keyed order.

    1. every row goes to one of 128 files by the first bits of a hash of (seed, image id)
    2. file after file: rows of an image are put together, sorted by that hash, and appended to the plan of their split
    3. a planned shard is a run of lines of a plan

So memory holds one file's rows (1/128 of the corpus) and eight bytes a record; the disk, next to the shards, twice the
text of the corpus while planning. The order depends on the ids and the seed only, not on the order of the source.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from mvptr_ds.corpus.record_keys import make_key
from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.rows import LabelledCaption, Labels, Row, clean_caption, normal_path
from mvptr_ds.data.shards.tar_writer import MAX_KEY_LEN
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.progress import progress_bar

REPEATED_CAPTION = "caption: repeated in its record"
SEVERAL_PICTURES = "caption: its image id names several pictures"
_NUM_BUCKETS = 128


class PlannedRecord(NamedTuple):
    image_id: str
    image: str | None  # path below the folder of pictures
    width: int
    height: int
    captions: list[str]
    labels: Sequence[Labels | None] = ()  # of each caption; empty: no caption has any


class PlannedShard(NamedTuple):
    """Where the plan of one shard lies; small, so that it goes to another process."""

    split: str
    number: int  # of the shard in its split
    plan: str  # file
    offset: int  # bytes
    num_records: int
    first_record: int  # of this shard, counted over all splits


@dataclass(frozen=True)
class GatherOptions:
    key_scheme: str
    records_per_shard: int
    seed: int
    max_caption_chars: int
    image_only: bool  # records have no captions
    images: str | None = None  # folder of the pictures
    apart: bool = False  # an image may stand in several splits, with a record in each


@dataclass
class _Plan:
    """The plan file of one split while it is written."""

    path: Path
    file: IO[bytes]
    num_records: int = 0
    offsets: list[int] = field(default_factory=list)  # of each shard's first line
    digest: hashlib._Hash = field(default_factory=hashlib.sha256)


def gather(
    rows: Iterable[Row], folder: Path, split_of: Callable[[Row], str], options: GatherOptions, summary: Summary
) -> tuple[list[PlannedShard], str]:
    """Plans the shards of all splits into `folder`, which is replaced; returns them and a digest of all they will say.

    Raises:
        DataError: nothing is left, or two images come to the same key.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _spool(rows, folder, split_of, options, summary)
    plans: dict[str, _Plan] = {}
    key_hashes = array("Q")
    with contextlib.ExitStack() as stack:
        for bucket in range(_NUM_BUCKETS):
            for split, record in _records_of_bucket(_bucket_path(folder, bucket), options, summary):
                if split not in plans:
                    path = folder / f"{split}.jsonl"
                    plans[split] = _Plan(path, stack.enter_context(open(path, "wb")))
                _append(plans[split], record, options.records_per_shard)
                if options.key_scheme == "image-id":
                    key_hashes.append(_key_hash(record.image_id, split if options.apart else ""))
    if not plans:
        reasons = [line for line in summary.lines() if line.startswith("dropped")]
        raise DataError(f"no record is left: {', '.join(reasons) or 'the source is empty'}")
    _check_keys(key_hashes, plans, options.apart)
    return _shards(plans, options.records_per_shard), _digest(plans)


def _bucket_path(folder: Path, bucket: int) -> Path:
    return folder / f"bucket-{bucket:03d}"


def _order(image_id: str, seed: int) -> bytes:
    return hashlib.blake2b(image_id.encode(), digest_size=8, key=str(seed).encode()[:64], person=b"order").digest()


def _spool(
    rows: Iterable[Row], folder: Path, split_of: Callable[[Row], str], options: GatherOptions, summary: Summary
) -> None:
    root = None if options.images is None else os.path.abspath(options.images)
    with contextlib.ExitStack() as stack:
        paths = [_bucket_path(folder, bucket) for bucket in range(_NUM_BUCKETS)]
        files = [stack.enter_context(open(path, "w", encoding="utf-8")) for path in paths]
        for row in progress_bar(rows, desc="reading", unit="row", delay=2.0):
            row = _with_normal_path(row, root)
            try:
                order = _order(row.image_id, options.seed)
            except UnicodeEncodeError:
                summary.drop("row: image id is not valid Unicode", ascii(row.image_id))
                continue
            summary.counts["source_captions"] += len(row.captions)
            files[order[0] * _NUM_BUCKETS // 256].write(json.dumps([split_of(row), *row]) + "\n")


def _with_normal_path(row: Row, root: str | None) -> Row:
    """Returns the row with its image's path in one spelling; an id that is this path is spelled alike."""
    if row.image is None or (path := normal_path(row.image, root)) == row.image:
        return row
    return row._replace(image=path, image_id=path if row.image_id == row.image else row.image_id)


def _records_of_bucket(path: Path, options: GatherOptions, summary: Summary) -> Iterator[tuple[str, PlannedRecord]]:
    """Yields the split and record of every image in the file, in the order of the hash, then removes the file.

    Of an id whose rows name several pictures no caption is kept: features and phrases are joined by the id, and could
    be of either picture.
    """
    images: dict[tuple[str, str], tuple[str, Row]] = {}  # by id, and by split where these are kept apart
    captions: dict[tuple[str, str], list[LabelledCaption]] = {}
    other_pictures: dict[tuple[str, str], str | None] = {}  # of ids that name several
    with open(path, encoding="utf-8") as file:
        for line in file:
            split, *fields = json.loads(line)
            row = Row(*fields)
            name = (row.image_id, split if options.apart else "")
            first_split, first = images.setdefault(name, (split, row))
            if row.image != first.image:
                other_pictures[name] = row.image
            if split != first_split:
                summary.drop("caption: of an image that is in another split, too", row.image_id, len(row.captions))
                continue
            captions.setdefault(name, []).extend(row.labelled_captions())
    path.unlink()
    summary.counts["source_images"] += len(images)
    for name in sorted(images, key=lambda name: (_order(name[0], options.seed), name)):
        (split, row), image_id = images[name], name[0]
        if name in other_pictures:
            where = f"{image_id}: {row.image}, {other_pictures[name]}"
            summary.drop(SEVERAL_PICTURES, where, len(captions[name]))
            continue
        kept = check_captions(captions[name], image_id, options.max_caption_chars, summary)
        if kept or options.image_only:
            texts, labels = [text for text, _ in kept], [labels for _, labels in kept]
            labels = labels if any(labels) else []
            yield split, PlannedRecord(image_id, row.image, row.width, row.height, texts, labels)
        else:
            summary.drop("record: no caption left", image_id)


def check_captions(
    captions: Iterable[LabelledCaption], image_id: str, max_chars: int, summary: Summary
) -> list[LabelledCaption]:
    """Returns the captions of one image that can be used, cleaned, each once; the others are counted in `summary`.

    A text with other labels is another caption: two people may ask the same question.
    """
    kept: dict[tuple[str, str], LabelledCaption] = {}
    for text, labels in captions:
        caption = clean_caption(text)
        written = "" if labels is None else json.dumps(labels, ensure_ascii=False, sort_keys=True)
        if not caption:
            summary.drop("caption: empty", f"{image_id}: {text[:80]!a}")
        elif len(caption) > max_chars:
            summary.drop(f"caption: over {max_chars} characters", f"{image_id}: {caption[:80]!a}…, {len(caption)}")
        elif not _is_unicode(caption + written):
            summary.drop("caption: not valid Unicode", f"{image_id}: {caption[:80]!a}")
        elif (caption, written) in kept:
            summary.drop(REPEATED_CAPTION, f"{image_id}: {caption[:80]!a}")
        else:
            kept[caption, written] = (caption, labels)
    return list(kept.values())


def _is_unicode(text: str) -> bool:
    """Returns whether a text holds no half of a surrogate pair, as bytes become that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _append(plan: _Plan, record: PlannedRecord, records_per_shard: int) -> None:
    fields = record if record.labels else record[:-1]  # so that the digest of a plan without labels stays as it was
    line = (json.dumps(fields, ensure_ascii=False, separators=(",", ":")) + "\n").encode()
    if plan.num_records % records_per_shard == 0:
        plan.offsets.append(plan.file.tell())
    plan.file.write(line)
    plan.digest.update(line)
    plan.num_records += 1


def _key_hash(image_id: str, split: str) -> int:
    key = make_key("image-id", image_id, 0)
    if len(key) > MAX_KEY_LEN:
        raise DataError(f"key {key!r} has {len(key)} characters, at most {MAX_KEY_LEN} fit; use --keys number or hash")
    return int.from_bytes(hashlib.blake2b(f"{split}/{key}".encode(), digest_size=8).digest(), "little")


def _check_keys(key_hashes: array[int], plans: dict[str, _Plan], apart: bool) -> None:
    unique, counts = np.unique(np.frombuffer(key_hashes, dtype=np.uint64), return_counts=True)
    if len(unique) == len(key_hashes):
        return
    repeated = {int(value) for value in unique[counts > 1]}
    first: dict[tuple[str, str], str] = {}
    for name, plan in plans.items():
        split = name if apart else ""
        for record in read_plan(str(plan.path), 0, plan.num_records):
            if _key_hash(record.image_id, split) not in repeated:
                continue
            key = make_key("image-id", record.image_id, 0)
            if (split, key) in first:
                raise DataError(
                    f"images {first[split, key]!r} and {record.image_id!r} both come to the key {key!r}, and "
                    f"{len(repeated)} keys are used twice; use --keys number or --keys hash"
                )
            first[split, key] = record.image_id


def read_plan(path: str, offset: int, num_records: int) -> Iterator[PlannedRecord]:
    """Yields `num_records` records of a plan from byte `offset` on."""
    with open(path, "rb") as file:
        file.seek(offset)
        for _ in range(num_records):
            yield PlannedRecord(*json.loads(file.readline()))


def _shards(plans: dict[str, _Plan], records_per_shard: int) -> list[PlannedShard]:
    shards, first_record = [], 0
    for split, plan in sorted(plans.items()):
        for number, offset in enumerate(plan.offsets):
            num_records = min(records_per_shard, plan.num_records - number * records_per_shard)
            shards.append(PlannedShard(split, number, str(plan.path), offset, num_records, first_record))
            first_record += num_records
    return shards


def _digest(plans: dict[str, _Plan]) -> str:
    digest = hashlib.sha256()
    for split, plan in sorted(plans.items()):
        digest.update(f"{split} {plan.num_records} {plan.digest.hexdigest()}\n".encode())
    return digest.hexdigest()
