from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from mvptr_ds.data import wordpiece
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError


def test_packaged_vocabulary_is_berts() -> None:
    words = WordPiece()
    assert len(words) == 30_522
    assert (words.pad_id, words.unk_id, words.cls_id, words.sep_id, words.mask_id) == (0, 100, 101, 102, 103)
    assert len(words.ordinary_ids) == 30_522 - 5 - 994  # specials, [unused0..993]


def test_encode_lowers_splits_and_keeps_character_spans() -> None:
    words = WordPiece()
    text = "Two CAFÉ frisbees."
    ids, spans = words.encode(text)
    assert [words.tokens[i] for i in ids] == ["two", "cafe", "fr", "##is", "##bee", "##s", "."]
    assert [text[a:b] for a, b in spans] == ["Two", "CAFÉ", "fr", "is", "bee", "s", "."]
    assert words.encode_words(["two", "frisbees"]) == [ids[:1], ids[2:6]]
    assert words.decode(ids) == "two cafe frisbees."


def test_text_never_becomes_a_special_token() -> None:
    words = WordPiece()
    ids, _ = words.encode("a [MASK] [SEP] [CLS] [PAD] b")
    assert not {words.mask_id, words.sep_id, words.cls_id, words.pad_id} & set(ids)


def test_known_words_give_what_the_tokenizer_gives() -> None:
    """Every pair of printable ASCII characters between two words, and words of any length; each text twice."""
    words, printable = WordPiece(), [chr(code) for code in range(32, 127)]
    texts = [f"A dog{first}{second}Frisbees" for first in printable for second in printable]
    texts += ["", " ", "a" * 33, "no " + "x" * 101 + "-y", "[MASK] ##s 3,000", "caf\u00e9 1", "a\tb\x00c", "x\x7fy"]
    for text in texts:
        assert words.encode(text) == words.encode(text) == words._encode(text), text
    assert max(map(len, words._known)) <= 32


def test_known_words_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wordpiece, "_MAX_KNOWN_WORDS", 3)
    words = WordPiece()
    for text in ("a dog on a red surfboard", "a red dog"):
        assert words.encode(text) == words._encode(text)
        assert len(words._known) <= 3


def test_pickles_with_the_same_results() -> None:
    words = WordPiece()
    copy = pickle.loads(pickle.dumps(words))
    assert copy.fingerprint == words.fingerprint
    assert copy.encode("a brown dog") == words.encode("a brown dog")


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a"], r"lacks \[MASK\]"),
        (["a", "[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"], "must be the first"),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "a"], "'a' twice"),
        (["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[unused0]"], "no ordinary piece"),
    ],
)
def test_refuses_a_broken_vocabulary(tmp_path: Path, lines: list[str], message: str) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DataError, match=message):
        WordPiece(path)


def test_a_byte_order_mark_is_no_part_of_the_first_piece(tmp_path: Path) -> None:
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
    (tmp_path / "vocab.txt").write_text("\ufeff" + "\r\n".join(tokens) + "\r\n", encoding="utf-8")
    assert WordPiece(tmp_path / "vocab.txt").tokens == tokens


def test_missing_vocabulary_says_what_to_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.txt: .*; name a file of one wordpiece a line"):
        WordPiece(tmp_path / "none.txt")
