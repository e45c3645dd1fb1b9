"""Batch -> what the model reads: the valid slots of all samples, packed. The one bridge between data and model.

Legend: N rows of all samples, T text slots, G tag slots, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from mvptr_ds.data.collate import Batch
from mvptr_ds.model.packed import Packed


@dataclass(frozen=True)
class PackedBatch:
    """Texts, tags and regions of a batch on its device."""

    text_ids: Packed  # int64
    phrase_mask: Packed  # bool, text rows that hold a phrase
    mlm_labels_N: Tensor  # int64, of the text rows
    phrase_labels_N: Tensor  # int64, of the text rows
    tag_ids: Packed  # int64
    tag_labels_N: Tensor  # int64, of the tag rows
    geometry: Packed  # float32
    features: Packed | None  # float32
    images_B3HW: Tensor | None  # uint8

    @classmethod
    def of(cls, batch: Batch) -> PackedBatch:
        def text(slots_BT: Tensor) -> Packed:
            return Packed.of_padded(slots_BT, batch.text_lengths)

        features_BRF = batch.region_features_BRF
        return cls(
            text_ids=text(batch.text_ids_BT),
            phrase_mask=text(batch.phrase_mask_BT),
            mlm_labels_N=text(batch.mlm_labels_BT).rows,
            phrase_labels_N=text(batch.phrase_labels_BT).rows,
            tag_ids=Packed.of_padded(batch.tag_ids_BG, batch.tag_lengths),
            tag_labels_N=Packed.of_padded(batch.tag_labels_BG, batch.tag_lengths).rows,
            geometry=Packed.of_padded(batch.region_geometry_BR6, batch.region_lengths),
            features=None if features_BRF is None else Packed.of_padded(features_BRF, batch.region_lengths),
            images_B3HW=batch.images_B3HW,
        )
