"""Evaluates retrieval on parts of a split, as COCO's 1k protocol does: five folds of 1,000 images, and their mean.

Legend: C captions, I images.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from statistics import mean
from typing import Any

import torch

from mvptr_ds.errors import DataError
from mvptr_ds.evaluation.encode import EncodedSplit
from mvptr_ds.evaluation.retrieval import recalls, rerank
from mvptr_ds.model.mvptr import Mvptr


def folds_of(split: EncodedSplit, num_images: int) -> Iterator[EncodedSplit]:
    """Yields parts of so many images each, in the order of the split, with their captions; a rest is left out.

    Raises:
        DataError: the split has fewer images.
    """
    total = len(split.image_global_ID)
    if total < num_images:
        raise DataError(f"eval.fold_images is {num_images}, but the split has {total} images: lower it, or set it to 0")
    for start in range(0, total - num_images + 1, num_images):
        images, captions_C = slice(start, start + num_images), (split.image_of_C >= start)
        captions_C &= split.image_of_C < start + num_images
        yield replace(
            split,
            text_CTD=split.text_CTD[captions_C],
            text_mask_CT=split.text_mask_CT[captions_C],
            phrase_mask_CT=split.phrase_mask_CT[captions_C],
            text_global_CD=split.text_global_CD[captions_C],
            regions_IRD=split.regions_IRD[images],
            region_mask_IR=split.region_mask_IR[images],
            image_global_ID=split.image_global_ID[images],
            image_of_C=split.image_of_C[captions_C] - start,
        )


@torch.inference_mode()
def score_folds(
    model: Mvptr, split: EncodedSplit, num_images: int, top_k: int, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Returns `num_folds`, `num_images`, and the means over the folds of `retrieval` and `rerank`."""
    coarse, fine = [], []
    for fold in folds_of(split, num_images):
        coarse.append(recalls(fold.sim_CI, fold.image_of_C))
        fine.append(reranked_recalls(model, fold, top_k, batch_size, device))
    return {
        "num_folds": len(coarse),
        "num_images": num_images,
        "retrieval": {name: mean(of_fold[name] for of_fold in coarse) for name in coarse[0]},
        "rerank": {name: mean(of_fold[name] for of_fold in fine) for name in fine[0]},
    }


def reranked_recalls(
    model: Mvptr, split: EncodedSplit, top_k: int, batch_size: int, device: torch.device
) -> dict[str, float]:
    """Returns `recalls` of both directions, each in its own re-ranked order."""
    both = rerank(model, split, top_k, batch_size, device)
    out: dict[str, float] = {}
    for way, scores_CI in zip(("t2i", "i2t"), both, strict=True):
        found = recalls(scores_CI, split.image_of_C)
        out |= {name: value for name, value in found.items() if name.startswith(way)}
    return out
