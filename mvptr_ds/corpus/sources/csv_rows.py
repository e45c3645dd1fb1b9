"""Reads the rows of a CSV file, where a stray quote costs one line at most.

A cell that begins with a quote and lacks the closing one takes all lines up to the next quote of the file with it. So
lines that a cell has swallowed are looked at. Where one of them is a row by itself, they are read again without it:

    7.jpg,"a screen of 24      the quote is part of the caption
    8.jpg,two dogs             a row of as many cells as the heading, with a picture's name where one belongs
    9.jpg,a wheel of 20"       the quote that ended the cell
"""

from __future__ import annotations

import csv
import re
from collections import deque
from collections.abc import Iterator
from pathlib import Path, PurePath

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.plain import PICTURE_SUFFIXES
from mvptr_ds.corpus.sources.rows import UNREADABLE, iter_lines
from mvptr_ds.errors import DataError

_SPACE, _DIGIT = re.compile(r"\s"), re.compile(r"\d")


class CsvRows:
    """The heading of a table, and by iteration (number of the first line from 1, cells) of every other row.

    A row has as many cells as the heading: those that it lacks are empty.

    A `.tsv` file is separated by tabs and has no multi-line cells: a quote there is a character like others, unless it
    encloses a whole cell. What cannot be read is counted in `summary`, by lines.

    Raises:
        DataError: the heading cannot be read.
    """

    def __init__(self, source: Path, summary: Summary) -> None:
        self._source, self._summary = source, summary
        self._lines = _Lines(iter_lines(source, summary))
        self._is_tsv = source.suffix.lower() == ".tsv"
        self._delimiter = "\t" if self._is_tsv else ","
        self._reader = csv.reader(
            self._lines,
            delimiter=self._delimiter,
            quoting=csv.QUOTE_NONE if self._is_tsv else csv.QUOTE_MINIMAL,
            strict=True,
        )
        try:
            self.heading = self._cleaned(next((cells for cells in self._reader if cells), []))
        except csv.Error as error:
            raise DataError(f"the heading of {source} cannot be read as CSV: {error}") from error
        self.image_at = 0  # which cell names the picture

    def __iter__(self) -> Iterator[tuple[int, list[str]]]:
        while True:
            self._lines.taken.clear()
            cells, problem = None, "a quote in a cell is not closed, or not doubled"
            try:
                cells = next(self._reader)
            except StopIteration:
                return
            except csv.Error as error:
                problem = str(error)
            taken = list(self._lines.taken)
            number, line = taken[0]
            if cells is None or len(taken) > 1:
                own = self._alone(line)
                end = self._end_of_row([other for _, other in taken], own)
                if end < len(taken):
                    self._lines.give_back(taken[end:])
                    cells = None
                if cells is None and end == 1 and len(own) == len(self.heading):
                    cells = own
                taken = taken[:end]
            where = f"{self._source.name}, line {number}"
            if cells is None:
                self._summary.drop(UNREADABLE, f"{where}: {problem}", len(taken))
            elif len(cells) > len(self.heading):
                self._summary.drop("row: more cells than the heading", where, len(taken))
            elif cells:
                yield number, self._cleaned(cells) + [""] * (len(self.heading) - len(cells))

    def _end_of_row(self, lines: list[str], own: list[str]) -> int:
        """Returns how many of the lines that a row has taken are its own; `own` are the cells of the first line."""
        swallowed = lines[1:]
        for number, line in enumerate(swallowed, start=1):
            if self._is_row(line, own):
                return number
        if len(swallowed) > 1 and all(self._could_be_row(line, own) for line in swallowed):
            return 1  # the pictures' names look like nothing, but a caption is not made of such lines alone
        return len(lines)

    def _alone(self, line: str) -> list[str]:
        """Cells of a line whose quotes are characters like others; none where it cannot be read."""
        try:
            return next(csv.reader([line], delimiter=self._delimiter, quoting=csv.QUOTE_NONE), [])
        except csv.Error:
            return []

    def _is_row(self, line: str, own: list[str]) -> bool:
        """Returns whether a line is a row by itself: its image is named in the manner of the one in the row `own`."""
        if not (image := self._could_be_row(line, own)):
            return False
        suffix, own_suffix = (PurePath(name).suffix.lower() for name in (image, own[self.image_at].strip('"')))
        return suffix in PICTURE_SUFFIXES or bool(suffix == own_suffix and _DIGIT.search(image))

    def _could_be_row(self, line: str, own: list[str]) -> str:
        """Returns the name of the image in a line that has as many cells as the heading; "" where it has none."""
        try:
            cells = next(csv.reader([line], delimiter=self._delimiter), [])
        except csv.Error:
            return ""
        if len(cells) != len(self.heading) or len(own) <= self.image_at:
            return ""
        image = cells[self.image_at]
        return "" if _SPACE.search(image) and not _SPACE.search(own[self.image_at]) else image

    def _cleaned(self, cells: list[str]) -> list[str]:
        return [_unquoted(cell) for cell in cells] if self._is_tsv else cells


class _Lines:
    """Numbered lines for a csv.reader, which takes them one at a time; some can be given back."""

    def __init__(self, lines: Iterator[tuple[int, str]]) -> None:
        self._lines = lines
        self._given_back: deque[tuple[int, str]] = deque()
        self.taken: list[tuple[int, str]] = []

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        numbered = self._given_back.popleft() if self._given_back else next(self._lines)
        self.taken.append(numbered)
        return numbered[1] + "\n"

    def give_back(self, lines: list[tuple[int, str]]) -> None:
        self._given_back.extendleft(reversed(lines))


def _unquoted(cell: str) -> str:
    """Returns a cell without the quotes that spreadsheets put around cells with quotes in them."""
    if len(cell) < 2 or not (cell[0] == cell[-1] == '"'):
        return cell
    inner = cell[1:-1]
    return inner.replace('""', '"') if '"' not in inner.replace('""', "") else cell
