"""Writes a sidecar with the regions that a detector finds in image shards, and their features if asked for."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from mvptr_ds.corpus.regions.detection import Detections, RegionChoice, choose_regions
from mvptr_ds.corpus.regions.detector import Detector, DetectorSource, choose_device, find_model, load_detector
from mvptr_ds.corpus.resumable_jobs import Summary, refuse_foreign_tars, run_units
from mvptr_ds.data.images import image_content
from mvptr_ds.data.pixels import MAX_IMAGE_PIXELS, open_image, read_rgb
from mvptr_ds.data.schema import Extractor, parse_record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.index_format import MANIFEST_NAME
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS, read_keyed_record
from mvptr_ds.data.shards.tar_writer import check_key, npy_bytes, write_tar
from mvptr_ds.errors import DataError

logger = logging.getLogger(__name__)

Entry = tuple[str, dict[str, bytes]]  # key, and the members by extension

_MAX_SIDE = 2048  # pixels; detectors look at less, and a batch of pictures must fit the memory
_MAX_ASPECT = 50  # processors that fix the longer side would leave nothing of the shorter one
_BATCHES_PER_WINDOW = 8  # pictures of similar shape are looked for among so many batches


@dataclass(frozen=True)
class ShardPart:
    """One unit of work: the records of an input shard."""

    number: int  # of the shard, and of the output tar
    first_record: int
    end_record: int


@dataclass(frozen=True)
class Extraction:
    """What all units share; picklable."""

    shards: str
    out: str
    detector: DetectorSource
    extractor: Extractor
    choice: RegionChoice
    batch_size: int


class _Picture(NamedTuple):
    key: str
    image: Image.Image
    size: tuple[int, int]  # width, height, in pixels of the stored picture


def extract_regions(
    shards: str | Path,
    model: str,
    out: str | Path,
    choice: RegionChoice,
    *,
    revision: str | None = None,
    features: bool = False,
    batch_size: int = 8,
    device: str = "auto",
    precision: str = "auto",
    num_processes: int = 1,
    limit: int | None = None,
) -> Summary:
    """Runs a detector over image shards; writes a sidecar into `out`, a tar for each shard, records in the same order.

    `features`: also `KEY.npy`, float16 [R, D], the last decoder state of each region's query. `limit`: the first so
    many records only. Goes on where an earlier call with the same arguments was interrupted.

    Raises:
        DataError: no shards, the model cannot be used, or `out` is of other arguments.
    """
    shards, out = Path(shards), Path(out)
    index = ensure_index(shards)
    if index.kind != "records":
        raise DataError(f"{shards} is a sidecar; give the folder of the image shards")
    device, precision = choose_device(device, precision)
    folder, extractor = find_model(model, revision)
    num_threads = max(1, (os.cpu_count() or 1) // num_processes) if num_processes > 1 else 0
    source = DetectorSource(str(folder), device, precision, features, num_threads)
    detector = load_detector(source)
    detector.check()
    if not detector.has_tag_names:
        logger.warning("%s names none of its classes: regions will have no tags", extractor.name)
    if num_processes > 1:
        load_detector.cache_clear()  # the processes have their own
    choice = replace(choice, at_least_one=features)
    arguments = {
        "shards": index.fingerprint,
        "extractor": {"name": extractor.name, "version": extractor.version},
        "precision": precision,
        "features": features,
        "limit": limit,
        **asdict(choice),
    }
    extraction = Extraction(str(shards), str(out), source, extractor, choice, batch_size)
    work = functools.partial(extract_shard, extraction)
    refuse_foreign_tars(out, shards)
    summary = run_units(out, arguments, _parts(shards, limit), work, num_processes, "regions")
    if summary.counts["records"]:
        ensure_index(out)
    return summary


def _parts(shards: Path, limit: int | None) -> list[ShardPart]:
    manifest = json.loads((shards / MANIFEST_NAME).read_text(encoding="utf-8"))
    parts, first = [], 0
    for number, shard in enumerate(manifest["shards"]):
        end = first + int(shard["num_records"])
        last = end if limit is None else min(end, limit)
        if last > first:
            parts.append(ShardPart(number, first, last))
        first = end
    return parts


@functools.lru_cache(maxsize=1)
def _open_index(shards: str) -> Index:
    return Index.open(shards)


def extract_shard(extraction: Extraction, part: ShardPart) -> Summary:
    """Detects in the images of one shard and writes its sidecar tar (none when nothing is left)."""
    summary = Summary()
    entries = _entries(extraction, part, summary)
    first = next(entries, None)
    if first is not None:
        path = Path(extraction.out) / f"shard-{part.number:06d}.tar"
        summary.counts["records"] += write_tar(path, itertools.chain([first], entries))
    return summary


def _entries(extraction: Extraction, part: ShardPart, summary: Summary) -> Iterator[Entry]:
    detector = load_detector(extraction.detector)
    window: list[_Picture] = []
    for picture in _read_pictures(_open_index(extraction.shards), part, summary):
        window.append(picture)
        if len(window) == _BATCHES_PER_WINDOW * extraction.batch_size:
            yield from _detect_window(extraction, detector, window, summary)
            window = []
    yield from _detect_window(extraction, detector, window, summary)


def _read_pictures(index: Index, part: ShardPart, summary: Summary) -> Iterator[_Picture]:
    for number in range(part.first_record, part.end_record):
        path, offset, num_bytes, *_ = index.place(number)
        try:
            key, members = read_keyed_record(path, offset, num_bytes)
            record = parse_record(members["json"])
        except (DataError, OSError) as error:
            summary.drop("the record cannot be read", f"{path}, record {number}: {error}")
            continue
        if not any(ext in members for ext in IMAGE_EXTENSIONS):
            summary.drop("the record has no image", f"{path}, key {key!r}")
            continue
        try:
            check_key(key)  # foreign tars may hold keys that the writer refuses
            image = open_picture(members)
        except DataError as error:
            summary.drop("the picture cannot be used", f"{path}, key {key!r}: {error}")
            continue
        if image.size != (record.width, record.height):
            summary.counts["pictures of another size than their record says"] += 1
        yield _Picture(key, image, image.size)


def _detect_window(
    extraction: Extraction, detector: Detector, window: Sequence[_Picture], summary: Summary
) -> Iterator[Entry]:
    """Yields the sidecar entries of the images, in their order; similar shapes share a batch, for less padding."""
    by_shape = sorted(range(len(window)), key=lambda number: window[number].size[0] / window[number].size[1])
    found: dict[int, Detections] = {}
    for start in range(0, len(by_shape), extraction.batch_size):
        decoded: dict[int, Image.Image] = {}
        for number in by_shape[start : start + extraction.batch_size]:
            try:
                decoded[number] = decode_picture(window[number].image)
            except DataError as error:
                summary.drop("the picture cannot be used", f"key {window[number].key!r}: {error}")
        if not decoded:
            continue
        results = detector.detect(list(decoded.values()), [window[number].size for number in decoded])
        for number, detections in zip(decoded, results, strict=True):
            if detections is None:
                summary.drop("the detector gives NaN or infinity", f"key {window[number].key!r}")
            else:
                found[number] = detections
    for number in sorted(found):
        members = _members(extraction, window[number], found[number], summary)
        if members is not None:
            yield window[number].key, members


def _members(extraction: Extraction, picture: _Picture, found: Detections, summary: Summary) -> dict[str, bytes] | None:
    width, height = picture.size
    regions, queries = choose_regions(found, width, height, extraction.choice)
    members = {"json": sidecar_json(extraction.extractor, width=width, height=height, regions=regions)}
    if found.states_QD is not None:
        with np.errstate(over="ignore"):  # infinity is looked for below
            features_RD = found.states_QD[queries].astype(np.float16)
        if not np.isfinite(features_RD).all():
            summary.drop("a feature is too large for float16", f"key {picture.key!r}")
            return None
        members["npy"] = npy_bytes(features_RD)
    summary.counts["regions"] += len(regions)
    summary.counts["regions without a tag"] += sum(not region.tag for region in regions)
    below = not regions or regions[0].score < extraction.choice.score_threshold
    summary.counts["pictures without a detection above the threshold"] += below
    return members


def open_picture(members: Mapping[str, bytes]) -> Image.Image:
    """Opens the image member as training sees it, without EXIF orientation; its pixels are not read yet.

    Raises:
        DataError: it is not JPEG, PNG or WebP, has too many pixels, or is too thin for a detector.
    """
    image = open_image(image_content(members), MAX_IMAGE_PIXELS)
    width, height = image.size
    if max(width, height) > _MAX_ASPECT * min(width, height):
        raise DataError(f"the image has {width} x {height} pixels; a detector sees nothing in one of 1 : {_MAX_ASPECT}")
    return image


def decode_picture(image: Image.Image) -> Image.Image:
    """Returns the pixels of `open_picture`'s image, which is closed: RGB, at most `_MAX_SIDE` a side.

    Raises:
        DataError: the picture is cut or damaged.
    """
    with contextlib.closing(image):
        picture = read_rgb(image, least_side=_MAX_SIDE).image
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BICUBIC)
    return picture
