"""What a run can train: the stages of pre-training and the downstream tasks, by the names that `run.stages` uses."""

from __future__ import annotations

from mvptr_ds.tasks.entailment import Entailment
from mvptr_ds.tasks.pretraining import JOINT, STAGE1, STAGE2
from mvptr_ds.tasks.referring import Referring
from mvptr_ds.tasks.retrieval import Retrieval
from mvptr_ds.tasks.task import Task
from mvptr_ds.tasks.vqa import Vqa

PRETRAINING: tuple[Task, ...] = (STAGE1, STAGE2, JOINT)
DOWNSTREAM: tuple[Task, ...] = (Retrieval(), Vqa(), Entailment(), Referring())
TASKS: dict[str, Task] = {task.name: task for task in (*PRETRAINING, *DOWNSTREAM)}

__all__ = ["DOWNSTREAM", "PRETRAINING", "TASKS", "Task"]
