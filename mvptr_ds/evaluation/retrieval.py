"""Evaluates retrieval: recall at 1, 5, 10 by the global states, and after re-ranking with the cross encoder.

Legend: C captions, I images, M scored pairs, B pairs of a batch, K re-ranked candidates.
"""

from __future__ import annotations

import math
from collections import Counter

import torch
from torch import Tensor

from mvptr_ds.evaluation.encode import CrossStates, EncodedSplit, cross_states
from mvptr_ds.model.mvptr import Mvptr

RANKS = (1, 5, 10)


def ranks(scores_CI: Tensor, image_of_C: Tensor) -> tuple[Tensor, Tensor]:
    """Returns how many wrong candidates precede the right one: int64 [C] of captions, and [I] of images.

    A caption's right candidate is its image. An image's is the best of its captions, and its other captions are not
    wrong. Candidates that tie with the right one precede it. NaN precedes nothing, and comes last.
    """
    own_CI = image_of_C[:, None] == torch.arange(scores_CI.shape[1])[None, :]
    text_rank_C = (~(scores_CI < scores_CI[own_CI][:, None])).sum(1) - 1
    best_own_I = scores_CI.masked_fill(~own_CI, float("-inf")).amax(0)
    image_rank_I = (~(scores_CI < best_own_I[None, :]) & ~own_CI).sum(0)
    return text_rank_C, image_rank_I


def recalls(scores_CI: Tensor, image_of_C: Tensor) -> dict[str, float]:
    """Returns `t2i_r1` ... `i2t_r10`, fractions of 1.

    A caption counts when its image is among the first K. An image counts when any of its captions is, as in COCO's
    protocol. Candidates that tie with the right one precede it, so a constant score earns nothing. NaN earns nothing.
    """
    text_rank_C, image_rank_I = ranks(scores_CI, image_of_C)
    t2i = {f"t2i_r{k}": float((text_rank_C < k).float().mean()) for k in RANKS}
    return t2i | {f"i2t_r{k}": float((image_rank_I < k).float().mean()) for k in RANKS}


def chance_recalls(image_of_C: Tensor, num_images: int) -> dict[str, float]:
    """Returns what random scores earn: `t2i_r1` ... `i2t_r10`, as `recalls` does."""
    num_captions = len(image_of_C)
    own = Counter(Counter(image_of_C.tolist()).values())  # number of images by their number of captions
    out = {f"t2i_r{k}": min(k, num_images) / num_images for k in RANKS}
    for k in RANKS:
        drawn = min(k, num_captions)
        misses = sum(times * math.comb(num_captions - n, drawn) for n, times in own.items())
        out[f"i2t_r{k}"] = 1.0 - misses / math.comb(num_captions, drawn) / num_images
    return out


@torch.inference_mode()
def rerank(
    model: Mvptr, split: EncodedSplit, top_k: int, batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Returns the re-ranked scores for text->image and for image->text, [C, I] each, float64.

    The ITM head orders the `top_k` best of every caption, or of every image, by global similarity. All others keep
    their order behind them. A pair that both directions need is scored once.
    """
    sim_CI = split.sim_CI
    asked_t2i_CI, asked_i2t_CI = short_lists(sim_CI, top_k, top_k)
    captions_M, images_M = (asked_t2i_CI | asked_i2t_CI).nonzero(as_tuple=True)
    match_M = score_pairs(model, split, captions_M, images_M, batch_size, device)
    match_CI = torch.zeros_like(sim_CI, dtype=torch.float64)
    match_CI[captions_M, images_M] = match_M
    return put_first(sim_CI, match_CI, asked_t2i_CI), put_first(sim_CI, match_CI, asked_i2t_CI)


def short_lists(sim_CI: Tensor, num_images: int, num_captions: int) -> tuple[Tensor, Tensor]:
    """Returns the pairs to score, bool [C, I] each: of every caption its best images, of every image its captions."""
    best_t2i = sim_CI.topk(min(num_images, sim_CI.shape[1]), dim=1).indices
    best_i2t = sim_CI.topk(min(num_captions, sim_CI.shape[0]), dim=0).indices
    nothing_CI = torch.zeros_like(sim_CI, dtype=torch.bool)
    return nothing_CI.scatter(1, best_t2i, True), nothing_CI.scatter(0, best_i2t, True)


def put_first(sim_CI: Tensor, match_CI: Tensor, asked_CI: Tensor) -> Tensor:
    """Returns scores by which the asked pairs come first, by their match, and the others behind, by similarity.

    Args:
        sim_CI: cosines, in [-1, 1].
        match_CI: probabilities of a match, in [0, 1]; read where `asked_CI`.
    """
    return torch.where(asked_CI, 2.0 + match_CI, sim_CI)


@torch.inference_mode()
def score_pairs(
    model: Mvptr, split: EncodedSplit, captions_M: Tensor, images_M: Tensor, batch_size: int, device: torch.device
) -> Tensor:
    """Returns the probability of a match of each pair by the cross encoder, float64 [M] on the CPU."""
    pairs = cross_states(model, split, captions_M, images_M, batch_size, device, "score pairs", firsts_alone=True)
    return torch.cat([torch.empty(0, dtype=torch.float64), *(match_probability(model, cross) for cross in pairs)])


def match_probability(model: Mvptr, cross: CrossStates) -> Tensor:
    """Returns the probability of a match of each pair by the ITM head, float64 [B] on the CPU."""
    logits_B2 = model.itm_logits(model.pool(cross.text)).double()
    # in float64, since two probabilities close to 1 would tie in float32, and a tie counts as wrong
    return (logits_B2[:, 0] - logits_B2[:, 1]).sigmoid().cpu()
