"""WordPiece: text -> rows of the word table, with the characters that each piece came from.

A thin layer over the `tokenizers` library adds what training needs: output without special tokens, character spans, a
fingerprint for compatibility checks, and the pieces that a random replacement may draw.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece as WordPieceModel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

from mvptr_ds.data.pickling import PicklesWithoutCaches
from mvptr_ds.errors import DataError

BERT_VOCAB = Path(__file__).resolve().parent / "bert-base-uncased-vocab.txt"
SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_UNUSED = re.compile(r"\[unused\d+\]")
_ASCII_WORDS = re.compile(r"[0-9A-Za-z]+|[^0-9A-Za-z ]")  # as BERT splits printable ASCII: runs, and the rest alone
_MAX_KNOWN_WORDS, _MAX_KNOWN_CHARS = 50_000, 32
Spans = list[tuple[int, int]]


class WordPiece(PicklesWithoutCaches):
    """Tokenises as lower-casing BERT WordPiece; row number = line number of the vocabulary file.

    A caption that spells `[MASK]` gets the pieces `[ mask ]`: text of a caption never becomes a special token.

    Source: the published code, Inputs ("WordPiece of bert-base-uncased, 30,522 rows, lower-cased").

    Raises:
        DataError: the file is missing, is not UTF-8, repeats a piece, lacks a special or does not begin with [PAD].
    """

    _CACHES = ("_tokenizer", "_known")

    def __init__(self, vocab_path: str | Path | None = None) -> None:
        path = Path(vocab_path) if vocab_path is not None else BERT_VOCAB
        try:
            # not splitlines(): it also cuts at characters that are pieces of other vocabularies (U+0085, U+2028)
            tokens = path.read_text(encoding="utf-8-sig").removesuffix("\n").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"cannot read the word vocabulary {path}: {error}; name a file of one wordpiece a line"
            ) from error
        source = str(path)
        rows = {token: row for row, token in enumerate(tokens)}
        if len(rows) != len(tokens):
            repeated = next(token for row, token in enumerate(tokens) if rows[token] != row)
            raise DataError(f"the word vocabulary {source} holds {repeated!r} twice; keep one line a piece")
        missing = [special for special in SPECIALS if special not in rows]
        if missing:
            raise DataError(f"the word vocabulary {source} lacks {', '.join(missing)}; add them, [PAD] first")
        if rows["[PAD]"] != 0:
            raise DataError(f"[PAD] is line {rows['[PAD]'] + 1} of {source}; it must be the first (padding is row 0)")
        self.tokens: list[str] = tokens
        self.source = source
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = (rows[special] for special in SPECIALS)
        self.fingerprint = hashlib.sha256("\n".join(tokens).encode()).hexdigest()
        self.ordinary_ids = np.array(
            [row for row, token in enumerate(tokens) if token not in SPECIALS and not _UNUSED.fullmatch(token)],
            dtype=np.int64,
        )  # what a random replacement may draw
        if len(self.ordinary_ids) == 0:
            raise DataError(f"the word vocabulary {source} holds no ordinary piece, only special and unused ones")
        self._init_caches()

    def tokenizer(self) -> Tokenizer:
        """Returns a tokenizer of these pieces, without special tokens around a text."""
        rows = {token: row for row, token in enumerate(self.tokens)}
        tokenizer = Tokenizer(WordPieceModel(rows, unk_token="[UNK]", max_input_chars_per_word=100))
        tokenizer.normalizer = BertNormalizer(lowercase=True)
        tokenizer.pre_tokenizer = BertPreTokenizer()
        tokenizer.decoder = WordPieceDecoder(prefix="##")
        return tokenizer

    def _init_caches(self) -> None:
        self._tokenizer = self.tokenizer()
        self._known: dict[str, tuple[list[int], Spans]] = {}  # words already seen -> their rows and spans

    def __len__(self) -> int:
        return len(self.tokens)

    def encode(self, text: str) -> tuple[list[int], Spans]:
        """Returns rows of the text's pieces, no specials, and for each the half-open character range it came from."""
        if not (text.isascii() and text.isprintable()):
            return self._encode(text)
        # fast path of `_encode`, which is the specification, for printable ASCII: words are looked up one by one
        ids: list[int] = []
        spans: Spans = []
        for match in _ASCII_WORDS.finditer(text):  # most words were seen before: 2/5 of the tokenizer's time
            start = match.start()
            word_ids, word_spans = self._known.get(match[0]) or self._learn(match[0])
            ids += word_ids
            spans += [(start + first, start + end) for first, end in word_spans]
        return ids, spans

    def _encode(self, text: str) -> tuple[list[int], Spans]:
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets

    def _learn(self, word: str) -> tuple[list[int], Spans]:
        encoded = self._encode(word)
        if len(word) <= _MAX_KNOWN_CHARS:
            if len(self._known) >= _MAX_KNOWN_WORDS:
                self._known.clear()
            self._known[word] = encoded
        return encoded

    def encode_words(self, words: Sequence[str]) -> list[list[int]]:
        """Returns the rows of each string's pieces, string by string."""
        return [self._tokenizer.encode(word, add_special_tokens=False).ids for word in words]

    def decode(self, ids: Sequence[int]) -> str:
        """Returns readable text of word rows, for logs and pictures."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)
