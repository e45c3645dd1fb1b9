"""Parameter groups, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mvptr_ds.config import OptimConfig, StageConfig


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; biases, norms and the logit scale (everything of one dimension) do not.

    Source: REFERENCE, "Optimiser in the published defaults".
    """
    named = list(named)
    decayed = [p for _, p in named if p.ndim > 1]
    others = [p for _, p in named if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(groups: list[dict[str, Any]], config: OptimConfig, learning_rate: float) -> torch.optim.Optimizer:
    """AdamW in torch's fused implementation, which both CPU and CUDA have.

    Raises:
        ValueError: another name.
    """
    if config.name != "adamw":
        raise ValueError(f"optim.name is {config.name!r}; choose from adamw")
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(config.beta1, config.beta2), eps=config.eps, fused=True)


def learning_rate_at(step: int, stage: StageConfig) -> float:
    """Linear warm-up over `warmup_steps`, then linear decay to 0 at `max_steps`.

    A pure function of the step, so that a resume has nothing to restore.
    """
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    left = (stage.max_steps - step) / max(1, stage.max_steps - stage.warmup_steps)
    return stage.learning_rate * max(0.0, left)
