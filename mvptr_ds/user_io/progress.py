"""How far long work has got: a bar on a terminal; elsewhere, as in the log of a job, a line every half minute."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

EVERY_S = 30.0
_LOOK_S = 1.0  # how often tqdm looks whether it is time
_FORMAT = "{desc}: {n_fmt} of {total_fmt} {unit}, {elapsed} so far, {remaining} left"


def progress_bar(items: Iterable[Any] | None = None, **options: Any) -> Any:
    """Returns `tqdm` with these arguments on a terminal, else what reports in lines of the log."""
    if sys.stderr.isatty():
        return tqdm(items, **options)
    _lines.begin()
    as_lines = {
        "file": _lines,
        "bar_format": _FORMAT,
        "mininterval": _LOOK_S,
        "miniters": 1,
        "delay": 0,
        "leave": False,
    }
    return tqdm(items, **options | as_lines)


class _Lines:
    """Where tqdm writes its bar at each look. Of all bars together, one line in EVERY_S goes on."""

    def __init__(self) -> None:
        self._said_s = self._seen_s = float("-inf")

    def begin(self) -> None:
        """Starts the clock of the first line anew after a pause; work right after other work delays no line."""
        now_s = time.monotonic()
        if now_s - self._seen_s > EVERY_S:
            self._said_s = now_s
        self._seen_s = now_s

    def write(self, text: str) -> None:
        self._seen_s = time.monotonic()
        line = text.strip()
        if line and self._seen_s - self._said_s >= EVERY_S:
            self._said_s = self._seen_s
            sys.stderr.write(f"{line}\n")

    def flush(self) -> None:
        sys.stderr.flush()


_lines = _Lines()
