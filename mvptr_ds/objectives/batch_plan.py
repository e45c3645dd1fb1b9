"""What a task's pass reads of a batch, made ahead by the processes that load it: packed rows and index arrays.

A step then makes no index array but those that follow from its negatives (negatives.py), and copies a batch in one
piece, while the step before it is computed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch

from mvptr_ds.data import one_block
from mvptr_ds.data.collate import Batch
from mvptr_ds.objectives import output_rows
from mvptr_ds.objectives.hard_negatives import OwnDraws
from mvptr_ds.objectives.packed_batch import PackedBatch


@dataclass
class ReadyBatch:
    """A batch on the host, for meters, and what the model reads of it."""

    batch: Batch  # without region features, which only the model reads
    packed: PackedBatch

    def pin_memory(self) -> ReadyBatch:
        """Returns it in pinned memory, as one block (DataLoader looks for this name)."""
        return one_block.pinned(self)


@dataclass(frozen=True)
class BatchPlan:
    """Packs batches ahead, with all that the passes of a task will ask for. Loader processes call it.

    Args:
        rows: encoder -> kinds of rows that its last layer computes.
        crosses: whether the cross encoder runs on the matched pairs alone.
        aligned: whether the global states, or the cross encoder, read slot 0.
        draws_slots: text slots for which a step draws numbers; 0: it draws none.
        buckets: whether the encoders fill their rows up (`kernels.fills_buckets`).
    """

    rows: Mapping[str, frozenset[str]]
    crosses: bool = False
    aligned: bool = False
    draws_slots: int = 0
    buckets: bool = False

    def __call__(self, batch: Batch) -> ReadyBatch:
        packed = self.pack(batch)
        return ReadyBatch(replace(batch, region_features_BRF=None), packed)

    def pack(self, batch: Batch) -> PackedBatch:
        """Packs a batch on the host."""
        packed = PackedBatch.of(batch, torch.device("cpu"))
        text, tags, regions = packed.text_ids.index, packed.tag_ids.index, packed.geometry.index
        firsts = ("starts",) if self.aligned else ()
        text.prepare("positions", "owners", "filled", "lengths", *firsts)
        text.prepare_attention(self.buckets)
        tags.prepare("positions", "owners", *firsts)
        regions.prepare("slots", "mask", "owners", "filled", "lengths")
        packed.tag_regions.of_tags.prepare("slots", "mask")
        for index in (packed.visual, *((packed.pairs,) if self.crosses else ())):
            index.prepare("firsts", "seconds")
            index.sequences.prepare_attention(self.buckets)
        for encoder, kinds in self.rows.items():
            if encoder != "mismatched" and (self.crosses or encoder != "matched"):
                packed.output_rows[encoder, kinds] = output_rows.needed_rows(encoder, kinds, packed)
        if self.draws_slots:
            packed.draws = OwnDraws.blank(len(packed), self.draws_slots)
        return packed
