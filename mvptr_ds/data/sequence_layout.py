"""Lays tokens, phrases and tags out in their sequences, before masking and padding.

Position ids count the slots and segment ids are constant (text 0, tags 1), so the model makes both itself.

Legend: T text slots, G tag slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def num_phrases_that_fit(num_tokens: int, max_tokens: int = 33, max_slots: int = 40) -> int:
    """Returns how many phrases a caption of `num_tokens` wordpieces may carry: a short caption may carry more."""
    return max(0, max_slots - 2 - min(num_tokens, max_tokens))


def layout_text(
    token_ids: Sequence[int],
    phrase_rows: Sequence[int],
    cls_id: int,
    sep_id: int,
    max_tokens: int = 33,
    max_slots: int = 40,
) -> tuple[np.ndarray, np.ndarray]:
    """Lays out `[CLS] tokens phrases [SEP]`: returns ids int64 [T] and the phrase slots bool [T]; T <= max_slots.

    Tokens are cut to `max_tokens`, phrases to what is left.

    Source: the published code, Inputs.
    """
    tokens = token_ids[: min(max_tokens, max_slots - 2)]
    phrases = phrase_rows[: num_phrases_that_fit(len(token_ids), max_tokens, max_slots)]
    ids_T = np.array([cls_id, *tokens, *phrases, sep_id], dtype=np.int64)
    phrase_mask_T = np.zeros(len(ids_T), dtype=bool)
    phrase_mask_T[1 + len(tokens) : -1] = True
    return ids_T, phrase_mask_T


def layout_tags(tag_ids: Sequence[int], cls_id: int, sep_id: int, max_slots: int = 20) -> np.ndarray:
    """Lays out `[CLS] tags [SEP]`: returns ids int64 [G], G <= max_slots; tags are cut to `max_slots - 2` wordpieces.

    Source: the published code, Inputs.
    """
    return np.array([cls_id, *tag_ids[: max_slots - 2], sep_id], dtype=np.int64)
