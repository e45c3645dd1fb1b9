"""Tables with an image and a caption column: JSONL, CSV, Parquet."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mvptr_ds.corpus.jobs import Summary
from mvptr_ds.corpus.sources.rows import UNREADABLE, Row, captions_of, iter_lines, open_text
from mvptr_ds.data.schema import DataError

_BATCH_ROWS = 4096


def read_jsonl(source: Path, image_column: str, caption_column: str, summary: Summary) -> Iterator[Row]:
    """One JSON object a line. Raises DataError when the first object lacks a column."""
    first = True
    for number, line in iter_lines(source, summary):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            if not isinstance(entry, dict):
                raise TypeError(f"a {type(entry).__name__}, not an object")
        except (ValueError, TypeError, RecursionError) as error:
            summary.drop(UNREADABLE, f"{source.name}, line {number}: {error}")
            continue
        if first:
            _check_columns(source, entry, (image_column, caption_column))
            first = False
        yield from _row(entry, image_column, caption_column, f"{source.name}, line {number}", summary)


def read_csv(source: Path, image_column: str, caption_column: str, summary: Summary) -> Iterator[Row]:
    """A heading, then a row a line; separated by tabs, and never quoted, when the name ends in
    .tsv. A cell may hold a JSON list.

    Raises:
        DataError: the heading lacks a column.
    """
    with open_text(source, newline="") as file:
        if source.suffix.lower() == ".tsv":
            reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE)  # a stray quote would swallow rows
        else:
            reader = csv.DictReader(file, strict=True)
        try:
            _check_columns(source, reader.fieldnames or (), (image_column, caption_column))
        except csv.Error as error:
            raise DataError(f"{source} cannot be read as CSV: {error}") from error
        while True:
            try:
                entry = next(reader, None)
            except csv.Error as error:
                summary.drop(UNREADABLE, f"{source.name}, line {reader.line_num}: {error}")
                continue
            if entry is None:
                return
            if None in entry:
                summary.drop("row: more cells than the heading", f"{source.name}, line {reader.line_num}")
                continue
            if reader.reader.dialect.quoting == csv.QUOTE_NONE:
                entry = {name: _unquoted(cell) for name, cell in entry.items()}
            entry[caption_column] = _list_in(entry[caption_column])
            yield from _row(entry, image_column, caption_column, f"{source.name}, line {reader.line_num}", summary)


def _unquoted(cell: str | None) -> str | None:
    """A cell that is quoted as a whole, as spreadsheets write those with quotes in them, without its quotes."""
    if cell is None or len(cell) < 2 or not (cell[0] == cell[-1] == '"'):
        return cell
    inner = cell[1:-1]
    return inner.replace('""', '"') if '"' not in inner.replace('""', "") else cell


def _list_in(cell: str | None) -> Any:
    if cell is None or not cell.startswith("["):
        return cell
    try:
        value = json.loads(cell)
    except (ValueError, RecursionError):
        return cell  # a caption that begins with a bracket
    return value if isinstance(value, list) else cell


def read_parquet(source: Path, image_column: str, caption_column: str, summary: Summary) -> Iterator[Row]:
    """A Parquet file, a batch of rows at a time.

    Raises:
        DataError: pyarrow is not installed, the file is not Parquet, or it lacks a column.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        raise DataError(f"reading Parquet needs pyarrow ({error}); pip install pyarrow, or convert to JSONL") from error
    if not source.is_file():
        raise DataError(f"{source} is not a file; give the Parquet file")
    columns = (image_column, caption_column)
    try:
        with pyarrow.parquet.ParquetFile(source) as file:
            _check_columns(source, file.schema_arrow.names, columns)
            number = 0
            for batch in file.iter_batches(_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                for entry in batch.to_pylist():
                    yield from _row(entry, *columns, f"{source.name}, row {number}", summary)
                    number += 1
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{source} cannot be read as Parquet: {error}") from error


def _check_columns(source: Path, there: Iterable[str], wanted: tuple[str, str]) -> None:
    there = list(there)
    if missing := [column for column in wanted if column not in there]:
        raise DataError(
            f"{source} has no column {missing}, only {there[:30]}; name them with --image-column and --caption-column"
        )


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
