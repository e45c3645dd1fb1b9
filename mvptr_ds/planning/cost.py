"""Estimates the bytes that are sent and the time of a step, from named assumptions. None was measured on a cluster."""

from __future__ import annotations

from dataclasses import dataclass

from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.table import Chosen
from mvptr_ds.planning.memory import FLOAT32, Zero


@dataclass(frozen=True)
class Gpu:
    """Describes a GPU and its links, as vendors state them for the usual servers. None of it was measured."""

    name: str  # a key of timing.VENDOR_TFLOPS
    memory_gib: float
    memory_tb_per_s: float
    num_multiprocessors: int
    node_gb_per_s: float  # to other GPUs of the node, one direction
    network_gb_per_s: float  # to other nodes, with one adapter a GPU
    bf16: bool = True


GPUS = {
    gpu.name: gpu
    for gpu in (
        Gpu("V100", 32, 0.90, 80, 150, 12.5, bf16=False),
        Gpu("A100", 80, 2.04, 108, 300, 25),
        Gpu("H100", 80, 3.35, 132, 450, 50),
        Gpu("H200", 141, 4.80, 132, 450, 50),
        Gpu("L40S", 48, 0.86, 142, 32, 25),
        Gpu("A10", 24, 0.60, 72, 32, 12.5),
        Gpu("RTX 4090", 24, 1.01, 128, 32, 12.5),
    )
}


@dataclass(frozen=True)
class Assumptions:
    """Lists the numbers that no formula gives."""

    product_efficiency: float = 0.8  # share of the vendor's peak that a large matrix product reaches
    bandwidth_efficiency: float = 0.77  # share of the memory's speed that torch's kernels reach
    host_us: float = 25.0  # for one operation that Python dispatches
    overlap: float = 0.5  # share of the backward pass that may hide the gradients' communication
    link_efficiency: float = 0.7  # share of the links' figures that collectives reach
    loader_samples_per_core_s: float = 1_000.0
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
class MicroBatchCost:
    """Says what forward and backward of a micro-batch cost on a GPU, by a model of its kernels; nothing is timed.

    Attributes:
        flop: of forward and backward, as the meters count them.
        device_s: of all kernels, back to back.
        operations: that the host dispatches.
    """

    flop: float
    device_s: float
    operations: int

    def scaled_to(self, flop: float) -> MicroBatchCost:
        """Returns the cost of a micro-batch of other lengths: kernels take time with the FLOPs, the host does not."""
        return MicroBatchCost(flop, self.device_s * flop / self.flop, self.operations)


@dataclass(frozen=True)
class EngineCost:
    """Counts what DeepSpeed and AdamW do in a step, beside the micro-batches.

    Attributes:
        bytes: that a rank reads and writes.
        operations: that the host dispatches, in the hooks of each micro-batch and in the step.
    """

    bytes: float
    hook_operations: int
    step_operations: int

    @classmethod
    def of(cls, trained: int, num_tensors: int, num_ranks: int, accumulation: int) -> EngineCost:
        """Returns the cost as counted for ZeRO-2 in half precision (docs/measurements/gpu_counts.md).

        A parameter of a rank's part moves 44 bytes: its gradient to float32 and its norm, AdamW, and its new value.
        With several ranks each gradient is also copied into a bucket, divided and copied out: 12 bytes, and two
        operations a tensor.
        """
        if num_ranks == 1:
            return cls(44.0 * trained, 6, 26)
        return cls(44.0 * trained / num_ranks + 12.0 * trained * accumulation, 2 * num_tensors + 6, 90)


@dataclass(frozen=True)
class ComputeTime:
    """Holds the seconds that a step takes without communication: those of the device, or of the host if it is slower.

    Attributes:
        factor: of a measurement over the model of it; 1 without one.
    """

    device_s: float
    host_s: float
    factor: float = 1.0

    @property
    def total_s(self) -> float:
        return self.factor * max(self.device_s, self.host_s)


def compute_time(
    micro_batch: MicroBatchCost, engine: EngineCost, accumulation: int, gpu: Gpu, assumed: Assumptions, factor: float
) -> ComputeTime:
    """Returns the time of one optimiser step's computation on one rank."""
    engine_s = engine.bytes / (assumed.bandwidth_efficiency * gpu.memory_tb_per_s * 1e12)
    operations = accumulation * (micro_batch.operations + engine.hook_operations) + engine.step_operations
    return ComputeTime(
        device_s=accumulation * micro_batch.device_s + engine_s,
        host_s=operations * assumed.host_us / 1e6,
        factor=factor,
    )


@dataclass(frozen=True)
class StepTime:
    compute_s: float
    gradients_s: float  # communication of gradients, before any is hidden
    other_communication_s: float
    exposed_s: float  # communication that no computation hides

    @property
    def total_s(self) -> float:
        return self.compute_s + self.exposed_s


def step_time(compute_s: float, sent: Traffic, gb_per_s: float, overlaps: bool, assumed: Assumptions) -> StepTime:
    """Returns the time of one optimiser step from the computation and traffic of one rank, over a link of `gb_per_s`.

    Args:
        overlaps: whether the JSON asks for communication beside the backward pass (`overlap_comm`).
    """
    per_s = assumed.link_efficiency * gb_per_s * 1e9
    gradients_s = sent.gradients / per_s
    other_s = (sent.total - sent.gradients) / per_s
    room_s = assumed.overlap * 2 / 3 * compute_s if overlaps else 0.0  # the backward pass is two thirds of a step
    return StepTime(compute_s, gradients_s, other_s, gradients_s - min(gradients_s, room_s) + other_s)
