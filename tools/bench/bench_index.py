"""The parts of tools/bench/bench_loader.py that need an index of ten million samples: resume, workers' memory."""

from __future__ import annotations

import hashlib
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import bench_data
import numpy as np

from mvptr_ds.data.dataset import ShardDataset
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_format import INDEX_NAME, MANIFEST_NAME, ROW, sampled_digest
from mvptr_ds.data.wordpiece import WordPiece

BATCH = 32
NUM_TRIES = 7
NUM_WORKERS = 2


def write_large_index(folder: Path, num_samples: int) -> None:
    """An index of as many records of one caption each; their places are those of a few real ones, again and again."""
    bench_data.write(folder, "features", bench_data.RECORDS_PER_SHARD, num_captions=1)
    manifest = json.loads((folder / MANIFEST_NAME).read_text())
    real = np.load(folder / INDEX_NAME)
    rows = np.empty(num_samples, dtype=ROW)
    for name in ("block", "span"):
        rows[name] = np.resize(real[name], num_samples)
    rows["first_sample"] = np.arange(num_samples)
    rows["key_hash"] = np.random.default_rng(0).integers(0, 1 << 63, num_samples)
    np.save(folder / INDEX_NAME, rows)
    with open(folder / INDEX_NAME, "rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else "0" * 64
        manifest |= {"sha256": sha256, "probe": sampled_digest(file, sha256), "num_records": num_samples}
    manifest["num_samples"] = num_samples
    manifest["shards"][0] |= {"num_records": num_samples, "num_samples": num_samples}
    (folder / MANIFEST_NAME).write_text(json.dumps(manifest))


def _dataset(folder: Path, words: WordPiece, phrases: PhraseVocab) -> ShardDataset:
    index = Index.open(folder)
    options = SampleOptions(feature_dim=bench_data.FEATURE_DIM, word_prob=0.15, tag_prob=0.15)
    return ShardDataset(index, Plan(len(index), seed=0), SampleBuilder(words, phrases, options))


def _timed(name: str, run: Callable[[], object]) -> float:
    """Milliseconds of CPU time, median of a few tries; prints them."""
    cpu_ms, wall_ms = [], []
    for _ in range(NUM_TRIES):
        started_s, cpu_s = time.perf_counter(), time.process_time()
        run()
        cpu_ms.append((time.process_time() - cpu_s) * 1e3)
        wall_ms.append((time.perf_counter() - started_s) * 1e3)
    shown = (
        f"{statistics.median(cpu_ms):.1f} ms of CPU (first {cpu_ms[0]:.1f}), {min(wall_ms):.1f} of wall time at best"
    )
    print(f"  {name:56}{shown}")
    return statistics.median(cpu_ms)


def bench_index(folder: Path, num_samples: int, words: WordPiece, phrases: PhraseVocab) -> dict[str, float]:
    """Opening the index, and the first batch of a run that goes on at position `num_samples`, opening included.

    Both in CPU time, like all else here, and in wall time, which on an idle machine is the same.
    """
    write_large_index(folder, num_samples)
    num_bytes = sum((folder / name).stat().st_size for name in (INDEX_NAME, MANIFEST_NAME))
    step = num_samples // BATCH

    def resume() -> None:
        next(iter(make_loader(_dataset(folder, words, phrases), Batches(BATCH), step, step + 1)))

    print(f"\nan index of {num_samples:,} samples: {num_bytes / 1e6:.1f} MB")
    _timed("opened", lambda: Index.open(folder))
    resumed_ms = _timed(f"first batch of {BATCH} at position {step * BATCH:,}", resume)
    return {
        "resume_first_batch_ms": round(resumed_ms, 1),
        "index_bytes_per_sample": round(num_bytes / num_samples, 2),
    }


def _private_mib(process: int) -> float:
    """Returns the private memory of a process in MiB: neither shared with another nor of a mapped file."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_Dirty")) / 1024


def _cpu_s(process: int) -> float:
    """CPU time of a process and its threads so far."""
    ticks = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[11:13]
    return sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def bench_workers(folder: Path, num_samples: int, words: WordPiece, phrases: PhraseVocab) -> None:
    """Private memory of loader processes with the large index, from their first batches on, and their CPU time."""
    dataset = _dataset(folder, words, phrases)
    num_steps = num_samples // BATCH
    warm = min(20, num_steps // 16)  # steps until the processes have started
    watched = {num_steps * share // 8 for share in range(1, 9)}
    loader = iter(make_loader(dataset, Batches(BATCH), 0, num_steps + 1, num_workers=NUM_WORKERS))
    workers = [worker.pid for worker in loader._workers]  # type: ignore[attr-defined]
    print(f"\nprivate memory of {NUM_WORKERS} workers and of this process, MiB (the index has "
          f"{os.stat(folder / INDEX_NAME).st_size >> 20} MiB)")  # fmt: skip
    own = os.getpid()
    begun_s = used_s = [0.0, 0.0]
    for step, _ in enumerate(loader, start=1):
        if step == warm or step in watched:
            sizes = " ".join(f"{_private_mib(worker):8.1f}" for worker in workers)
            print(f"  after {step * BATCH:8,} samples {sizes} {_private_mib(own):8.1f}", flush=True)
            used_s = [sum(map(_cpu_s, workers)), _cpu_s(own)]
            if step == warm:
                begun_s = used_s
    each_us = [(end - start) / ((num_steps - warm) * BATCH) * 1e6 for start, end in zip(begun_s, used_s, strict=True)]
    print(f"  CPU time of a sample, its way to this process included: {each_us[0]:.0f} us in the workers, "
          f"{each_us[1]:.0f} here")  # fmt: skip
