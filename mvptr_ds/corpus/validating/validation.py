"""Finds all that is wrong with a folder of shards, and writes the folder without it.

    every tar:  walk it, behind damage too (salvage) -> read every record (tars, schema) -> check it (record_checks)
    the folder: keys that come twice, features of another size, records of several extractors
    then:       the index, when nothing is wrong | what is sound, written again | neither

The findings of a tar and one row a record are kept below the folder that is to hold the index until all is done, so
that an interrupted run goes on.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np

from mvptr_ds.corpus.resumable_jobs import Summary, refuse_foreign_tars, run_units
from mvptr_ds.corpus.validating.record_checks import IMG2DATASET, Checked, check_content
from mvptr_ds.corpus.validating.repair import Break, Piece, first_key, pieces
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import NOT_WRITABLE, build_index, is_img2dataset, not_writable, where_tars_are
from mvptr_ds.data.shards.index_format import MANIFEST_NAME
from mvptr_ds.data.shards.tar_reader import (
    IMAGE_EXTENSIONS,
    MEMBER_EXTENSIONS,
    list_tars,
    read_keyed_record,
    read_record,
)
from mvptr_ds.data.shards.tar_writer import check_key, write_tar
from mvptr_ds.errors import DataError

ROW = np.dtype(
    [
        ("hash", "<u8"),
        ("hash2", "<u8"),
        ("offset", "<u8"),
        ("num_bytes", "<u8"),
        ("feature_dim", "<u8"),  # 0 without features
        ("is_sidecar", "<u8"),
        ("state", "<u8"),
    ]
)
SOUND, UNSOUND, INCOMPLETE = 0, 1, 2  # states of a row; an incomplete piece makes others of its key useless
EXTRACTOR = "records by "  # and its name and version: a count of the summary

TWICE = "a key that comes twice"
APART = "members of one key that are not neighbours"
NO_PICTURE = "a record that says a picture's size and lacks the picture that others have"
BESIDE = "a record beside damage that lacks members others have"
OTHER_KIND = "records and entries of a sidecar in one folder"
OTHER_SIZE = "features of another size than the folder's"

Unit = tuple[int, str]  # number of the shard, its path


@dataclass
class Result:
    """The result of a validation."""

    summary: Summary  # of the folder: what was found, and what is wrong
    examples: dict[str, list[str]]  # reason -> cases
    index: Index | None = None  # of the folder, or of its repair
    warnings: list[str] = field(default_factory=list)

    @property
    def is_clean(self) -> bool:
        return not self.summary.dropped


def validate(
    folder: Path,
    out: Path | None = None,
    repair: Path | None = None,
    decode: bool = True,
    num_processes: int = 1,
    max_examples: int = 5,
) -> Result:
    """Finds everything that is wrong with a folder of shards, or with one of sidecar tars.

    Nothing wrong: the index is built (in `out` if given). Something wrong: it is not, unless `repair` names a folder:
    the sound records are written there, with the very same members, in shards of the same names, with their index.

    Raises:
        DataError: the folder holds no tars, or `repair` is the folder itself or holds something else.
        OSError: a folder cannot be written.
    """
    tars = list_tars(folder)
    if not tars:
        raise DataError(f"{folder} holds no .tar file; {where_tars_are(folder)}")
    if repair is not None:
        refuse_foreign_tars(repair, folder)
    target = repair or out or folder
    arguments = {
        "folder": str(folder.resolve()),
        "tars": [[tar.name, *_size_and_time(tar)] for tar in tars],
        "decode": decode,
        "repair": repair is not None,
    }
    # named by its arguments: what is left of a run on other tars is no hindrance
    work = target / f".validation-{hashlib.sha256(json.dumps(arguments).encode()).hexdigest()[:12]}"
    try:
        work.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if target != folder or error.errno not in NOT_WRITABLE:
            raise
        raise DataError(not_writable(folder, folder, error)) from error
    units = [(number, str(tar)) for number, tar in enumerate(tars)]
    inspect = partial(inspect_shard, work=work, decode=decode, writable_keys=repair is not None)
    run_units(work, arguments, units, inspect, num_processes, "validate")
    try:
        result = _sum_up(_judge_folder(work, units), max_examples)
        if not result.summary.counts["records sound"]:
            result.warnings.append(f"there is no sound record in {folder}, so no index was written")
        elif repair is not None:
            write = partial(repair_shard, work=work, out=repair)
            result.summary.counts += run_units(repair, arguments, units, write, num_processes, "repair").counts
            result.index = build_index(repair)
        elif result.is_clean:
            result.index = build_index(folder, out)
        else:
            result.warnings += _stale_index(out or folder)
    except DataError:
        shutil.rmtree(work)  # not after an interruption: what was found is for the next run
        raise
    shutil.rmtree(work)
    return result


def _size_and_time(tar: Path) -> tuple[int, int]:
    try:
        stat = tar.stat()
    except OSError:
        return -1, -1  # counted as a shard that cannot be read
    return stat.st_size, stat.st_mtime_ns


def inspect_shard(unit: Unit, work: Path, decode: bool, writable_keys: bool) -> Summary:
    """Finds what is wrong within a tar; writes a row a record and the findings into `work`."""
    number, path = unit
    inspection = _Inspection(Path(path), decode, writable_keys)
    try:
        inspection.run()
    except OSError as error:
        inspection.summary.drop("a shard that cannot be read", f"{Path(path).name}: {error}")
    columns = [np.frombuffer(column, dtype=np.uint64) for column in inspection.columns]
    rows = np.zeros(len(columns[0]), dtype=ROW)
    for name, column in zip(ROW.names or (), columns, strict=True):
        rows[name] = column
    np.save(_rows_path(work, number), rows, allow_pickle=False)
    _write_report(_report_path(work, number), inspection.summary)
    return inspection.summary


class _Inspection:
    """One tar: its summary, and its rows column by column."""

    def __init__(self, path: Path, decode: bool, writable_keys: bool) -> None:
        self.path = path
        self.decode = decode
        self.writable_keys = writable_keys
        self.summary = Summary()
        self.columns = [array("Q") for _ in ROW.names or ()]
        self.extensions: set[str] = set()  # of all sound records

    def run(self) -> None:
        beside: list[tuple[int, Piece]] = []
        without_picture: list[tuple[int, Piece]] = []
        with open(self.path, "rb") as file:
            for item in pieces(file, self.path.stat().st_size):
                if isinstance(item, Break):
                    key = "" if item.key is None else f", key {item.key!r}"
                    self.summary.drop(item.reason, f"{self.path.name}, byte {item.start}{key}: {item.detail}")
                    continue
                checked = self._inspect(item)
                if checked.lacks_picture and self.columns[-1][-1] == SOUND:
                    without_picture.append((len(self.columns[-1]) - 1, item))
                if item.beside_loss and self.columns[-1][-1] == SOUND:
                    beside.append((len(self.columns[-1]) - 1, item))
                elif self.columns[-1][-1] == SOUND:
                    self.extensions.update(item.extensions)
        wanted = self.extensions.union(*(piece.extensions for _, piece in beside))
        for row, piece in beside:
            if missing := wanted - set(piece.extensions):
                self.columns[-1][row] = INCOMPLETE
                self._drop(piece, BESIDE, f"no {sorted(missing)}")
        for row, piece in without_picture if self.extensions & {"npy", *IMAGE_EXTENSIONS} else ():
            alone = self.columns[0].count(self.columns[0][row]) == 1  # else its picture may lie elsewhere
            if self.columns[-1][row] == SOUND and alone:
                self.columns[-1][row] = INCOMPLETE
                self._drop(piece, NO_PICTURE, f"only {piece.extensions}")

    def _inspect(self, piece: Piece) -> Checked:
        """Appends the piece's row, and counts what is wrong with it."""
        state, checked = INCOMPLETE, Checked([])
        if piece.broken is not None:
            self._drop(piece, piece.broken, piece.detail)
        elif "json" not in piece.extensions and piece.num_members == len(piece.extensions):
            reason = IMG2DATASET if is_img2dataset(piece.extensions, None) else "no json member"
            self._drop(piece, reason, f"only {piece.extensions}")
        elif len(set(piece.extensions)) < len(piece.extensions):
            self._drop(piece, "a member twice", f"members {piece.extensions}")
        else:
            checked = self._check(piece)
            state = UNSOUND if checked.problems else SOUND
        for reason, detail in checked.problems:
            self._drop(piece, reason, detail)
        digest = hashlib.blake2b(piece.key.encode("utf-8", "surrogateescape"), digest_size=16).digest()
        hashes = int.from_bytes(digest[:8], "little"), int.from_bytes(digest[8:], "little")
        values = (*hashes, piece.start, piece.end - piece.start, checked.feature_dim, checked.is_sidecar, state)
        for column, value in zip(self.columns, values, strict=True):
            column.append(value)
        self.summary.counts["records found"] += 1
        self.summary.counts["members"] += piece.num_members
        if num_foreign := sum(extension not in MEMBER_EXTENSIONS for extension in piece.extensions):
            self.summary.counts["members of other kinds, not read"] += num_foreign
        if piece.num_mac_files:
            self.summary.counts["files that a Mac added (._NAME, .DS_Store), passed over"] += piece.num_mac_files
        return checked

    def _check(self, piece: Piece) -> Checked:
        """Returns the result for a piece with all its members."""
        try:
            members = read_record(str(self.path), piece.start, piece.end - piece.start)
        except DataError as error:
            return Checked([("members that may not be read", str(error))])
        try:
            if self.writable_keys:
                check_key(piece.key)
        except DataError as error:
            return Checked([("a key that cannot be written again", str(error))])
        checked = check_content(members, self.decode)
        if checked.extractor:
            self.summary.counts[EXTRACTOR + checked.extractor] += 1
        self.summary.counts["captions"] += checked.num_captions
        self.summary.counts.update(checked.changes)
        return checked

    def _drop(self, piece: Piece, reason: str, detail: str) -> None:
        self.summary.drop(reason, f"{self.path.name}, byte {piece.start}, key {piece.key!r}: {detail}")


def _rows_path(work: Path, number: int) -> Path:
    return work / f"rows-{number:06d}.npy"


def _judged_path(work: Path, number: int) -> Path:
    return work / f"judged-{number:06d}.npy"


def _report_path(work: Path, number: int) -> Path:
    return work / f"report-{number:06d}.json"


def _write_report(path: Path, report: Summary) -> None:
    path.write_text(json.dumps(report.to_json()), encoding="utf-8")


def _read_report(path: Path) -> Summary:
    return Summary.from_json(json.loads(path.read_text(encoding="utf-8")))


def _judge_folder(work: Path, units: Sequence[Unit]) -> list[Summary]:
    """Judges what only shows over all tars: returns their reports, and changes the states of rows in `work`."""
    reports = [_read_report(_report_path(work, number)) for number, _ in units]
    rows_by_shard = [np.load(_rows_path(work, number), allow_pickle=False) for number, _ in units]
    shards = np.repeat(np.arange(len(units)), [len(rows) for rows in rows_by_shard])
    rows = np.concatenate(rows_by_shard)
    # one after the other: what is refused for its key counts no longer among the sizes
    for row, reason, detail in itertools.chain(_repeated(rows), _minorities(rows)):
        number, path = units[shards[row]]
        place = int(rows["offset"][row])
        with open(path, "rb") as file:
            key = first_key(file, place, int(rows["num_bytes"][row]))
        reports[number].drop(reason, f"{Path(path).name}, byte {place}, key {key!r}: {detail}")
        rows["state"][row] = UNSOUND
    for (number, _), report in zip(units, reports, strict=True):
        of_shard = rows[shards == number]
        report.counts["records sound"] = int((of_shard["state"] == SOUND).sum())
        np.save(_judged_path(work, number), of_shard, allow_pickle=False)
        _write_report(_judged_path(work, number).with_suffix(".json"), report)
    return reports


def _repeated(rows: np.ndarray) -> Iterator[tuple[int, str, str]]:
    """Yields the rows of repeated keys to refuse: all of a key if one is incomplete, else all but the first."""
    order = np.lexsort((np.arange(len(rows)), rows["hash2"], rows["hash"]))
    hashes = rows[["hash", "hash2"]][order]
    starts = np.flatnonzero(np.append(True, hashes[1:] != hashes[:-1]))
    ends = np.append(starts[1:], len(rows))
    for start, end in zip(starts[ends - starts > 1].tolist(), ends[ends - starts > 1].tolist(), strict=True):
        same = order[start:end]
        sound = [int(row) for row in same if rows["state"][row] == SOUND]
        if (rows["state"][same] == INCOMPLETE).any():
            yield from ((row, APART, f"{len(same)} pieces") for row in sound)
        else:
            yield from ((row, TWICE, f"{len(same)} records; the first sound one is kept") for row in sound[1:])


def _minorities(rows: np.ndarray) -> Iterator[tuple[int, str, str]]:
    """Yields rows that differ from most of the folder: of the other kind, then with features of another size."""
    sound = np.flatnonzero(rows["state"] == SOUND)
    kind, others = _part(rows["is_sidecar"], sound)
    for row in others:
        yield row, OTHER_KIND, "most are " + ("entries of a sidecar" if kind else "records")
    featured = np.setdiff1d(sound, others)
    size, others = _part(rows["feature_dim"], featured[rows["feature_dim"][featured] > 0])
    for row in others:
        yield row, OTHER_SIZE, f"{rows['feature_dim'][row]} numbers a region, elsewhere {size}"


def _part(column: np.ndarray, of_rows: np.ndarray) -> tuple[int, list[int]]:
    """Returns the most frequent value of a column, and the rows that have another."""
    values, numbers = np.unique(column[of_rows], return_counts=True)
    usual = int(values[numbers.argmax()]) if len(values) else 0
    return usual, of_rows[column[of_rows] != usual].tolist()


def _sum_up(reports: Sequence[Summary], max_examples: int) -> Result:
    result = Result(Summary(), {})
    result.summary.counts["shards"] = len(reports)
    for report in reports:
        result.summary.add(report)
        for reason, cases in report.examples.items():
            shown = result.examples.setdefault(reason, [])
            shown += cases[: max_examples - len(shown)]
    extractors = sorted(name for name in result.summary.counts if name.startswith(EXTRACTOR))
    if len(extractors) > 1:
        counts = ", ".join(f"{result.summary.counts[name]} {name}" for name in extractors)
        result.warnings.append(f"several extractors ({counts}): training refuses them unless told to take them")
    return result


def _stale_index(folder: Path) -> list[str]:
    if not (folder / MANIFEST_NAME).exists():
        return []
    try:
        Index.open(folder).verify()
    except DataError as error:
        return [f"the index in {folder} is of other shards: {error}"]
    return [f"the index in {folder} was left as it is, though not all that it points to is sound"]


def repair_shard(unit: Unit, work: Path, out: Path) -> Summary:
    """Writes the sound records of a tar into `out`, under the tar's name; nothing when it has none."""
    number, path = unit
    rows = np.load(_judged_path(work, number), allow_pickle=False)
    rows = rows[rows["state"] == SOUND]
    summary = _read_report(_judged_path(work, number).with_suffix(".json"))
    summary.counts.clear()
    if len(rows):
        summary.counts["records written"] = write_tar(out / Path(path).name, _sound_records(path, rows))
        summary.counts["shards written"] = 1
    return summary


def _sound_records(path: str, rows: np.ndarray) -> Iterator[tuple[str, dict[str, bytes]]]:
    for offset, num_bytes in zip(rows["offset"].tolist(), rows["num_bytes"].tolist(), strict=True):
        yield read_keyed_record(path, offset, num_bytes)
