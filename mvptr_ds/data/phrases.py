"""The phrase vocabulary: phrase tuples <-> label index (0..P-1) <-> row of the embedding table.

Shards hold phrases as strings, which become ids only here. So a shard outlives a vocabulary.

Legend: P phrases of the vocabulary.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing
from mvptr_ds.user_io.tool_names import tool

_SCHEMA = 1
PhraseTuple = tuple[str, ...]
KINDS = {1: "objects", 2: "attributes", 3: "relations"}  # by the number of words of the tuple


class PhraseVocab:
    """Holds phrases in a fixed order; `rows[i]` is the embedding row of phrase i (int64 [P]).

    A one-word phrase whose word is a single wordpiece shares that wordpiece's row. Every other phrase owns a row, from
    `len(words)` on. A published list may leave some of these rows unused.

    Source: the published code, Inputs.
    """

    def __init__(
        self,
        tuples: Sequence[PhraseTuple],
        rows: Sequence[int] | np.ndarray,
        counts: Sequence[int],
        num_words: int,
        word_fingerprint: str,
    ) -> None:
        self.tuples = list(tuples)
        self.rows = np.asarray(rows, dtype=np.int64).reshape(-1)
        self.counts = list(counts)
        self.num_words = num_words
        self.word_fingerprint = word_fingerprint
        self.num_rows = max(num_words, int(self.rows.max(initial=-1)) + 1)  # V: size of the embedding table
        self._index = {phrase: index for index, phrase in enumerate(self.tuples)}
        listing = json.dumps([num_words, word_fingerprint, self.tuples, self.rows.tolist()], ensure_ascii=False)
        self.fingerprint = hashlib.sha256(listing.encode()).hexdigest()

    @classmethod
    def build(cls, counts: Mapping[PhraseTuple, int], words: WordPiece, min_count: int) -> PhraseVocab:
        """Builds a vocabulary of the phrases seen at least `min_count` times, most frequent first, then by tuple."""
        kept = sorted((p for p, count in counts.items() if count >= min_count), key=lambda p: (-counts[p], p))
        return cls.empty(words).extended({phrase: counts[phrase] for phrase in kept}, words)

    def extended(self, counts: Mapping[PhraseTuple, int], words: WordPiece) -> PhraseVocab:
        """Returns this vocabulary with more phrases behind its own, which keep label index and row.

        New phrases stand in their order. Counts of a phrase that is there already are added.
        """
        tuples, rows = list(self.tuples), self.rows.tolist()
        total = dict(zip(self.tuples, self.counts, strict=True))
        taken = set(rows)
        next_row = self.num_rows
        for phrase, count in counts.items():
            if phrase in total:
                total[phrase] += count
                continue
            total[phrase] = count
            row = shared_row(phrase, words)
            # "Dog" and "dog" are one wordpiece: the second one owns a row, or two labels would share one decoder row
            if row is None or row in taken:
                row, next_row = next_row, next_row + 1
            taken.add(row)
            tuples.append(phrase)
            rows.append(row)
        return PhraseVocab(tuples, rows, [total[phrase] for phrase in tuples], self.num_words, self.word_fingerprint)

    @classmethod
    def merge(cls, vocabs: Sequence[PhraseVocab], words: WordPiece) -> PhraseVocab:
        """Merges several vocabularies of the same words; phrases of the first keep label index and row."""
        merged = vocabs[0]
        for other in vocabs[1:]:
            merged = merged.extended(dict(zip(other.tuples, other.counts, strict=True)), words)
        return merged

    @classmethod
    def empty(cls, words: WordPiece) -> PhraseVocab:
        """Returns a vocabulary without phrases: every phrase of a shard is dropped and counted."""
        return cls([], [], [], len(words), words.fingerprint)

    def __len__(self) -> int:
        return len(self.tuples)

    def index_of(self, phrase: PhraseTuple) -> int | None:
        """Returns the label index of a phrase, None when the vocabulary lacks it."""
        return self._index.get(phrase)

    def pieces(self, words: WordPiece) -> list[list[int]]:
        """Returns the wordpiece rows of each phrase's words, aligned with `rows`; a new row starts as their mean."""
        known: dict[str, list[int]] = {}
        out = []
        for phrase in self.tuples:
            for word in phrase:
                if word not in known:
                    known[word] = words.encode_words([word])[0]
            out.append([piece for word in phrase for piece in known[word]])
        return out

    def save(self, path: str | Path) -> None:
        """Writes the JSON file, whole or not at all."""
        content: dict[str, Any] = {
            "schema": _SCHEMA,
            "num_words": self.num_words,
            "word_fingerprint": self.word_fingerprint,
        }
        if self.num_unused_rows():
            content["num_rows"] = self.num_rows
        content["phrases"] = [
            {"tuple": list(phrase), "row": int(row), "count": int(count)}
            for phrase, row, count in zip(self.tuples, self.rows, self.counts, strict=True)
        ]
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as partial:
            partial.write_text(json.dumps(content, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path, words: WordPiece) -> PhraseVocab:
        """Reads the JSON file and checks it against the word vocabulary.

        Raises:
            DataError: the file is unreadable, of another schema, inconsistent, or made for another word vocabulary.
        """
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
            if content["schema"] != _SCHEMA:
                raise DataError(f"{path} has schema {content['schema']!r}, expected {_SCHEMA}; build it again")
            phrases = content["phrases"]
            vocab = cls(
                [tuple(str(word) for word in phrase["tuple"]) for phrase in phrases],
                [int(phrase["row"]) for phrase in phrases],
                [int(phrase["count"]) for phrase in phrases],
                int(content["num_words"]),
                str(content["word_fingerprint"]),
            )
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise DataError(
                f"cannot read the phrase vocabulary {path}: {error}; name one that {tool('vocab')} has written"
            ) from error
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{path} is not a phrase vocabulary: {error!r}; build it again") from error
        vocab._check(path, words, content.get("num_rows"))
        return vocab

    def num_unused_rows(self) -> int:
        """Counts the rows behind the words that no phrase owns."""
        return self.num_rows - self.num_words - int((self.rows >= self.num_words).sum())

    def _check(self, path: str | Path, words: WordPiece, num_rows: Any) -> None:
        if (self.num_words, self.word_fingerprint) != (len(words), words.fingerprint):
            raise DataError(
                f"{path} was built for a word vocabulary of {self.num_words} rows (sha256 "
                f"{self.word_fingerprint[:12]}), but {words.source} has {len(words)} rows (sha256 "
                f"{words.fingerprint[:12]}); take the one it was built for, or build it again"
            )
        if len(self._index) != len(self.tuples) or len(np.unique(self.rows)) != len(self.rows):
            raise DataError(f"{path} holds a phrase or a row twice; build it again")
        num_unused = self.num_unused_rows()
        # a list with unused rows says so itself; as many as the used ones are a mistake that would cost memory
        if (self.rows < 0).any() or (num_unused and (num_rows != self.num_rows or 2 * num_unused > self.num_rows)):
            raise DataError(f"{path}: own rows must run from {self.num_words} without a gap; build it again")


def shared_row(phrase: PhraseTuple, words: WordPiece) -> int | None:
    """Returns the wordpiece row that a phrase of one word shares, None where the word is no single wordpiece."""
    pieces = words.encode_words(phrase)[0] if len(phrase) == 1 else []
    return pieces[0] if len(pieces) == 1 and pieces[0] != words.unk_id else None


@dataclass
class Vocabs:
    """The two vocabularies of a model: rows of its word table, and phrases over the same words."""

    words: WordPiece
    phrases: PhraseVocab
