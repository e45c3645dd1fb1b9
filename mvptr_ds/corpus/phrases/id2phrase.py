"""Reads and writes the published phrase list, the JSON `id2phrase`.

    {"30522": ["boat", "two"], ..., "2367": ["different"], ...}

An id is the phrase's row of the embedding table: that of its wordpiece, or one behind the words. The list has no
counts, and leaves some rows unused. Source: the published code, Inputs.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.data.phrases import KINDS, PhraseTuple, PhraseVocab, shared_row
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing


def read_id2phrase(path: str | Path, words: WordPiece) -> tuple[PhraseVocab, Summary]:
    """Returns the phrases of a published list: its ids are rows, counts are 0, a repeated phrase keeps its first id.

    Raises:
        DataError: unreadable, not of this layout, an id twice, or ids below the number of words that are no wordpiece
            of their phrase (the list was made for other words), or more ids are missing than there.
    """
    path = Path(path)
    try:
        pairs = json.loads(path.read_text(encoding="utf-8-sig"), object_pairs_hook=list)
    except (OSError, UnicodeDecodeError, ValueError, RecursionError) as error:
        raise DataError(f"cannot read the phrase list {path}: {error}") from error
    if not isinstance(pairs, list) or not all(isinstance(pair, tuple) for pair in pairs):
        raise DataError(f'{path} is not a phrase list, {{"30522": ["boat", "two"], ...}}')
    rows: dict[PhraseTuple, int] = {}
    seen: set[int] = set()
    summary = Summary()
    for text, content in pairs:
        row, phrase = _entry(path, text, content, words)
        if row in seen:
            raise DataError(f"{path} has the id {row} twice, the second time for {list(phrase)}; keep one of them")
        seen.add(row)
        if phrase in rows:
            summary.drop("phrases that the list has twice", f"{list(phrase)}: {rows[phrase]}, {row}")
            continue
        rows[phrase] = row
        summary.counts[f"kept {KINDS[len(phrase)]}"] += 1
    vocab = PhraseVocab(list(rows), list(rows.values()), [0] * len(rows), len(words), words.fingerprint)
    if 2 * vocab.num_unused_rows() > vocab.num_rows:
        raise DataError(f"{path} has ids up to {max(seen)} for {len(rows)} phrases; each id is a row of a table")
    return vocab, summary


def _entry(path: Path, text: str, content: Any, words: WordPiece) -> tuple[int, PhraseTuple]:
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise DataError(f"{path}: the id {text[:40]!r} is not a row number")
    if (
        not isinstance(content, list)
        or not 1 <= len(content) <= 3
        or not all(isinstance(w, str) and w for w in content)
    ):
        raise DataError(f"{path}: id {text} stands for {str(content)[:80]!r}, expected a list of one to three words")
    row, phrase = int(text), tuple(content)
    if row < len(words) and shared_row(phrase, words) != row and phrase != (words.tokens[row],):
        raise DataError(
            f"{path}: id {row} stands for {content}, but that row of {words.source} is {words.tokens[row]!r}; the list "
            "was made for another word vocabulary (--word-vocab)"
        )
    return row, phrase


def write_id2phrase(vocab: PhraseVocab, path: str | Path) -> None:
    """Writes the vocabulary in the published layout, in its own order; counts are not in it."""
    path = Path(path)
    entries: dict[str, Sequence[str]] = {
        str(row): phrase for row, phrase in zip(vocab.rows.tolist(), vocab.tuples, strict=True)
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(entries), encoding="utf-8")
