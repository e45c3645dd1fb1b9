from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from mvptr_ds.corpus.phrases.id2phrase import read_id2phrase, write_id2phrase
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError

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


def test_byte_order_marks(tmp_path: Path) -> None:
    vocab = PhraseVocab.build(COUNTS, WORDS, min_count=1)
    vocab.save(tmp_path / "vocab.json")
    write_id2phrase(vocab, tmp_path / "list.json")
    for path in (tmp_path / "vocab.json", tmp_path / "list.json"):
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert PhraseVocab.load(tmp_path / "vocab.json", WORDS).fingerprint == vocab.fingerprint
    assert read_id2phrase(tmp_path / "list.json", WORDS)[0].tuples == vocab.tuples


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


# --- merging


OTHER = {("cat",): 4, ("dog", "brown"): 3, ("cat", "old"): 2, ("frisbees",): 1, ("Dog",): 1}


def test_merging_keeps_rows_and_labels_of_the_first_and_appends_the_others() -> None:
    first, second = PhraseVocab.build(COUNTS, WORDS, 2), PhraseVocab.build(OTHER, WORDS, 1)
    merged = PhraseVocab.merge([first, second], WORDS)
    assert merged.tuples == [*first.tuples, ("cat",), ("cat", "old"), ("Dog",)]
    assert merged.rows.tolist() == [*first.rows.tolist(), WORDS.tokens.index("cat"), 30_525, 30_526]
    assert merged.counts == [12, 5, 6, 2, 4, 2, 1]
    assert merged.num_rows == 30_527
    assert PhraseVocab.merge([first], WORDS).fingerprint == first.fingerprint
    assert PhraseVocab.merge([merged, first, second], WORDS).fingerprint == merged.fingerprint
    assert first.counts == [9, 5, 5, 2]  # unchanged


def test_merging_in_steps_is_merging_at_once(tmp_path: Path) -> None:
    vocabs = [PhraseVocab.build(counts, WORDS, 1) for counts in (COUNTS, OTHER, {("bird",): 7, ("dog", "wet"): 1})]
    at_once = PhraseVocab.merge(vocabs, WORDS)
    PhraseVocab.merge(vocabs[:2], WORDS).save(tmp_path / "two.json")
    in_steps = PhraseVocab.merge([PhraseVocab.load(tmp_path / "two.json", WORDS), vocabs[2]], WORDS)
    assert (in_steps.fingerprint, in_steps.counts) == (at_once.fingerprint, at_once.counts)


# --- the published list


def published(path: Path) -> Path:
    """As the published file is: ids as strings in no order, lists of words, no counts, rows that nobody has."""
    dog = WORDS.tokens.index("dog")
    entries = {"30522": ["boat", "two"], "30524": ["man", "ride on top of", "surfboard"], str(dog): ["dog"]}
    path.write_text(json.dumps({**entries, "30527": ["corn/maize"], "1094": ["\u00bf"], "30526": ["olé"]}))
    return path


def test_the_published_layout_is_read_with_its_rows_and_their_gaps(tmp_path: Path) -> None:
    vocab, summary = read_id2phrase(published(tmp_path / "id2phrase.json"), WORDS)
    assert dict(zip(vocab.tuples, vocab.rows.tolist(), strict=True)) == {
        ("boat", "two"): 30_522,
        ("man", "ride on top of", "surfboard"): 30_524,
        ("dog",): WORDS.tokens.index("dog"),
        ("corn/maize",): 30_527,
        ("\u00bf",): 1094,
        ("olé",): 30_526,
    }
    assert vocab.num_rows == 30_528 and vocab.counts == [0] * 6
    assert summary.counts == {"kept objects": 4, "kept attributes": 1, "kept relations": 1} and not summary.dropped
    vocab.save(tmp_path / "vocab.json")
    loaded = PhraseVocab.load(tmp_path / "vocab.json", WORDS)
    assert (loaded.fingerprint, loaded.num_rows) == (vocab.fingerprint, 30_528)
    merged = PhraseVocab.merge([loaded, PhraseVocab.build({("boat", "red"): 1}, WORDS, 1)], WORDS)
    assert merged.rows.tolist()[-1] == 30_528  # behind the last, in no gap: a later list may use those
    write_id2phrase(loaded, tmp_path / "again.json")
    assert json.loads((tmp_path / "again.json").read_text()) == json.loads((tmp_path / "id2phrase.json").read_text())


def test_our_vocabulary_goes_out_and_comes_back(tmp_path: Path) -> None:
    vocab = PhraseVocab.build(COUNTS, WORDS, 1)
    write_id2phrase(vocab, tmp_path / "id2phrase.json")
    content = json.loads((tmp_path / "id2phrase.json").read_text())
    assert content["30522"] == ["dog", "brown"] and content[str(WORDS.tokens.index("dog"))] == ["dog"]
    again, _ = read_id2phrase(tmp_path / "id2phrase.json", WORDS)
    assert again.fingerprint == vocab.fingerprint


def test_a_phrase_that_the_list_has_twice_keeps_its_first_id(tmp_path: Path) -> None:
    (tmp_path / "list.json").write_text('{"30523": ["boat", "two"], "30522": ["boat", "two"], "30524": ["dog", "old"]}')
    vocab, summary = read_id2phrase(tmp_path / "list.json", WORDS)
    assert vocab.index_of(("boat", "two")) == 0 and vocab.rows.tolist() == [30_523, 30_524]
    assert summary.dropped == {"phrases that the list has twice": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('["dog"]', "not a phrase list"),
        ('{"30522": ["dog"]', "cannot read"),
        ('{"x1": ["dog"]}', "'x1' is not a row number"),
        ('{"-1": ["dog"]}', "'-1' is not a row number"),
        ('{"30522": "dog"}', r"30522 stands for 'dog', expected a list"),
        ('{"30522": ["a", "b", "c", "d"]}', "expected a list of one to three words"),
        ('{"30522": ["a"], "30522": ["b"]}', "has the id 30522 twice"),
        ('{"2003": ["dog"]}', r"row of .* is 'is'; the list was made for another word vocabulary"),
        ('{"2003": ["is", "dog"]}', "another word vocabulary"),
        ('{"30522": ["dog"], "999999999": ["cat"]}', "ids up to 999999999 for 2 phrases"),
    ],
)
def test_lists_that_are_none(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(DataError, match=message):
        read_id2phrase(tmp_path / "list.json", WORDS)


@pytest.mark.parametrize("num_rows", [30_530, 10**9, None])
def test_a_gap_must_be_meant(tmp_path: Path, num_rows: int | None) -> None:
    path = tmp_path / "vocab.json"
    read_id2phrase(published(tmp_path / "list.json"), WORDS)[0].save(path)
    content = json.loads(path.read_text())
    assert content["num_rows"] == 30_528
    content["num_rows"] = num_rows
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="without a gap"):
        PhraseVocab.load(path, WORDS)
    content["num_rows"] = content["phrases"][0]["row"] = 10**9
    content["num_rows"] += 1
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="without a gap"):
        PhraseVocab.load(path, WORDS)
