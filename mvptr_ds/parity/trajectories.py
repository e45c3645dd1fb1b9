"""Compares some optimiser steps with those of the published AdamW and its schedule.

Two details of the published AdamW differ from torch's, which the project uses. It decays a weight behind the step, and
adds eps to the second moment before that is corrected for its bias. Both are translated into settings of ours here, so
that groups, schedule and clipping are compared exactly. With the settings as they are, the recorded four steps at a
learning rate of 5e-4 end with losses that differ by 1e-5 to 3e-4 of themselves.
"""

from __future__ import annotations

from typing import Any

import torch

from mvptr_ds.config import OptimConfig
from mvptr_ds.config_stages import StageConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.model.encoder import Execution
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.optim.optimizer import build_optimizer, learning_rate_at, parameter_groups
from mvptr_ds.parity.comparison import Comparison
from mvptr_ds.parity.finetuned_cases import Recorded

_CASES = {"vqa": "vqa", "ve": "ve", "re_mod1": "re_mod1_layer{layer}"}  # recorded name -> name of the case
_CLIP_NORM = 1.0
_TOLERANCE = 1e-9


def check(comparison: Comparison, recorded: Recorded, execution: Execution) -> None:
    """Compares losses, gradient norms before clipping, and learning rates of every recorded step, in float64."""
    by_name = {case.name: case for case in recorded.cases()}
    for name, trajectory in recorded.scalars["trajectories"].items():
        case = by_name[_CASES[name].format(layer=recorded.phrase_layer)]
        stage = StageConfig(max_steps=len(trajectory["steps"]), learning_rate=trajectory["lr"], warmup_steps=0)
        steps, loss_after = _train(
            recorded.module(case, torch.float64, execution),
            recorded.batch(case, torch.float64),
            stage,
            trajectory["weight_decay"],
        )
        for number, (wanted, ours) in enumerate(zip(trajectory["steps"], steps, strict=True)):
            for key, value in wanted.items():
                comparison.number(f"trajectory {name} step {number} {key}", value, ours[key], _tolerance(key, value))
        after = trajectory["loss_after"]
        comparison.number(f"trajectory {name} loss_after", after, loss_after, _tolerance("loss_after", after))


def _tolerance(key: str, value: float) -> float:
    return 1e-12 if key == "lr" else _TOLERANCE * max(1.0, abs(value))


def _train(
    module: TaskModule, batch: Batch, stage: StageConfig, weight_decay: float
) -> tuple[list[dict[str, float]], float]:
    """Returns loss, gradient norm and learning rate of each step, and the loss behind the last."""
    named = [(name, weight) for name, weight in module.named_weights() if weight.requires_grad]
    weights = [weight for _, weight in named]
    optimizer = build_optimizer(parameter_groups(named, weight_decay), OptimConfig(), stage.learning_rate)
    steps = []
    for step in range(stage.max_steps):
        optimizer.zero_grad()
        loss = module(batch, step).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(weights, _CLIP_NORM)
        learning_rate = learning_rate_at(step + 1, stage)  # their schedule is a step ahead
        for group in optimizer.param_groups:
            _set_as_published(group, learning_rate, weight_decay if group["weight_decay"] else 0.0, step + 1)
        optimizer.step()
        steps.append({"loss": loss.item(), "grad_norm": float(norm), "lr": learning_rate})
    return steps, module(batch, stage.max_steps).loss.item()


def _set_as_published(group: dict[str, Any], learning_rate: float, weight_decay: float, num_steps: int) -> None:
    """Gives a group of torch's AdamW the settings with which its step is the published one.

    Theirs is `(p - lr u)(1 - lr d)`, and ours `p (1 - lr' d') - lr' u`.
    """
    kept = 1.0 - learning_rate * weight_decay
    group["lr"], group["weight_decay"] = learning_rate * kept, weight_decay / kept
    group["eps"] = OptimConfig().eps / (1.0 - OptimConfig().beta2 ** num_steps) ** 0.5
