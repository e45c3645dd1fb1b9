"""Reads a pickle of plain data, such as `refs(unc).p`, without running anything that the file names.

`pickle.load` runs whatever a file says. This unpickler knows the operations alone that make lists, dictionaries,
tuples, strings, numbers, booleans and None. A file that wants anything else is refused: classes and functions by name,
calls, objects of a registry, persistent ids. Python's unpickler in C cannot be told which operations it may run, so the
one in Python is taken, with a shorter table.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import re
import struct
from pathlib import Path
from typing import Any, NoReturn, cast

from mvptr_ds.errors import DataError

MAX_BYTES = 128 << 20  # three times the largest published file; a byte may become an object of 64 bytes
_PYTHON = cast(Any, pickle)._Unpickler  # the standard library's unpickler in Python; no type stub declares its table
_DATA = (
    "PROTO FRAME STOP MARK POP POP_MARK DUP PUT BINPUT LONG_BINPUT MEMOIZE GET BINGET LONG_BINGET NONE NEWTRUE "
    "NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 LONG4 FLOAT BINFLOAT STRING BINSTRING SHORT_BINSTRING UNICODE "
    "BINUNICODE SHORT_BINUNICODE BINUNICODE8 EMPTY_LIST LIST APPEND APPENDS EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_DICT DICT SETITEM SETITEMS"
)
_NAMED = "GLOBAL STACK_GLOBAL INST"  # they ask `find_class`, which refuses and can say for what
_CODES = {name: getattr(pickle, name)[0] for name in f"{_DATA} {_NAMED}".split()}
_TEXT_LINE_OF_WINDOWS = re.compile(rb"p\d+\r\n")  # of protocol 0, which numbers its parts in lines p0, p1, ...
_COPIED_AS_TEXT = (
    "was copied as text: each line end in it became two bytes (CR LF); copy it again as a binary file, or undo it: "
    "sed -i 's/\\r$//'"
)
_DAMAGED = (
    pickle.UnpicklingError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, AssertionError,
    OverflowError, MemoryError, RecursionError, struct.error,
)  # fmt: skip


class _ClosedUnpickler(_PYTHON):  # type: ignore[misc, valid-type]
    """Unpickles plain data; strings of Python 2 are taken for Latin-1."""

    dispatch = {code: _PYTHON.dispatch[code] for code in _CODES.values()}

    def _load_pair(self) -> None:
        _check_key(self.stack[-2])
        _PYTHON.load_setitem(self)

    def _load_pairs(self) -> None:
        for key in self.stack[::2]:  # of the part behind the mark
            _check_key(key)
        _PYTHON.load_setitems(self)

    def _load_dict(self) -> None:
        for key in self.stack[::2]:
            _check_key(key)
        _PYTHON.load_dict(self)

    dispatch |= {_CODES["SETITEM"]: _load_pair, _CODES["SETITEMS"]: _load_pairs, _CODES["DICT"]: _load_dict}

    def find_class(self, module: str, name: str) -> NoReturn:
        raise _RefusedError(f"it names {f'{module}.{name}'[:80]!r}")

    def persistent_load(self, pid: Any) -> NoReturn:
        raise _RefusedError("it names a persistent id")


class _RefusedError(Exception):
    """Says what a pickle holds besides plain data."""


def _check_key(key: Any) -> None:
    """Raises _RefusedError for a tuple: to hash one of many layers crashes Python, or takes for ever."""
    if isinstance(key, tuple):
        raise _RefusedError("a dictionary has a tuple as a key")


def read_closed_pickle(path: Path) -> Any:
    """Returns the lists, dictionaries, strings and numbers that a pickle of any protocol holds.

    Raises:
        DataError: it holds anything else, is larger than 128 MiB, cut or damaged, refers to itself, or says one part so
            many times that it would unfold to more values than it has bytes.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; give the pickle")
    with open(path, "rb") as file:
        content = file.read(MAX_BYTES + 1)
    if len(content) > MAX_BYTES:
        raise DataError(f"{path} has over {MAX_BYTES >> 20} MiB, the most that is read of a pickle; give it as JSON")
    if not content.startswith(pickle.PROTO) and _TEXT_LINE_OF_WINDOWS.search(content):
        raise DataError(f"{path} {_COPIED_AS_TEXT}")  # it would be read, with keys such as "ref_id\\r"
    try:
        value = _ClosedUnpickler(io.BytesIO(content), encoding="latin-1", fix_imports=False).load()
    except _RefusedError as error:
        raise DataError(
            f"{path} is no pickle of plain data: {error}; nothing of it was run, give it as JSON"
        ) from error
    except _DAMAGED as error:
        raise DataError(f"{path} {_what_is_wrong(content, error)}") from error
    if _unfolds_beyond(value, len(content)):
        raise DataError(f"{path} repeats its own parts to more values than it has bytes; give it as JSON")
    return value


def _what_is_wrong(content: bytes, error: BaseException) -> str:
    if b"\n" in content and content.count(b"\n") == content.count(b"\r\n"):
        return _COPIED_AS_TEXT
    if isinstance(error, KeyError) and (refused := _operation(error)) is not None:
        return f"is no pickle of plain data: it holds the operation {refused}; nothing of it was run, give it as JSON"
    reason = f"{type(error).__name__}: {str(error)[:80]}"
    return f"is no whole pickle ({reason}), it begins with {content[:16]!r}; copy it again"


def _operation(error: KeyError) -> str | None:
    """Returns the name of the operation that is not in the table; None where something else was looked up."""
    code = error.args[0] if error.args else None
    if not isinstance(code, int) or isinstance(code, bool) or not 0 <= code < 256:
        return None
    names = [known.name for known in pickletools.opcodes if known.code == chr(code)]
    return names[0] if names and code not in _ClosedUnpickler.dispatch else None


def _unfolds_beyond(value: Any, most: int) -> bool:
    """Returns whether a value, each part counted as often as it is said, has more than `most` values."""
    waiting, num_values = [value], 0
    while waiting:
        part = waiting.pop()
        if isinstance(part, dict):
            num_values += 2 * len(part)
            waiting += [inner for inner in part.values() if isinstance(inner, (dict, list, tuple))]
        elif isinstance(part, (list, tuple)):
            num_values += len(part)
            waiting += [inner for inner in part if isinstance(inner, (dict, list, tuple))]
        if num_values + len(waiting) > most:
            return True
    return False
