"""Splits text into tokens with their character spans, as the Penn Treebank does."""

from __future__ import annotations

import re
from collections.abc import Iterator

from nltk.tokenize import TreebankWordTokenizer

_TREEBANK = TreebankWordTokenizer()
# Treebank keeps "close-up", "and/or" and the full stop inside "snow. A dog" in one token
_INSIDE = re.compile(r"(?<=[^\W\d_])[-–—/](?=[^\W\d_])|(?<=[^\W_]{2})\.(?=$|[^\W\d_]{2})|\.{2,}$|(?<=\w),(?=[^\W\d_])")
_PIECES = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]")

Span = tuple[int, int]


def token_spans(text: str) -> list[Span]:
    """Returns the half-open character ranges of the tokens, in order; whitespace belongs to none."""
    try:
        spans = list(_TREEBANK.span_tokenize(text))
    except ValueError:  # it rewrites some quotation marks and then cannot find them again
        spans = [match.span() for match in _PIECES.finditer(text)]
    return [part for span in spans for part in _split_inside(text, *span)]


def _split_inside(text: str, start: int, end: int) -> Iterator[Span]:
    if end - start < 3 or text[start:end].isalpha():
        if start < end and not text[start:end].isspace():
            yield start, end
        return
    at = start
    for match in _INSIDE.finditer(text[start:end]):
        middle, after = start + match.start(), start + match.end()
        if at < middle:
            yield at, middle
        yield middle, after
        at = after
    if at < end:
        yield at, end
