"""Estimates the bytes that are sent and the time of a step, from named assumptions. None was measured on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.table import Chosen
from mvptr_ds.planning.memory import FLOAT32, Zero


@dataclass(frozen=True)
class Gpu:
    """Describes a GPU: memory and links, as vendors state them for the usual servers. None of it was measured."""

    name: str  # a key of timing.VENDOR_TFLOPS
    memory_gib: float
    node_gb_per_s: float  # to other GPUs of the node, one direction
    network_gb_per_s: float  # to other nodes, with one adapter a GPU
    bf16: bool = True


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100", 32, 150, 12.5, bf16=False),
        Gpu("A100", 80, 300, 25),
        Gpu("H100", 80, 450, 50),
        Gpu("H200", 141, 450, 50),
        Gpu("L40S", 48, 32, 25),
        Gpu("A10", 24, 32, 12.5),
        Gpu("RTX 4090", 24, 32, 12.5),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Lists the numbers that no formula gives."""

    efficiency: float = 0.35  # share of the vendor's matrix-product peak that forward and backward reach
    overlap: float = 0.5  # share of the backward pass that may hide the gradients' communication
    link_efficiency: float = 0.7  # share of the links' figures that collectives reach
    loader_samples_per_core_s: float = 1_000.0
    host_s: float = 0.15  # seconds to launch a micro-batch's kernels from Python, however fast they are (docs/gpu.md)
    overhead_gib: float = 2.0  # CUDA's context, NCCL's buffers, fragmentation


@dataclass(frozen=True)
class Traffic:
    """Counts the bytes that a rank sends in one optimiser step. It receives as many."""

    gradients: float
    parameters: float
    contrast: float  # global states of VSC and their gradients
    exchanged: float  # states of other samples, for ITM's and WPG's negatives, and their gradients

    @property
    def total(self) -> float:
        return self.gradients + self.parameters + self.contrast + self.exchanged


def traffic(
    trained: int,
    dim: int,
    element_bytes: int,
    zero: Zero,
    num_ranks: int,
    accumulation: int,
    lengths: Lengths,
    objectives: Chosen,
) -> Traffic:
    """Returns the bytes that ring collectives send: each rank sends (n - 1) / n of what is reduced or gathered.

    Args:
        lengths: lengths of one rank's micro-batch.
    """
    share = (num_ranks - 1) / num_ranks
    whole = trained * element_bytes * share
    reductions = accumulation if zero.stage >= 2 else 1
    gathers = 2 * accumulation if zero.stage == 3 else 1
    # Both global states are gathered in float32, and their gradients are reduced to their owners.
    contrast = 4 * lengths.samples * num_ranks * share * dim * FLOAT32 if objectives.scopes() else 0.0
    rows = 0.0
    if objectives.needs_mismatched():
        rows += (lengths.text + lengths.regions) / 2  # half of the samples fetch a text, the others an image
    if "wpg" in objectives.scopes():
        rows += lengths.regions
    return Traffic(
        gradients=reductions * whole,
        parameters=gathers * whole,
        contrast=accumulation * contrast,
        exchanged=accumulation * 2 * rows * share * dim * element_bytes,
    )


def contrast_bytes(dim: int, samples: float, num_ranks: int, scores_bytes: float) -> float:
    """Returns the bytes that contrast holds: global states and gradients in float32, and three chunks of scores."""
    return 4 * samples * num_ranks * dim * FLOAT32 + 3 * scores_bytes


@dataclass(frozen=True)
class StepTime:
    compute_s: float
    gradients_s: float  # communication of gradients, before any is hidden
    other_communication_s: float
    exposed_s: float  # communication that no computation hides

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s


def step_time(
    flop: float, peak_tflops: float, accumulation: int, sent: Traffic, gb_per_s: float, assumed: Assumptions
) -> StepTime:
    """Returns the time of one optimiser step from the `flop` and traffic of one rank, over a link of `gb_per_s`."""
    compute_s = max(flop / (assumed.efficiency * peak_tflops * 1e12), accumulation * assumed.host_s)
    per_s = assumed.link_efficiency * gb_per_s * 1e9
    gradients_s = sent.gradients / per_s
    other_s = (sent.total - sent.gradients) / per_s
    hidden_s = min(gradients_s, assumed.overlap * 2 / 3 * compute_s)  # the backward pass is two thirds of a step
    return StepTime(compute_s, gradients_s, other_s, gradients_s - hidden_s + other_s)
