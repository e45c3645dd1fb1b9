"""Draws figures whose texts come from data: literally, never parsed, in the font that matplotlib brings."""

from __future__ import annotations

import functools
import unicodedata
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib

matplotlib.use("Agg")
from matplotlib import font_manager

_FONT = "DejaVu Sans"
_NO_GLYPH = "□"


@contextmanager
def plain_figures() -> Iterator[None]:
    """Wraps what makes and saves a figure. No text in it is parsed, not even those of axes and legends."""
    # A `$` stays a dollar: mathematics that do not parse would end the program. TeX is never used, whatever a user set.
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "font.family": _FONT}):
        yield


def drawable(text: str, max_chars: int) -> str:
    """Returns the text on one line of at most `max_chars`. Characters that the font lacks become boxes."""
    shown = "".join(map(_drawable_char, text[: 2 * max_chars]))
    shown = " ".join(shown.split())
    return shown if len(shown) <= max_chars and len(text) <= 2 * max_chars else shown[: max_chars - 1] + "…"


def _drawable_char(char: str) -> str:
    kind = unicodedata.category(char)
    if kind == "Cf":  # invisible characters, some of which change the direction of text
        return ""
    if kind[0] in "CZ":
        return " "
    return char if ord(char) in _glyphs() else _NO_GLYPH


@functools.cache
def _glyphs() -> frozenset[int]:
    """Returns the code points of the font. matplotlib warns of each other one, in every figure."""
    path = font_manager.findfont(font_manager.FontProperties(family=_FONT))
    return frozenset(font_manager.get_font(path).get_charmap())
