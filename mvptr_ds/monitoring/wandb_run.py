"""Logs to Weights & Biases: the same run after a resume."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mvptr_ds.config import WandbConfig

logger = logging.getLogger(__name__)
ID = "wandb_id"  # file of the stage's folder
START_TIMEOUT_S = 30.0  # for the service to answer; the other ranks wait meanwhile


class WandbRun:
    """Makes one run for each stage. Its id is kept in `wandb_id`, so resumes and eval.py continue the same run.

    `online` without an account or without an answer becomes `offline`: files that `wandb sync` uploads later.

    Args:
        content: the configuration that wandb shows; empty: that of the run stays.
    """

    def __init__(self, stage_dir: Path, config: WandbConfig, content: Mapping[str, Any]) -> None:
        run_id = stored_id(stage_dir)
        if run_id is None:
            run_id = secrets.token_hex(4)
            (stage_dir / ID).write_text(run_id, encoding="utf-8")
        self._run = _start(stage_dir, config, content, run_id)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Sends one report. `step` is a value like the others, since a resumed run may begin before its last report."""
        self._run.log({"step": step, **values})

    def log_picture(self, step: int, name: str, path: Path) -> None:
        """Sends a PNG."""
        import wandb  # see `_start`

        self._run.log({"step": step, name: wandb.Image(str(path))})

    def close(self) -> None:
        """Writes what is pending."""
        self._run.finish()


def stored_id(stage_dir: Path) -> str | None:
    """Returns the id of the stage's run on wandb; None where it has none."""
    with suppress(OSError):
        return (stage_dir / ID).read_text(encoding="utf-8", errors="replace").strip() or None
    return None


def _start(stage_dir: Path, config: WandbConfig, content: Mapping[str, Any], run_id: str) -> Any:
    import wandb  # imported only where it is used, since the import takes a second

    settings = wandb.Settings(silent=True, console="off", init_timeout=START_TIMEOUT_S)

    def start(mode: Any) -> Any:
        return wandb.init(
            project=config.project,
            name=config.name or f"{stage_dir.parent.name}-{stage_dir.name}",
            id=run_id,
            resume="allow",
            mode=mode,
            dir=str(stage_dir),
            config=dict(content),
            settings=settings,
        )

    run = None
    if config.mode != "offline":
        if not wandb.login(prompt=False, verify=False):
            logger.warning("wandb is to be online, but there is no account here (wandb login): logging offline")
        else:
            try:
                run = start("online")
            except Exception as error:  # the service's own errors have no common class
                logger.warning("wandb is to be online, but there is no answer (%s): logging offline", error)
                wandb.teardown()  # its helper process still holds the id for the run that did not start
    run = run or start("offline")
    run.define_metric("*", step_metric="step")
    return run
