"""Which checkpoint of a stage is the best by its evaluations, and whether there were enough without a better one.

    STAGE/best.json     {"step", "score", "by", ["stopped_at",] "evaluations": [[step, score], ...]}

Both follow from the list of evaluations alone. A run that resumes drops those behind its checkpoint, since it comes to
them again. A checkpoint is written before the evaluation that needs it is recorded: the best one, or the last one of a
stage that ends early. So a run that is killed at any point comes to the same end as one that nobody disturbs:

    killed before the record    the evaluation of that step is missing from the list, and is done again
    killed after the record     the checkpoint of the best step is there, and nothing is done twice
"""

from __future__ import annotations

import json
import logging
import math
import os
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from mvptr_ds.checkpoints.checkpoint import UNREADABLE, complete, damaged, verify
from mvptr_ds.distributed import collectives
from mvptr_ds.user_io.atomic import replacing

logger = logging.getLogger(__name__)
BEST = "best.json"  # of a stage


class Evaluation(NamedTuple):
    """The score of a step; None where it was no number."""

    step: int
    score: float | None


@dataclass(frozen=True)
class Evaluations:
    """The evaluations of a stage, in the order of their steps.

    Args:
        folder: of the stage.
        by: the score that is compared; None: the stage compares none, and the list stays empty.
        patience: the stage ends after so many evaluations in a row without a better score; 0: never.
    """

    folder: Path
    by: str | None
    patience: int = 0
    done: tuple[Evaluation, ...] = ()

    @classmethod
    def resume(cls, folder: Path, by: str | None, patience: int, step: int) -> Evaluations:
        """Returns those that `best.json` lists up to the step of a checkpoint, and drops the others. All ranks call it.

        Raises:
            OSError: the file cannot be read, or not be replaced.
        """
        evaluations = cls(folder, by, patience)
        if by is None:
            return evaluations
        content = collectives.of_main(lambda: _read(folder))
        if content is None or content["by"] != by:
            return evaluations
        done = [Evaluation(*item) for item in content["evaluations"] if item[0] <= step]
        evaluations = replace(evaluations, done=tuple(done))
        if evaluations.to_json() != content:  # they were behind the checkpoint, or the patience is another one
            collectives.run_on_rank_zero(evaluations._write)
        return evaluations

    @property
    def best(self) -> Evaluation | None:
        """The evaluation of the highest score, the earliest of several; None where no score is a number."""
        scored = [evaluation for evaluation in self.done if evaluation.score is not None]
        return max(scored, key=lambda evaluation: evaluation.score or 0.0, default=None)

    @property
    def stopped_at(self) -> int | None:
        """The step at which the patience was at an end; None where it is not."""
        best, in_vain = -math.inf, 0
        for step, score in self.done:
            if score is not None and score > best:
                best, in_vain = score, 0
            else:
                in_vain += 1
            if self.patience and in_vain >= self.patience:
                return step
        return None

    def why_stopped(self) -> str | None:
        """Returns why the stage has ended early, for the log; None where it has not."""
        if self.stopped_at is None:
            return None
        text = f"it stopped at step {self.stopped_at}, after {self.patience} evaluations in a row without a better "
        best = f", {self.best.score:.4f} at step {self.best.step}" if self.best is not None else ""
        return f"{text}{self.by}{best} (patience={self.patience})"

    def lacks(self, step: int) -> bool:
        """Returns whether scores are compared and that of this step is missing: a run was ended before its record."""
        return self.by is not None and step > 0 and step not in {evaluation.step for evaluation in self.done}

    def after(self, step: int, score: float) -> Evaluations:
        """Returns the list with one evaluation more. A score that is not finite is none."""
        return replace(self, done=(*self.done, Evaluation(step, score if math.isfinite(score) else None)))

    def record(self) -> None:
        """Writes `best.json` on rank 0. Without space it is reported; the next one holds this evaluation, too."""
        if not collectives.is_main():
            return
        try:
            self._write()
        except OSError as error:
            logger.error("%s is not written, training goes on: %s", self.folder / BEST, error)

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `best.json`."""
        best = self.best
        content: dict[str, Any] = {"step": best and best.step, "score": best and best.score, "by": self.by}
        if self.stopped_at is not None:
            content["stopped_at"] = self.stopped_at
        return {**content, "evaluations": [list(evaluation) for evaluation in self.done]}

    def _write(self) -> None:
        if not self.done:
            with suppress(FileNotFoundError):
                (self.folder / BEST).unlink()
            return
        with replacing(self.folder / BEST) as partial, partial.open("w", encoding="utf-8") as file:
            json.dump(self.to_json(), file)
            file.flush()
            os.fsync(file.fileno())


def best_checkpoint(stage_dir: Path) -> Path | None:
    """Returns the checkpoint of a stage's best score; None where nothing is best, or where it is gone or damaged.

    The log says which step it is, or why the newest checkpoint has to stand in for it. All ranks call it.

    Raises:
        StorageError: it cannot be read for a reason that may pass.
    """
    content = collectives.of_main(lambda: _read(stage_dir))
    if content is None or content["step"] is None:
        return None
    step, score = content["step"], content["score"]
    path = stage_dir / "checkpoints" / f"step-{step:08d}"
    problem = verify(path) if collectives.of_main(lambda: path in complete(path.parent)) else "it is gone"
    if problem is not None and UNREADABLE in problem:
        raise damaged(f"{path}, the best of {stage_dir.name}: {problem}: ", [problem], "")
    if collectives.is_main():
        best = f"{stage_dir.name} was best at step {step} ({content['by']} {score:.4f})"
        if problem is None:
            logger.info("%s: %s", best, path)
        else:
            logger.warning("%s, but its checkpoint cannot be used (%s): its newest one is taken instead", best, problem)
    return path if problem is None else None


def _read(stage_dir: Path) -> dict[str, Any] | None:
    """The content of `best.json`; None where there is none, or where it is damaged, which is reported."""
    path = stage_dir / BEST
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        step, score, by = content["step"], content["score"], content["by"]
        listed = [Evaluation(*item) for item in content["evaluations"]]
        if by is not None and (step is None) == (score is None) and all(isinstance(e.step, int) for e in listed):
            return dict(content)
        problem = "its values do not fit each other"
    except FileNotFoundError:
        return None
    except (ValueError, LookupError, TypeError) as error:
        problem = str(error)
    logger.warning("%s says not which checkpoint is the best (%s); it counts as missing", path, problem)
    return None
