"""Evaluates masked concept recovering (MCR): masked tags from the regions, masked phrases from the caption.

Legend: B samples, N rows of all samples, K asked rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvptr_ds.data.collate import IGNORE
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.loader import eval_batches
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.evaluation.encode import SplitInput, new_images
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.user_io.progress import progress_bar


@torch.inference_mode()
def recover_concepts(
    model: Mvptr, split: SplitInput, index: SampleIndex, samples: SampleBuilder, batch_size: int, device: torch.device
) -> dict[str, Any]:
    """Returns `accuracy`, `majority` and `n` of tag wordpieces, each image once, and in `phrases` those of phrases.

    Every masked slot is `[MASK]`. Training leaves a tenth of them as they are, and those could be copied. The words of
    half of the phrases stay visible, and the words of the others are masked too, as in training. The majority is the
    share of the most frequent answer. The masks depend only on the sample's number, so every evaluation has the same.

    Args:
        model: in evaluation mode.
        samples: the builder of samples, which masks tags and phrases (`predict_phrases`).
    """
    tags: list[tuple[Tensor, Tensor]] = []
    phrases: list[tuple[Tensor, Tensor]] = []
    mask_id = samples.words.mask_id
    seen = 0
    batches = eval_batches(index, samples, batch_size)
    for batch in progress_bar(batches, total=-(-len(index) // batch_size), desc="recover", leave=False):
        new, seen = new_images(batch, seen), int(batch.image_index_B[-1]) + 1
        images_B = batch.image_index_B[new]
        packed = PackedBatch.of(batch, device)
        if new:
            labels = Packed.of_padded(batch.tag_labels_BG, batch.tag_lengths).take(new)
            picked_K = (labels.rows != IGNORE).nonzero().flatten()
            rows_K, ids = picked_K.to(device), packed.tag_ids.take(new)
            lengths = split.region_mask_IR[images_B].sum(1).tolist()
            regions = Packed.of_padded(split.embedded_IRD[images_B], lengths).to(device, model.dtype)
            states, _ = model.encode_visual(ids.like(ids.rows.index_fill(0, rows_K, mask_id)), regions)
            tags.append((model.tag_logits(states.rows[rows_K]).argmax(-1).cpu(), labels.rows[picked_K]))
        masked, ids = packed.masked_phrases, packed.text_ids
        if model.config.num_phrases and masked.samples:
            text = model.encode_text(ids.like(ids.rows.index_fill(0, masked.rows_K, mask_id)))
            answers_K = model.phrase_logits(text.rows[masked.rows_K]).argmax(-1)
            phrases.append((answers_K.cpu(), masked.labels_K.cpu()))
    return {**_accuracy(tags), "phrases": _accuracy(phrases)}


def _accuracy(parts: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    """Returns the scores of (answers, labels), int64 [N] each."""
    num = sum(len(labels) for _, labels in parts)
    if not num:
        return {"accuracy": None, "majority": None, "n": 0}
    answers_N, labels_N = (torch.cat(column) for column in zip(*parts, strict=True))
    most = int(labels_N.unique(return_counts=True)[1].max())
    return {"accuracy": float((answers_N == labels_N).double().mean()), "majority": most / num, "n": num}
