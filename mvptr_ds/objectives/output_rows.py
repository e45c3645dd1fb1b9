"""Which rows of an encoder's last layer the objectives read.

Attention there needs the keys and values of all rows, but what follows it (nine twelfths of a layer's products) only
the rows that somebody reads. A kind of rows has a name, so that `Task` can mark the rows and `flops` count them:

    first           slot 0 of a text or of an image's tags          text      all slots of a text
    tokens, tags    those that the masking picked                   regions   all regions
    phrases         all phrases of a text                           asking_regions   those of samples with a picked tag
    picked_phrases  those that the masking picked
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from mvptr_ds.model.packed import Packed, join
from mvptr_ds.objectives.packed_batch import PackedBatch

FIRST = frozenset({"first"})
EVERYTHING = frozenset({"text", "regions"})


def kinds_read(stage: str, objectives: Collection[str], wpg_on_cross: bool) -> dict[str, frozenset[str]]:
    """Kinds of rows by encoder: `text`, `visual`, and the cross encoder's `matched` and `mismatched` pairs.

    An encoder that is not named is read wholly: the text encoder of stage 2, whose states the cross encoder takes.
    """

    def kinds(**read: bool) -> frozenset[str]:
        return frozenset(kind for kind, is_read in read.items() if is_read)

    on = set(objectives)
    mlm, itm, tags = "mlm" in on, "itm" in on, "mcr_tags" in on
    if stage == "stage1":
        return {
            "text": kinds(tokens=mlm, picked_phrases="mcr_phrases" in on),
            "visual": kinds(tags=tags, asking_regions="mcr_regions" in on),
        }
    grounds = wpg_on_cross or "wpg_cross" in on
    return {
        "visual": kinds(first=True, tags=tags, regions=True),
        "matched": kinds(first=itm, tokens=mlm, phrases=grounds, regions=grounds),
        "mismatched": EVERYTHING if "wpg_cross" in on else FIRST,
    }


def some_rows(lengths: Sequence[int], everything: bool, first: bool, *picked: Packed) -> Packed:
    """Marks rows of sequences: all, the first of each, and those that are picked; bool, on the host."""
    marked = Packed(torch.full((sum(lengths),), everything), tuple(lengths))
    if first:
        marked.rows[torch.from_numpy(marked.starts)] = True
    for mask in picked:
        marked.rows.logical_or_(mask.rows)
    return marked


def of_text(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    """Marks the rows of texts that are read."""
    masks = {
        "tokens": packed.masked_tokens.mask,
        "picked_phrases": packed.masked_phrases.mask,
        "phrases": packed.phrases_on_host,
    }
    picked = [mask for kind, mask in masks.items() if kind in kinds]
    return some_rows(packed.text_ids.lengths, "text" in kinds, "first" in kinds, *picked)


def of_tags(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    """Marks the rows of tags that are read."""
    picked = [packed.masked_tags.mask] if "tags" in kinds else []
    return some_rows(packed.tag_ids.lengths, False, "first" in kinds, *picked)


def of_regions(kinds: frozenset[str], packed: PackedBatch) -> Packed:
    """Marks the rows of regions that are read."""
    marked = some_rows(packed.geometry.lengths, "regions" in kinds, False)
    if "asking_regions" in kinds:
        asking = torch.tensor(packed.masked_tags.samples, dtype=torch.int64)
        marked.rows.logical_or_(torch.isin(marked.owners(), asking))
    return marked


def of_pairs(kinds: frozenset[str], text_lengths: Sequence[int], region_lengths: Sequence[int]) -> Packed:
    """Marks the rows of any texts joined with any regions: slot 0 of the texts (FIRST) or all (EVERYTHING)."""
    text = some_rows(text_lengths, "text" in kinds, "first" in kinds)
    return join(text, some_rows(region_lengths, "regions" in kinds, False))
