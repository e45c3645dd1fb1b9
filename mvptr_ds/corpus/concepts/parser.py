"""Captions -> phrases: the one entry to this package."""

from __future__ import annotations

from collections.abc import Sequence

from mvptr_ds.corpus.concepts.backends import BACKENDS, LEMMAS_NAME, MODELS, Annotation, Backend
from mvptr_ds.corpus.concepts.lemmas import Lemmatiser
from mvptr_ds.corpus.concepts.rules import find_tuples
from mvptr_ds.corpus.concepts.spans import are_said, to_phrase
from mvptr_ds.corpus.concepts.tokens import Span, token_spans
from mvptr_ds.corpus.concepts.tree import Token, Tree
from mvptr_ds.data.schema import DataError, Phrase

RULES_VERSION = 1  # goes up when the same tree gives other phrases


class PhraseParser:
    """Finds (noun), (noun, attribute) and (subject, relation, object) in captions, with the spans of their words.

    `version` changes with the models and the rules; `num_dropped` counts the tuples whose words were not found in the
    text.
    """

    def __init__(self, backend: str = "default") -> None:
        """Loads the models.

        Raises:
            DataError: there is no such backend, or it is not installed.
        """
        if backend not in BACKENDS:
            raise DataError(f"phrase parser is {backend!r}, choose one of {sorted(BACKENDS)}")
        self._backend: Backend = BACKENDS[backend]()
        self._lemmatiser = Lemmatiser.load(MODELS / LEMMAS_NAME)
        self.version = f"{self._backend.name}-{RULES_VERSION}-{self._backend.version}"
        self.num_dropped = 0

    def parse(self, texts: Sequence[str]) -> list[list[Phrase]]:
        """The phrases of each text, spans in characters of the text.

        A phrase has at least one span a word of its tuple, in the order of the tuple; a relation whose words stand
        apart ("ride down" in "rides a horse down the road") has one for each stretch.
        """
        spans = [token_spans(text) for text in texts]
        annotations = self._backend.annotate(texts, spans)
        return [self._phrases(*parts) for parts in zip(texts, spans, annotations, strict=True)]

    def _phrases(self, text: str, spans: list[Span], annotation: Annotation) -> list[Phrase]:
        lemma = self._lemmatiser.lemma
        tokens = [
            Token(text[start:end], start, end, tag, lemma(text[start:end], tag), head, label)
            for (start, end), tag, head, label in zip(spans, *annotation, strict=True)
        ]
        phrases = [to_phrase(found, spans) for found in find_tuples(Tree(tokens))]
        said = [phrase for phrase in phrases if are_said(text, phrase, self._lemmatiser)]
        self.num_dropped += len(phrases) - len(said)
        return said
