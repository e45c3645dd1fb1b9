from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mvptr_ds.data.collate import IGNORE
from mvptr_ds.data.masking import TextMasking, mask_text
from mvptr_ds.data.sequence_layout import layout_tags, layout_text
from mvptr_ds.data.wordpiece import WordPiece

CASES_PATH = Path(__file__).resolve().parents[3] / "shared" / "parity" / "inputs_layout.json"
CLS, SEP, MASK = 101, 102, 103


def _padded(ids: np.ndarray, length: int) -> list[int]:
    return ids.tolist() + [0] * (length - len(ids))


def _read_cases() -> list[dict[str, Any]]:
    if not CASES_PATH.exists():
        pytest.skip(f"{CASES_PATH} is not here")
    return json.loads(CASES_PATH.read_text())


def _tokens(case: dict[str, Any], words: WordPiece) -> list[int]:
    """The case's tokens, checked against our WordPiece.

    The cases were recorded with a vocabulary whose continuation pieces lie in other rows than bert-base-uncased's
    (its whole words agree), so a caption in which we split a word compares the layout only.
    """
    ids, _ = words.encode(case["caption"])
    if not any(words.tokens[i].startswith("##") for i in ids):
        assert ids == case["tokens_a_ids"]
    return case["tokens_a_ids"]


def _masked_by(phrase_map: dict[str, list[int]], num_phrases: int, num_slots: int, num_tokens: int) -> np.ndarray:
    words_of_PT = np.zeros((num_phrases, num_slots), dtype=bool)
    for token, phrases in phrase_map.items():
        for phrase in phrases:
            if phrase < num_phrases and int(token) < num_tokens:
                words_of_PT[phrase, 1 + int(token)] = True
    return words_of_PT


def test_all_reference_cases_without_masking() -> None:
    cases = [case for case in _read_cases() if case["nomask"]]
    assert len(cases) >= 10
    words = WordPiece()
    for case in cases:
        token_ids = _tokens(case, words)
        ids_T, phrase_mask_T = layout_text(token_ids, case["phrases"], CLS, SEP)
        assert _padded(ids_T, 40) == case["input_ids_a"]
        assert [1] * len(ids_T) + [0] * (40 - len(ids_T)) == case["input_mask_a"]
        assert set(case["segment_ids_a"]) == {0} and set(case["segment_ids_b"]) == {1}
        if phrase_mask_T.any():
            slots = np.flatnonzero(phrase_mask_T)
            assert [slots[0], slots[-1] + 1] == case["phrase_index"]
        tag_ids = [piece for tag in case["tags"] for piece in words.encode(tag)[0]]
        assert tag_ids == case["tokens_b_ids"]
        ids_G = layout_tags(tag_ids, CLS, SEP)
        assert _padded(ids_G, 20) == case["input_ids_b"]
        num_regions = min(case["n_regions"], 50)
        mask = [1] * len(ids_G) + [0] * (20 - len(ids_G)) + [1] * num_regions + [0] * (50 - num_regions)
        assert mask == case["input_mask_b"]
        assert case["image_index"] == [40, 40 + num_regions]


def test_reference_cases_with_masking_keep_the_invariants() -> None:
    """What the reference did to its words decides what becomes of its phrases; ours follow the same rule."""
    cases = [case for case in _read_cases() if not case["nomask"]]
    assert len(cases) >= 10
    words = WordPiece()
    for number, case in enumerate(cases):
        token_ids = _tokens(case, words)
        ids_T, phrase_mask_T = layout_text(token_ids, case["phrases"], CLS, SEP)
        num_tokens = len(ids_T) - 2 - int(phrase_mask_T.sum())
        reference = np.array(case["input_ids_a"])
        assert (reference != 0).sum() == len(ids_T)
        words_of_PT = _masked_by(case["phrase_mask_map"], int(phrase_mask_T.sum()), len(ids_T), num_tokens)
        leaks_P = (words_of_PT & (np.array(case["lm_label_ids_a"])[: len(ids_T)] != -1)).any(axis=1)
        assert (reference[: len(ids_T)][phrase_mask_T][leaks_P] == MASK).all()
        how = TextMasking(0.3, 0.15, MASK, words.ordinary_ids, np.arange(30_522, 40_000), predict_phrases=False)
        masked_T, labels_T, _ = mask_text(
            ids_T, phrase_mask_T, words_of_PT, np.arange(len(words_of_PT)), np.random.default_rng(number), how
        )
        leaks_P = (words_of_PT & (labels_T != IGNORE)).any(axis=1)
        assert (masked_T[phrase_mask_T][leaks_P] == MASK).all()


@pytest.mark.parametrize(
    ("tokens", "phrases", "ids", "phrase_slots"),
    [
        ([5076, 1997], [64_314, 66_569], [CLS, 5076, 1997, 64_314, 66_569, SEP], [3, 4]),
        ([7, 8, 9], [], [CLS, 7, 8, 9, SEP], []),
        (list(range(200, 240)), list(range(7)), [CLS, *range(200, 233), 0, 1, 2, 3, 4, SEP], list(range(34, 39))),
        ([200] * 10, list(range(50)), [CLS, *[200] * 10, *range(28), SEP], list(range(11, 39))),
    ],
)
def test_small_cases(tokens: list[int], phrases: list[int], ids: list[int], phrase_slots: list[int]) -> None:
    ids_T, phrase_mask_T = layout_text(tokens, phrases, CLS, SEP)
    assert ids_T.tolist() == ids
    assert np.flatnonzero(phrase_mask_T).tolist() == phrase_slots
    assert len(ids_T) <= 40 and ids_T.dtype == np.int64


def test_tags_are_cut_to_eighteen() -> None:
    assert layout_tags([5, 6], CLS, SEP).tolist() == [CLS, 5, 6, SEP]
    assert layout_tags([], CLS, SEP).tolist() == [CLS, SEP]
    assert layout_tags(list(range(200, 230)), CLS, SEP).tolist() == [CLS, *range(200, 218), SEP]
