"""Parameter groups, optimiser, schedule."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from mvptr_ds.config import OptimConfig
from mvptr_ds.config_stages import StageConfig
from mvptr_ds.model.installed import apex_lacks
from mvptr_ds.model.kernels import Choice
from mvptr_ds.optim.lamb import Lamb

APEX_ADAM = "apex.optimizers.FusedAdam"
TORCH_ADAM = "torch.optim.AdamW(fused=True)"
LAMB = "mvptr_ds.optim.lamb.Lamb"
SETTINGS = ("lr", "betas", "eps", "weight_decay")  # of a group; whatever else stands there chooses a kernel
FACTOR = "factor"  # of a group: its learning rate is that of the schedule times this
HOST = torch.device("cpu")
ALIGNED_NUMBERS = 8  # of 2 bytes
PARAMETER_ORDER = "aligned"  # of a checkpoint's flat buffers; before there was a name for it, as the model has them


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], weight_decay: float, factors: Mapping[str, float] | None = None
) -> list[dict[str, Any]]:
    """Returns two groups of parameters: matrices decay; those of one dimension (biases, norms, the scale) do not.

    Each factor of the learning rate has two of its own, in the order in which the parameters show the factors. A group
    names its factor where it is not 1, so that the groups of a run without factors are as they always were.

    Within a group, those of an odd size come last: ZeRO lays a group's parameters one behind another in one buffer,
    and behind a logit scale of 2 bytes all would stand where a GPU's kernels cannot read 16 bytes at a time.

    Args:
        factors: of the learning rate, by the name of a parameter; those without have 1.

    Source: the published code, "Optimiser in the published defaults".
    """
    factors, of_factors = factors or {}, dict[float, list[tuple[str, nn.Parameter]]]()
    for name, parameter in named:
        of_factors.setdefault(float(factors.get(name, 1.0)), []).append((name, parameter))
    groups: list[dict[str, Any]] = []
    for factor, its_own in of_factors.items():
        its_own = sorted(its_own, key=lambda item: item[1].numel() % ALIGNED_NUMBERS != 0)
        scaled = {} if factor == 1.0 else {FACTOR: factor}
        groups.append({"params": [p for _, p in its_own if p.ndim > 1], "weight_decay": weight_decay, **scaled})
        groups.append({"params": [p for _, p in its_own if p.ndim <= 1], "weight_decay": 0.0, **scaled})
    return [group for group in groups if group["params"]]


def set_learning_rate(groups: Iterable[dict[str, Any]], learning_rate: float) -> None:
    """Gives each group of parameters this learning rate times its factor."""
    for group in groups:
        group["lr"] = learning_rate * group.get(FACTOR, 1.0)


def build_optimizer(
    groups: list[dict[str, Any]], config: OptimConfig, learning_rate: float, device: torch.device = HOST
) -> torch.optim.Optimizer:
    """Returns the optimiser of `optimizer_choice`. Its state goes into any other of them.

    Args:
        device: where it will step: that of the engine, which moves the parameters there, or the host when offloading.
    """
    settings: dict[str, Any] = {"lr": learning_rate, "betas": (config.beta1, config.beta2), "eps": config.eps}
    implementation = optimizer_choice(config, device).implementation
    optimizer: torch.optim.Optimizer
    if implementation == APEX_ADAM:
        from apex.optimizers import FusedAdam

        optimizer = FusedAdam(groups, **settings, adam_w_mode=True)
    elif implementation == LAMB:
        optimizer = Lamb(groups, **settings)
    else:
        optimizer = torch.optim.AdamW(groups, **settings, fused=True)
    optimizer.register_load_state_dict_pre_hook(_as_its_own)
    return optimizer


def optimizer_choice(config: OptimConfig, device: torch.device) -> Choice:
    """Returns the kernel of `build_optimizer`, and why."""
    name = "optimiser"
    if config.name == "lamb":
        return Choice(name, LAMB, "optim.name=lamb; fused kernels know no tensors that ZeRO cuts")
    if device.type != "cuda":
        return Choice(name, TORCH_ADAM, f"the device is {device.type}")
    missing = apex_lacks("optimizers/fused_adam.py", "amp_C", "FusedAdam")
    return Choice(name, TORCH_ADAM, missing) if missing else Choice(name, APEX_ADAM, "apex is installed")


def _as_its_own(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> dict[str, Any]:
    """The state of any of these optimisers as one of `optimizer`: settings are what was saved, the kernel is its own.

    torch and LAMB count the steps of each parameter, apex those of a group. A state of its own kind stays as it is:
    what a resumed run saves is bit-identical with what an undisturbed one does.
    """
    counts_by_group = not isinstance(optimizer, torch.optim.AdamW | Lamb)
    moments = {number: dict(values) for number, values in state["state"].items()}
    groups = []
    for saved, own in zip(state["param_groups"], optimizer.param_groups, strict=True):
        trained = [moments[number] for number in saved["params"] if number in moments]
        steps = {float(values["step"]) for values in trained if "step" in values}
        step = max(steps, default=float(saved.get("step", 0)))
        for values in trained:
            values.setdefault("step", torch.tensor(step))
        kept = {name: saved.get(name, own[name]) if name in SETTINGS else own[name] for name in own}
        group = {name: value for name, value in kept.items() if name not in ("params", "step")}
        groups.append(group | {"params": saved["params"]} | ({"step": int(step)} if counts_by_group else {}))
    return {**state, "state": moments, "param_groups": groups}


def learning_rate_at(step: int, stage: StageConfig) -> float:
    """Warms up linearly over `warmup_steps`, then decays linearly to 0 at `max_steps`.

    A pure function of the step, so that a resume has nothing to restore.
    """
    warmup_steps = stage.max_steps // 10 if stage.warmup_steps is None else stage.warmup_steps
    if step < warmup_steps:
        return stage.learning_rate * (step + 1) / warmup_steps
    left = (stage.max_steps - step) / max(1, stage.max_steps - warmup_steps)
    return stage.learning_rate * max(0.0, left)
