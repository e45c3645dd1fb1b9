"""Masks words, tags and phrases: pure functions in numpy, which draw from the generator that they are given.

Probabilities of 0 leave the input as it is (evaluation).

Legend: N slots of any sequence, T text slots, P phrases of the caption.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mvptr_ds.data.collate import IGNORE

MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of the picked slots; the rest stays as it is. Source: BERT, section 3.1
VISIBLE_SHARE = 0.5  # of stage 1's picked phrases: the words stay visible


def mask_words(
    ids_N: np.ndarray,
    candidates_N: np.ndarray,
    rng: np.random.Generator,
    prob: float,
    mask_id: int,
    random_ids: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Masks as BERT does: returns masked ids int64 [N] and labels int64 [N] (IGNORE where nothing was picked).

    Each candidate (bool [N]) is picked with `prob`; 80 % of the picked become `mask_id`, 10 % one of `random_ids`.
    """
    slots = (candidates_N & (rng.random(len(ids_N)) < prob)).nonzero()[0]
    labels_N = _no_labels(len(ids_N))
    labels_N[slots] = ids_N[slots]
    return _replace(ids_N, slots, rng, mask_id, random_ids), labels_N


def _replace(
    ids_N: np.ndarray, slots: np.ndarray, rng: np.random.Generator, mask_id: int, random_ids: np.ndarray
) -> np.ndarray:
    """Replaces the picked slots. They are few, so a loop is faster than calls of numpy."""
    out_N = ids_N.copy()
    if not len(slots):
        return out_N
    random_slots = []
    for slot, chance in zip(slots.tolist(), rng.random(len(slots)).tolist(), strict=True):
        if chance < MASK_SHARE:
            out_N[slot] = mask_id
        elif chance < MASK_SHARE + RANDOM_SHARE:
            random_slots.append(slot)
    if random_slots:
        out_N[random_slots] = random_ids[rng.integers(len(random_ids), size=len(random_slots))]
    return out_N


def _no_labels(num_slots: int) -> np.ndarray:
    labels_N = np.empty(num_slots, dtype=np.int64)
    labels_N.fill(IGNORE)  # fast path of np.full: a third of its time
    return labels_N


@dataclass(frozen=True)
class TextMasking:
    """Settings of the masking of captions."""

    word_prob: float
    phrase_prob: float
    mask_id: int
    random_word_ids: np.ndarray  # int64, ordinary wordpieces
    random_phrase_rows: np.ndarray  # int64, rows of the phrase vocabulary
    predict_phrases: bool  # stage 1: phrases carry labels


def mask_text(
    ids_T: np.ndarray,
    phrase_mask_T: np.ndarray,
    words_of_PT: np.ndarray,
    phrase_indices_P: np.ndarray,
    rng: np.random.Generator,
    how: TextMasking,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Masks a laid-out caption: returns ids, word labels and phrase labels, int64 [T] each.

    Leak rule: a phrase any of whose tokens was picked becomes [MASK], or it would give the answer away. The other
    phrases are picked with `phrase_prob`, 80/10/10, without labels.

    With `predict_phrases` the picked phrases are drawn first and carry labels. For half of them the words stay visible.
    For the other half all words are [MASK] and predicted, too. Phrases that share words share that choice, or the rule
    of one would break that of the other.

    Args:
        ids_T: int64, from `layout_text`.
        phrase_mask_T: bool, from `layout_text`.
        words_of_PT: bool, the slots of the tokens of each phrase; phrases stand in the order of their slots.
        phrase_indices_P: int64, index of each phrase in the vocabulary.

    Source: the published code, Losses (masking of phrases) and ours (phrase MCR).
    """
    words_T = ~phrase_mask_T
    words_T[0] = words_T[-1] = False
    slots_P = phrase_mask_T.nonzero()[0]
    picked_P = rng.random(len(slots_P)) < how.phrase_prob
    labelled = how.predict_phrases and np.count_nonzero(picked_P) > 0
    hidden_T = None
    if labelled:
        hidden_P = picked_P & _shared_coin(words_of_PT, picked_P, rng)
        hidden_T = words_of_PT[hidden_P].any(axis=0)
        words_T &= ~words_of_PT[picked_P].any(axis=0)

    masked_T, word_labels_T = mask_words(ids_T, words_T, rng, how.word_prob, how.mask_id, how.random_word_ids)
    if hidden_T is not None:
        masked_T[hidden_T] = how.mask_id
        word_labels_T[hidden_T] = ids_T[hidden_T]

    phrase_labels_T = _no_labels(len(ids_T))
    if len(slots_P):
        leak_P = words_of_PT @ (word_labels_T != IGNORE)  # a product of bools is an "any": of the phrase's own words
        if labelled:
            phrase_labels_T[slots_P[picked_P]] = phrase_indices_P[picked_P]
            leak_P &= ~picked_P
        masked_T = _replace(masked_T, slots_P[picked_P & ~leak_P], rng, how.mask_id, how.random_phrase_rows)
        masked_T[slots_P[leak_P]] = how.mask_id
    return masked_T, word_labels_T, phrase_labels_T


def _shared_coin(words_of_PT: np.ndarray, picked_P: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Draws one fair coin for each group of picked phrases linked by common words: bool [P], True hides the words."""
    coin_P = rng.random(len(picked_P)) >= VISIBLE_SHARE
    if picked_P.sum() == 1:
        return coin_P
    linked_PP = (words_of_PT.astype(np.int8) @ words_of_PT.T.astype(np.int8)) > 0
    linked_PP &= picked_P[:, None] & picked_P[None, :]
    np.fill_diagonal(linked_PP, True)
    # the groups are connected components: each phrase takes the lowest number among its neighbours until none changes
    group_P = np.arange(len(picked_P))
    while True:
        lowest_P = np.where(linked_PP, group_P[None, :], len(group_P)).min(axis=1)
        if np.array_equal(lowest_P, group_P):
            return coin_P[group_P]
        group_P = lowest_P
