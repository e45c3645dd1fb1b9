"""The objectives as pure functions of tensors: each returns a float32 sum and the count it is a mean over.

Counts are summed over ranks before dividing (task.py), so a rank with nothing to predict contributes zero, not NaN.

Legend: B samples of this rank, N samples of all ranks, M scored pairs, K picked slots, W word rows,
T text slots, G tag slots, R regions, D hidden; K also some of the B samples at a time (vsc).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE = -100  # label of a slot that is not predicted


@dataclass(frozen=True)
class LossSum:
    """A loss before its division: the mean is `sum / count`, with the counts of all ranks added up."""

    sum: Tensor  # float32 or float64 scalar
    count: Tensor  # same dtype, scalar, no gradient
    per_sample_B2: Tensor | None = None  # both of each sample, no gradient, where they are asked for

    def detach(self) -> LossSum:
        return LossSum(self.sum.detach(), self.count, self.per_sample_B2)

    @classmethod
    def of_slots(cls, values_K: Tensor, owner_K: Tensor, num_samples: int) -> LossSum:
        """Returns the sum of the values, also by the sample that owns each (int64 [K])."""
        both_K2 = torch.stack([values_K.detach(), torch.ones_like(values_K)], dim=1)
        per_sample_B2 = both_K2.new_zeros(num_samples, 2).index_add_(0, owner_K, both_K2)
        return cls(values_K.sum(), values_K.new_full((), values_K.numel()), per_sample_B2)

    @classmethod
    def of_samples(cls, values_B: Tensor) -> LossSum:
        """Returns the sum of one value a sample, also by sample."""
        return cls.of_slots(values_B, torch.arange(len(values_B), device=values_B.device), len(values_B))

    @classmethod
    def of(cls, values: Tensor, valid: Tensor | None = None) -> LossSum:
        """Sums `values` where `valid` (default: everywhere); others give no gradient, whatever they hold."""
        if valid is None:
            return cls(values.sum(), values.new_full((), values.numel()))
        return cls(torch.where(valid, values, 0.0).sum(), valid.sum().to(values.dtype))


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def mcr_regions(log_p_KR: Tensor, is_region_KR: Tensor) -> LossSum:
    """Computes masked concept recovering of tags: `max(0, -logsumexp over regions of log p(tag | region))`.

    Some region must let a masked tag be recovered.

    Args:
        log_p_KR: the tag head's log probability of every masked tag at the regions of its own image; K may be 0.
        is_region_KR: bool, the slots that hold a region. A tag whose image has none does not count.

    Source: README, "The published code".
    """
    has_region_K = is_region_KR.any(1)
    # a row of -inf alone has no gradient: let it be zeros, which do not count
    log_p_KR = log_p_KR.masked_fill(~is_region_KR & has_region_K[:, None], float("-inf"))
    return LossSum.of((-torch.logsumexp(log_p_KR, dim=1)).clamp(min=0.0), has_region_K)


def vsc(
    own: tuple[Tensor, Tensor],
    everyone: tuple[Tensor, Tensor],
    scale: Tensor,
    image_index_B: Tensor,
    image_index_N: Tensor,
    first: int,
    rows_at_once: int,
) -> LossSum:
    """Computes the visual-semantic contrast of this rank's rows and columns of the global matrix, a few at a time.

    Args:
        own: normalised global states of this rank's samples, of the texts and of the images, [B, D] each.
        everyone: those of every rank, [N, D], with gradient; rows first..first+B are this rank's.
        scale: one element, exp(logit_scale) after its clamp.
        image_index_B, image_index_N: int64, the image that a sample shows.
        rows_at_once: samples whose N logits are held at a time, forward and backward.

    Source: Li et al. 2022, VSC. Differs: negatives come from all ranks, and another caption of the same image is no
    negative.
    """
    (text_BD, image_BD), (text_ND, image_ND) = ((_at_least_float32(x) for x in pair) for pair in (own, everyone))
    rows = _OwnRows(image_index_B, image_index_N, first, rows_at_once)
    to_images_B = _Contrast.apply(text_BD, image_ND, scale, rows)
    to_texts_B = _Contrast.apply(image_BD, text_ND, scale, rows)
    return LossSum.of(0.5 * (to_images_B + to_texts_B))


@dataclass(frozen=True)
class _OwnRows:
    """The rows of the similarity matrix that are this rank's; see `vsc`."""

    image_index_B: Tensor
    image_index_N: Tensor
    first: int
    at_once: int

    def logits(self, queries_BD: Tensor, keys_ND: Tensor, scale: Tensor) -> Iterator[tuple[slice, int, Tensor]]:
        """Yields some queries at a time: which, the diagonal of their own keys, their logits (-inf where left out)."""
        for start in range(0, len(queries_BD), self.at_once):
            chosen = slice(start, start + self.at_once)
            logits_KN = (queries_BD[chosen] @ keys_ND.T).mul_(scale)
            left_out_KN = self.image_index_B[chosen, None] == self.image_index_N
            left_out_KN.diagonal(self.first + start).fill_(False)
            yield chosen, self.first + start, logits_KN.masked_fill_(left_out_KN, float("-inf"))


class _Contrast(torch.autograd.Function):
    """Cross entropy of each query's own key among all keys but the others of its image, [B].

    The logits are computed again in the backward pass: never more than `rows.at_once` rows of them exist.
    """

    @staticmethod
    def forward(ctx: Any, queries_BD: Tensor, keys_ND: Tensor, scale: Tensor, rows: _OwnRows) -> Tensor:
        ctx.save_for_backward(queries_BD, keys_ND, scale)
        ctx.rows = rows
        out_B = torch.empty_like(queries_BD[:, 0])
        for chosen, own, logits_KN in rows.logits(queries_BD, keys_ND, scale):
            out_B[chosen] = logits_KN.logsumexp(-1) - logits_KN.diagonal(own)
        return out_B

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        queries_BD, keys_ND, scale = ctx.saved_tensors
        to_queries_BD, to_keys_ND = torch.empty_like(queries_BD), torch.zeros_like(keys_ND)
        for chosen, own, logits_KN in ctx.rows.logits(queries_BD, keys_ND, scale):
            to_logits_KN = logits_KN.softmax(-1)
            to_logits_KN.diagonal(own).sub_(1.0)
            to_logits_KN *= grads[0][chosen, None]
            to_queries_BD[chosen] = to_logits_KN @ keys_ND
            to_keys_ND.addmm_(to_logits_KN.T, queries_BD[chosen])
        to_scale = (to_queries_BD * queries_BD).sum().to(scale.dtype).reshape(scale.shape)
        return to_queries_BD.mul_(scale), to_keys_ND.mul_(scale), to_scale, None


def itm(matched_logits_B2: Tensor, mismatched_logits_B2: Tensor, has_negative_B: Tensor) -> LossSum:
    """Computes image-text matching: cross entropy with 0 = match, 1 = mismatch, over 2B pairs.

    Args:
        has_negative_B: bool; False where the batch holds no other image, whose pair then does not count.

    Source: Li et al. 2022, ITM.
    """
    logits_M2 = _at_least_float32(torch.cat([matched_logits_B2, mismatched_logits_B2]))
    labels_M = torch.zeros(len(logits_M2), dtype=torch.long, device=logits_M2.device)
    labels_M[len(matched_logits_B2) :] = 1
    valid_M = torch.cat([torch.ones_like(has_negative_B), has_negative_B])
    return LossSum.of(F.cross_entropy(logits_M2, labels_M, reduction="none"), valid_M)


def phrase_region_score(
    text_BTD: Tensor, phrase_mask_BT: Tensor, regions_BRD: Tensor, region_mask_BR: Tensor, draw_BT: Tensor, top_k: int
) -> Tensor:
    """Returns how well an image grounds phrases: for each, one of its `top_k` highest cosine similarities.

    Args:
        phrase_mask_BT: bool, the slots that hold a phrase.
        region_mask_BR: bool, real regions.
        draw_BT: uniform in [0, 1): which of the highest is taken (0 the highest); fewer regions than top_k will do.

    Returns:
        The mean over the sample's phrases, [B]; 0 where it has none, or no region.
    """
    text_BTD, regions_BRD = _at_least_float32(text_BTD), _at_least_float32(regions_BRD)
    # similarities are scaled, not states: they are fewer
    sim_BTR = text_BTD @ regions_BRD.transpose(1, 2) * _inverse_norm(text_BTD)[:, :, None]
    sim_BTR = (sim_BTR * _inverse_norm(regions_BRD)[:, None, :]).masked_fill(~region_mask_BR[:, None, :], float("-inf"))
    highest_BTk = sim_BTR.topk(min(top_k, sim_BTR.shape[-1]), dim=-1).values
    num_choices_B1 = region_mask_BR.sum(-1, keepdim=True).clamp(min=1, max=top_k)
    choice_BT = (draw_BT * num_choices_B1).long().minimum(num_choices_B1 - 1)
    taken_BT = highest_BTk.gather(-1, choice_BT.unsqueeze(-1)).squeeze(-1)
    counts_BT = phrase_mask_BT & region_mask_BR.any(-1, keepdim=True)
    return torch.where(counts_BT, taken_BT, 0.0).sum(-1) / phrase_mask_BT.sum(-1).clamp(min=1)


@functools.cache
def compiled_phrase_region_score() -> Callable[..., Tensor]:
    """Returns `phrase_region_score` by torch.compile, for sizes that change with every batch."""
    return torch.compile(phrase_region_score, dynamic=True)


def _inverse_norm(states: Tensor) -> Tensor:
    """One over the length of each state; a state of zeros, as padding has, keeps a finite gradient."""
    return torch.linalg.vector_norm(states, dim=-1).clamp(min=1e-12).reciprocal()


def wpg(pos_B: Tensor, neg_B: Tensor, counts_B: Tensor, margin: float) -> LossSum:
    """Computes weakly supervised phrase grounding: `max(0, neg + margin - pos)` over samples with a phrase.

    Args:
        pos_B, neg_B: `phrase_region_score` with the own and with another image.
        counts_B: bool, the sample has a phrase, both images have regions, and the batch holds another image.

    Source: Li et al. 2022, WPG.
    """
    return LossSum.of((neg_B + margin - pos_B).clamp(min=0.0), counts_B)
