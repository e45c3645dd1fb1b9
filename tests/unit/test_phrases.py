from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import DataError
from mvptr_ds.data.wordpiece import WordPiece

WORDS = WordPiece()
COUNTS = {("dog",): 5, ("frisbees",): 5, ("dog", "brown"): 9, ("dog", "chase", "cat"): 2, ("rare",): 1}


def test_order_and_rows() -> None:
    vocab = PhraseVocab.build(COUNTS, WORDS, min_count=2)
    assert vocab.tuples == [("dog", "brown"), ("dog",), ("frisbees",), ("dog", "chase", "cat")]
    dog = WORDS.tokens.index("dog")
    assert vocab.rows.tolist() == [30_522, dog, 30_523, 30_524]  # "frisbees" is four pieces
    assert (vocab.num_rows, len(vocab)) == (30_525, 4)
    assert vocab.index_of(("dog",)) == 1
    assert vocab.index_of(("rare",)) is None
    assert [[WORDS.tokens[i] for i in p] for p in vocab.pieces(WORDS)[:2]] == [["dog", "brown"], ["dog"]]


def test_order_does_not_depend_on_the_mapping() -> None:
    backwards = dict(reversed(list(COUNTS.items())))
    first, second = (PhraseVocab.build(counts, WORDS, 1) for counts in (COUNTS, backwards))
    assert first.fingerprint == second.fingerprint


def test_two_phrases_never_share_a_row_and_unknown_words_own_one() -> None:
    vocab = PhraseVocab.build({("dog",): 2, ("Dog",): 1, ("\u2603\u2603x" * 60,): 1}, WORDS, 1)
    assert len(np.unique(vocab.rows)) == 3
    assert (vocab.rows >= len(WORDS)).sum() == 2


def test_save_and_load(tmp_path: Path) -> None:
    vocab = PhraseVocab.build(COUNTS, WORDS, 1)
    vocab.save(tmp_path / "phrases.json")
    loaded = PhraseVocab.load(tmp_path / "phrases.json", WORDS)
    assert loaded.fingerprint == vocab.fingerprint
    assert loaded.counts == vocab.counts
    assert loaded.index_of(("dog", "chase", "cat")) == vocab.index_of(("dog", "chase", "cat"))
    empty = PhraseVocab.empty(WORDS)
    assert (len(empty), empty.num_rows, empty.rows.dtype) == (0, len(WORDS), np.int64)


def test_load_refuses_another_word_vocabulary(tmp_path: Path) -> None:
    PhraseVocab.build(COUNTS, WORDS, 1).save(tmp_path / "phrases.json")
    (tmp_path / "vocab.txt").write_text("[PAD]\n[UNK]\n[CLS]\n[SEP]\n[MASK]\ndog\n")
    with pytest.raises(DataError, match=r"30522 rows.*has 6 rows"):
        PhraseVocab.load(tmp_path / "phrases.json", WordPiece(tmp_path / "vocab.txt"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(schema=2), "schema 2"),
        (lambda c: c.pop("phrases"), "not a phrase vocabulary"),
        (lambda c: c["phrases"][0].update(row=40_000), "without a gap"),
        (lambda c: c["phrases"][0].update(row=c["phrases"][1]["row"]), "twice"),
    ],
)
def test_load_refuses_broken_files(tmp_path: Path, change, message: str) -> None:  # type: ignore[no-untyped-def]
    path = tmp_path / "phrases.json"
    PhraseVocab.build(COUNTS, WORDS, 1).save(path)
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match=message):
        PhraseVocab.load(path, WORDS)
