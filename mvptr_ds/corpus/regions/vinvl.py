"""Turns region features and predictions of VinVL and Oscar (TSV files) into a sidecar.

    features.tsv      features of an image's boxes in each row; predictions.tsv their boxes and tags (see vinvl_rows)
    NAME.lineidx      byte offset of each line, one a line; the lines are looked for where it is absent
    imageid2idx.json  number of each image's line in features.tsv; only compared with that file

Legend: N boxes, F size of a feature, L lines.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mvptr_ds.corpus.record_keys import make_key
from mvptr_ds.corpus.regions.detection import clip_boxes
from mvptr_ds.corpus.regions.tsv import Table, without_zeros
from mvptr_ds.corpus.regions.vinvl_rows import (
    GEOMETRY_DIM,
    RowError,
    check_geometry,
    parse_features,
    parse_predictions,
    size_from_geometry,
    to_float16,
)
from mvptr_ds.corpus.resumable_jobs import Summary, refuse_foreign_tars, run_units
from mvptr_ds.data.schema import Extractor, Region
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.storage import open_files
from mvptr_ds.data.shards.tar_writer import check_key, npy_bytes, write_tar
from mvptr_ds.errors import DataError

EXTRACTOR_NAME = "vinvl"
FEATURE_DIM = 2054  # numbers a box in the published files, geometry included
_MAX_LINE_BYTES = 64 << 20
# what planning finds out about a row; the unit that meets it counts it
_USABLE, _NO_ID, _REPEATED = range(3)
_NOTHING = (0, 0)  # offset and bytes of what an image does not have

Entry = tuple[str, dict[str, bytes]]  # key, and the members by extension


class KeyRule(NamedTuple):
    """How image ids become keys: those of digits alone get so many zeros in front as `width` asks, then by scheme."""

    scheme: str = "image-id"  # or hash, as record_keys says
    width: int = 0  # digits; 0: the id stays as it is written

    def key(self, image_id: str) -> str:
        if self.width and image_id.isascii() and image_id.isdigit():
            image_id = without_zeros(image_id).zfill(self.width)
        return make_key(self.scheme, image_id, 0)


@dataclass(frozen=True)
class RowPart:
    """One unit of work: rows of (state, offset and bytes of the features, offset and bytes of the predictions).

    Bytes are 0 where an image has none. Rows that cannot be used are among them, so that they are counted.
    """

    number: int  # of the output tar
    rows_L5: np.ndarray  # int64


@dataclass(frozen=True)
class Conversion:
    """What all units share; picklable."""

    features: str | None
    predictions: str
    out: str
    extractor: Extractor
    feature_dim: int
    key_rule: KeyRule
    max_regions: int


def import_vinvl(
    predictions: str | Path,
    features: str | Path | None,
    out: str | Path,
    version: str,
    key_rule: KeyRule,
    *,
    feature_dim: int = FEATURE_DIM,
    records_per_shard: int = 10_000,
    max_regions: int = 50,
    num_processes: int = 1,
) -> Summary:
    """Writes a sidecar of boxes and tags, with `KEY.npy` float16 [R, F] where there are features, best region first.

    Without `features`, those in the objects are taken if there are any. Goes on where an earlier call with the
    same arguments was interrupted. Planning holds about 0.6 KB an image.

    Raises:
        DataError: a file is absent or does not fit another, two images get one key, or `out` is of other arguments.
    """
    features, predictions, out = Path(features) if features else None, Path(predictions), Path(out)
    feature_table = None if features is None else Table(features)
    if feature_table and (numbers := feature_table.path.with_name("imageid2idx.json")).is_file():
        feature_table.check_numbers(numbers)
    rows_L5 = plan_rows(feature_table, Table(predictions), key_rule)
    arguments = {
        "features": None if features is None else [features.name, features.stat().st_size],
        "predictions": [predictions.name, predictions.stat().st_size],
        "version": version,
        "feature_dim": feature_dim,
        **key_rule._asdict(),
        "records_per_shard": records_per_shard,
        "max_regions": max_regions,
    }
    starts = range(0, len(rows_L5), records_per_shard)
    parts = [RowPart(number, rows_L5[start : start + records_per_shard]) for number, start in enumerate(starts)]
    extractor = Extractor(EXTRACTOR_NAME, version)
    conversion = Conversion(
        str(features) if features else None, str(predictions), str(out), extractor, feature_dim, key_rule, max_regions
    )
    refuse_foreign_tars(out)
    summary = run_units(out, arguments, parts, functools.partial(convert_part, conversion), num_processes, "vinvl")
    if summary.counts["records"]:
        ensure_index(out)
    return summary


def plan_rows(features: Table | None, predictions: Table, key_rule: KeyRule) -> np.ndarray:
    """Returns int64 [L, 5], as in RowPart: the images of `features` in their order, then those of `predictions` only.

    An image that one file writes 7 and the other 007 is one image; its key is made of what `predictions` writes.

    Raises:
        DataError: two image ids give the same key.
    """
    first_of: dict[str, int] = {}
    for line, image_id in enumerate(predictions.ids):
        if image_id is not None:
            first_of.setdefault(image_id, line)
    rows: list[tuple[int, ...]] = []
    seen: set[str] = set()
    respelled: dict[str, str] = {}
    if features is not None:
        respelled = _respelled(features.ids, first_of)
        for image_id, span in zip(features.ids, features.spans_L2.tolist(), strict=True):
            partner = None if image_id is None else first_of.get(respelled.get(image_id, image_id))
            rows.append(
                (_state(image_id, seen), *span, *(_NOTHING if partner is None else predictions.spans_L2[partner]))
            )
    seen = {respelled.get(image_id, image_id) for image_id in seen}
    done = frozenset(seen)
    for line, (image_id, span) in enumerate(zip(predictions.ids, predictions.spans_L2.tolist(), strict=True)):
        if image_id is None or image_id not in done or first_of[image_id] != line:
            rows.append((_state(image_id, seen), *_NOTHING, *span))
    _check_keys(seen, key_rule)
    return np.array(rows, dtype=np.int64)


def _respelled(ids: Iterable[str | None], others: Collection[str]) -> dict[str, str]:
    """Returns for each id the one of `others` that is the same number with more or fewer zeros in front.

    Only of ids that `others` lacks, and where each side writes the number in one way: 7 and 07 may be two images.
    """
    own = {image_id for image_id in ids if image_id is not None}
    by_number: dict[str, tuple[set[str], set[str]]] = {}
    for side, unmatched in enumerate((own.difference(others), set(others).difference(own))):
        for image_id in unmatched:
            by_number.setdefault(without_zeros(image_id), (set(), set()))[side].add(image_id)
    return {next(iter(a)): next(iter(b)) for a, b in by_number.values() if len(a) == len(b) == 1}


def _state(image_id: str | None, seen: set[str]) -> int:
    if image_id is None:
        return _NO_ID
    state = _REPEATED if image_id in seen else _USABLE
    seen.add(image_id)
    return state


def _check_keys(image_ids: set[str], key_rule: KeyRule) -> None:
    owner: dict[str, str] = {}
    for image_id in image_ids:
        other = owner.setdefault(key_rule.key(image_id), image_id)
        if other != image_id:
            raise DataError(
                f"images {other!r} and {image_id!r} get one key, {key_rule.key(image_id)!r}; change --key-width, "
                "or import them apart"
            )


def convert_part(conversion: Conversion, part: RowPart) -> Summary:
    """Writes the tar of the rows of one unit (none when no row can be used)."""
    summary = Summary()
    entries = _entries(conversion, part, summary)
    first = next(entries, None)
    if first is not None:
        path = Path(conversion.out) / f"shard-{part.number:06d}.tar"
        summary.counts["records"] += write_tar(path, itertools.chain([first], entries))
    return summary


def _entries(conversion: Conversion, part: RowPart, summary: Summary) -> Iterator[Entry]:
    for state, *spans in part.rows_L5.tolist():
        name, span = ("features", spans[:2]) if spans[1] else ("predictions", spans[2:])
        where = f"{name}, byte {span[0]}"
        try:
            if state != _USABLE:
                raise RowError("the line has no image id" if state == _NO_ID else "the image id was seen before")
            image_id, members = _convert_row(conversion, spans, summary)
            key = conversion.key_rule.key(image_id)
            check_key(key)
        except RowError as error:
            summary.drop(error.reason, f"{where}: {error.detail}" if error.detail else where)
            continue
        except DataError as error:
            summary.drop("the image id makes no key", f"{where}: {error}")
            continue
        yield key, members


def _convert_row(conversion: Conversion, spans: list[int], summary: Summary) -> tuple[str, dict[str, bytes]]:
    if not spans[3]:
        raise RowError("the image has features and no predictions")
    if conversion.features is not None and not spans[1]:
        raise RowError("the image has predictions and no features")
    image_id, content = _read_line(conversion.predictions, spans[2], spans[3])
    found = parse_predictions(content)
    geometry_N4 = None
    features_NF = found.features_NF
    if conversion.features is not None:
        rows_NF = parse_features(_read_line(conversion.features, spans[0], spans[1])[1], conversion.feature_dim)
        if len(rows_NF) != len(found.boxes_N4):
            raise RowError(
                "features and predictions differ in number", f"{image_id}: {len(rows_NF)} and {len(found.boxes_N4)}"
            )
        features_NF, geometry_N4 = rows_NF[:, :-GEOMETRY_DIM], rows_NF[:, -GEOMETRY_DIM:-2]
    width, height = found.size or size_from_geometry(found.boxes_N4, geometry_N4)
    if geometry_N4 is not None:
        check_geometry(found.boxes_N4, geometry_N4, width, height)
    boxes_N4, usable_N = clip_boxes(found.boxes_N4, width, height)
    summary.counts["boxes below 1 pixel left out"] += int((~usable_N).sum())
    kept = np.flatnonzero(usable_N)
    kept = kept[np.argsort(-found.scores_N[kept], kind="stable")]
    summary.counts["boxes beyond --max-regions left out"] += max(0, len(kept) - conversion.max_regions)
    kept = kept[: conversion.max_regions]
    if not len(kept):
        raise RowError("no box is left", image_id)
    regions = tuple(_region(boxes_N4[n], found.tags[n], found.scores_N[n]) for n in kept.tolist())
    members = {"json": sidecar_json(conversion.extractor, width=width, height=height, regions=regions)}
    if features_NF is not None:
        members["npy"] = npy_bytes(to_float16(features_NF[kept]))
    summary.counts["regions"] += len(regions)
    return image_id, members


def _region(box_4: np.ndarray, tag: str, score: float) -> Region:
    x1, y1, x2, y2 = (round(float(value), 2) for value in box_4)
    return Region((x1, y1, x2, y2), tag, round(float(score), 4))


def _read_line(path: str, offset: int, num_bytes: int) -> tuple[str, bytes]:
    """Returns the first column and the rest of a line."""
    if num_bytes > _MAX_LINE_BYTES:
        raise RowError(f"the line is over {_MAX_LINE_BYTES >> 20} MiB", num_bytes)
    image_id, _, rest = os.pread(open_files.get(path), num_bytes, offset).partition(b"\t")
    rest = rest.strip()
    if b"\n" in rest:
        raise RowError("the .lineidx skips lines", image_id)
    return image_id.strip().decode("utf-8", "replace"), rest
