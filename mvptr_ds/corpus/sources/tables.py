"""Reads tables with an image and a caption column: JSONL, CSV, Parquet."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.csv_rows import CsvRows
from mvptr_ds.corpus.sources.rows import UNREADABLE, Row, captions_of, is_array, iter_array, iter_lines
from mvptr_ds.errors import DataError

_BATCH_ROWS = 4096


def read_jsonl(source: Path, image_column: str, caption_column: str, summary: Summary) -> Iterator[Row]:
    """Yields the rows of JSON lines or of a JSON array. Raises DataError when the first object lacks a column."""
    first = True
    for where, entry in iter_objects(source, summary):
        if first:
            find_columns(source, entry, (image_column, caption_column))
            first = False
        yield from _row(entry, image_column, caption_column, where, summary)


def iter_objects(source: Path, summary: Summary) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields place and content of each object of JSON lines or of a JSON array; what is none is counted.

    Raises:
        DataError: there is no such file, or the array is cut.
    """
    entries = _array_entries(source) if is_array(source) else _line_entries(source, summary)
    for where, entry in entries:
        if isinstance(entry, dict):
            yield where, entry
        else:
            summary.drop(UNREADABLE, f"{where}: a {type(entry).__name__}, not an object")


def _array_entries(source: Path) -> Iterator[tuple[str, Any]]:
    for number, entry in enumerate(iter_array(source)):
        yield f"{source.name}, [{number}]", entry


def _line_entries(source: Path, summary: Summary) -> Iterator[tuple[str, Any]]:
    for number, line in iter_lines(source, summary):
        where = f"{source.name}, line {number}"
        try:
            if line.strip():
                yield where, json.loads(line)
        except (ValueError, RecursionError) as error:
            summary.drop(UNREADABLE, f"{where}: {error}")


def read_csv(source: Path, image_column: str, caption_column: str, summary: Summary) -> Iterator[Row]:
    """Yields the rows of a table with a heading; .tsv is separated by tabs. A cell may hold a JSON list.

    Raises:
        DataError: the heading lacks a column, or has one twice.
    """
    rows = CsvRows(source, summary)
    columns = find_columns(source, rows.heading, (image_column, caption_column))
    rows.image_at, caption_at = (rows.heading.index(column) for column in columns)
    for number, cells in rows:
        entry = {image_column: cells[rows.image_at], caption_column: list_in(cells[caption_at])}
        yield from _row(entry, image_column, caption_column, f"{source.name}, line {number}", summary)


def list_in(cell: str) -> Any:
    """Returns the list that a cell holds as JSON, else the cell."""
    if not cell.startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # a caption that begins with a bracket
    return value if isinstance(value, list) else cell


def read_parquet(source: Path, image_column: str, caption_column: str, summary: Summary) -> Iterator[Row]:
    """Yields the rows of a Parquet file, read a batch at a time.

    Raises:
        DataError: pyarrow is not installed, the file is not Parquet, or it lacks a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        remedy = "pip install 'mvptr_ds[parquet]', or convert to JSONL"
        raise DataError(f"reading Parquet needs pyarrow ({error}); {remedy}") from error
    if not source.is_file():
        raise DataError(f"{source} is not a file; give the Parquet file")
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            columns = find_columns(source, file.schema_arrow.names, (image_column, caption_column))
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                for entry in batch.to_pylist():
                    yield from _row(entry, columns[0], columns[1], f"{source.name}, row {number}", summary)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read as Parquet: {error}") from error


def find_columns(
    source: Path,
    there: Iterable[str],
    wanted: tuple[str, ...],
    remedy: str = "name them with --image-column and --caption-column",
) -> list[str]:
    """Returns the names of the wanted columns as the file spells them, perhaps with spaces around them.

    Raises:
        DataError: one is missing, or there twice; `remedy` says what to do about a missing one.
    """
    there = list(there)
    counts = Counter(name.strip() for name in there)
    if repeated := [name for name, number in counts.items() if name and number > 1]:
        raise DataError(f"{source} has the column {repeated[0]!r} twice; rename one, or take it out")
    found = {name.strip(): name for name in there}
    if missing := [column for column in wanted if column.strip() not in found]:
        shown = [name[:80] for name in there[:30]]
        raise DataError(f"{source} has no column {missing}, only {shown}; {remedy}")
    return [found[column.strip()] for column in wanted]


def _row(
    entry: Mapping[str, Any], image_column: str, caption_column: str, where: str, summary: Summary
) -> Iterator[Row]:
    image = entry.get(image_column)
    if not isinstance(image, str) or not image.strip():
        kind = "is empty" if not image else f"is a {type(image).__name__}, expected a path"
        summary.drop(UNREADABLE, f"{where}: column {image_column!r} {kind}")
        return
    try:
        yield Row(image, captions_of(entry.get(caption_column)), image)
    except TypeError as error:
        summary.drop(UNREADABLE, f"{where}: {error}")
