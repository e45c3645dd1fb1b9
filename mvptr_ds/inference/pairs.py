"""Which text goes with which picture, where either may stand alone or in a list."""

from __future__ import annotations

from collections.abc import Sequence

from mvptr_ds.errors import DataError


def as_texts(texts: str | Sequence[str]) -> list[str]:
    """Returns texts, of which one may be given bare.

    Raises:
        DataError: there is none, or one of them is empty or no text.
    """
    given = [texts] if isinstance(texts, str) else list(texts)
    if not given:
        raise DataError("there is no text")
    for number, text in enumerate(given):
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"text {number} of {len(given)} is {text!r}, expected words")
    return given


def pairs_of(num_texts: int, num_pictures: int) -> list[tuple[int, int]]:
    """Returns (number of the text, number of the picture) of each pair: one to one, or one of either with all others.

    Raises:
        DataError: there are no pictures, or several of both in different numbers.
    """
    if not num_pictures:
        raise DataError("there is no picture")
    if num_pictures != num_texts and 1 not in (num_pictures, num_texts):
        raise DataError(f"{num_pictures} pictures and {num_texts} texts: give as many, or one of either")
    return [(n if num_texts > 1 else 0, n if num_pictures > 1 else 0) for n in range(max(num_pictures, num_texts))]
