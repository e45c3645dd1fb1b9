from __future__ import annotations

import numpy as np
import pytest

from mvptr_ds.data.collate import IGNORE
from mvptr_ds.data.masking import TextMasking, mask_text, mask_words

MASK = 103
WORD_IDS = np.arange(1000, 2000)
PHRASE_ROWS = np.arange(5000, 6000)


def test_words_are_masked_80_10_10() -> None:
    n = 200_000
    ids = np.full(n, 500)
    candidates = np.arange(n) % 2 == 0
    masked, labels = mask_words(ids, candidates, np.random.default_rng(0), 0.15, MASK, WORD_IDS)
    picked = labels != IGNORE
    assert not picked[~candidates].any() and (masked[~picked] == 500).all() and (labels[picked] == 500).all()
    # 15,000 picked: the standard errors are 0.0011 and, of the shares, 0.0033 and 0.0024; 4 of them are allowed
    assert picked[candidates].mean() == pytest.approx(0.15, abs=0.0045)
    assert (masked[picked] == MASK).mean() == pytest.approx(0.8, abs=0.013)
    assert (masked[picked] == 500).mean() == pytest.approx(0.1, abs=0.01)
    assert np.isin(masked[picked], WORD_IDS).mean() == pytest.approx(0.1, abs=0.01)


def _caption(num_words: int, owners: list[list[int]]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """A caption of words 200.., phrases 5000.. with the given words, as (ids, phrase mask, words of phrases, index)."""
    ids_T = np.array([101, *range(200, 200 + num_words), *range(5000, 5000 + len(owners)), 102])
    phrase_mask_T = (ids_T >= 5000) & (ids_T < 6000)
    words_of_PT = np.zeros((len(owners), len(ids_T)), dtype=bool)
    for row, words in zip(words_of_PT, owners, strict=True):
        row[[1 + word for word in words]] = True
    return ids_T, phrase_mask_T, words_of_PT, np.arange(len(owners)) + 40


def _how(word_prob: float, phrase_prob: float, predict: bool) -> TextMasking:
    return TextMasking(word_prob, phrase_prob, MASK, WORD_IDS, PHRASE_ROWS, predict)


OWNERS = [[0], [0, 1], [2, 3, 4], [6], [4, 6]]


@pytest.mark.parametrize("predict", [False, True])
def test_probability_zero_leaves_the_input_alone(predict: bool) -> None:
    caption = _caption(8, OWNERS)
    ids, words, phrases = mask_text(*caption, np.random.default_rng(0), _how(0.0, 0.0, predict))
    assert np.array_equal(ids, caption[0])
    assert (words == IGNORE).all() and (phrases == IGNORE).all()


def test_leak_rule_and_the_other_phrases_without_labels() -> None:
    caption = _caption(8, OWNERS)
    ids_T, phrase_mask_T, words_of_PT, _ = caption
    masked = kept = replaced = 0
    for seed in range(4000):
        out_T, words_T, phrases_T = mask_text(*caption, np.random.default_rng(seed), _how(0.15, 0.15, False))
        leak_P = (words_of_PT & (words_T != IGNORE)).any(axis=1)
        assert (out_T[phrase_mask_T][leak_P] == MASK).all()
        assert (phrases_T == IGNORE).all() and (words_T[phrase_mask_T] == IGNORE).all()
        assert out_T[0] == 101 and out_T[-1] == 102
        free_P = out_T[phrase_mask_T][~leak_P]
        original_P = ids_T[phrase_mask_T][~leak_P]
        masked += (free_P == MASK).sum()
        replaced += ((free_P != MASK) & (free_P != original_P)).sum()
        kept += len(free_P)
    # 15 % x 80 % and 15 % x 10 % of about 14,000; 4 standard errors
    assert masked / kept == pytest.approx(0.12, abs=0.011)
    assert replaced / kept == pytest.approx(0.015, abs=0.0045)


def test_phrase_mcr_hides_or_shows_all_words_of_a_picked_phrase() -> None:
    caption = _caption(8, OWNERS)
    ids_T, phrase_mask_T, words_of_PT, indices_P = caption
    picks = hidden = masks = 0
    runs = 6000
    for seed in range(runs):
        out_T, words_T, phrases_T = mask_text(*caption, np.random.default_rng(seed), _how(0.15, 0.3, True))
        labels_P = phrases_T[phrase_mask_T]
        picked_P = labels_P != IGNORE
        assert np.array_equal(labels_P[picked_P], indices_P[picked_P])
        for words_of_T, picked, id_ in zip(words_of_PT, picked_P, out_T[phrase_mask_T], strict=True):
            if picked:
                is_hidden = (words_T[words_of_T] != IGNORE).all()
                if is_hidden:
                    assert (out_T[words_of_T] == MASK).all()
                    assert np.array_equal(words_T[words_of_T], ids_T[words_of_T])
                else:
                    assert (words_T[words_of_T] == IGNORE).all()
                    assert np.array_equal(out_T[words_of_T], ids_T[words_of_T])
                picks, hidden, masks = picks + 1, hidden + is_hidden, masks + (id_ == MASK)
            elif (words_T[words_of_T] != IGNORE).any():
                assert id_ == MASK
    # 30,000 draws; those of one caption are correlated (shared coin), so 6 standard errors of independent ones
    assert picks / (runs * len(OWNERS)) == pytest.approx(0.3, abs=0.016)
    assert hidden / picks == pytest.approx(0.5, abs=0.03)
    assert masks / picks == pytest.approx(0.8, abs=0.025)


def test_same_generator_same_masking_and_no_phrases_is_fine() -> None:
    caption = _caption(8, [])
    first = mask_text(*caption, np.random.default_rng(4), TextMasking(0.5, 0.5, MASK, WORD_IDS, PHRASE_ROWS[:0], True))
    again = mask_text(*caption, np.random.default_rng(4), TextMasking(0.5, 0.5, MASK, WORD_IDS, PHRASE_ROWS[:0], True))
    assert all(np.array_equal(a, b) for a, b in zip(first, again, strict=True))
    assert (first[1] != IGNORE).any()
