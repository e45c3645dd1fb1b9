"""How much work a batch is: the sums over its samples that every formula of cost is made of."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from torch import Tensor

from mvptr_ds.data.collate import IGNORE, Batch


@dataclass(frozen=True)
class Lengths:
    """What formulas need of a batch: sums over its samples. Pairs are squares of lengths: what attention compares."""

    samples: float
    text: float  # slots of the text encoder: tokens and phrases
    text_pairs: float
    visual: float  # tags and regions
    visual_pairs: float
    cross: float  # text slots and regions
    cross_pairs: float
    regions: float
    phrases: float = 0.0
    picked_tokens: float = 0.0  # slots that a head predicts
    picked_tags: float = 0.0
    picked_phrases: float = 0.0
    scored_regions: float = 0.0  # regions of samples with a picked tag (region MCR)
    images: float = 0.0  # that go through a backbone

    @classmethod
    def of(cls, batch: Batch) -> Lengths:
        """Returns the sums of a batch on the host (on a GPU every number would wait for it)."""
        text, tags, regions = (
            mask.sum(-1).double() for mask in (batch.text_mask_BT, batch.tag_mask_BG, batch.region_mask_BR)
        )
        visual, cross = tags + regions, text + regions
        picked_BG = batch.tag_labels_BG != IGNORE
        return cls(
            samples=len(batch),
            text=_total(text),
            text_pairs=_total(text**2),
            visual=_total(visual),
            visual_pairs=_total(visual**2),
            cross=_total(cross),
            cross_pairs=_total(cross**2),
            regions=_total(regions),
            phrases=_total(batch.phrase_mask_BT),
            picked_tokens=_total(batch.mlm_labels_BT != IGNORE),
            picked_tags=_total(picked_BG),
            picked_phrases=_total(batch.phrase_labels_BT != IGNORE),
            scored_regions=_total(regions * picked_BG.any(-1)),
            images=0 if batch.images_B3HW is None else len(batch),
        )

    def rows(self, kinds: Collection[str]) -> float:
        """Rows of these kinds (output_rows.py), which do not overlap."""
        numbers = {
            "first": self.samples,
            "tokens": self.picked_tokens,
            "tags": self.picked_tags,
            "phrases": self.phrases,
            "picked_phrases": self.picked_phrases,
            "text": self.text,
            "regions": self.regions,
            "asking_regions": self.scored_regions,
            "all_tags": self.visual - self.regions,
        }
        return sum(numbers[kind] for kind in kinds)


def _total(values: Tensor) -> float:
    return float(values.sum())
