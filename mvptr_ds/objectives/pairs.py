"""Texts and the images beside them, and how well the phrases of the one are grounded in the other.

Legend: B samples of this rank, T text slots, R regions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mvptr_ds.config import WpgConfig
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives import losses
from mvptr_ds.objectives.hard_negatives import OwnDraws


@dataclass
class Pairs:
    """Texts and the images beside them: their states, and which text rows hold a phrase."""

    text: Packed
    phrase_mask: Packed
    regions: Packed

    def can_be_grounded(self) -> Tensor:
        """Returns whether the text has a phrase and the image a region, bool [B]."""
        return self.phrase_mask.padded(False).any(-1) & self.regions.index.on(self.regions.rows.device, "filled")

    def grounding_score(self, draw_BT: Tensor, top_k: int, compiled: bool = False) -> Tensor:
        """Returns how well texts' phrases are grounded in the images beside them, [B]; see `phrase_region_score`.

        Args:
            compiled: by torch.compile on CUDA; the scores are the same.
        """
        text_BTD, regions = self.text.padded(), self.regions
        compiles = compiled and text_BTD.device.type == "cuda"
        score = losses.compiled_phrase_region_score() if compiles else losses.phrase_region_score
        return score(
            text_BTD,
            self.phrase_mask.padded(False),
            regions.padded(),
            regions.mask(),
            draw_BT[:, : text_BTD.shape[1]],
            top_k,
        )


def grounding_scores(
    pairs: Pairs, negative: Packed, draws: OwnDraws, wpg: WpgConfig, compiled: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns how well phrases are grounded in their own image and in that of `negative`, [B] each.

    The third tensor, bool [B], says whether they can be grounded in both.

    Args:
        negative: regions of another image for each text [N, D].
    """
    other = Pairs(pairs.text, pairs.phrase_mask, negative)
    can_be_B = pairs.can_be_grounded() & other.can_be_grounded()
    positive_B = pairs.grounding_score(draws.wpg_own_BT, wpg.top_k, compiled)
    return positive_B, other.grounding_score(draws.wpg_other_BT, wpg.top_k, compiled), can_be_B
