"""Which other sample of the global batch serves as a negative, from explicit, keyed randomness.

Every random choice of a step is a uniform number drawn by a generator keyed by (seed, step, accumulation), the same
on all ranks; a rank takes the rows of its own samples. Hence the choices do not depend on the number of ranks.

Legend: B samples of this rank, N samples of all ranks, T text slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mvptr_ds.streams import Stream, generator

MODES = ("hardest", "sampled", "random")


@dataclass
class RandomDraws:
    """The random choices of one micro-batch over all ranks, as uniform numbers in [0, 1) (float64, CPU)."""

    itm_takes_image_N: Tensor  # bool: (own text, other image) or else (other text, own image)
    itm_N: Tensor  # which other sample
    wpg_image_N: Tensor  # which other image
    wpg_own_NT: Tensor  # which of a phrase's highest similarities, in its own image
    wpg_other_NT: Tensor  # and in the other one

    @classmethod
    def keyed(cls, seed: int, step: int, accumulation: int, num_samples: int, max_text_slots: int) -> RandomDraws:
        rng = generator(Stream.STEP, seed, step, accumulation)
        takes_image = np.zeros(num_samples, dtype=bool)
        takes_image[rng.permutation(num_samples)[: num_samples // 2]] = True
        per_sample = torch.from_numpy(rng.random((2, num_samples)))
        per_slot = torch.from_numpy(rng.random((2, num_samples, max_text_slots)))
        return cls(torch.from_numpy(takes_image), *per_sample, *per_slot)

    def rows(self, first: int, num: int) -> RandomDraws:
        """Returns the choices of samples first..first+num."""
        part = slice(first, first + num)
        return RandomDraws(
            self.itm_takes_image_N[part],
            self.itm_N[part],
            self.wpg_image_N[part],
            self.wpg_own_NT[part],
            self.wpg_other_NT[part],
        )


@dataclass
class OwnDraws:
    """The random choices of this rank's samples, as its pass reads them: on the device, but for one number."""

    itm_takes_image_B: Tensor  # bool
    itm_rows_B: Tensor  # int64: the samples that take another image, then those that take another text
    num_taking_image: int
    itm_B: Tensor  # float64, as all below
    wpg_image_B: Tensor
    wpg_own_BT: Tensor
    wpg_other_BT: Tensor

    @classmethod
    def blank(cls, num_samples: int, max_text_slots: int) -> OwnDraws:
        """Returns room for draws that are not made yet."""
        uniform = torch.zeros(2, num_samples, dtype=torch.float64)
        per_slot = torch.zeros(2, num_samples, max_text_slots, dtype=torch.float64)
        rows_B = torch.zeros(num_samples, dtype=torch.int64)
        return cls(torch.zeros(num_samples, dtype=torch.bool), rows_B, 0, *uniform, *per_slot)

    def fill(self, own: RandomDraws) -> None:
        """Writes the draws of this rank's samples, on the host."""
        takes_image_B = own.itm_takes_image_N
        self.num_taking_image = int(takes_image_B.sum())
        self.itm_takes_image_B.copy_(takes_image_B)
        torch.cat([takes_image_B.nonzero().flatten(), (~takes_image_B).nonzero().flatten()], out=self.itm_rows_B)
        self.itm_B.copy_(own.itm_N)
        self.wpg_image_B.copy_(own.wpg_image_N)
        self.wpg_own_BT.copy_(own.wpg_own_NT)
        self.wpg_other_BT.copy_(own.wpg_other_NT)

    @classmethod
    def of(cls, own: RandomDraws) -> OwnDraws:
        """Returns the draws of this rank's samples, on the host."""
        out = cls.blank(*own.wpg_own_NT.shape)
        out.fill(own)
        return out


def choose(mode: str, sim_BN: Tensor, same_image_BN: Tensor, uniform_B: Tensor, scale: Tensor | float = 1.0) -> Tensor:
    """Returns one negative for every row: the index of a sample of another image.

    Args:
        mode: `hardest` (the most similar), `sampled` (by softmax of scale x similarity), `random` (uniform).
        sim_BN: similarity to every sample of the global batch.
        same_image_BN: bool, true where sample n shows the row's own image: never chosen.
        uniform_B: uniform in [0, 1).

    Returns:
        int64 [B]; any index where a row has no other image (`has_negative` tells).

    Source: Li et al. 2022, ITM (hardest). Differs: other captions of the same image are never negatives.
    """
    sim_BN = sim_BN.detach()
    # a state that is not finite makes no choice fail: the step is skipped for its gradient
    sim_BN = (sim_BN if sim_BN.dtype == torch.float64 else sim_BN.float()).nan_to_num(0.0, 1.0, -1.0)
    if mode == "hardest":
        return sim_BN.masked_fill(same_image_BN, float("-inf")).argmax(-1)
    if mode == "random":
        return _inverse_cdf((~same_image_BN).double(), uniform_B)
    if mode == "sampled":
        logits_BN = (scale * sim_BN.double()).masked_fill(same_image_BN, float("-inf"))
        peak_B1 = logits_BN.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
        # the floor keeps every other image reachable, and a row's sum above zero, however sharp the softmax
        weights_BN = (logits_BN - peak_B1).exp().clamp(min=1e-6)
        return _inverse_cdf(weights_BN.masked_fill(same_image_BN, 0.0), uniform_B)
    raise ValueError(f"negatives are chosen by {mode!r}; choose from {', '.join(MODES)}")


def has_negative(image_index_B: Tensor, image_index_N: Tensor) -> Tensor:
    """Returns whether one of the candidates N shows another image than the row's own; bool [B]."""
    return (image_index_N.amin() != image_index_B) | (image_index_N.amax() != image_index_B)


def _inverse_cdf(weights_BN: Tensor, uniform_B: Tensor) -> Tensor:
    """The column whose share of the row's cumulated weight holds `uniform_B`; of weight zero only if all are."""
    cdf_BN = weights_BN.cumsum(-1)
    target_B1 = uniform_B.to(cdf_BN.dtype).unsqueeze(-1) * cdf_BN[:, -1:]
    index_B = torch.searchsorted(cdf_BN, target_B1, right=True).squeeze(-1)
    last_B = (weights_BN > 0).to(torch.int64).cumsum(-1).argmax(-1)  # rounding may point past the last weight
    return index_B.minimum(last_B)
