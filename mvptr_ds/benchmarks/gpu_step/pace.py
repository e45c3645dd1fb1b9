"""What a planned step costs on a GPU: its operations are counted as on CUDA, and a model gives their seconds."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import replace

from mvptr_ds.benchmarks.gpu_step.roofline import Roofline
from mvptr_ds.benchmarks.gpu_step.step import StepCounts, count_step
from mvptr_ds.config import Config, load_config
from mvptr_ds.ds_config import DTYPES
from mvptr_ds.monitoring.timing import vendor_tflops
from mvptr_ds.planning.cost import Assumptions, EngineCost, Gpu, MicroBatchCost, compute_time
from mvptr_ds.planning.measured import MeasuredStep, nearest
from mvptr_ds.planning.plan import CALIBRATED, MEASURED, MODELLED, Pace

MOST_COUNTED = 512  # samples: a larger micro-batch takes time in proportion


def roofline_of(gpu: Gpu, precision: str, assumed: Assumptions) -> Roofline:
    """Returns the bounds of a GPU: the assumed shares of what its vendor states."""
    tflops = vendor_tflops(gpu.name, DTYPES[precision])
    assert tflops is not None, gpu.name
    return Roofline(
        product_flops_per_s=assumed.product_efficiency * tflops * 1e12,
        bytes_per_s=assumed.bandwidth_efficiency * gpu.memory_tb_per_s * 1e12,
        num_multiprocessors=gpu.num_multiprocessors,
    )


class PaceOfGpu:
    """Counts a stage's micro-batches on one GPU, each size once.

    Args:
        measured: steps that tools/bench/bench_gpu.py timed; none: the plan is the model's.
    """

    def __init__(
        self, config: Config, stage: str, gpu: Gpu, assumed: Assumptions, measured: Sequence[MeasuredStep] = ()
    ) -> None:
        self.config, self.stage, self.gpu, self.assumed = config, stage, gpu, assumed
        self.measured = list(measured)
        self._count = functools.cache(self._count_uncached)

    def pace(self) -> Pace:
        """Returns what `make_plan` asks."""
        return Pace(self.cost, self.calibration if self.measured else lambda *_: (1.0, MODELLED))

    def cost(self, samples: int, precision: str) -> MicroBatchCost:
        """Returns the cost of forward and backward of a micro-batch; of more than 512 samples that of 512."""
        return _cost_of(self._count(None, self.stage, min(max(2, samples), MOST_COUNTED), precision))

    def calibration(self, precision: str, samples: int, num_ranks: int, accumulation: int) -> tuple[float, str]:
        """Returns the factor of the nearest measured step over its model, and what the times of the plan then are.

        Raises:
            DataError: no step was measured on this GPU in this precision.
        """
        step = nearest(self.measured, self.gpu.name, precision, self.stage, samples)
        is_own = _config_of(step) == replace(self.config, train=_config_of(step).train)
        counts = self._count(None if is_own else step, step.stage, min(step.samples, MOST_COUNTED), precision)
        engine = EngineCost.of(counts.num_trained, counts.num_tensors, 1, 1)
        cost = _cost_of(counts)
        cost = cost.scaled_to(cost.flop * max(1.0, step.samples / MOST_COUNTED))
        modelled_s = compute_time(cost, engine, 1, self.gpu, self.assumed, 1.0).total_s
        is_same = (step.stage, step.samples, 1, 1) == (self.stage, samples, num_ranks, accumulation)
        is_same = is_same and _config_of(step).model == self.config.model
        return step.step_s / modelled_s, MEASURED if is_same else CALIBRATED

    def _count_uncached(self, step: MeasuredStep | None, stage: str, samples: int, precision: str) -> StepCounts:
        config = self.config if step is None else _config_of(step)
        roofline = roofline_of(self.gpu, precision, self.assumed)
        return count_step(config, stage, samples, DTYPES[precision], roofline=roofline)


def _config_of(step: MeasuredStep) -> Config:
    return load_config(step.config, step.overrides)


def _cost_of(counts: StepCounts) -> MicroBatchCost:
    operations = counts.recording.operations
    return MicroBatchCost(counts.flops, sum(operation.model_s for operation in operations), len(operations))
