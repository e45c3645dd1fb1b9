"""Batch -> what the model reads: the valid slots of all samples, packed. The one bridge between data and model.

Legend: N rows of all samples, K rows with a label, T text slots, G tag slots, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.data.collate import IGNORE, Batch
from mvptr_ds.model.packed import Packed


@dataclass(frozen=True)
class MaskedTargets:
    """The rows that are to be predicted, and what stood there."""

    mask: Packed  # bool, on the host: which of the packed rows
    rows_K: Tensor  # int64, their places among them
    labels_K: Tensor  # int64
    samples: tuple[int, ...]  # whose each is, on the host

    @classmethod
    def of(cls, labels_BL: Tensor, lengths: tuple[int, ...], device: torch.device) -> MaskedTargets:
        labels = Packed.of_padded(labels_BL.cpu(), lengths)
        mask = labels.like(labels.rows != IGNORE)
        rows_K = mask.rows.nonzero().flatten()
        samples = tuple(labels.owners()[rows_K].tolist())
        labels_K = labels.rows[rows_K].to(device, non_blocking=True)
        return cls(mask, rows_K.to(device, non_blocking=True), labels_K, samples)


@dataclass(frozen=True)
class PackedBatch:
    """Texts, tags and regions of a batch on its device."""

    text_ids: Packed  # int64
    phrase_mask: Packed  # bool, text rows that hold a phrase
    phrases_on_host: Packed  # the same
    masked_tokens: MaskedTargets  # of the text rows, wordpieces
    masked_phrases: MaskedTargets  # of the text rows, numbers in the phrase vocabulary
    tag_ids: Packed  # int64
    masked_tags: MaskedTargets  # of the tag rows, wordpieces
    geometry: Packed  # float32
    features: Packed | None  # float32
    images_B3HW: Tensor | None  # uint8
    image_index_B: Tensor  # int64, which image a sample shows
    labels: tuple[dict[str, Any], ...] = ()  # of each sample, what the task makes of those of the caption
    text_segments: Packed | None = None  # int64, of the text rows, where some of them hold tags

    @classmethod
    def of(cls, batch: Batch, device: torch.device | None = None) -> PackedBatch:
        """Packs a batch on `device` (default: where it is). Nothing waits for the device for a batch on the host."""
        device = batch.text_ids_BT.device if device is None else device

        def text(slots_BT: Tensor) -> Packed:
            return Packed.of_padded(slots_BT, batch.text_lengths)

        masked_tokens = MaskedTargets.of(batch.mlm_labels_BT, batch.text_lengths, device)
        masked_phrases = MaskedTargets.of(batch.phrase_labels_BT, batch.text_lengths, device)
        masked_tags = MaskedTargets.of(batch.tag_labels_BG, batch.tag_lengths, device)
        phrases_on_host = Packed.of_padded(batch.phrase_mask_BT.cpu(), batch.text_lengths)
        batch = batch.to(device, non_blocking=True)
        features_BRF = batch.region_features_BRF
        return cls(
            text_ids=text(batch.text_ids_BT),
            phrase_mask=text(batch.phrase_mask_BT),
            phrases_on_host=phrases_on_host,
            masked_tokens=masked_tokens,
            masked_phrases=masked_phrases,
            tag_ids=Packed.of_padded(batch.tag_ids_BG, batch.tag_lengths),
            masked_tags=masked_tags,
            geometry=Packed.of_padded(batch.region_geometry_BR6, batch.region_lengths),
            features=None if features_BRF is None else Packed.of_padded(features_BRF, batch.region_lengths),
            images_B3HW=batch.images_B3HW,
            image_index_B=batch.image_index_B,
            labels=batch.labels,
            text_segments=None if batch.tags_in_text_BT is None else text(batch.tags_in_text_BT.long()),
        )
