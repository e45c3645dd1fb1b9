"""Turns tuples of words into phrases with the characters that say them, each span checked."""

from __future__ import annotations

from collections.abc import Sequence

from mvptr_ds.corpus.concepts.lemmas import Lemmatiser
from mvptr_ds.corpus.concepts.rules import HAVE, A, Found
from mvptr_ds.corpus.concepts.tokens import Span
from mvptr_ds.data.schema import Phrase

# what says a word without being a form of it
_SAID_BY = {
    HAVE: frozenset(["my", "your", "his", "her", "its", "our", "their", "whose", "'s", "’s", "'", "’"]),
    A: frozenset(["an"]),
}


def to_phrase(found: Found, spans: Sequence[Span]) -> Phrase:
    """Returns the phrase of a tuple; `spans` are the tokens of its text."""
    parts = [span for part in found for span in to_spans(part.tokens, spans)]
    return Phrase(tuple(part.word for part in found), tuple(parts))


def to_spans(tokens: Sequence[int], spans: Sequence[Span]) -> list[Span]:
    """Characters of some tokens; those that stand side by side share a span."""
    out: list[Span] = []
    last = -2
    for index in tokens:
        start, end = spans[index]
        if index == last + 1:
            out[-1] = (out[-1][0], end)
        else:
            out.append((start, end))
        last = index
    return out


def are_said(text: str, phrase: Phrase, lemmatiser: Lemmatiser) -> bool:
    """Returns whether the words in the spans, one after the other, are forms of the phrase's words."""
    forms = [form for start, end in phrase.spans for form in text[start:end].split()]
    words = [word for part in phrase.tuple for word in part.split()]
    return len(forms) == len(words) and all(
        is_said_by(word, form, lemmatiser) for word, form in zip(words, forms, strict=True)
    )


def is_said_by(word: str, form: str, lemmatiser: Lemmatiser) -> bool:
    """Returns whether `form` is one of the word's; a possessive says "have", "an" says "a"."""
    return word in lemmatiser.lemmas(form) or form.lower() in _SAID_BY.get(word, ())
