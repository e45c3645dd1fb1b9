"""Evaluates image-text matching: every caption with its own image, and with the most similar other image.

Legend: C captions, I images, T text slots, P phrases, R regions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.evaluation.encode import EncodedSplit, cross_states
from mvptr_ds.evaluation.grounding import AskedPhrase, cosines
from mvptr_ds.evaluation.retrieval import match_probability, score_pairs
from mvptr_ds.model.mvptr import Mvptr


@torch.inference_mode()
def cross_with_own(
    model: Mvptr, split: EncodedSplit, asked: Sequence[AskedPhrase], batch_size: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Runs one cross pass of every caption with its own image, which ITM and grounding on cross states share.

    Returns:
        The probability of a match, float64 [C], and the similarities of phrases and regions, float32 [P, R] with
        -inf where there is no region.
    """
    captions_P, slots_P = torch.tensor([[a.caption, a.slot] for a in asked], dtype=torch.int64).view(-1, 2).unbind(1)
    sim_PR = torch.full((len(asked), split.regions_IRD.shape[1]), float("-inf"))
    match_C = torch.zeros(len(split.text_CTD), dtype=torch.float64)
    every_C = torch.arange(len(split.text_CTD))
    for cross in cross_states(model, split, every_C, split.image_of_C, batch_size, device, "own pairs"):
        match_C[cross.rows_B] = match_probability(model, cross)
        first, last = int(cross.rows_B[0]), int(cross.rows_B[-1])
        phrases = ((captions_P >= first) & (captions_P <= last)).nonzero().flatten()
        rows, slots = (captions_P[phrases] - first).to(device), slots_P[phrases].to(device)
        phrases_PD, regions_BRD = cross.text.padded()[rows, slots], cross.regions.padded()
        sim = cosines(phrases_PD, regions_BRD[rows], cross.regions.mask()[rows])
        sim_PR[phrases, : sim.shape[1]] = sim.cpu()
    return match_C, sim_PR


def hardest_images(split: EncodedSplit) -> tuple[Tensor, Tensor]:
    """Returns the captions that have another image, and for each the most similar one, int64 [C] each."""
    own_CI = split.image_of_C[:, None] == torch.arange(len(split.image_global_ID))[None, :]
    captions_C = (~own_CI).any(1).nonzero().flatten()
    return captions_C, split.sim_CI.masked_fill(own_CI, float("-inf"))[captions_C].argmax(1)


def score_matching(
    model: Mvptr, split: EncodedSplit, match_C: Tensor, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Returns `accuracy` over both kinds of pairs, `match` and `mismatch` apart, and the number of pairs `n`.

    Args:
        match_C: from `cross_with_own`. A probability of one half, or NaN, is wrong in either case.
    """
    captions_C, images_C = hardest_images(split)
    match_right = match_C > 0.5
    if not len(captions_C):
        accuracy = float(match_right.double().mean())
        return {"accuracy": accuracy, "match": accuracy, "mismatch": None, "n": len(match_C)}
    mismatch_right = score_pairs(model, split, captions_C, images_C, batch_size, device) < 0.5
    return {
        "accuracy": float(torch.cat([match_right, mismatch_right]).double().mean()),
        "match": float(match_right.double().mean()),
        "mismatch": float(mismatch_right.double().mean()),
        "n": len(match_C) + len(captions_C),
    }
