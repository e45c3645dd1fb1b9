#!/usr/bin/env python3
"""Measures a training step of the base model (forward + backward) against what the published code computes.

python tools/bench/bench_step.py                          # batches of 8 and 16; the last line is JSON
python tools/bench/bench_step.py --batch 4 --steps 1      # quicker
python tools/bench/bench_step.py --captions captions_val2014.json   # caption lengths of a COCO annotation file
python tools/bench/bench_step.py --profile                # where the time of a packed step goes, by torch's profiler

Four ways, each in a process of its own and with the same weights: `packed` (valid positions alone), `products`
(packed, but linear layers by torch's own matrix product), `padded` (ours, to the longest of the batch) and `reference`
(transformers' BertLayer with eager attention at 40 text, 20 + 50 visual and 90 cross slots). They take turns, step by
step, so that a busy machine disturbs all alike; the median step counts. Their losses must agree. The peak of the
machine is that of the faster matrix product, torch's or ours, in the same minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# a thread that waits for others shall sleep: else CPU-seconds count what the rest of the machine does
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # read when torch is first imported, here and in the workers

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch
import torch.nn.functional as F
from bench_models import TEXT_SLOTS, Reference, build_task, fixed_slots, make_batch
from torch import Tensor

from mvptr_ds.data.collate import Batch
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.evaluation.encode import CrossStates, EncodedSplit
from mvptr_ds.evaluation.retrieval import match_probability, score_pairs
from mvptr_ds.model import kernels
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

WAYS = ("packed", "products", "padded", "reference")
TOLERANCE = 1e-4  # of a loss summed over the batch, in float32
LIMIT_S = 1800.0  # of a process
PROFILED = 14  # operations, those that take the longest
GEMM = (2048, 768, 3072)  # rows x hidden x FFN, and the reverse of it


def model_config(small: bool) -> MvptrConfig:
    sizes: dict[str, Any] = {"hidden_dropout": 0.0, "attention_dropout": 0.0}  # equal losses need equal states
    if small:
        sizes |= {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "region_feature_dim": 32}
        sizes |= {"num_text_layers": 1, "num_visual_layers": 1, "num_cross_layers": 1}
    return MvptrConfig(**sizes)


# --- a worker: one way of computing, one step for every line of its standard input


def measured(function: Callable[..., Any], *arguments: Any) -> tuple[Any, dict[str, Any]]:
    """Returns the result of a call, and the time it took."""
    wall, cpu = time.perf_counter(), time.process_time()
    value = function(*arguments)
    return value, {"wall_s": time.perf_counter() - wall, "cpu_s": time.process_time() - cpu}


def work(way: str, arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    config = model_config(arguments.small)
    task: Any = build_task(config, "padded" if way == "padded" else "packed")
    flops = StepFlops(task, 1)
    if way == "reference":
        task = Reference(task.model)
    if way == "products":
        kernels._HAS_ONEDNN = False
    if arguments.compile and way != "reference":
        task.model.set_execution(task.model.cross_encoder.execution, compiled=True)
    for num in (2, 3):  # warms up
        step(task, fixed(make_batch(num, 0, config), way), RandomDraws.keyed(0, 0, 0, num, TEXT_SLOTS))
    for line in sys.stdin:
        number = int(line)
        batch = make_batch(arguments.batch, number, config, arguments.caption_lengths)
        fed = fixed(batch, way)
        draws = RandomDraws.keyed(0, number, 0, arguments.batch, TEXT_SLOTS)
        parts, answer = measured(step, task, fed, draws)
        answer |= {"losses": {name: part.sum.item() for name, part in parts.items()}}
        answer |= {"gflop": flops.of(batch) / 1e9, "peak_rss_gib": peak_rss_gib()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


def fixed(batch: Batch, way: str) -> Batch:
    return fixed_slots(batch) if way == "reference" else batch


def step(task: Any, batch: Batch, draws: RandomDraws) -> dict[str, Any]:
    task.zero_grad(set_to_none=True)
    parts: dict[str, Any] = task.sums(batch, draws)
    torch.stack([part.sum / part.count.clamp(min=1.0) for part in parts.values()]).sum().backward()
    return parts


def peak_rss_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def profile(arguments: argparse.Namespace) -> None:
    """A packed step by torch's profiler: each operation's own time on the main thread, and what the kernel did."""
    config, batch_size = model_config(arguments.small), arguments.batch[-1]
    task = build_task(config, "packed")
    for number in (0, 1):
        inputs = task, make_batch(batch_size, number, config), RandomDraws.keyed(0, number, 0, batch_size, TEXT_SLOTS)
        if not number:
            step(*inputs)  # warms up
    before = resource.getrusage(resource.RUSAGE_SELF)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        step(*inputs)
    after = resource.getrusage(resource.RUSAGE_SELF)
    events = sorted(profiler.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total_us = sum(event.self_cpu_time_total for event in events)
    sys.stdout.write(f"batch {batch_size}: {total_us / 1e6:.2f} s on the main thread\n")
    for event in events[:PROFILED]:
        share, ms = event.self_cpu_time_total / total_us, event.self_cpu_time_total / 1e3
        sys.stdout.write(f"{share:6.1%}  {ms:8.1f} ms  {event.count:5} calls  {event.key}\n")
    user_s, system_s = after.ru_utime - before.ru_utime, after.ru_stime - before.ru_stime
    faults = after.ru_minflt - before.ru_minflt
    sys.stdout.write(f"CPU-seconds: {user_s:.2f} of our own, {system_s:.2f} of the kernel; {faults:,} page faults\n")


# --- the parent


class Worker:
    def __init__(self, way: str, batch: int, arguments: argparse.Namespace, limit_s: float = LIMIT_S) -> None:
        command = [sys.executable, str(Path(__file__).resolve()), "--worker", way, "--batch", str(batch)]
        command += ["--threads", str(arguments.threads), *(["--small"] if arguments.small else [])]
        command += ["--compile"] if arguments.compile else []
        command += ["--captions", str(arguments.captions)] if arguments.captions else []
        self.way, self.answers = way, []  # type: ignore[var-annotated]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.limit = threading.Timer(limit_s, self.process.kill)
        self.limit.start()

    def ask(self, number: int) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(f"{number}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"the process of {self.way} ended with code {self.process.wait(30)}")
        self.answers.append(json.loads(line))

    def median(self, name: str) -> float:
        return statistics.median(answer[name] for answer in self.answers)

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.limit.cancel()


def compare(batch: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures the ways on the same batches, in turns."""
    workers: list[Worker] = []
    peaks: dict[Callable[..., Tensor], list[float]] = {F.linear: [], kernels.linear: []}
    try:
        workers += [Worker(way, batch, arguments) for way in WAYS]
        for number in range(1, 1 + arguments.steps):
            for worker in workers:
                worker.ask(number)
            for product, found in peaks.items():
                found.append(gemm_gflops_per_cpu_s(product))
    finally:
        for worker in workers:
            worker.end()
    packed, products, padded, reference = workers
    torchs_peak, ours_peak = (statistics.median(found) for found in peaks.values())
    for worker in workers:
        cpu_s, wall_s, gflop = (worker.median(name) for name in ("cpu_s", "wall_s", "gflop"))
        peak_gib = worker.answers[-1]["peak_rss_gib"]
        sys.stdout.write(
            f"batch {batch:2}  {worker.way:9}  {cpu_s:6.2f} CPU-s  {wall_s:6.2f} s wall  "
            f"{gflop / cpu_s:5.1f} GFLOP/CPU-s  peak {peak_gib:.2f} GiB\n"
        )
    return {
        "speedup_vs_reference": reference.median("cpu_s") / packed.median("cpu_s"),
        "speedup_with_torchs_products": reference.median("cpu_s") / products.median("cpu_s"),
        "speedup_vs_padded": padded.median("cpu_s") / packed.median("cpu_s"),
        "gflops_per_cpu_s": packed.median("gflop") / packed.median("cpu_s"),
        "gemm_peak_gflops_per_cpu_s": max(torchs_peak, ours_peak),
        "gflops_per_cpu_s_with_torchs_products": products.median("gflop") / products.median("cpu_s"),
        "torchs_gemm_peak_gflops_per_cpu_s": torchs_peak,
        "peak_rss_gib": packed.answers[-1]["peak_rss_gib"],
        "reference_peak_rss_gib": reference.answers[-1]["peak_rss_gib"],
        "losses_max_abs_diff": max(
            abs(value - other.answers[number]["losses"][name])
            for other in workers[1:]
            for number, answer in enumerate(packed.answers)
            for name, value in answer["losses"].items()
        ),
    }


def gemm_gflops_per_cpu_s(product: Callable[[Tensor, Tensor], Tensor], repeats: int = 6) -> float:
    """Returns the better speed of matrix products at the FFN's two shapes, over 2,048 rows."""
    rows, dim, inner = GEMM
    best = 0.0
    for num_in, num_out in ((dim, inner), (inner, dim)):
        states, weight = torch.randn(rows, num_in), torch.randn(num_out, num_in)
        product(states, weight)
        _, took = measured(lambda: [product(states, weight) for _ in range(repeats)])  # noqa: B023
        best = max(best, repeats * 2 * rows * dim * inner / 1e9 / took["cpu_s"])
    return best


# --- scoring


@torch.inference_mode()
def scoring(num: int, arguments: argparse.Namespace) -> dict[str, float]:
    """Scores all pairs of `num` captions and `num` images, from raw inputs and as evaluation re-ranks them."""
    config = model_config(arguments.small)
    model = build_task(config, "packed").eval().model
    packed = PackedBatch.of(make_batch(num, 0, config, arguments.caption_lengths))
    captions_M, images_M = torch.cartesian_prod(torch.arange(num), torch.arange(num)).unbind(1)
    device = torch.device("cpu")

    def raw() -> Tensor:
        scores = []
        for rows in torch.arange(len(captions_M)).split(arguments.batch):
            text, regions, _ = encode(model, packed, captions_M[rows].tolist(), images_M[rows].tolist())
            scores.append(match_probability(model, CrossStates(rows, *model.encode_cross(text, regions))))
        return torch.cat(scores)

    def cached() -> Tensor:
        text, regions, tags = encode(model, packed, range(num), range(num))
        split = EncodedSplit(
            text_CTD=text.padded(),
            text_mask_CT=text.mask(),
            phrase_mask_CT=packed.phrase_mask.padded(False),
            text_global_CD=model.text_global(text),
            regions_IRD=regions.padded(),
            region_mask_IR=regions.mask(),
            image_global_ID=model.visual_global(tags),
            image_of_C=torch.arange(num),
        )
        return score_pairs(model, split, captions_M, images_M, arguments.batch, device)

    (wanted, slow), (found, fast) = measured(raw), measured(cached)
    return {
        "scoring_speedup": slow["cpu_s"] / fast["cpu_s"],
        "scoring_pairs_per_cpu_s": len(captions_M) / fast["cpu_s"],
        "scoring_max_abs_diff": (wanted - found).abs().max().item(),
    }


def encode(
    model: Mvptr, packed: PackedBatch, texts: Sequence[int], images: Sequence[int]
) -> tuple[Packed, Packed, Packed]:
    """States of texts, regions and tags, from raw inputs."""
    assert packed.features is not None
    embedded = model.embed_regions(packed.features.take(images), None, packed.geometry.take(images))
    tags, regions = model.encode_visual(packed.tag_ids.take(images), embedded)
    return model.encode_text(packed.text_ids.take(texts)), regions, tags


def caption_lengths(path: Path, num: int = 20_000) -> list[int]:
    """Wordpieces of a COCO annotation file's first captions."""
    words = WordPiece()
    captions = json.loads(path.read_text(encoding="utf-8"))["annotations"]
    return [len(words.encode(caption["caption"])[0]) for caption in captions[:num]]


def main() -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 16], help="samples; the last one gives the JSON")
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each way")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--captions", type=user_path, help="COCO annotation file that gives the lengths of captions")
    parser.add_argument("--score", type=int, default=8, metavar="N", help="score N x N pairs; 0: do not")
    parser.add_argument("--compile", action="store_true", help="with model.compile, but for the reference")
    parser.add_argument("--profile", action="store_true", help="profile one packed step instead")
    parser.add_argument("--small", action="store_true", help="a tiny model, to try the tool itself")
    parser.add_argument("--worker", choices=WAYS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.caption_lengths = None if arguments.captions is None else caption_lengths(arguments.captions)
    if arguments.profile:
        profile(arguments)
        return 0
    sizes = arguments.batch
    if arguments.worker:
        arguments.batch = sizes[0]
        work(arguments.worker, arguments)
        return 0
    results = {}
    for size in sizes:
        results[size] = compare(size, arguments)
        sys.stdout.write(f"batch {size:2}  {results[size]['speedup_vs_reference']:.2f} x the reference's speed\n")
    last = results[sizes[-1]]
    last |= {f"speedup_vs_reference_batch_{size}": results[size]["speedup_vs_reference"] for size in sizes[:-1]}
    arguments.batch = sizes[-1]
    last |= scoring(arguments.score, arguments) if arguments.score else {}
    sys.stdout.write(json.dumps({name: float(f"{value:.4g}") for name, value in last.items()}) + "\n")
    if not last["losses_max_abs_diff"] <= TOLERANCE:
        sys.stderr.write(f"error: losses differ by {last['losses_max_abs_diff']:.2g}, above {TOLERANCE:g}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
