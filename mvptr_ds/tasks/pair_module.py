"""The module of a task that asks the cross encoder about a text and the picture beside it.

Legend: B samples of this rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvptr_ds.data.collate import Batch
from mvptr_ds.model import kernels
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.batch_plan import BatchPlan
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.module import TaskModule, TaskOutput
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.passes import PairPass
from mvptr_ds.objectives.table import REGIONS, WORDS, Chosen, Objective

Labels = Sequence[Mapping[str, Any]]  # of each sample, as the task's `read_labels` makes them


class PairModule(TaskModule):
    """Computes logits from the cross encoder's states of each text with its picture, and their loss.

    Args:
        name: of the task, and of its loss in the log.
        settings: what gives the head's rows their meaning, beside the task's name.
        reads: the kinds of rows (output_rows.py) of the cross encoder that the head reads.
        parts: parts of the model that the head goes through, such as the pooler.
        num_cross_layers: layers of the cross encoder that run; None: all.
    """

    objectives: Chosen

    def __init__(
        self,
        model: Mvptr,
        name: str,
        head: nn.Module | None,
        settings: Mapping[str, Any],
        *,
        reads: Collection[str] = ("first",),
        parts: Collection[str] = (),
        num_cross_layers: int | None = None,
    ) -> None:
        super().__init__(model, head, {"task": name, **settings})
        self.name, self.num_cross_layers = name, num_cross_layers
        row = Objective(
            compute=lambda outputs: self.loss(self.logits(outputs), outputs.packed.labels),
            outputs={"visual": frozenset({"regions"}), "matched": frozenset(reads)},
            needs=(WORDS, REGIONS),
            target="labels",
            heads=frozenset(parts),
            flops=lambda lengths, config, _: self.head_flops(lengths, config),
        )
        self.objectives = Chosen({name: row}, aligned=True)

    @abstractmethod
    def logits(self, outputs: PairPass) -> Tensor:
        """Returns the head's scores of each sample, at least float32."""

    @abstractmethod
    def loss(self, logits: Tensor, labels: Labels) -> LossSum:
        """Returns the loss of `logits`, a value a sample."""

    @abstractmethod
    def head_flops(self, lengths: Lengths, config: MvptrConfig) -> float:
        """Returns the FLOPs of the head, one forward pass."""

    def trained_parts(self) -> list[str]:
        return self.objectives.trained_parts()

    def reaches(self, name: str) -> bool:
        layers = "cross_encoder.layers."
        if self.num_cross_layers is None or not name.startswith(layers):
            return True
        return int(name.removeprefix(layers).split(".")[0]) < self.num_cross_layers

    def batch_plan(self) -> BatchPlan:
        """Returns what packs batches for the task."""
        return BatchPlan(
            self.objectives.output_rows(), crosses=True, aligned=True, buckets=kernels.fills_buckets(self.model.device)
        )

    def outputs(self, batch: Batch | PackedBatch) -> PairPass:
        """Runs the model over a batch."""
        packed, rows = self.packed(batch), self.objectives.output_rows()
        return PairPass(self.model, packed, rows, num_cross_layers=self.num_cross_layers)

    def packed(self, batch: Batch | PackedBatch) -> PackedBatch:
        """Returns what the model reads of a batch, on its device."""
        if isinstance(batch, PackedBatch):
            return batch
        return self.batch_plan().pack(batch).to(self.model.device)

    def forward(self, batch: Batch | PackedBatch, step: int, accumulation: int = 0) -> TaskOutput:
        """Computes the loss of a micro-batch, a mean over the samples of all ranks."""
        outputs = self.outputs(batch)
        return self.normalised({self.name: self.loss(self.logits(outputs), outputs.packed.labels)}, {self.name: 1.0})


def at_least_float32(logits: Tensor) -> Tensor:
    """Returns logits as float32, where they are not float64 already: no loss is half precision."""
    return logits if logits.dtype == torch.float64 else logits.float()


def fresh_linear(num_inputs: int, num_outputs: int, std: float, seed: int) -> nn.Linear:
    """Returns a linear layer of N(0, std) weights and zero biases; the run's own random numbers stay as they are."""
    layer = nn.Linear(num_inputs, num_outputs)
    generator = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():
        layer.weight.normal_(std=std, generator=generator)
        layer.bias.zero_()
    return layer
