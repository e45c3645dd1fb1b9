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


def some_rows(lengths: Sequence[int], everything: bool, first: bool, *picked: Packed) -> Packed:
    """Marks rows of sequences: all, the first of each, and those that are picked; bool, on the host."""
    marked = Packed(torch.full((sum(lengths),), everything), tuple(lengths))
    if first:
        marked.rows[torch.from_numpy(marked.starts)] = True
    for mask in picked:
        marked.rows.logical_or_(mask.rows)
    return marked


def text_rows(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    """Marks the rows of texts that are needed."""
    masks = {
        "tokens": packed.masked_tokens.mask,
        "picked_phrases": packed.masked_phrases.mask,
        "phrases": packed.phrases_on_host,
    }
    picked = [mask for kind, mask in masks.items() if kind in kinds]
    return some_rows(packed.text_ids.lengths, "text" in kinds, "first" in kinds, *picked)


def tag_rows(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    """Marks the rows of tags that are needed."""
    picked = [packed.masked_tags.mask] if "tags" in kinds else []
    return some_rows(packed.tag_ids.lengths, "all_tags" in kinds, "first" in kinds, *picked)


def region_rows(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    """Marks the rows of regions that are needed."""
    marked = some_rows(packed.geometry.lengths, "regions" in kinds, False)
    if "asking_regions" in kinds:
        asking = torch.tensor(packed.masked_tags.samples, dtype=torch.int64)
        marked.rows.logical_or_(torch.isin(marked.owners(), asking))
    return marked


def pair_rows(kinds: frozenset[str], text_lengths: Sequence[int], region_lengths: Sequence[int]) -> Packed:
    """Marks the rows of any texts joined with any regions: slot 0 of the texts, all of their slots, all regions."""
    text = some_rows(text_lengths, "text" in kinds, "first" in kinds)
    return join(text, some_rows(region_lengths, "regions" in kinds, False))
