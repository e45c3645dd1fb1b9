"""Writes what a run reports, on the console, in `metrics.jsonl` and to trackers. `meters.py` counts it."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from mvptr_ds.config import Config
from mvptr_ds.distributed import collectives
from mvptr_ds.monitoring.trackers import open_trackers
from mvptr_ds.monitoring.wandb_run import stored_id
from mvptr_ds.objectives.table import OBJECTIVES
from mvptr_ds.user_io.atomic import replacing

logger = logging.getLogger(__name__)
SUMMARY = ("eval/retrieval/t2i_r1", "eval/rerank/t2i_r1", "eval/grounding/accuracy", "eval/mcr/accuracy")


class MetricsLog:
    """Writes rank 0's log of a stage: a line on the console, a JSON object for each report, and trackers.

    What cannot be written, for want of space, is kept and written with the first report that can be.

    Args:
        resumed_at: the step that the run resumes from. Later reports belong to a lost part and are dropped.
        config: names the trackers, and is shown there.
    """

    def __init__(self, folder: Path, resumed_at: int, config: Config) -> None:
        self.path = folder / "metrics.jsonl"
        self.enabled = collectives.is_main()
        self.wandb_id: str | None = None
        self._pending: list[str] = []
        self._seen: set[str] = set()  # losses that have had a target, or that were reported to have none
        if self.enabled:
            folder.mkdir(parents=True, exist_ok=True)
            _drop_lines_from(self.path, resumed_at)
            self.trackers = open_trackers(folder, config, resumed_at)
            self.wandb_id = stored_id(folder)

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
        """Ends the trackers."""
        if self.enabled:
            self.trackers.close()

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
        self.trackers.log(step, values)


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
