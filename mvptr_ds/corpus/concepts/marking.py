"""Marks the phrases of a caption for `mvptr phrases --show`.

A woman rides her horse.
  ^^^^^                  woman
      ...
  ^^^^^ ^^^^^     ^^^^^  woman | ride | horse
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterator, Sequence

from mvptr_ds.data.schema import Phrase


def mark(text: str, phrases: Sequence[Phrase]) -> Iterator[str]:
    """Yields the text, then a line for each phrase, which underlines the words of the phrase."""
    shown = "".join(character if character.isprintable() else " " for character in text)
    widths = [_columns(character) for character in shown]
    yield shown
    for phrase in phrases:
        marked = {place for start, end in phrase.spans for place in range(start, end)}
        line = "".join(("^" if place in marked else " ") * width for place, width in enumerate(widths))
        yield f"{line}  {' | '.join(phrase.tuple)}"


def _columns(character: str) -> int:
    """Returns how many columns of a terminal a character takes."""
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
