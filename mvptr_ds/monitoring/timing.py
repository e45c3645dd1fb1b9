"""Measures where a step's time goes and how fast the device can be, and traces a window with torch's profiler."""

from __future__ import annotations

import logging
import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, record_function

from mvptr_ds.distributed import collectives
from mvptr_ds.model.kernels import linear

logger = logging.getLogger(__name__)
PHASES = ("forward", "backward", "step", "communication")


class PhaseClock:
    """Measures the seconds in each phase since the last read, without making the device wait.

    On CUDA an event is recorded at either end and read at the report. A phase then lasts as long as the device takes,
    including idling for the host. On a CPU it is the wall clock. Phases may nest: `communication` lies within the
    others. It covers the package's collectives, with the waiting for slower ranks.
    """

    def __init__(self, device: torch.device) -> None:
        self.on_cuda = device.type == "cuda"
        self._spans: list[tuple[str, Any, Any]] = []

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        with record_function(f"mvptr_ds/{phase}"):
            start = self._now()
            yield
            self._spans.append((phase, start, self._now()))

    def _now(self) -> Any:
        if not self.on_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def read(self) -> dict[str, float]:
        """Returns the seconds by phase, and resets. On CUDA the device must have reached the last event."""
        spans, self._spans = self._spans, []
        seconds: dict[str, float] = defaultdict(float)
        for phase, start, end in spans:
            if self.on_cuda:
                end.synchronize()
                seconds[phase] += start.elapsed_time(end) / 1e3
            else:
                seconds[phase] += end - start
        return seconds


@dataclass(frozen=True)
class Peak:
    """Holds how fast a device multiplies matrices, and the source of the number."""

    tflops: float
    source: str


# Vendors' dense figures in TFLOPS with float32 accumulation, for half precision and for float32 without TF32.
# A name is searched as a whole word. The longer names come first.
VENDOR_TFLOPS: dict[str, tuple[float, float]] = {
    "H100 PCIe": (756.0, 51.0),
    "H100 NVL": (835.0, 60.0),
    "H200": (989.0, 67.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "V100": (125.0, 15.7),
    "L40S": (362.0, 91.6),
    "L40": (181.0, 90.5),
    "L4": (121.0, 30.3),
    "A40": (149.7, 37.4),
    "A10": (125.0, 31.2),
    "T4": (65.0, 8.1),
    "RTX 4090": (165.2, 82.6),
    "RTX 3090": (71.0, 35.6),
    "RTX A6000": (154.8, 38.7),
}


def vendor_tflops(name: str, dtype: torch.dtype) -> float | None:
    """Returns the vendor's figure for a device's name, or None for a name that is not in the table."""
    for known, (half, single) in VENDOR_TFLOPS.items():
        if re.search(rf"\b{known}\b", name):
            return single if dtype == torch.float32 else half
    return None


def measured_tflops(device: torch.device, dtype: torch.dtype, size: int = 8192) -> float:
    """Measures the best of a few square matrix products by the model's kernel. On a GPU it takes milliseconds."""
    generator = torch.Generator(device).manual_seed(0)  # its own: a resumed run has restored its random state
    left, right = (torch.randn(size, size, device=device, dtype=dtype, generator=generator) for _ in range(2))
    clock, best_s = PhaseClock(device), float("inf")
    for _ in range(5):
        with clock("gemm"):
            linear(left, right)
        best_s = min(best_s, clock.read()["gemm"])
    return 2 * size**3 / best_s / 1e12


def device_peak(device: torch.device, dtype: torch.dtype) -> Peak | None:
    """Returns what MFU is a share of, and logs it: the vendor's figure for a known GPU, or else a measured product.

    It is None on a CPU, whose cores the ranks share with each other and with other programs. A product measured
    there in one moment is no bound for the next.
    """
    if device.type != "cuda":
        return None
    measured = measured_tflops(device, dtype)
    name = torch.cuda.get_device_name(device)
    vendor = vendor_tflops(name, dtype)
    kind = str(dtype).removeprefix("torch.")
    if vendor is None:
        peak = Peak(measured, f"a {kind} matrix product measured at start on {name}")
    else:
        peak = Peak(vendor, f"the vendor's for {name} in {kind}; a matrix product reached {measured:.0f} at start")
    logger.info("MFU is a share of %.3g TFLOPS: %s", peak.tflops, peak.source)
    return peak


class ProfileWindow:
    """Traces the steps first..stop-1 with torch's profiler, one Chrome trace a rank in `folder`.

    A trace that cannot be written is reported, and training goes on without.

    Args:
        steps: [first, stop], or empty for none.

    Raises:
        ValueError: they are no such pair.
    """

    def __init__(self, steps: Sequence[int], folder: Path) -> None:
        if steps and (len(steps) != 2 or not 0 <= steps[0] < steps[1]):
            raise ValueError(
                f"train.profile_steps is {list(steps)}; give [first, stop], such as [100, 103] for three steps, or []"
            )
        self.first, self.stop = steps or (0, 0)
        self.folder = folder
        self._profiler: torch.profiler.profile | None = None

    def __enter__(self) -> ProfileWindow:
        return self

    def begin(self, step: int) -> None:
        """Starts the trace before step number `step`, which counts from 0."""
        if self._profiler is None and self.first <= step < self.stop:
            activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()
            self._started_at = step

    def end(self, num_steps: int) -> None:
        """Ends the trace after `num_steps` steps in all."""
        if self._profiler is not None and num_steps >= self.stop:
            self._export(num_steps)

    def __exit__(self, *_: object) -> None:
        if self._profiler is not None:  # a signal or an error ended the run within the window
            self._export("cut")

    def _export(self, stop: int | str) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        path = self.folder / f"rank{collectives.rank()}-steps{self._started_at}-{stop}.json"
        try:
            profiler.stop()
            self.folder.mkdir(parents=True, exist_ok=True)
            path.unlink(missing_ok=True)
            profiler.export_chrome_trace(str(path))  # it prints what fails and raises nothing
            _check_trace(path)
        except (OSError, RuntimeError) as error:
            logger.warning("the trace %s could not be written, training goes on without: %s", path, error)
            return
        logger.info("traced: %s (open it in chrome://tracing or ui.perfetto.dev)", path)


def _check_trace(path: Path) -> None:
    """Raises OSError for a trace that is missing or has lost its end."""
    with path.open("rb") as file:
        file.seek(max(0, file.seek(0, os.SEEK_END) - 16))
        if not file.read().rstrip().endswith(b"}"):
            raise OSError("it is cut, for want of space maybe")
