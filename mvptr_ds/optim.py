"""Parameter groups, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from mvptr_ds.config import OptimConfig, StageConfig
from mvptr_ds.model.kernels import Choice, apex_lacks

APEX_ADAM = "apex.optimizers.FusedAdam"
TORCH_ADAM = "torch.optim.AdamW(fused=True)"
HOST = torch.device("cpu")


def parameter_groups(named: Iterable[tuple[str, nn.Parameter]], weight_decay: float) -> list[dict[str, Any]]:
    """Two groups: matrices decay; biases, norms and the logit scale (everything of one dimension) do not.

    Source: the published code, "Optimiser in the published defaults".
    """
    named = list(named)
    decayed = [p for _, p in named if p.ndim > 1]
    others = [p for _, p in named if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, learning_rate: float, device: torch.device = HOST
) -> torch.optim.Optimizer:
    """AdamW by the kernel of `optimizer_choice`. Its state goes into any other of them.

    Args:
        device: where it will step: that of the engine, which moves the parameters there, or the host when offloading.

    Raises:
        ValueError: another name.
    """
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    if optimizer_choice(config, device).implementation == APEX_ADAM:
        from apex.optimizers import FusedAdam

        optimizer: torch.optim.Optimizer = FusedAdam(groups, **settings, adam_w_mode=True)
    else:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    optimizer.register_load_state_dict_pre_hook(_steps_where_they_belong)
    return optimizer


def optimizer_choice(config: OptimConfig, device: torch.device) -> Choice:
    """The kernel of `build_optimizer`, and why."""
    if config.name != "adamw":
        raise ValueError(f"optim.name is {config.name!r}; choose from adamw")
    if device.type != "cuda":
        return Choice("optimiser", TORCH_ADAM, f"the device is {device.type}")
    missing = apex_lacks("optimizers/fused_adam.py", "amp_C")
    return Choice("optimiser", TORCH_ADAM, missing) if missing else Choice("optimiser", APEX_ADAM, "apex is installed")


def _steps_where_they_belong(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """torch counts the steps of each parameter, apex those of a group: a state of either becomes one of `optimizer`.

    It gets nothing else: what a resumed run saves is bit-identical with what an undisturbed one does.
    """
    counts_by_group = not isinstance(optimizer, torch.optim.AdamW)
    groups = [dict(group) for group in state["param_groups"]]
    moments = {number: dict(values) for number, values in state["state"].items()}
    for group in groups:
        trained = [moments[number] for number in group["params"] if number in moments]
        steps = {float(values["step"]) for values in trained if "step" in values}
        step = max(steps, default=float(group.get("step", 0)))
        for values in trained:
            values.setdefault("step", torch.tensor(step))
        group.pop("step", None)
        if counts_by_group:
            group["step"] = int(step)
    return {**state, "state": moments, "param_groups": groups}


def learning_rate_at(step: int, stage: StageConfig) -> float:
    """Linear warm-up over `warmup_steps`, then linear decay to 0 at `max_steps`.

    A pure function of the step, so that a resume has nothing to restore.
    """
    if step < stage.warmup_steps:
        return stage.learning_rate * (step + 1) / stage.warmup_steps
    left = (stage.max_steps - step) / max(1, stage.max_steps - stage.warmup_steps)
    return stage.learning_rate * max(0.0, left)
