"""Logs to Weights & Biases, if wanted: the same run after a resume, and never a reason for training to end."""

from __future__ import annotations

import logging
import secrets
from pathlib import Path
from typing import Any

from mvptr_ds.config import WandbConfig
from mvptr_ds.monitoring.versions import versions

logger = logging.getLogger(__name__)
START_TIMEOUT_S = 30.0  # for the service to answer; the other ranks wait meanwhile


class WandbRun:
    """Makes one run for each stage. Its id is kept in `wandb_id`, so a resume continues the same run.

    `online` without an account or without an answer becomes `offline`: files that `wandb sync` uploads later. Whatever
    goes wrong inside the service is reported once and ends the logging, not the training.
    """

    def __init__(self, folder: Path, config: WandbConfig, content: dict[str, Any]) -> None:
        self.id: str | None = None
        self._run: Any = None
        if config.mode == "disabled":
            return
        try:
            self.id = _run_id(folder / "wandb_id")
            self._run = _start(folder, config, content, self.id)
        except Exception as error:  # the service's own errors have no common class
            logger.warning("wandb could not start, training goes on without: %s", error)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Sends one report. `step` is a value like the others, since a resumed run may begin before its last report."""
        if self._run is None:
            return
        try:
            self._run.log({"step": step} | {k: v for k, v in values.items() if v is not None})
        except Exception as error:  # see above
            logger.warning("wandb stopped at step %d, training goes on without: %s", step, error)
            self._run = None

    def close(self) -> None:
        """Writes what is pending."""
        run, self._run = self._run, None
        try:
            if run is not None:
                run.finish()
        except Exception as error:  # see above
            logger.warning("wandb could not finish its run: %s", error)


def _run_id(path: Path) -> str:
    if not path.exists() or not path.read_text(encoding="utf-8").strip():
        path.write_text(secrets.token_hex(4), encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _start(folder: Path, config: WandbConfig, content: dict[str, Any], run_id: str) -> Any:
    import wandb  # imported only where it is used, since the import takes a second

    settings = wandb.Settings(silent=True, console="off", init_timeout=START_TIMEOUT_S)

    def start(mode: Any) -> Any:
        return wandb.init(
            project=config.project,
            name=config.name or f"{folder.parent.name}-{folder.name}",
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(folder),
            config={**content, "versions": versions()},
            settings=settings,
        )

    run = None
    if config.mode == "online":
        if not wandb.login(prompt=False, verify=False):
            logger.warning("wandb.mode=online, but there is no account here (wandb login): logging offline")
        else:
            try:
                run = start("online")
            except Exception as error:  # the service's own errors have no common class
                logger.warning("wandb.mode=online, but there is no answer (%s): logging offline", error)
    run = run or start("offline")
    run.define_metric("*", step_metric="step")
    return run
