"""Counts model FLOPs: what a batch needs mathematically, whatever kernels compute it.

Matrix products on valid positions are counted, and in an encoder's last layer the rows that a loss uses
(output_rows.py). A multiplication and an addition count as two. A training step is three times its forward pass: one
for the forward, two for the backward.

Not counted are padding, what activation checkpointing computes again, element-wise work, the embedding look-up,
RoIAlign, and grounding's phrase-region products (below 0.1 % of the base model). The mismatched pairs of ITM are
counted with the lengths of the matched ones. Only the device knows which pairs they are, and over a batch the
positions are nearly the same. Legend: D hidden, W word rows, P phrases.
"""

from __future__ import annotations

import copy

import torch
from torch.utils.flop_counter import FlopCounterMode

from mvptr_ds.data.collate import Batch
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.vision import GEOMETRY_DIM
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.objectives.table import Chosen

FORWARD_AND_BACKWARD = 3


def forward_flops(lengths: Lengths, model: MvptrConfig, objectives: Chosen, num_samples: float) -> dict[str, float]:
    """Returns one forward pass's FLOPs by part of the model and by objective, without an image backbone.

    Args:
        num_samples: samples of the global micro-batch, which contrast compares each sample with.
    """
    dim, parts = model.hidden_size, objectives.computed_parts()
    before, after = 2 * 3 * dim**2, 2 * (dim**2 + 2 * dim * model.intermediate_size)  # of attention, for each position
    a_pair = 4 * dim  # query x key, and probability x value

    def encoder(num_layers: int, positions: float, pairs: float, last: float) -> float:
        return num_layers * (before * positions + a_pair * pairs) + after * ((num_layers - 1) * positions + last)

    last = last_layer_rows(lengths, objectives)
    out: dict[str, float] = {}
    if "text" in parts:
        out["text"] = encoder(model.num_text_layers, lengths.text, lengths.text_pairs, last["text"])
    if "visual" in parts:
        out["visual"] = encoder(model.num_visual_layers, lengths.visual, lengths.visual_pairs, last["visual"])
        out["regions"] = 2 * (model.region_feature_dim + GEOMETRY_DIM) * dim * lengths.regions
    if "cross" in parts:
        calls = objectives.num_cross_calls()
        positions, pairs = calls * lengths.cross, calls * lengths.cross_pairs
        out["cross"] = encoder(model.num_cross_layers, positions, pairs, last["cross"])
    return out | objectives.head_flops(lengths, model, num_samples)


def last_layer_rows(lengths: Lengths, objectives: Chosen) -> dict[str, float]:
    """Rows that each encoder's last layer computes wholly, those of both cross calls together."""
    number = {encoder: lengths.rows(kinds) for encoder, kinds in objectives.output_rows().items()}
    mismatched = number["mismatched"] if objectives.needs_mismatched() else 0.0
    return {
        "text": number.get("text", lengths.text),
        "visual": number.get("visual", lengths.visual),
        "cross": number.get("matched", lengths.cross) + mismatched,
    }


def backbone_flops(model: Mvptr) -> float:
    """Returns the FLOPs of one image's forward pass through the backbone, or 0. It counts on a copy without memory."""
    backbone = model.region_embedding.backbone
    if backbone is None:
        return 0.0
    with torch.device("meta"):
        copy = type(backbone)(backbone.net.config, freeze=True).eval()
        image_13HW = torch.empty(1, 3, model.config.image_size, model.config.image_size)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        copy.net(image_13HW)
    return float(counter.get_total_flops())


class StepFlops:
    """Training FLOPs of the batches of a stage, whose module says what it computes."""

    def __init__(self, module: TaskModule, num_ranks: int) -> None:
        assert module.objectives is not None
        self.model: MvptrConfig = copy.copy(module.model.config)  # type: ignore[assignment]  # annotated as its base class
        self.model.num_cross_layers = module.num_cross_layers or self.model.num_cross_layers
        self.objectives, self.num_ranks = module.objectives, num_ranks
        self.an_image = backbone_flops(module.model) * (1 if self.model.freeze_backbone else FORWARD_AND_BACKWARD)

    def of(self, batch: Batch) -> float:
        """Returns the FLOPs of forward and backward of a micro-batch on the host."""
        return self.of_lengths(Lengths.of(batch))

    def of_lengths(self, lengths: Lengths) -> float:
        """Returns the FLOPs of a micro-batch of these lengths, as `forward_flops` does."""
        num_samples = lengths.samples * self.num_ranks
        parts = forward_flops(lengths, self.model, self.objectives, num_samples)
        return FORWARD_AND_BACKWARD * sum(parts.values()) + self.an_image * lengths.images
