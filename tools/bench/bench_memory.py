#!/usr/bin/env python3
"""Measures the peak memory of many training steps of the base model, beside what the published code takes.

python tools/bench/bench_memory.py                        # 200 steps of 4 samples; the last line is JSON
python tools/bench/bench_memory.py --batch 16 --steps 50
python tools/bench/bench_memory.py --way packed           # ours alone

Each way has a fresh process, and they take turns, step by step. Every step has a batch of other lengths, as in a run:
what is kept for each number of rows shows only after many steps. bench_step.py says what the ways compute.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as bench_step.py

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch
from bench_step import WAYS, Worker

from mvptr_ds.user_io.terminal import accept_any_text

EVERY = 20  # steps between two lines


def measure(ways: list[str], arguments: argparse.Namespace) -> list[Worker]:
    """Runs the steps of all ways, in turns; the workers hold what they answered."""
    workers: list[Worker] = []
    try:
        workers += [Worker(way, arguments.batch, arguments, limit_s=arguments.limit_s) for way in ways]
        for number in range(1, 1 + arguments.steps):
            for worker in workers:
                worker.ask(number)
            if number % EVERY == 0 or number == arguments.steps:
                peaks = ", ".join(f"{w.way} {w.answers[-1]['peak_rss_gib']:.2f} GiB" for w in workers)
                sys.stdout.write(f"step {number:4}: peak of {peaks}\n")
                sys.stdout.flush()
    finally:
        for worker in workers:
            worker.end()
    return workers


def figures(workers: list[Worker]) -> dict[str, Any]:
    """Returns the peaks of all ways, how they grew over the second half of the steps, and the median step."""
    out: dict[str, Any] = {}
    for worker in workers:
        peaks = [answer["peak_rss_gib"] for answer in worker.answers]
        out[f"{worker.way}_peak_rss_gib"] = peaks[-1]
        out[f"{worker.way}_growth_of_second_half_gib"] = peaks[-1] - peaks[len(peaks) // 2 - 1]
        out[f"{worker.way}_cpu_s"] = statistics.median(answer["cpu_s"] for answer in worker.answers)
    if {"packed", "reference"} <= {worker.way for worker in workers}:
        out["memory_vs_reference"] = out["packed_peak_rss_gib"] / out["reference_peak_rss_gib"]
    return out


def main() -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=4, help="samples")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--way", choices=WAYS, nargs="+", default=["packed", "reference"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--limit-s", type=float, default=7200.0, help="of a process")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the tool itself")
    arguments = parser.parse_args()
    arguments.compile, arguments.captions = False, None
    if arguments.steps < 2:
        parser.error(f"--steps is {arguments.steps}, must be at least 2")
    found = figures(measure(arguments.way, arguments)) | {"batch": arguments.batch, "steps": arguments.steps}
    sys.stdout.write(json.dumps({name: float(f"{value:.4g}") for name, value in found.items()}) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
