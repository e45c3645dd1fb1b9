"""What a user names and writes: paths with `~`, text that must be UTF-8, JSON in which no key may come twice."""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

_JSON_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|[][{},:\n]')


def user_path(text: str) -> Path:
    """Returns a path of a command's argument, its `~` expanded: a type for argparse.

    Raises:
        ArgumentTypeError: `~NAME` names nobody.
    """
    try:
        return Path(expanded(text))
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def whole_number(least: int, most: int | None = None) -> Callable[[str], int]:
    """Returns a type for argparse: whole numbers from `least` to `most`."""

    def number(text: str) -> int:
        value = int(text)
        if value < least or (most is not None and value > most):
            limits = f"at least {least}" if most is None else f"at least {least} and at most {most}"
            raise argparse.ArgumentTypeError(f"{value} is not {limits}")
        return value

    return number


def expanded(text: str) -> str:
    """Returns the text of a path or URL, with a leading `~` or `~NAME` expanded.

    Raises:
        ValueError: `~NAME` names nobody.
    """
    found = os.path.expanduser(text)
    if found.startswith("~"):
        raise ValueError(f"{text} begins with the home folder of a user who does not exist; write ./{text} for a name")
    return found


def read_text(path: Path) -> str:
    """Returns a file of the user as text, without a byte order mark.

    Raises:
        ValueError: it cannot be read or is not UTF-8, with its name.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        where = f"byte {error.start} is 0x{error.object[error.start]:02x}"
        raise ValueError(f"{path} is not UTF-8 ({where}): save it as UTF-8") from error
    except OSError as error:
        raise ValueError(f"cannot read {path}: {error.strerror}") from error


def parse_json(text: str, origin: str) -> Any:
    """Returns what the JSON says, if each object says each key once.

    Raises:
        ValueError: it is not JSON, or a key comes twice in an object, with the lines.
    """

    def refuse(constant: str) -> NoReturn:
        raise ValueError(f"{origin} is not JSON: {constant} is no number")

    try:
        content = json.loads(text, parse_constant=refuse)
    except (json.JSONDecodeError, RecursionError) as error:
        raise ValueError(f"{origin} is not JSON: {error}") from error
    if twice := list(_keys_given_twice(text)):
        raise ValueError(f"{origin}: {'; '.join(twice)}")
    return content


def given_twice(name: str, lines: list[int]) -> str:
    """Returns what is wrong with a key that comes several times, each in its line."""
    places = f"line {lines[0]}" if len(set(lines)) == 1 else f"lines {' and '.join(map(str, lines))}"
    return f"{name} is given {'twice' if len(lines) == 2 else f'{len(lines)} times'}, in {places}: keep one"


def _keys_given_twice(text: str) -> Iterator[str]:
    """Says what is wrong with each key that an object of sound JSON has several times, by its path."""
    line, string = 1, ""
    path: list[str] = []  # the name under which each open object or list stands
    open_keys: list[dict[str, list[int]]] = []  # of each of them: its keys, and the lines of each
    for token in (match.group() for match in _JSON_TOKEN.finditer(text)):
        if token == "\n":
            line += 1
        elif token in "{[":
            path.append(string)
            open_keys.append({})
            string = ""
        elif token in "}]":
            for key, lines in open_keys.pop().items():
                if len(lines) > 1:
                    yield given_twice(".".join(name for name in [*path[1:], key] if name), lines)
            path.pop()
            string = ""
        elif token == ":":
            open_keys[-1].setdefault(string, []).append(line)
        else:
            string = "" if token == "," else json.loads(token)
