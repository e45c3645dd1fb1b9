"""What a trace of torch's profiler says of some steps on a GPU: launches, copies, waits, and how long it idled.

A Chrome trace names the category of every event. Kernels and copies have the times of the device, `cuda_runtime` and
`cuda_driver` are calls of the host.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch.profiler import ProfilerActivity

ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")
CALLS = ("cuda_runtime", "cuda_driver")
LAUNCHES = ("cudaLaunch", "cuLaunch", "cudaGraphLaunch", "cuGraphLaunch")
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "cuStreamSynchronize")
KEYS = ("launches", "kernels", "copies_to_device", "waits", "busy_ms", "idle_frac")  # of `summary`
Event = Mapping[str, Any]


def traced(steps: Callable[[], None], num: int) -> dict[str, float]:
    """Runs `num` steps under the profiler on a GPU and returns `summary` of them."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        steps()
        torch.cuda.synchronize()
    with TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        events = json.loads(path.read_text(encoding="utf-8", errors="replace"))["traceEvents"]
    return summary(events, num, ending_waits=1)


def summary(events: Iterable[Event], num_steps: int, ending_waits: int = 0) -> dict[str, float]:
    """Returns the launches, copies to the device and waits of a step, and the device's idle share.

    Args:
        events: of a Chrome trace, times in microseconds.
        ending_waits: waits that are not the steps' own.
    """
    complete = [event for event in events if event.get("ph") == "X"]
    calls = [str(event["name"]) for event in complete if event.get("cat") in CALLS]
    work = [event for event in complete if event.get("cat") in ON_DEVICE]
    busy_us, span_us = _busy([(float(e["ts"]), float(e["ts"]) + float(e["dur"])) for e in work])
    copies = sum(e.get("cat") == "gpu_memcpy" and "HtoD" in str(e["name"]) for e in work)
    return {
        "launches": sum(name.startswith(LAUNCHES) for name in calls) / num_steps,
        "kernels": sum(event.get("cat") == "kernel" for event in work) / num_steps,
        "copies_to_device": copies / num_steps,
        "waits": max(0, sum(name.startswith(WAITS) for name in calls) - ending_waits) / num_steps,
        "busy_ms": busy_us / 1e3 / num_steps,
        "idle_frac": 1 - busy_us / span_us if span_us else 0.0,
    }


def _busy(spans_us: list[tuple[float, float]]) -> tuple[float, float]:
    """Returns how long any of the spans lasts, and the time from the first to the end of the last."""
    if not spans_us:
        return 0.0, 0.0
    busy = 0.0
    end = first = min(start for start, _ in spans_us)
    for start, stop in sorted(spans_us):
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy, end - first
