"""Ends a run whose rank hangs, or whose gradients are not finite."""

from __future__ import annotations

import faulthandler
import logging
import os
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mvptr_ds.distributed import collectives
from mvptr_ds.errors import TrainingError

logger = logging.getLogger(__name__)


def any_rank(flags: Sequence[bool], device: torch.device) -> list[bool]:
    """Returns for each flag whether any rank has it set. It takes one collective of a few numbers."""
    if collectives.num_ranks() == 1:  # one rank: no collective is needed
        return list(flags)
    counts = collectives.all_reduce_sum(torch.tensor([float(flag) for flag in flags], device=device))
    return [count > 0 for count in counts.tolist()]


def collectives_timeout_s(*guard_limits_s: float) -> float:
    """Returns how long a collective may wait: longer than Watchdog, so that its stacks come first, or a week."""
    return max(guard_limits_s) + 600.0 if all(limit_s > 0 for limit_s in guard_limits_s) else 7 * 86_400.0


class Watchdog:
    """Ends this process with the stacks of its threads when `alive` was not called for `timeout_s` seconds.

    The limit is `start_timeout_s` until the first call of `alive`, and None means `timeout_s`. Each call of `starting`
    restarts it.

    The timer is a C thread of the interpreter, so it also fires while a kernel or a collective holds the process.
    When one rank hangs, the others block in their next collective and write their stacks too. Another rank's end may
    make that collective fail earlier. Then they write where they waited.

    Stacks of earlier starts are kept as `stacks-rank0.1.txt` and so on, the newest with the lowest number.
    """

    KEPT = 5

    def __init__(self, path: Path, timeout_s: float, start_timeout_s: float | None = None) -> None:
        self.path, self.timeout_s = path, timeout_s
        self.start_timeout_s = timeout_s if start_timeout_s is None else start_timeout_s

    def __enter__(self) -> Watchdog:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._keep_earlier()
        self._file = self.path.open("w", encoding="utf-8")
        self._start(self.start_timeout_s)
        return self

    def _keep_earlier(self) -> None:
        if not self.path.exists() or self.path.stat().st_size == 0:
            return
        numbered = [self.path.with_suffix(f".{number}{self.path.suffix}") for number in range(1, self.KEPT + 1)]
        for older, newer in zip(reversed(numbered), reversed([self.path, *numbered[:-1]]), strict=True):
            if newer.exists():
                os.replace(newer, older)

    def alive(self) -> None:
        """Restarts the time. 0 seconds means no limit."""
        self._start(self.timeout_s)

    def starting(self) -> None:
        """Restarts the time of the start-up, whose long parts wait in short intervals."""
        self._start(self.start_timeout_s)

    def _start(self, timeout_s: float) -> None:
        self._alive_s = time.monotonic()
        faulthandler.cancel_dump_traceback_later()
        if timeout_s > 0:
            faulthandler.dump_traceback_later(timeout_s, exit=True, file=self._file)

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        faulthandler.cancel_dump_traceback_later()
        waited_s = time.monotonic() - self._alive_s
        if error is not None and 0 < self.timeout_s < 2 * waited_s:
            self._file.write(f"Failed after {waited_s:.0f} s without a step:\n")
            self._file.writelines(traceback.format_exception(error))
        self._file.close()
        if self.path.stat().st_size == 0:
            self.path.unlink()


@dataclass(frozen=True)
class LossScale:
    """Holds fp16's dynamic loss scale after a step, and the least value that it may have."""

    value: float
    minimum: float


class SkippedSteps:
    """Counts the steps that the engine skipped because their gradient was not finite, on all ranks alike.

    fp16 also skips a step when the loss scale was too high and is lowered, at the start several times in a row. Such
    steps are counted and do not end the run. When no lower scale is left, the run ends at once.
    """

    def __init__(self, max_in_row: int) -> None:
        self.max_in_row = max_in_row
        self.in_row, self.total = 0, 0

    def count(self, step: int, applied: bool, loss_scale: LossScale | None = None) -> None:
        """Raises TrainingError after `max_in_row` skipped steps in a row, or when fp16 finds no loss scale."""
        if applied:
            self.in_row = 0
            return
        self.total += 1
        if loss_scale is not None:
            self._lowered(step, loss_scale)
            return
        self.in_row += 1
        if collectives.is_main():
            logger.warning("step %d left out: its gradient is not finite (%d so far)", step, self.total)
        if self.in_row >= self.max_in_row:
            raise TrainingError(
                f"{self.in_row} steps in a row had a gradient that is not finite, the last was step {step} "
                "(train.max_skipped_in_row); lower the learning rate, lengthen warmup_steps, or use bf16 for fp16"
            )

    def _lowered(self, step: int, scale: LossScale) -> None:
        if collectives.is_main():
            logger.warning(
                "step %d left out: fp16 overflow, loss scale now %g (%d so far)", step, scale.value, self.total
            )
        if scale.value <= scale.minimum:
            raise TrainingError(
                f"step {step}: fp16 overflows at every loss scale above the minimum {scale.minimum:g}; lower the "
                "learning rate, lengthen warmup_steps, or use bf16"
            )
