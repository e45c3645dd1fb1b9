"""Among which samples a rank's own ones look for negatives, and how: `local`, its own, or `global`, those of all ranks.

Nothing here holds all similarities of the global batch, not even a rank's rows of them at once.

Legend: B samples of this rank, N candidates (B, or those of all ranks), D hidden.
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
        """In the order of ranks, with gradient."""
        return Globals(*(collectives.gather(x) for x in (self.text_ND, self.image_ND, self.image_index_N)))


class Candidates:
    """The candidates of one scope for this rank's samples.

    Args:
        scores_mib: of float32 similarities at a time: so many of this rank's samples, at least one, are compared with
            all candidates at once.
    """

    def __init__(self, own: Globals, scope: str, scores_mib: float) -> None:
        assert scope in SCOPES, scope
        self.across = scope == "global" and collectives.num_ranks() > 1
        self.own = own
        self.all = own.of_all_ranks() if self.across else own
        self.first = collectives.rank() * len(own.image_index_N) if self.across else 0
        self.rows_at_once = max(1, int(scores_mib * 2**20 / 4 / max(1, len(self.all.image_index_N))))

    def vsc(self, scale: Tensor) -> LossSum:
        own, all_ = self.own, self.all
        return losses.vsc(
            (own.text_ND, own.image_ND),
            (all_.text_ND, all_.image_ND),
            scale,
            own.image_index_N,
            all_.image_index_N,
            self.first,
            self.rows_at_once,
        )

    def has_negative(self) -> Tensor:
        """Whether a sample's candidates show another image than its own, bool [B]."""
        return hard_negatives.has_negative(self.own.image_index_N, self.all.image_index_N)

    def others(self, mode: str, takes_image_B: Tensor, uniform_B: Tensor, scale: Tensor) -> Tensor:
        """Another sample for each: its image goes with the own text, or (False) its text with the own image.

        Args:
            mode: of `hard_negatives.choose`.
            takes_image_B, uniform_B: bool and uniform in [0, 1), on the CPU.

        Returns:
            int64 [B], places among the candidates; any where there is none of another image (`has_negative`).
        """
        own, all_ = self.own, self.all
        negative_index_B = torch.zeros_like(own.image_index_N)
        for takes_B, queries_BD, keys_ND in (
            (takes_image_B, own.text_ND, all_.image_ND),
            (~takes_image_B, own.image_ND, all_.text_ND),
        ):
            for rows in takes_B.nonzero().flatten().split(self.rows_at_once):
                there = rows.to(negative_index_B.device, non_blocking=True)
                same_image_KN = own.image_index_N[there, None] == all_.image_index_N
                sim_KN = queries_BD[there].detach() @ keys_ND.detach().T
                negative_index_B[there] = hard_negatives.choose(
                    mode, sim_KN, same_image_KN, uniform_B[rows], scale.detach()
                )
        return negative_index_B
