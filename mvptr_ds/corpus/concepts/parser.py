"""Finds the phrases of captions: the one entry to the modules of this folder."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mvptr_ds.corpus.concepts.backends import BACKENDS, LEMMAS_NAME, MODELS, Annotation, Backend
from mvptr_ds.corpus.concepts.lemmas import Lemmatiser
from mvptr_ds.corpus.concepts.rules import find_tuples
from mvptr_ds.corpus.concepts.spans import are_said, to_phrase
from mvptr_ds.corpus.concepts.tokens import Span, token_spans
from mvptr_ds.corpus.concepts.tree import Token, Tree
from mvptr_ds.corpus.concepts.web import Readable, are_words, readable
from mvptr_ds.data.phrase_words import wrong_spans
from mvptr_ds.data.schema import Phrase
from mvptr_ds.errors import DataError

RULES_VERSION = 2  # goes up when the same tree gives other phrases


class PhraseParser:
    """Finds (noun), (noun, attribute) and (subject, relation, object) in captions, with the spans of their words.

    `version` changes with the models and the rules. `left_out` counts by reason, until it is cleared: tuples whose
    words were not found in the text or are no words, and what captions hold besides their language.
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
        self.left_out: Counter[str] = Counter()

    def parse(self, texts: Sequence[str]) -> list[list[Phrase]]:
        """Returns the phrases of each text, spans in characters of the text.

        A phrase has at least one span a word of its tuple, in the order of the tuple; a relation whose words stand
        apart ("ride down" in "rides a horse down the road") has one for each stretch.
        """
        seen = [readable(text) for text in texts]
        spans = [token_spans(one.text) for one in seen]
        annotations = self._backend.annotate([one.text for one in seen], spans)
        return [self._phrases(*parts) for parts in zip(texts, seen, spans, annotations, strict=True)]

    def _phrases(self, text: str, seen: Readable, spans: list[Span], annotation: Annotation) -> list[Phrase]:
        lemma = self._lemmatiser.lemma
        tokens = [
            Token(seen.text[start:end], start, end, tag, lemma(seen.text[start:end], tag), head, label)
            for (start, end), tag, head, label in zip(spans, *annotation, strict=True)
        ]
        self.left_out.update({f"{kind} in captions": number for kind, number in seen.left_out.items()})
        out = []
        for phrase in [to_phrase(found, spans) for found in find_tuples(Tree(tokens))]:
            if not are_words(phrase.tuple):
                self.left_out["phrases with a word that is none"] += 1
            elif not are_said(seen.text, phrase, self._lemmatiser):
                self.left_out["phrases whose words the caption does not say"] += 1
            elif seen.starts is None:
                out.append(phrase)
            else:
                placed = Phrase(phrase.tuple, seen.original(phrase.spans))
                if placed.spans == phrase.spans or wrong_spans(text, placed) is None:
                    out.append(placed)
                else:
                    self.left_out["phrases whose words hold an entity of HTML"] += 1
        return out
