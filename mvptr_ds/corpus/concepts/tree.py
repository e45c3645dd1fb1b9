"""Holds what the rules read: the words of one text with tags, lemmas and a dependency tree."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


def word_set(words: str) -> frozenset[str]:
    """Returns the words of a list that is written as one string."""
    return frozenset(words.split())


@dataclass(frozen=True, slots=True)
class Token:
    text: str  # as it stands in the text
    start: int  # characters of the text, half open
    end: int
    tag: str  # Penn Treebank
    lemma: str  # lower-case
    head: int  # index of the head in the tree; its own for a root
    label: str  # ClearNLP dependency labels, as spaCy's English models give them


class Tree:
    """Tokens of one text; `children[i]` are the dependents of token i from left to right."""

    def __init__(self, tokens: Sequence[Token]) -> None:
        self.tokens = tokens
        self.children: list[list[int]] = [[] for _ in tokens]
        for index, token in enumerate(tokens):
            if token.head != index:
                self.children[token.head].append(index)

    def labelled(self, head: int, *labels: str) -> list[int]:
        """Returns the dependents of `head` with one of the labels."""
        tokens = self.tokens
        return [child for child in self.children[head] if tokens[child].label in labels]
