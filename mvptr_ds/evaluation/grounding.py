"""Phrase grounding: which region of its own image is most similar to a phrase.

Legend: C captions, I images, T text slots, R regions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from mvptr_ds.data.loader import read_sample_record
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Phrase
from mvptr_ds.data.shards import Index
from mvptr_ds.evaluation.encode import EncodedSplit


@dataclass(frozen=True)
class GroundedPhrase:
    """A phrase of a caption and the region that the model finds for it."""

    caption: int  # sample number
    phrase: Phrase
    region: int  # number in the record
    num_regions: int

    @property
    def right(self) -> bool | None:
        """Whether the region is one that the record names; None where it names none."""
        return self.region in self.phrase.regions if self.phrase.regions else None


def ground_phrases(split: EncodedSplit, index: Index, phrases: PhraseVocab) -> list[GroundedPhrase]:
    """The most similar region, by cosine of the uni-modal states, of every phrase that has a slot.

    Images without boxes are left out.
    """
    sim_CTR = F.normalize(split.text_CTD, dim=-1) @ F.normalize(split.regions_IRD, dim=-1)[split.image_of_C].mT
    sim_CTR = sim_CTR.masked_fill(~split.region_mask_IR[split.image_of_C][:, None, :], float("-inf"))
    best_CT = sim_CTR.argmax(-1)
    num_regions_C = split.region_mask_IR[split.image_of_C].sum(-1)
    found = []
    for caption in range(len(split.text_CTD)):
        slots = torch.nonzero(split.phrase_mask_CT[caption]).flatten().tolist()
        record, number = read_sample_record(index, caption)
        if not record.regions:  # the cells of a grid are no regions of the record
            continue
        known = [p for p in record.captions[number].phrases if phrases.index_of(p.tuple) is not None]
        for slot, phrase in zip(slots, known[: len(slots)], strict=True):
            found.append(GroundedPhrase(caption, phrase, int(best_CT[caption, slot]), int(num_regions_C[caption])))
    return found
