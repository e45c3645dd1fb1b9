"""Texts and the images beside them, and how well the phrases of the one are grounded in the other.

Legend: B samples of this rank, T text slots, R regions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mvptr_ds.config import WpgConfig
from mvptr_ds.distributed import collectives
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives import losses
from mvptr_ds.objectives.gather_rows import RowExchange
from mvptr_ds.objectives.hard_negatives import RandomDraws


@dataclass
class Pairs:
    """Texts and the images beside them: their states, and which text rows hold a phrase."""

    text: Packed
    phrase_mask: Packed
    regions: Packed

    def split(self, num: int) -> tuple[Pairs, Pairs]:
        """Returns the first `num` pairs, and the rest."""
        (text, text_rest), (mask, mask_rest) = self.text.split(num), self.phrase_mask.split(num)
        regions, regions_rest = self.regions.split(num)
        return Pairs(text, mask, regions), Pairs(text_rest, mask_rest, regions_rest)

    def can_be_grounded(self) -> Tensor:
        """Returns whether the text has a phrase and the image a region, bool [B]."""
        has_region_B = torch.tensor([num > 0 for num in self.regions.lengths])
        return self.phrase_mask.padded(False).any(-1) & has_region_B.to(self.phrase_mask.rows.device, non_blocking=True)

    def grounding_score(self, draw_BT: Tensor, top_k: int) -> Tensor:
        """Returns how well texts' phrases are grounded in the images beside them, [B]; see `phrase_region_score`."""
        text_BTD, regions = self.text.padded(), self.regions
        return losses.phrase_region_score(
            text_BTD,
            self.phrase_mask.padded(False),
            regions.padded(),
            regions.mask(),
            draw_BT[:, : text_BTD.shape[1]],
            top_k,
        )


def fetch_samples(parts: list[Packed], requested_B: Tensor, across: bool) -> list[Packed]:
    """Returns the samples `requested_B` out of each part.

    Args:
        requested_B: int64, places among the samples of all ranks (`across`), or else of this rank alone.
    """
    exchange = RowExchange(torch.tensor(parts[0].lengths), requested_B, across)
    return [Packed(exchange.fetch(part.rows), tuple(exchange.lengths)) for part in parts]


def grounding_scores(
    pairs: Pairs, negative_index_B: Tensor, draws: RandomDraws, wpg: WpgConfig
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns how well phrases are grounded in their own image and in that of `negative_index_B`, [B] each.

    The third tensor, bool [B], says whether they can be grounded in both.
    """
    across = wpg.scope == "global" and collectives.num_ranks() > 1
    (regions,) = fetch_samples([pairs.regions], negative_index_B, across)
    negative = Pairs(pairs.text, pairs.phrase_mask, regions)
    can_be_B = pairs.can_be_grounded() & negative.can_be_grounded()
    positive_B = pairs.grounding_score(draws.wpg_own_NT, wpg.top_k)
    return positive_B, negative.grounding_score(draws.wpg_other_NT, wpg.top_k), can_be_B
