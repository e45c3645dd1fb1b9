"""Collects and writes what a run reports: losses, throughput and memory, on the console and in `metrics.jsonl`."""

from __future__ import annotations

import json
import logging
import math
import os
import resource
import time
from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.config import WandbConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.distributed import collectives
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.monitoring.timing import PHASES, Peak, PhaseClock
from mvptr_ds.monitoring.wandb_run import WandbRun
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.table import OBJECTIVES
from mvptr_ds.user_io.atomic import replacing

logger = logging.getLogger(__name__)
GIB = 2**30
SUMMARY = ("eval/retrieval/t2i_r1", "eval/rerank/t2i_r1", "eval/grounding/accuracy", "eval/mcr/accuracy")


class Meters:
    """Sums since the last report. Nothing is read from the device or exchanged before `report`.

    Args:
        sources: names of the sources of a mixture, which are also counted apart.
        flops: counts the FLOPs of a batch, which are then reported.
        peak: what the device can do at most. The share of it is then reported, too.
    """

    def __init__(
        self,
        device: torch.device,
        sources: Sequence[str] = (),
        flops: StepFlops | None = None,
        peak: Peak | None = None,
    ) -> None:
        self.device, self.flops, self.peak = device, flops, peak
        self.sources = list(sources)
        self.clock = PhaseClock(device)
        self._reset()

    def _reset(self) -> None:
        self.sums: dict[str, Tensor] = defaultdict(lambda: torch.zeros(2, dtype=torch.float64, device=self.device))
        self.counts: dict[str, float] = defaultdict(float)
        self.since_s = time.perf_counter()

    def add_parts(self, parts: dict[str, LossSum], source_B: Tensor | None = None) -> None:
        """Adds each objective's local sum and count, and those of each source where they are known by sample."""
        for name, part in parts.items():
            self.sums[f"loss/{name}"] += torch.stack([part.sum, part.count]).double()
            if source_B is None or part.per_sample_B2 is None:
                continue
            source_B = source_B.to(part.per_sample_B2.device, non_blocking=True)
            for number, source in enumerate(self.sources):
                of_source_B1 = (source_B == number)[:, None]
                self.sums[f"source/{source}/loss/{name}"] += (part.per_sample_B2 * of_source_B1).sum(0).double()

    def add_batch(self, batch: Batch, data_wait_s: float) -> None:
        """Counts samples, slots and phrases of a batch that is still on the host."""
        masks = (batch.text_mask_BT, batch.tag_mask_BG, batch.region_mask_BR)
        self.counts["slots"] += sum(mask.numel() for mask in masks)
        self.counts["valid"] += sum(int(mask.sum()) for mask in masks)
        self.counts["data_wait_s"] += data_wait_s
        if self.flops is not None:
            self.counts["tflop"] += self.flops.of(batch) / 1e12
        self._count_samples("", batch, torch.ones_like(batch.source_B, dtype=torch.bool))
        for number, name in enumerate(self.sources):
            self._count_samples(f"source/{name}/", batch, batch.source_B == number)

    def _count_samples(self, prefix: str, batch: Batch, chosen_B: Tensor) -> None:
        self.counts[f"{prefix}samples"] += int(chosen_B.sum())
        self.counts[f"{prefix}phrases"] += int(batch.num_phrases_B[chosen_B].sum())
        self.counts[f"{prefix}oov_phrases"] += int(batch.num_oov_phrases_B[chosen_B].sum())
        self.counts[f"{prefix}bad_samples"] += int(batch.num_bad_B[chosen_B].sum())

    def report(self) -> dict[str, Any]:
        """Returns the means over all ranks since the last report, and resets. Every rank calls it at the same step.

        A loss without a target is None, unlike NaN, which shows that training diverges. Shares of time are of the mean
        rank. `time/communication_frac` lies within the other phases.
        """
        seconds = self.clock.read()
        self.counts |= {phase: seconds[phase] for phase in PHASES}
        self.counts["peak_tflops"] = 0.0 if self.peak is None else self.peak.tflops
        names, count_names = sorted(self.sums), sorted(self.counts)
        counts = torch.tensor([self.counts[n] for n in count_names], dtype=torch.float64, device=self.device)
        packed = collectives.all_reduce_sum(torch.cat([*(self.sums[n] for n in names), counts])).tolist()
        elapsed_s = time.perf_counter() - self.since_s  # the line above waits for the device
        out: dict[str, Any] = {}
        for i, name in enumerate(names):
            total, count = packed[2 * i : 2 * i + 2]
            out[name] = total / count if count else None
        totals = dict(zip(count_names, packed[2 * len(names) :], strict=True))
        rank_seconds = collectives.num_ranks() * elapsed_s
        out |= {
            "samples_per_s": totals["samples"] / elapsed_s,
            "tokens_per_s": totals["valid"] / elapsed_s,
            "data/wait_frac": totals["data_wait_s"] / rank_seconds,
            "data/padded_frac": 1.0 - totals["valid"] / totals["slots"],
            "data/oov_phrases_frac": _oov_frac(totals, ""),
            "data/samples": totals["samples"],
            "data/bad_samples": totals["bad_samples"],
            "memory_gib": peak_memory_gib(self.device),
        }
        out |= {f"time/{phase}_frac": totals[phase] / rank_seconds for phase in PHASES}
        if self.flops is not None:
            out["model_tflops_per_rank"] = totals["tflop"] / rank_seconds
        if self.flops is not None and self.peak is not None:
            out["mfu_frac"] = totals["tflop"] / totals["peak_tflops"] / elapsed_s
        for name in self.sources:
            prefix = f"source/{name}/"
            out |= {
                f"{prefix}samples": totals[f"{prefix}samples"],
                f"{prefix}share": totals[f"{prefix}samples"] / totals["samples"],
                f"{prefix}oov_phrases_frac": _oov_frac(totals, prefix),
                f"{prefix}bad_samples": totals[f"{prefix}bad_samples"],
            }
        self._reset()
        return out


def _oov_frac(totals: dict[str, float], prefix: str) -> float:
    dropped = totals[f"{prefix}oov_phrases"]
    phrases = totals[f"{prefix}phrases"] + dropped
    return dropped / phrases if phrases else 0.0


def peak_memory_gib(device: torch.device) -> float:
    """Returns the peak of allocated memory on CUDA, or of this process's resident memory on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIB


class MetricsLog:
    """Writes rank 0's log of a stage: a line on the console, a JSON object for each report, and wandb.

    What cannot be written, for want of space, is kept and written with the first report that can be.

    Args:
        resumed_at: the step that the run resumes from. Later reports belong to a lost part and are dropped.
        config: the resolved configuration, as wandb shows it.
    """

    def __init__(self, folder: Path, resumed_at: int, wandb: WandbConfig, config: dict[str, Any]) -> None:
        self.path = folder / "metrics.jsonl"
        self.enabled = collectives.is_main()
        self.wandb_id: str | None = None
        self._pending: list[str] = []
        self._seen: set[str] = set()  # losses that have had a target, or that were reported to have none
        if self.enabled:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_lines_from(self.path, resumed_at)
            self.wandb = WandbRun(folder, wandb, config)
            self.wandb_id = self.wandb.id

    def write(self, step: int, max_steps: int, values: dict[str, Any]) -> None:
        """Appends one report. None, of an objective without a target, and NaN and infinity become null."""
        if not self.enabled:
            return
        self._append(step, {k: v if v is not None and math.isfinite(v) else None for k, v in values.items()})
        means = {k.removeprefix("loss/"): v for k, v in values.items() if k.startswith("loss/")}
        losses = " ".join(f"{name} -" if mean is None else f"{name} {mean:.3f}" for name, mean in means.items())
        seconds_left = (max_steps - step) * values["seconds_per_step"]
        speed = f"{values['samples_per_s']:.0f} samples/s"
        if "model_tflops_per_rank" in values:
            speed += f", {values['model_tflops_per_rank']:.3g} TFLOPS"
        if "mfu_frac" in values:
            speed += f" ({100 * values['mfu_frac']:.0f}% MFU)"
        logger.info(
            "%s %d/%d  %s | lr %.2g norm %.2f | %s, wait %.0f%%, padded %.0f%%, %.1f GiB, %d:%02d left",
            self.path.parent.name, step, max_steps, losses, values["learning_rate"], values["grad_norm"],
            speed, 100 * values["data/wait_frac"], 100 * values["data/padded_frac"],
            values["memory_gib"], *divmod(int(seconds_left), 60),
        )  # fmt: skip
        self._say_what_is_not_learnt(means, values)

    def _say_what_is_not_learnt(self, means: dict[str, float | None], values: dict[str, Any]) -> None:
        """Names, once, each objective that has had no target so far."""
        stage = self.path.parent.name
        for name in [name for name, mean in means.items() if mean is None and name not in self._seen]:
            logger.warning(
                "%s has nothing to learn so far (-): none of the %d samples had %s; %s.weights.%s=0 turns it off",
                name, values["data/samples"], OBJECTIVES[name].target, stage, name,
            )  # fmt: skip
        self._seen |= means.keys()

    def write_scores(self, step: int, scores: dict[str, float]) -> None:
        """Appends the scores of an evaluation."""
        if self.enabled:
            self._append(step, scores)
            logger.info("%s %d evaluated: %s", self.path.parent.name, step, _in_percent(scores))

    def close(self) -> None:
        """Ends the wandb run, if there is one."""
        if self.enabled:
            self.wandb.close()

    def _append(self, step: int, values: dict[str, Any]) -> None:
        self._pending.append(json.dumps({"step": step, "time": time.time(), **values}) + "\n")
        num_bytes = self.path.stat().st_size if self.path.exists() else 0
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write("".join(self._pending))
            self._pending.clear()
        except OSError as error:
            logger.error("%s: %s; kept until it can be written", self.path, error)
            with suppress(OSError):  # the part of the line that was written
                os.truncate(self.path, num_bytes)
        self.wandb.log(step, values)


def _in_percent(scores: dict[str, float]) -> str:
    """The scores of pre-training that tell most, or the first four of another task."""
    chosen = [key for key in SUMMARY if key in scores] or list(scores)[:4]
    return ", ".join(f"{key.removeprefix('eval/')} {100 * scores[key]:.1f} %" for key in chosen)


def _drop_lines_from(path: Path, step: int) -> None:
    """Removes reports after `step`, which belong to a part of the run that is repeated.

    Lines that are no report are removed and reported, except a last line that a killed run cut off.
    """
    if not path.exists():
        return
    *whole, rest = path.read_bytes().split(b"\n")
    steps = [_step_of(line) for line in (*whole, rest)]
    num_strange = sum(bool(line) and found is None for line, found in zip(whole, steps[:-1], strict=True))
    if num_strange:
        logger.warning("%s: lines that are no reports are dropped (%d)", path, num_strange)
    kept = [line for line, found in zip((*whole, rest), steps, strict=True) if found is not None and found <= step]
    with replacing(path) as partial:  # a run killed here must not lose the lines before
        partial.write_bytes(b"".join(line + b"\n" for line in kept))


def _step_of(line: bytes) -> float | None:
    """Returns the step of a report, or None for another line."""
    try:
        step = json.loads(line.decode())["step"]
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return step if isinstance(step, int | float) else None
