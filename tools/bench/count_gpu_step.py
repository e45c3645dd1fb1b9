#!/usr/bin/env python3
"""Counts what a training step of a stage or task executes on a GPU, on a machine without one.

python tools/bench/count_gpu_step.py stage2 --batch 256           # tables by part; the last line is JSON
python tools/bench/count_gpu_step.py vqa --batch 16 --json        # the JSON alone
python tools/bench/count_gpu_step.py stage2 model.attention_dropout=0   # overrides of the configuration

The step is executed on tensors that claim to be on CUDA, at the true sizes: forward and backward pass of one rank, and
DeepSpeed's hooks and step with the real engine on a small model of the same layers. Numbers are counted, none is timed.
Milliseconds come from a model of an H200 (mvptr_ds/benchmarks/gpu_step/roofline.py).
The keys of the JSON:

  ops, engine_ops              operations that the host dispatches: of the task (copies included), of DeepSpeed
  waits, engine_waits          times that the host waits for the device
  copies_to_device             copies from the host; pageable_copies are those whose memory is not pinned
  gb_outside                   GB that everything but products and attention moves
  odd_side_frac                share of the products' FLOPs with rows that are no multiple of 16 bytes (8 numbers)
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

if __name__ == "__main__":  # the checkout's package, wherever this is called from
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch

from mvptr_ds.benchmarks.gpu_step import report
from mvptr_ds.benchmarks.gpu_step.engine_step import count_engine
from mvptr_ds.benchmarks.gpu_step.step import PACKAGED, config_of, count_step
from mvptr_ds.ds_config import DTYPES, load_ds_config
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=PACKAGED)
    parser.add_argument("--batch", type=int, default=256, help="samples of the micro-batch (256)")
    parser.add_argument("--config", help="YAML file, or the name of a packaged one (that of the stage, of base size)")
    parser.add_argument("--deepspeed", default="z2", metavar="JSON", help="file, or the name of a packaged one (z2)")
    parser.add_argument("--dtype", choices=DTYPES, default="bf16", help="what the model computes in (bf16)")
    parser.add_argument("--no-engine", action="store_true", help="leave DeepSpeed out: its keys are then null")
    parser.add_argument("--fail-on-wait", action="store_true", help="end with an error where the host waits")
    parser.add_argument("--json", action="store_true", help="print the JSON alone")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.batch < 2:
        parser.error(f"--batch is {arguments.batch}, must be at least 2")
    return arguments


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    arguments = parse_arguments(argv)
    stage, num = arguments.stage, arguments.batch
    try:
        config = config_of(stage, arguments.config, tuple(arguments.overrides))
        counts = count_step(config, stage, num, DTYPES[arguments.dtype], arguments.fail_on_wait)
        engine = None if arguments.no_engine else count_engine(config, stage, load_ds_config(arguments.deepspeed))
    except (*USER_ERRORS, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not arguments.json:
        title = f"{stage}, {num} samples, {arguments.dtype}, torch {torch.__version__}: counted as on CUDA, not timed"
        print(report.table(title, counts, engine))
    print(json.dumps(report.as_json(counts, engine)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
