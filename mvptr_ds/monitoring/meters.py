"""Counts what the steps since the last report came to: losses, samples, slots, time and memory, over all ranks.

Legend: B samples, N objectives, S sources.
"""

from __future__ import annotations

import resource
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.data.collate import Batch
from mvptr_ds.distributed import collectives
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.monitoring.timing import PHASES, Peak, PhaseClock
from mvptr_ds.objectives.losses import LossSum

GIB = 2**30


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
        self.sums: dict[tuple[str, ...], Tensor] = {}  # by the names of its rows: float64 [rows, 2], sums and counts
        self.counts: dict[str, float] = defaultdict(float)
        self.since_s = time.perf_counter()

    def add_parts(self, parts: dict[str, LossSum], source_B: Tensor | None = None) -> None:
        """Adds each objective's local sum and count, and those of each source where they are known by sample."""
        # a step's sums in one tensor: some tiny operations for all objectives, instead of some for each
        rows = torch.stack([value for part in parts.values() for value in (part.sum, part.count)]).double().view(-1, 2)
        self._add(tuple(f"loss/{name}" for name in parts), rows)
        per_sample = {name: part.per_sample_B2 for name, part in parts.items() if part.per_sample_B2 is not None}
        if source_B is not None and self.sources and per_sample:
            values_NB2 = torch.stack(list(per_sample.values()))
            chosen_SB = source_B == torch.arange(len(self.sources), device=source_B.device)[:, None]
            chosen_SB = chosen_SB.to(values_NB2.device, non_blocking=True)
            of_sources = (values_NB2 * chosen_SB[:, None, :, None]).sum(2).double().view(-1, 2)
            self._add(tuple(f"source/{s}/loss/{name}" for s in self.sources for name in per_sample), of_sources)

    def _add(self, names: tuple[str, ...], rows: Tensor) -> None:
        before = self.sums.get(names)
        self.sums[names] = rows if before is None else before + rows

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
        row_names, count_names = sorted(self.sums), sorted(self.counts)
        counts = torch.tensor([self.counts[n] for n in count_names], dtype=torch.float64, device=self.device)
        packed = collectives.all_reduce_sum(torch.cat([*(self.sums[n].flatten() for n in row_names), counts])).tolist()
        elapsed_s = time.perf_counter() - self.since_s  # the line above waits for the device
        out: dict[str, Any] = {}
        names = [name for rows in row_names for name in rows]
        sums: dict[str, float] = defaultdict(float)
        sum_counts: dict[str, float] = defaultdict(float)
        for i, name in enumerate(names):
            sums[name] += packed[2 * i]
            sum_counts[name] += packed[2 * i + 1]
        out |= {name: sums[name] / sum_counts[name] if sum_counts[name] else None for name in sorted(sums)}
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
