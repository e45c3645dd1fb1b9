"""Runs as they were at an earlier step."""

from __future__ import annotations

import shutil
from pathlib import Path

STAGES = ("stage1", "stage2")


def forget(run_dir: Path, copy: Path, stage: str, step: int) -> Path:
    """A copy of a run as it was after `step` of a stage."""
    shutil.copytree(run_dir, copy)
    for later in STAGES[STAGES.index(stage) + 1 :]:
        shutil.rmtree(copy / later, ignore_errors=True)
    for path in (copy / stage / "checkpoints").glob("step-*"):
        if int(path.name.removeprefix("step-")) > step:
            shutil.rmtree(path)
    for log in copy.glob("rank*.log"):
        log.unlink()
    return copy
