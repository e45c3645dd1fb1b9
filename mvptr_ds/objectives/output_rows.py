"""Which rows of an encoder's last layer the objectives read.

Attention there needs the keys and values of all rows, but what follows it (nine twelfths of a layer's products) only
the rows that somebody reads. A kind of rows has a name, so that `Task` can mark the rows and `flops` count them:

    first           slot 0 of a text or of an image's tags          text      all slots of a text
    tokens, tags    those that the masking picked                   regions   all regions
    phrases         all phrases of a text                           asking_regions   those of samples with a picked tag
    picked_phrases  those that the masking picked                   all_tags         all slots of an image's tags
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from mvptr_ds.model.packed import Packed, join
from mvptr_ds.objectives.packed_batch import PackedBatch

COVERED = {  # kinds that are part of another one
    "text": frozenset({"first", "tokens", "phrases", "picked_phrases"}),
    "regions": frozenset({"asking_regions"}),
    "all_tags": frozenset({"tags"}),
}


def without_covered(kinds: Collection[str]) -> frozenset[str]:
    """Returns the same rows in kinds that do not overlap, so that their numbers can be added up."""
    covered = (COVERED[kind] for kind in kinds if kind in COVERED)
    return frozenset(kinds).difference(*covered)


def some_rows(lengths: Sequence[int], everything: bool, first: bool, *picked: Tensor) -> Packed:
    """Marks rows of sequences: all, the first of each, and those that are picked, each int64 or bool; on the host."""
    marked = Packed(torch.full((sum(lengths),), everything), tuple(lengths))
    if first:
        marked.rows[torch.from_numpy(marked.starts)] = True
    for rows in picked:
        marked.rows[rows] = True
    return marked


def needed_rows(encoder: str, kinds: frozenset[str], packed: PackedBatch) -> Tensor | None:
    """Returns the rows of `text`, `visual` or `matched` that are read, int64 on the host; None where all are.

    Args:
        packed: on the host.
    """
    if encoder == "text":
        return numbers(_text_rows(kinds, packed))
    if encoder == "visual":
        return numbers(join(_tag_rows(kinds, packed), _region_rows(kinds, packed), index=packed.visual))
    return numbers(matched_rows(kinds, packed, packed.geometry.lengths))


def matched_rows(kinds: frozenset[str], packed: PackedBatch, region_lengths: Sequence[int]) -> Packed:
    """Marks the rows of texts joined with the images beside them."""
    return join(_text_rows(kinds, packed), some_rows(region_lengths, "regions" in kinds, False))


def pair_rows(kinds: frozenset[str], text_lengths: Sequence[int], region_lengths: Sequence[int]) -> Packed:
    """Marks the rows of any texts joined with any regions: slot 0 of the texts, all of their slots, all regions."""
    text = some_rows(text_lengths, "text" in kinds, "first" in kinds)
    return join(text, some_rows(region_lengths, "regions" in kinds, False))


def numbers(*marked: Packed) -> Tensor | None:
    """Returns which rows are marked, in sequences behind each other: int64 [K]; None where all are."""
    whole = torch.cat([part.rows for part in marked])
    return None if bool(whole.all()) else whole.nonzero().flatten()


def _text_rows(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    rows = {
        "tokens": packed.masked_tokens.rows_K,
        "picked_phrases": packed.masked_phrases.rows_K,
        "phrases": packed.phrase_mask.rows,
    }
    picked = [of_kind for kind, of_kind in rows.items() if kind in kinds]
    return some_rows(packed.text_ids.lengths, "text" in kinds, "first" in kinds, *picked)


def _tag_rows(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    picked = [packed.masked_tags.rows_K] if "tags" in kinds else []
    return some_rows(packed.tag_ids.lengths, "all_tags" in kinds, "first" in kinds, *picked)


def _region_rows(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    picked = [packed.tag_regions.rows_M] if "asking_regions" in kinds else []
    return some_rows(packed.geometry.lengths, "regions" in kinds, False, *picked)
