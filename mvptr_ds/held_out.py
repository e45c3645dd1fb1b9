"""Evaluates a stage on the held-out shards between two steps of its training, and says what follows from the score."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import torch

from mvptr_ds.checkpoints.best import Evaluations
from mvptr_ds.config import Config
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import DataError
from mvptr_ds.monitoring.metrics import MetricsLog
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.stopping import Interrupted, StopSignal
from mvptr_ds.tasks import Task

logger = logging.getLogger(__name__)


class HeldOut:
    """The evaluations of a stage, those to come and those that are done. All ranks call its methods together.

    Args:
        index: the samples to evaluate on; None: nothing is evaluated any more.
        folder: of the stage.
        resumed_at: the step that the stage goes on from.
    """

    def __init__(
        self,
        config: Config,
        task: Task,
        vocabs: Vocabs,
        index: SampleIndex | None,
        device: torch.device,
        folder: Path,
        resumed_at: int,
    ) -> None:
        self.config, self.task, self.vocabs, self.index, self.device = config, task, vocabs, index, device
        section = config.finetuning(task.name)
        patience = 0 if section is None else section.patience
        self.evaluations = Evaluations.resume(folder, task.best_by, patience, resumed_at)

    @property
    def best_step(self) -> int | None:
        """The step of the best score; None where nothing is best."""
        best = self.evaluations.best
        return None if best is None else best.step

    def evaluate(
        self,
        module: TaskModule,
        step: int,
        log: MetricsLog,
        stop: StopSignal,
        save: Callable[[bool], int],
    ) -> None:
        """Evaluates on rank 0, and keeps what the score says: a new best step, or the end of the stage.

        What cannot be read costs the scores of this step alone, and so does a signal, which is not to wait for them.
        Where the task compares no scores, the other ranks wait for rank 0 in the next step's first collective.

        Args:
            save: saves this step, unless that was done, and returns the step of the newest checkpoint; it gets whether
                the save must succeed.
        """
        scores = self._scores(module, step, log, stop) if collectives.is_main() else {}
        if self.task.best_by is None:
            return
        score = collectives.broadcast_object(scores.get(self.task.best_by))
        if score is None:
            return
        after = self.evaluations.after(step, score)
        ends = after.stopped_at is not None
        if (ends or (after.best is not None and after.best.step == step)) and save(ends) != step:
            return  # a score without its checkpoint is worth nothing
        self.evaluations = after
        after.record()
        if ends:
            logger.info("%s is finished: %s", self.task.name, after.why_stopped())

    def _scores(self, module: TaskModule, step: int, log: MetricsLog, stop: StopSignal) -> dict[str, float]:
        assert self.index is not None
        try:
            with stop.interrupting():
                scores = self.task.evaluate(module, self.vocabs, self.config, self.index, self.device)
            log.write_scores(step, scores)
        except (DataError, OSError) as error:
            logger.warning("%s %d not evaluated, training goes on: %s", self.task.name, step, error)
        except Interrupted as interrupted:
            logger.info("%s %d not evaluated: %s", self.task.name, step, interrupted)
        else:
            return scores
        return {}
