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

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from mvptr_ds.data.collate import IGNORE, Batch
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.vision import GEOMETRY_DIM
from mvptr_ds.objectives.task import Task

FORWARD_AND_BACKWARD = 3


@dataclass(frozen=True)
class Lengths:
    """Sums what formulas need over the samples of a batch. Pairs are squares of lengths, which attention compares."""

    samples: float
    text: float  # slots of the text encoder: tokens and phrases
    text_pairs: float
    visual: float  # tags and regions
    visual_pairs: float
    cross: float  # text slots and regions
    cross_pairs: float
    regions: float
    phrases: float = 0.0
    picked_tokens: float = 0.0  # slots that a head predicts
    picked_tags: float = 0.0
    picked_phrases: float = 0.0
    scored_regions: float = 0.0  # regions of samples with a picked tag (region MCR)
    images: float = 0.0  # images that go through a backbone

    @classmethod
    def of(cls, batch: Batch) -> Lengths:
        """Sums the lengths of a batch on the host, since on a GPU every number would wait for the device."""
        text, tags, regions = (
            mask.sum(-1).double() for mask in (batch.text_mask_BT, batch.tag_mask_BG, batch.region_mask_BR)
        )
        visual, cross = tags + regions, text + regions
        picked_BG = batch.tag_labels_BG != IGNORE
        return cls(
            samples=len(batch),
            text=_total(text),
            text_pairs=_total(text**2),
            visual=_total(visual),
            visual_pairs=_total(visual**2),
            cross=_total(cross),
            cross_pairs=_total(cross**2),
            regions=_total(regions),
            phrases=_total(batch.phrase_mask_BT),
            picked_tokens=_total(batch.mlm_labels_BT != IGNORE),
            picked_tags=_total(picked_BG),
            picked_phrases=_total(batch.phrase_labels_BT != IGNORE),
            scored_regions=_total(regions * picked_BG.any(-1)),
            images=0 if batch.images_B3HW is None else len(batch),
        )

    def read(self, kinds: frozenset[str]) -> float:
        """Returns the number of rows of these kinds (output_rows.py), which do not overlap."""
        numbers = {
            "first": self.samples,
            "tokens": self.picked_tokens,
            "tags": self.picked_tags,
            "phrases": self.phrases,
            "picked_phrases": self.picked_phrases,
            "text": self.text,
            "regions": self.regions,
            "asking_regions": self.scored_regions,
        }
        return sum(numbers[kind] for kind in kinds)


def _total(values: Tensor) -> float:
    return float(values.sum())


def forward_flops(
    lengths: Lengths,
    model: MvptrConfig,
    parts: Collection[str],
    objectives: Collection[str],
    num_samples: float,
    reads: Mapping[str, frozenset[str]],
) -> dict[str, float]:
    """Returns the FLOPs of one forward pass by part of the model, without an image backbone.

    Args:
        parts: `Task.trained_parts`: which of the encoders run.
        objectives: those with a weight.
        num_samples: samples of the global micro-batch, which contrast compares each sample with.
        reads: `Task.reads`: the rows that each encoder's last layer computes wholly.
    """
    dim, on = model.hidden_size, set(objectives)
    before, after = 2 * 3 * dim**2, 2 * (dim**2 + 2 * dim * model.intermediate_size)  # of attention, for each position
    a_pair = 4 * dim  # query x key, and probability x value

    def encoder(num_layers: int, positions: float, pairs: float, read: float) -> float:
        return num_layers * (before * positions + a_pair * pairs) + after * ((num_layers - 1) * positions + read)

    read = rows_read(lengths, objectives, reads)

    def head(slots: float, rows: int) -> float:
        return slots * 2 * (dim**2 + dim * rows)

    out: dict[str, float] = {}
    if "text" in parts:
        out["text"] = encoder(model.num_text_layers, lengths.text, lengths.text_pairs, read["text"])
    if "visual" in parts:
        out["visual"] = encoder(model.num_visual_layers, lengths.visual, lengths.visual_pairs, read["visual"])
        out["regions"] = 2 * (model.region_feature_dim + GEOMETRY_DIM) * dim * lengths.regions
    if "cross" in parts:
        passes = num_cross_passes(objectives)
        positions, pairs = passes * lengths.cross, passes * lengths.cross_pairs
        out["cross"] = encoder(model.num_cross_layers, positions, pairs, read["cross"])
    slots = {"mlm": lengths.picked_tokens, "mcr_tags": lengths.picked_tags, "mcr_regions": lengths.scored_regions}
    out["word_heads"] = head(sum(number for name, number in slots.items() if name in on), model.num_words)
    if "mcr_phrases" in on:
        out["phrase_head"] = head(lengths.picked_phrases, model.num_phrases)
    if "itm" in on:
        out["itm"] = 2 * lengths.samples * 2 * (dim**2 + 2 * dim)
    if "vsc" in on:
        out["contrast"] = lengths.samples * 4 * (dim**2 + dim * num_samples)
    return out


def num_cross_passes(objectives: Collection[str]) -> int:
    """Returns the passes of the cross encoder: matched pairs, and mismatched ones where an objective needs them."""
    return 2 if set(objectives) & {"itm", "wpg_cross"} else 1


def rows_read(lengths: Lengths, objectives: Collection[str], reads: Mapping[str, frozenset[str]]) -> dict[str, float]:
    """Returns the rows that each encoder's last layer computes wholly, with both cross passes added."""
    number = {name: lengths.read(kinds) for name, kinds in reads.items()}
    strangers = number.get("mismatched", lengths.cross) if num_cross_passes(objectives) == 2 else 0.0
    return {
        "text": number.get("text", lengths.text),
        "visual": number.get("visual", lengths.visual),
        "cross": number.get("matched", lengths.cross) + strangers,
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
    """Counts the training FLOPs of the batches of a task."""

    def __init__(self, task: Task, num_ranks: int) -> None:
        self.model: MvptrConfig = task.model.config  # type: ignore[assignment]  # transformers annotates its base class
        self.objectives, self.num_ranks, self.reads = frozenset(task.weights), num_ranks, task.reads
        always = () if task.stage == "stage1" else ("text", "visual")
        self.parts = frozenset((*task.trained_parts(), *always))
        self.an_image = backbone_flops(task.model) * (1 if self.model.freeze_backbone else FORWARD_AND_BACKWARD)

    def of(self, batch: Batch) -> float:
        """Returns the FLOPs of forward and backward of a micro-batch on the host."""
        return self.of_lengths(Lengths.of(batch))

    def of_lengths(self, lengths: Lengths) -> float:
        num_samples = lengths.samples * self.num_ranks
        parts = forward_flops(lengths, self.model, self.parts, self.objectives, num_samples, self.reads)
        return FORWARD_AND_BACKWARD * sum(parts.values()) + self.an_image * lengths.images
