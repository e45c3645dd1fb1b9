"""Defines the row that every reader yields, and reads lines of text files and elements of large JSON arrays."""

from __future__ import annotations

import codecs
import json
import os
import unicodedata
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.data.schema import MAX_SIDE_PX
from mvptr_ds.errors import DataError

UNREADABLE = "row: cannot be read"
_MAX_LINE_CHARS = 1 << 24
_CHUNK_CHARS = 1 << 20
_MAX_ELEMENT_CHARS = 1 << 26  # a file that is no JSON must not end in memory as one element


Labels = dict[str, Any]
LabelledCaption = tuple[str, Labels | None]


class Row(NamedTuple):
    """A picture and captions of it; rows of one `image_id` become one record."""

    image_id: str
    captions: tuple[str, ...]  # as the source writes them
    image: str | None = None  # path below the folder of pictures
    width: int = 0  # pixels; 0: the source does not say
    height: int = 0
    split: str | None = None  # where the source has splits of its own
    labels: tuple[Labels | None, ...] = ()  # of each caption, for a downstream task; empty: no caption has any

    def labelled_captions(self) -> list[LabelledCaption]:
        """Returns each caption with its labels, None where it has none."""
        return list(zip(self.captions, self.labels or [None] * len(self.captions), strict=True))


def clean_caption(text: str) -> str:
    """Returns the text with one space for white space and control characters; "" when nothing visible is left."""
    words = "".join(" " if unicodedata.category(c) == "Cc" else c for c in text).split()
    visible = any(unicodedata.category(c)[0] not in "CZ" or unicodedata.category(c) == "Cs" for w in words for c in w)
    return " ".join(words) if visible else ""


def normal_path(name: str, root: str | None = None) -> str:
    """Returns an image's path in one spelling: `./a.jpg`, `x/../a.jpg` and ROOT/a.jpg all become `a.jpg`.

    Args:
        root: absolute path of the folder of pictures; None where there is none.
    """
    path = os.path.normpath(name)
    if root is None or not path.startswith("/"):
        return path
    path, below = "/" + path.lstrip("/"), root.rstrip("/") + "/"
    return path[len(below) :] if path.startswith(below) else path


def captions_of(value: Any) -> tuple[str, ...]:
    """Returns the captions of a cell: a string, a list of strings, or nothing.

    Raises:
        TypeError: anything else.
    """
    if value is None or value == []:
        return ("",)
    if isinstance(value, str):
        return (value,)
    if isinstance(value, list) and all(isinstance(text, str) for text in value):
        return tuple(value)
    raise TypeError(f"caption is {str(value)[:80]!r}, expected a string or a list of strings")


def size_of(entry: Mapping[str, Any]) -> tuple[int, int]:
    """Returns the width and height in pixels; 0, 0 when the source has none or they make no sense."""
    width, height = whole(entry.get("width")), whole(entry.get("height"))
    if not isinstance(width, int) or not isinstance(height, int) or not min(width, height) > 0:
        return 0, 0
    return (width, height) if max(width, height) <= MAX_SIDE_PX else (0, 0)


def whole(value: Any) -> Any:
    """Returns 4 for 4.0, as table programs write whole numbers, and anything else unchanged."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def number_or_name(value: Any) -> str:
    """Returns an image id; numbers get twelve digits, as in COCO's file names. Raises TypeError for other types."""
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"image id is {str(value)[:80]!r}, expected a number or a string")
    return f"{value:012d}" if isinstance(value, int) else value


def open_text(path: Path) -> TextIO:
    """Opens a UTF-8 file; other bytes become lone surrogates, which the check of ids and captions counts.

    Raises:
        DataError: there is no such file, or it is UTF-16.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; give the annotation file")
    with open(path, "rb") as file:
        if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise DataError(f"{path} is UTF-16; write it as UTF-8: iconv -f UTF-16 -t UTF-8 {path.name}")
    return open(path, encoding="utf-8-sig", errors="surrogateescape")


def iter_lines(path: Path, summary: Summary) -> Iterator[tuple[int, str]]:
    """Yields each line without its end, and its number from 1; overlong lines are dropped and counted.

    A byte order mark is no part of a line: files that were put together have one within.
    """
    with open_text(path) as file:
        number = 0
        while line := file.readline(_MAX_LINE_CHARS):
            number += 1
            if len(line) == _MAX_LINE_CHARS and not line.endswith("\n"):
                while line and not line.endswith("\n"):
                    line = file.readline(_MAX_LINE_CHARS)
                summary.drop(UNREADABLE, f"{path.name}, line {number}: over {_MAX_LINE_CHARS} characters")
            else:
                yield number, line.rstrip("\n").removeprefix("\ufeff")


def is_array(path: Path) -> bool:
    """Returns whether a file begins like a JSON array. Raises what `open_text` raises."""
    with open_text(path) as file:
        return _JsonStream(file, path).peek() == "["


def iter_array(path: Path, name: str | None = None) -> Iterator[Any]:
    """Elements of the JSON array in a file, or of the one that field `name` of its object holds, one at a time.

    A file of gigabytes never is in memory as a whole.

    Raises:
        DataError: the file is missing, not JSON, cut, or has no such array.
    """
    with open_text(path) as file:
        stream = _JsonStream(file, path)
        if name is None:
            yield from stream.array()
            stream.end()
            return
        if stream.peek() == "[":
            raise DataError(
                f"{path} is a JSON array, not an object with the field {name!r}; is it of that format? An array of "
                'objects with an image and a caption is read by the format "jsonl"'
            )
        stream.take("{")
        fields = []
        while stream.peek() == '"':
            fields.append(stream.value())
            stream.take(":")
            if fields[-1] == name:
                yield from stream.array()
                return
            stream.skip()
            if stream.peek() == ",":
                stream.take(",")
        stream.take("}")
        raise DataError(f"{path} has no field {name!r}, only {fields[:20]}; is it of that format?")


def iter_fields(path: Path) -> Iterator[tuple[str, Any]]:
    """Yields name and value of each field of the JSON object in a file; None stands for an array or an object.

    An array is passed over one element at a time, and not before the next field is asked for.

    Raises:
        DataError: the file is missing, cut, or holds no JSON object.
    """
    with open_text(path) as file:
        stream = _JsonStream(file, path)
        stream.take("{")
        while stream.peek() == '"':
            name = stream.value()
            stream.take(":")
            if stream.peek() in "[{":
                yield name, None
                stream.skip()
            else:
                yield name, stream.value()
            if stream.peek() == ",":
                stream.take(",")
        stream.take("}")


class _JsonStream:
    """A cursor over JSON text that is read in chunks."""

    def __init__(self, file: TextIO, path: Path) -> None:
        self._file, self._path = file, path
        self._text, self._at, self._passed = "", 0, 0  # _passed: characters in front of _text
        self._decoder = json.JSONDecoder()

    def _more(self) -> bool:
        rest = len(self._text) - self._at
        chunk = self._file.read(max(_CHUNK_CHARS, rest)) if rest < _MAX_ELEMENT_CHARS else ""
        self._passed += self._at
        self._text, self._at = self._text[self._at :] + chunk, 0
        return bool(chunk)

    def _error(self, reason: str) -> DataError:
        return DataError(f"{self._path}, character {self._passed + self._at}: {reason}; is the file whole and JSON?")

    def peek(self) -> str:
        """Returns the next character that is no white space; "" at the end of the file."""
        while True:
            while self._at < len(self._text) and self._text[self._at] in " \t\r\n":
                self._at += 1
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def take(self, char: str) -> None:
        if self.peek() != char:
            raise self._error(f"expected {char!r}, found {self.peek()!r}")
        self._at += 1

    def end(self) -> None:
        if self.peek():
            raise self._error(f"expected the end of the file, found {self.peek()!r}")

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._at)
                # what follows must be seen: a number may go on in the next chunk
                if self._text[end : end + 1] in (",", "]", "}", ":", " ", "\n", "\r", "\t") and end < len(self._text):
                    self._at = end
                    return value
                reason = "the value is cut"
            except (ValueError, RecursionError) as error:
                reason = str(error)
            if not self._more():
                raise self._error(reason)

    def array(self) -> Iterator[Any]:
        self.take("[")
        while self.peek() != "]":
            yield self.value()
            if self.peek() != "]":
                self.take(",")
        self.take("]")

    def skip(self) -> None:
        """Passes over a value; of an array only one element at a time is in memory."""
        if self.peek() == "[":
            for _ in self.array():
                pass
        else:
            self.value()
