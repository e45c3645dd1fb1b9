"""Sends what a run reports to the trackers that `train.report_to` names. No failure of theirs ends anything."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from mvptr_ds.config import Config
from mvptr_ds.monitoring.tensorboard_run import TensorBoardRun
from mvptr_ds.monitoring.versions import versions
from mvptr_ds.monitoring.wandb_run import WandbRun

logger = logging.getLogger(__name__)


class Tracker(Protocol):
    """Shows one stage of a run. Each method may raise whatever its service raises: `Trackers` sees to it."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Shows a report, or the scores of an evaluation."""

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Shows a PNG."""

    def close(self) -> None:
        """Writes what is pending."""


class Trackers:
    """Hands everything to each tracker. One that fails is reported once and left out from there."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}

    def add(self, name: str, start: Callable[[], Tracker]) -> None:
        """Starts a tracker. Without it nothing else is lost."""
        try:
            self._open[name] = start()
        except Exception as error:  # the errors of the services have no common class
            logger.warning("%s could not start and is left out: %s", name, error)

    def log(self, step: int, values: Mapping[str, float | None]) -> None:
        """Hands on the values that are not None."""
        known = {key: value for key, value in values.items() if value is not None}
        self._each(f"failed at step {step} and is left out from there", lambda tracker: tracker.log(step, known))

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Hands on a PNG."""
        self._each(
            f"failed at picture {name} and is left out from there",
            lambda tracker: tracker.log_picture(step, name, path),
        )

    def close(self) -> None:
        """Ends all trackers."""
        self._each("could not finish", lambda tracker: tracker.close())
        self._open.clear()

    def _each(self, failed: str, call: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                call(tracker)
            except Exception as error:  # see above
                logger.warning("%s %s: %s", name, failed, error)
                del self._open[name]


def open_trackers(stage_dir: Path, config: Config, resumed_at: int | None) -> Trackers:
    """Starts the trackers that the configuration names. A stage is one run in each, however often it is started.

    Args:
        resumed_at: the step that the stage resumes from, 0 at its start. TensorBoard drops what it has of later steps.
            None: an evaluation by eval.py, which adds to a run and drops nothing.
    """
    trackers = Trackers()
    content: dict[str, Any] = {} if resumed_at is None else {**asdict(config), "versions": versions()}
    if _uses_wandb(config):
        trackers.add("wandb", lambda: WandbRun(stage_dir, config.wandb, content))
    if "tensorboard" in config.train.report_to:
        trackers.add("tensorboard", lambda: TensorBoardRun(stage_dir, resumed_at))
    return trackers


def _uses_wandb(config: Config) -> bool:
    named, mode = "wandb" in config.train.report_to, config.wandb.mode
    if named and mode == "disabled":
        logger.warning("train.report_to names wandb, but wandb.mode=disabled: nothing goes there (wandb.mode=null)")
    return named if mode is None else mode != "disabled"
