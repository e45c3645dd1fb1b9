"""Among which samples those of a rank find their negatives: `local`, the same rank's, or `global`, those of all ranks.

Nothing here holds all similarities of the global batch, not even a rank's rows of them at once.

Legend: B samples of this rank, N candidates (B, or those of all ranks), K some of the B samples, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mvptr_ds.distributed import collectives
from mvptr_ds.objectives import hard_negatives, losses
from mvptr_ds.objectives.losses import LossSum

SCOPES = ("local", "global")


@dataclass
class Globals:
    """The global states of samples, of length 1 (float32 or float64), and the images that they show (int64)."""

    text_ND: Tensor
    image_ND: Tensor
    image_index_N: Tensor

    def of_all_ranks(self) -> Globals:
        """Returns the states of all ranks, in their order, with gradient."""
        return Globals(*(collectives.gather(x) for x in (self.text_ND, self.image_ND, self.image_index_N)))


class Candidates:
    """The candidates of one scope for this rank's samples.

    Args:
        local: global states of this rank's samples.
        scope: `local` or `global`.
        scores_mib: of float32 similarities at a time: so many of this rank's samples, at least one, are compared with
            all candidates at once.

    Attributes:
        across: whether the candidates are those of all ranks.
        first: place of this rank's first sample among the candidates.
    """

    def __init__(self, local: Globals, scope: str, scores_mib: float) -> None:
        assert scope in SCOPES, scope
        self.across = scope == "global" and collectives.num_ranks() > 1
        self.local = local
        self.all = local.of_all_ranks() if self.across else local
        self.first = collectives.rank() * len(local.image_index_N) if self.across else 0
        self.rows_at_once = max(1, int(scores_mib * 2**20 / 4 / max(1, len(self.all.image_index_N))))

    def vsc(self, scale: Tensor) -> LossSum:
        """Returns the contrast of this rank's samples with all candidates; see `losses.vsc`."""
        return losses.vsc(
            (self.local.text_ND, self.local.image_ND),
            (self.all.text_ND, self.all.image_ND),
            scale,
            self.local.image_index_N,
            self.all.image_index_N,
            self.first,
            self.rows_at_once,
        )

    def has_negative(self) -> Tensor:
        """Returns whether a sample's candidates show another image than its own, bool [B]."""
        return hard_negatives.has_negative(self.local.image_index_N, self.all.image_index_N)

    def negative_images(self, mode: str, uniform_B: Tensor, scale: Tensor, rows_K: Tensor | None = None) -> Tensor:
        """Returns for samples `rows_K` (int64; default: all) a candidate whose image goes with their text.

        Args:
            mode: of `hard_negatives.choose`.
            uniform_B: uniform in [0, 1), of every sample of this rank.

        Returns:
            int64 [K], places among the candidates; any where there is none of another image (`has_negative`).
        """
        return self._negatives(mode, self.local.text_ND, self.all.image_ND, uniform_B, scale, rows_K)

    def negative_texts(self, mode: str, uniform_B: Tensor, scale: Tensor, rows_K: Tensor | None = None) -> Tensor:
        """Returns for samples a candidate whose text goes with their image; see `negative_images`."""
        return self._negatives(mode, self.local.image_ND, self.all.text_ND, uniform_B, scale, rows_K)

    def _negatives(
        self, mode: str, queries_BD: Tensor, keys_ND: Tensor, uniform_B: Tensor, scale: Tensor, rows_K: Tensor | None
    ) -> Tensor:
        queries_BD, keys_ND, image_B = queries_BD.detach(), keys_ND.detach(), self.local.image_index_N
        if rows_K is not None:
            queries_BD, image_B, uniform_B = (x.index_select(0, rows_K) for x in (queries_BD, image_B, uniform_B))
        chosen = []
        # few rows at a time, so that a rank never holds all of its similarities to the global batch
        for first in range(0, len(queries_BD), self.rows_at_once):
            part = slice(first, first + self.rows_at_once)
            same_image_KN = image_B[part, None] == self.all.image_index_N
            sim_KN = queries_BD[part] @ keys_ND.T
            chosen.append(hard_negatives.choose(mode, sim_KN, same_image_KN, uniform_B[part], scale.detach()))
        return torch.cat(chosen) if chosen else image_B
