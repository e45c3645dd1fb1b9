"""Figures with texts that come from data: drawn as they stand, never parsed, in the one font that matplotlib brings."""

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
    """Of what makes and saves a figure: no text in it is parsed, those of axes and legends included."""
    # `$` is a dollar: mathematics that do not parse would end the program. Nor is TeX started, whatever a user has set
    with matplotlib.rc_context({"text.parse_math": False, "text.usetex": False, "font.family": _FONT}):
        yield


def drawable(text: str, max_chars: int) -> str:
    """The text on one line, at most `max_chars` long: what the font lacks is a box, control characters a space."""
    shown = "".join(map(_drawable_char, text[: 2 * max_chars]))
    shown = " ".join(shown.split())
    return shown if len(shown) <= max_chars and len(text) <= 2 * max_chars else shown[: max_chars - 1] + "…"


def _drawable_char(char: str) -> str:
    kind = unicodedata.category(char)
    if kind == "Cf":  # invisible; some turn the direction of what follows
        return ""
    if kind[0] in "CZ":
        return " "
    return char if ord(char) in _glyphs() else _NO_GLYPH


@functools.cache
def _glyphs() -> frozenset[int]:
    """Code points that the font has. matplotlib warns of each of the others, in every figure."""
    path = font_manager.findfont(font_manager.FontProperties(family=_FONT))
    return frozenset(font_manager.get_font(path).get_charmap())
