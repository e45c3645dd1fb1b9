"""Model folders of downstream tasks with random weights, over the shards of `untrained_folder`."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch

from mvptr_ds.checkpoints.model_folder import load_model_folder, save_model_folder
from mvptr_ds.config import override_config
from mvptr_ds.objectives.module import HEAD
from mvptr_ds.tasks import TASKS
from tests.support.untrained_folder import Untrained

ANSWERS = ["dog", "2", "yes", "no", "a red car", "tree", "blue"]


def finetuned_folder(made: Untrained, task: str, out: Path, overrides: Sequence[str] = ()) -> Path:
    """Writes the untrained model with a random head of a task to `out`, and returns that.

    The list of answers that the head was built from is removed, as it may be where a model is used.
    """
    answers = out.with_name(f"{out.name}-answers.json")
    answers.write_text(json.dumps(ANSWERS), encoding="utf-8")
    model, vocabs, config = load_model_folder(made.folder)
    config = override_config(config, [f"vqa.answers={answers}", f"run.stages=[{task}]", *overrides])
    module = TASKS[task].build(config, model, seed=5)
    torch.manual_seed(7)
    weights = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if module.head is not None:
        weights |= {HEAD + name: torch.randn_like(tensor) for name, tensor in module.head.state_dict().items()}
    save_model_folder(out, model, weights, vocabs, config, module.head_settings)
    answers.unlink()
    return out
