#!/usr/bin/env python3
"""Times training steps on a GPU against what the published code computes, and the bounds of the GPU itself.

python tools/bench/bench_gpu.py                                   # stage 1, stage 2, joint; 256, 512, 1,024 samples
python tools/bench/bench_gpu.py --stages joint --batch 256        # quicker
python tools/bench/bench_gpu.py --stages stage2 --ways packed model.attention_dropout=0   # overrides for all ways
python tools/bench/bench_gpu.py --products                        # the first minutes on a GPU: products, copies
python tools/bench/bench_gpu.py > bench.json && python tools/plan_run.py --gpu H200 --measured bench.json
python tools/bench/bench_gpu.py --device cpu --small --batch 4 --rounds 1 --steps 1 --warm-up 1   # tries the tool

Each way has a process of its own, the same weights, the same batches and the same DeepSpeed JSON. Before anything is
timed, the losses of all ways must agree: without dropout, in float32 and in the precision of the steps. Then the ways
take turns, a round of steps each, with dropout as configured; the median step counts. A step is forward, backward and
update, with the copy of its batch to the device.

The ways:

WAY_LIST

Progress goes to stderr, a table and at last one line of JSON to stdout. The keys of its `results`:

  ms_per_step, samples_per_s   of the median step
  mfu_frac                     useful FLOPs (mvptr_ds/monitoring/flops.py) over the vendor's peak: padding is no merit
  host_cpu_ms                  CPU-milliseconds of the process a step
  launches, kernels, waits, copies_to_device, busy_ms, idle_frac    of a step, by torch's profiler
  peak_gib                     allocated on the device at most
  left_out                     why a way was not timed

On a CPU the figures of a GPU are null, and its times say nothing about any GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import gpu_products
import gpu_trace
import gpu_ways
import torch
from gpu_ways import WAYS, Setting, Way

from mvptr_ds.ds_config import DTYPES
from mvptr_ds.monitoring.timing import vendor_tflops
from mvptr_ds.user_io.terminal import accept_any_text

STAGES = ("stage1", "stage2", "joint")
TOLERANCE = {"float32": 1e-4, "bf16": 1e-2, "fp16": 1e-2}  # of a mean loss, absolute and relative
COMPARED = 16  # samples at most whose losses are compared
LIMIT_S = 3600.0  # of a process
TRACED = 3  # steps
PLACE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # of a launcher: each way is the only rank
SMALL = (
    "model.hidden_size=64", "model.num_attention_heads=4", "model.intermediate_size=128", "visual.feature_dim=32",
    "model.num_text_layers=1", "model.num_visual_layers=1", "model.num_cross_layers=1",
)  # fmt: skip
COLUMNS = ("ms_per_step", "samples_per_s", "mfu_frac", "host_cpu_ms", "launches", "waits", "idle_frac", "peak_gib")


def say(text: str) -> None:
    """Tells of progress."""
    sys.stderr.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stderr.flush()


# --- a worker: one way, one answer for every line of its standard input


def work(setting: Setting, device_type: str) -> None:
    """Answers requests until its input ends; everything else that is printed goes to stderr."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    device, way = gpu_ways.start(device_type), None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "losses":
                answer: dict[str, Any] = gpu_ways.losses(setting, request["samples"], request["precision"], device)
            else:
                way = way or gpu_ways.build(setting, device)
                answer = _steps(way, request["steps"], device) if request["do"] == "time" else _trace(way, device)
        except torch.OutOfMemoryError as error:
            answer = {"left_out": f"out of memory: {error}".splitlines()[0]}
        if device.type == "cuda":
            torch.cuda.empty_cache()  # for the process whose turn is next
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _steps(way: Way, num: int, device: torch.device) -> dict[str, Any]:
    """Takes one step that is not timed and `num` that are."""
    on_cuda = device.type == "cuda"
    way.step()
    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
        torch.cuda.synchronize()
    cpu_s, marks = time.process_time(), [_mark(on_cuda)]
    for _ in range(num):
        way.step()
        marks.append(_mark(on_cuda))
    host_cpu_ms = 1e3 * (time.process_time() - cpu_s) / num  # the last steps may still run on the device
    if on_cuda:
        marks[-1].synchronize()
    pairs = itertools.pairwise(marks)
    return {
        "ms": [a.elapsed_time(b) if on_cuda else 1e3 * (b - a) for a, b in pairs],
        "host_cpu_ms": host_cpu_ms,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        "tflop": statistics.mean(way.flop) / 1e12,
    }


def _mark(on_cuda: bool) -> Any:
    if not on_cuda:
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _trace(way: Way, device: torch.device) -> dict[str, Any]:
    if device.type != "cuda":
        return {}

    def steps() -> None:
        for _ in range(TRACED):
            way.step()

    return dict(gpu_trace.traced(steps, TRACED))


# --- the parent


class Worker:
    """A process that computes in one way."""

    def __init__(self, setting: Setting, device: str) -> None:
        self.setting, self.left_out = setting, ""
        self.rounds: list[dict[str, Any]] = []
        self.trace: dict[str, Any] = {}
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "--device",
            device,
            "--worker",
            json.dumps(vars(setting)),
        ]
        alone = {name: value for name, value in os.environ.items() if name not in PLACE}
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=alone)
        self.limit = threading.Timer(LIMIT_S, self.process.kill)
        self.limit.start()

    @property
    def name(self) -> str:
        return f"{self.setting.way} {self.setting.precision}"

    def ask(self, **request: Any) -> dict[str, Any]:
        """Returns the answer; a worker without memory is left out from then on.

        Raises:
            RuntimeError: the process ended.
        """
        if self.left_out:
            return {}
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it says below how it ended
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.name} ended with code {self.process.wait(30)}")
        answer: dict[str, Any] = json.loads(line)
        self.left_out = answer.get("left_out", "")
        if self.left_out:
            self.end()  # and so frees what it holds, for the others
        return {} if self.left_out else answer

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.limit.cancel()

    def result(self, peak_tflops: float | None) -> dict[str, Any]:
        """Returns what was measured, null where it was not."""
        setting = self.setting
        names = ("ms_per_step", "samples_per_s", "mfu_frac", "host_cpu_ms", "peak_gib", "tflop_per_step")
        found: dict[str, Any] = {
            "stage": setting.stage, "samples": setting.samples, "way": setting.way, "precision": setting.precision,
            "config": setting.config or gpu_ways.packaged(setting.stage), "left_out": self.left_out or None,
            **dict.fromkeys((*names, *gpu_trace.KEYS)),
        }  # fmt: skip
        if self.left_out or not self.rounds:
            return found
        ms = statistics.median(value for answer in self.rounds for value in answer["ms"])
        tflop = self.rounds[-1]["tflop"]
        found |= {
            "ms_per_step": ms,
            "samples_per_s": 1e3 * setting.samples / ms,
            "mfu_frac": tflop / (ms / 1e3) / peak_tflops if peak_tflops else None,
            "host_cpu_ms": statistics.median(answer["host_cpu_ms"] for answer in self.rounds),
            "peak_gib": self.rounds[-1]["peak_gib"],
            "tflop_per_step": tflop,
        } | self.trace
        return {name: float(f"{v:.4g}") if isinstance(v, float) else v for name, v in found.items()}


def compare(settings: Sequence[Setting], arguments: argparse.Namespace, peaks: dict[str, float | None]) -> list[Any]:
    """Compares the losses of the ways, then times them in turns; returns a result for each.

    Raises:
        RuntimeError: the losses differ, or a process ended.
    """
    workers: list[Worker] = []
    try:
        workers += [Worker(setting, arguments.device) for setting in settings]
        _compare_losses(workers, min(COMPARED, settings[0].samples))
        for worker in workers:
            say(f"{worker.name}: {arguments.warm_up} steps to warm up")
            worker.ask(do="time", steps=arguments.warm_up)
        for number in range(arguments.rounds):
            for worker in workers:
                answer = worker.ask(do="time", steps=arguments.steps)
                worker.rounds += [answer] if answer else []
                told = f"{statistics.median(answer['ms']):.1f} ms" if answer else worker.left_out
                say(f"round {number + 1} of {arguments.rounds}, {worker.name}: {told}")
        for worker in workers:
            worker.trace = worker.ask(do="trace", steps=TRACED)
    finally:
        for worker in workers:
            worker.end()
    return [worker.result(peaks[worker.setting.precision]) for worker in workers]


def _compare_losses(workers: Sequence[Worker], samples: int) -> None:
    """Raises RuntimeError where a way's losses differ from the first one's in float32."""
    wanted: dict[str, float] = {}
    for precision in ("float32", "the steps'"):
        for worker in workers:
            name = precision if precision == "float32" else worker.setting.precision
            found = worker.ask(do="losses", samples=samples, precision=name)
            wanted = wanted or found
            if worker.left_out:
                continue
            say(f"losses of {worker.name} in {name}: " + ", ".join(f"{k} {v:.4f}" for k, v in found.items()))
            differing = differences(wanted, found, TOLERANCE[name])
            if differing:
                raise RuntimeError(f"{worker.name} has other losses in {name} than {workers[0].name}: {differing}")


def differences(wanted: dict[str, float], found: dict[str, float], tolerance: float) -> str:
    """Returns the losses that differ by more than a share of themselves and the same number; empty: none."""
    if wanted.keys() != found.keys():
        return f"{', '.join(found)} instead of {', '.join(wanted)}"
    return ", ".join(
        f"{name} {found[name]:.6g} instead of {value:.6g}"
        for name, value in wanted.items()
        if not abs(found[name] - value) <= tolerance * (1 + abs(value))  # also where one is not a number
    )


def settings_of(stage: str, samples: int, arguments: argparse.Namespace) -> tuple[list[Setting], list[dict[str, Any]]]:
    """Returns what is computed for a stage and batch, and a result for each way that is left out."""
    taken, left_out = [], []
    for way in arguments.ways:
        reason = gpu_ways.unavailable(way, stage)
        for precision in precisions_of(way, arguments):
            setting = Setting(
                way, precision, stage, samples, arguments.config, tuple(arguments.overrides), arguments.deepspeed
            )
            if reason:
                entry = {"stage": stage, "samples": samples, "way": way, "precision": precision, "left_out": reason}
                left_out.append(entry)
            else:
                taken.append(setting)
    return taken, left_out


def precisions_of(way: str, arguments: argparse.Namespace) -> tuple[str, ...]:
    """Returns the precisions of a way: what the published code computes is timed in fp16, too, which it ran in."""
    both = way == gpu_ways.PUBLISHED and arguments.device == "cuda" and arguments.dtype == "bf16"
    return ("bf16", "fp16") if both else (arguments.dtype,)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Returns the results as lines of text."""
    lines = [f"{'stage':8}{'samples':>8}  {'way':20}" + "".join(f"{name:>15}" for name in COLUMNS)]
    for result in results:
        head = f"{result['stage']:8}{result['samples']:8}  {result['way'] + ' ' + result['precision']:20}"
        cells = "".join(f"{'-' if result.get(name) is None else format(result[name], '.4g'):>15}" for name in COLUMNS)
        lines.append(head + (f"  left out: {result['left_out']}" if result.get("left_out") else cells))
    return "\n".join(lines)


def about(device: str) -> dict[str, Any]:
    """Returns the versions and the device."""
    is_cuda = device == "cuda"
    return {
        "gpu": torch.cuda.get_device_name() if is_cuda else None,
        "torch": torch.__version__,
        "flash_attn": not gpu_ways.unavailable(gpu_ways.FLASH, "joint"),
    }


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the arguments, checked."""
    ways = "\n".join(f"  {name:12} {what}" for name, what in WAYS.items())
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").replace("WAY_LIST", ways), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--stages", nargs="+", choices=STAGES, default=STAGES, help="default: all three")
    add("--batch", type=int, nargs="+", default=[256, 512, 1024], metavar="N", help="samples (256 512 1024)")
    add("--ways", nargs="+", choices=list(WAYS), default=list(WAYS), help="default: all that can be taken")
    add("--dtype", choices=list(DTYPES), default="bf16", help="precision of the steps (bf16)")
    add("--rounds", type=int, default=6, metavar="N", help="turns of each way (6)")
    add("--steps", type=int, default=5, metavar="N", help="timed steps of a turn (5)")
    add("--warm-up", type=int, default=10, metavar="N", help="steps before the first turn (10)")
    add("--config", help="YAML file or packaged name (that of the stage, of base size)")
    add("--deepspeed", default="z2", metavar="JSON", help="file, or the name of a packaged one (z2)")
    add("--products", action="store_true", help="time products, copies and launches alone, without any step")
    add("--small", action="store_true", help="a tiny model, to try the tool itself")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="cpu tries the tool without a GPU (cuda)")
    add("--worker", help=argparse.SUPPRESS)
    add("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    arguments = parser.parse_intermixed_args(argv)
    for name in ("rounds", "steps", "warm_up"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} is {getattr(arguments, name)}, must be at least 1")
    if min(arguments.batch) < 2:
        parser.error(f"--batch is {min(arguments.batch)}, must be at least 2")
    if arguments.device == "cpu" and arguments.dtype == "fp16":
        parser.error("--dtype fp16 needs a GPU")
    if arguments.small:
        arguments.overrides = [*SMALL, *arguments.overrides]
    return arguments


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    arguments = parse_arguments(argv)
    if arguments.worker:
        given = json.loads(arguments.worker)
        work(Setting(**{**given, "overrides": tuple(given["overrides"])}), arguments.device)
        return 0
    if arguments.device == "cuda" and not torch.cuda.is_available():
        say(f"error: torch {torch.__version__} finds no GPU; --device cpu tries the tool without one")
        return 1
    report = about(arguments.device)
    try:
        if arguments.products:
            report["products"] = _products(arguments)
        else:
            report |= _bench(arguments, report["gpu"])
    except RuntimeError as error:
        say(f"error: {error}")
        return 1
    sys.stdout.write(json.dumps(report) + "\n")
    return 0


def _products(arguments: argparse.Namespace) -> dict[str, Any]:
    hidden, samples, copied = (64, arguments.batch[0], 2**20) if arguments.small else (768, 256, 2**31)
    shapes = gpu_products.shapes_of(hidden, samples, copied)
    found = gpu_products.measure(shapes, torch.device(arguments.device), DTYPES[arguments.dtype], say)
    for name, speeds in found["tflops_forward_input_weight"].items():
        sys.stdout.write(f"{name:32}" + "".join(f"{speed:10.4g}" for speed in speeds) + " TFLOP/s\n")
    return found


def _bench(arguments: argparse.Namespace, gpu: str | None) -> dict[str, Any]:
    peaks = {name: vendor_tflops(gpu, dtype) if gpu else None for name, dtype in DTYPES.items()}
    results: list[dict[str, Any]] = []
    for stage in arguments.stages:
        for samples in arguments.batch:
            settings, left_out = settings_of(stage, samples, arguments)
            say(f"{stage}, {samples} samples: {', '.join(f'{s.way} {s.precision}' for s in settings) or 'nothing'}")
            results += compare(settings, arguments, peaks) if settings else []
            results += left_out
    sys.stdout.write(table(results) + "\n")
    return {"vendor_tflops": peaks[arguments.dtype], "overrides": arguments.overrides, "results": results}


if __name__ == "__main__":
    sys.exit(main())
