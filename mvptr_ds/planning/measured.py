"""Reads what tools/bench/bench_gpu.py timed on a GPU, as the point that plans are calibrated with."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mvptr_ds.errors import DataError
from mvptr_ds.monitoring.timing import vendor_tflops

WAY = "packed"  # of the bench's ways, the one that training takes


@dataclass(frozen=True)
class MeasuredStep:
    """Holds one timed step of one GPU.

    Attributes:
        config: the YAML file or packaged name that the bench ran, with its overrides.
    """

    gpu: str
    stage: str
    samples: int
    precision: str
    step_s: float
    config: str
    overrides: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.stage}, {self.samples} samples, {self.precision}: {1e3 * self.step_s:.0f} ms on {self.gpu}"


def read_measured(path: Path) -> list[MeasuredStep]:
    """Returns the steps of this package in the last line of a bench's output.

    Raises:
        DataError: it is no such output, or has no step that a GPU took.
        OSError: it cannot be read.
    """
    lines = path.read_text(encoding="utf-8").splitlines()
    try:
        report = json.loads([line for line in lines if line.strip()][-1])
        steps = [_step(report, result) for result in report["results"] if _counts(result)]
    except (IndexError, KeyError, TypeError, ValueError) as error:
        raise DataError(f"{path}: its last line is not the JSON of tools/bench/bench_gpu.py: {error!r}") from error
    if not report.get("gpu") or not steps:
        raise DataError(f"{path}: no step of {WAY!r} was timed on a GPU there")
    return steps


def _counts(result: dict[str, Any]) -> bool:
    return result["way"] == WAY and result.get("ms_per_step") is not None


def _step(report: dict[str, Any], result: dict[str, Any]) -> MeasuredStep:
    return MeasuredStep(
        gpu=str(report["gpu"]),
        stage=str(result["stage"]),
        samples=int(result["samples"]),
        precision=str(result["precision"]),
        step_s=float(result["ms_per_step"]) / 1e3,
        config=str(result["config"]),
        overrides=tuple(map(str, report["overrides"])),
    )


def nearest(steps: list[MeasuredStep], gpu: str, precision: str, stage: str, samples: int) -> MeasuredStep:
    """Returns the step that a plan is calibrated with: of its stage if there is one, and of the nearest batch.

    Raises:
        DataError: none was taken on this GPU in this precision.
    """
    fitting = [s for s in steps if _is(s.gpu, gpu) and s.precision == precision]
    if not fitting:
        had = ", ".join(sorted({f"{s.gpu} in {s.precision}" for s in steps}))
        raise DataError(f"--measured has steps of {had}, none of {gpu} in {precision}")
    return min(fitting, key=lambda s: (s.stage != stage, abs(math.log(s.samples / samples))))


def _is(device: str, gpu: str) -> bool:
    """Returns whether a device's name is that of a GPU in the table of `vendor_tflops`."""
    return gpu in device and vendor_tflops(device, torch.float16) == vendor_tflops(gpu, torch.float16)
