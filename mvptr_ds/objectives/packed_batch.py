"""Batch -> what the model reads: the valid slots of all samples, packed. The one bridge between data and model.

Packing happens on the host. `PackedBatch.to` then copies rows, labels and index arrays in one piece.

Legend: N rows of all samples, K rows with a label, P pairs of a masked tag and a region of its image, T text slots,
G tag slots, R regions.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvptr_ds.data import one_block
from mvptr_ds.data.collate import IGNORE, Batch
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.sequence_index import JoinIndex, SequenceIndex, ranges
from mvptr_ds.objectives.hard_negatives import OwnDraws


@dataclass(frozen=True)
class MaskedTargets:
    """The rows that are to be predicted, and what stood there."""

    rows_K: Tensor  # int64, their places among the packed rows
    labels_K: Tensor  # int64
    samples: tuple[int, ...]  # whose each is, on the host

    @classmethod
    def of(cls, labels: Packed) -> MaskedTargets:
        """Returns the targets of packed labels on the host, int64 [N]."""
        rows_K = (labels.rows != IGNORE).nonzero().flatten()
        return cls(rows_K, labels.rows[rows_K], tuple(labels.owners()[rows_K].tolist()))


@dataclass(frozen=True)
class TagRegions:
    """The regions that a masked tag may be recovered from: those of its own image.

    Scoring a region against all words is dear, so only the images in which a tag is masked take part.
    """

    rows_M: Tensor  # int64, the regions of these images among all
    picked_P: Tensor  # int64, places among those
    labels_P: Tensor  # int64, the tag's wordpiece
    of_tags: SequenceIndex  # how many pairs each masked tag has

    @classmethod
    def of(cls, masked_tags: MaskedTargets, regions: SequenceIndex) -> TagRegions:
        """Pairs masked tags with regions, on the host."""
        lengths_B = np.array(regions.lengths, dtype=np.int64)
        samples, place_K = np.unique(np.array(masked_tags.samples, dtype=np.int64), return_inverse=True)
        lengths_K = lengths_B[samples][place_K]
        rows_M = ranges((np.cumsum(lengths_B) - lengths_B)[samples], lengths_B[samples])
        starts_K = (np.cumsum(lengths_B[samples]) - lengths_B[samples])[place_K]
        labels_P = masked_tags.labels_K.numpy().repeat(lengths_K)
        picked_P = ranges(starts_K, lengths_K)
        of_tags = SequenceIndex(tuple(lengths_K.tolist()))
        return cls(torch.from_numpy(rows_M), torch.from_numpy(picked_P), torch.from_numpy(labels_P), of_tags)


@dataclass
class PackedBatch:
    """Texts, tags and regions of a batch on its device, with the index arrays that follow from their lengths."""

    text_ids: Packed  # int64
    phrase_mask: Packed  # bool, text rows that hold a phrase
    masked_tokens: MaskedTargets  # of the text rows, wordpieces
    masked_phrases: MaskedTargets  # of the text rows, numbers in the phrase vocabulary
    tag_ids: Packed  # int64
    masked_tags: MaskedTargets  # of the tag rows, wordpieces
    tag_regions: TagRegions
    geometry: Packed  # float32
    features: Packed | None  # float16, or float32 where a sample's are
    images_B3HW: Tensor | None  # uint8
    image_index_B: Tensor  # int64, which image a sample shows
    visual: JoinIndex  # tags and regions
    pairs: JoinIndex  # texts and regions
    labels: tuple[dict[str, Any], ...] = ()  # of each sample, what the task makes of those of the caption
    text_segments: Packed | None = None  # int64, of the text rows, where some of them hold tags
    # the rows that are read of encoders, by encoder and kinds (output_rows.py), where they are there already
    output_rows: dict[tuple[str, frozenset[str]], Tensor | None] = field(default_factory=dict)
    draws: OwnDraws | None = None  # of this step, where they are made already
    on_host: PackedBatch | None = None  # what this is a copy of; None: itself

    @classmethod
    def of(cls, batch: Batch, device: torch.device | None = None) -> PackedBatch:
        """Packs a batch and copies it to `device` (default: where it is). A batch on the host waits for no device."""
        device = batch.text_ids_BT.device if device is None else device
        batch = batch.to(torch.device("cpu"))
        text, tags, regions = map(SequenceIndex, (batch.text_lengths, batch.tag_lengths, batch.region_lengths))

        def packed(slots_BLx: Tensor, index: SequenceIndex) -> Packed:
            return Packed.of_padded(slots_BLx, index.lengths, index)

        masked_tags = MaskedTargets.of(packed(batch.tag_labels_BG, tags))
        features_BRF, segments_BT = batch.region_features_BRF, batch.tags_in_text_BT
        whole = cls(
            text_ids=packed(batch.text_ids_BT, text),
            phrase_mask=packed(batch.phrase_mask_BT, text),
            masked_tokens=MaskedTargets.of(packed(batch.mlm_labels_BT, text)),
            masked_phrases=MaskedTargets.of(packed(batch.phrase_labels_BT, text)),
            tag_ids=packed(batch.tag_ids_BG, tags),
            masked_tags=masked_tags,
            tag_regions=TagRegions.of(masked_tags, regions),
            geometry=packed(batch.region_geometry_BR6, regions),
            features=None if features_BRF is None else packed(features_BRF, regions),
            images_B3HW=batch.images_B3HW,
            image_index_B=batch.image_index_B,
            visual=JoinIndex(tags, regions),
            pairs=JoinIndex(text, regions),
            labels=batch.labels,
            text_segments=None if segments_BT is None else packed(segments_BT.long(), text),
        )
        return whole.to(device)

    def to(self, device: torch.device) -> PackedBatch:
        """Returns it on a device, by one copy that nothing waits for."""
        moved = one_block.to_device(self, device)
        if moved is not self:
            moved.on_host = self
        return moved

    @property
    def host(self) -> PackedBatch:
        """The same on the host, where its content can be looked at without waiting for the device."""
        return self if self.on_host is None else self.on_host

    def record_stream(self, stream: torch.cuda.Stream) -> None:
        """Keeps its memory on the device from being used anew before `stream` has read it."""
        self.image_index_B.record_stream(stream)  # all of it lies in one block

    def __len__(self) -> int:
        return len(self.text_ids)
