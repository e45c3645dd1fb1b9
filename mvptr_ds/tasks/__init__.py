"""What a run can train: the stages of pre-training and the downstream tasks, by the names that `run.stages` uses."""

from __future__ import annotations

from mvptr_ds.tasks.pretraining import JOINT, STAGE1, STAGE2
from mvptr_ds.tasks.task import Task

TASKS: dict[str, Task] = {task.name: task for task in (STAGE1, STAGE2, JOINT)}

__all__ = ["TASKS", "Task"]
