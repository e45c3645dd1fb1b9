"""Schedule, groups, optimiser."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from mvptr_ds.config import OptimConfig, StageConfig
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.optim import (
    _steps_where_they_belong,
    build_optimizer,
    learning_rate_at,
    optimizer_choice,
    parameter_groups,
)


def test_warm_up_then_linear_decay_to_zero() -> None:
    stage = StageConfig(max_steps=12, learning_rate=1.0, warmup_steps=4)
    rates = [learning_rate_at(step, stage) for step in range(13)]
    wanted = [0.25, 0.5, 0.75, 1.0, *(1.0 - i / 8 for i in range(9))]
    assert rates == pytest.approx(wanted)
    assert rates[12] == 0.0 and rates[11] > 0  # the last step still learns


@pytest.mark.parametrize(("warmup", "wanted"), [(0, [1.0, 0.5]), (2, [0.5, 1.0]), (4, [0.25, 0.5])])
def test_warm_up_of_no_or_all_steps(warmup: int, wanted: list[float]) -> None:
    stage = StageConfig(max_steps=2, learning_rate=1.0, warmup_steps=warmup)
    assert [learning_rate_at(step, stage) for step in range(2)] == pytest.approx(wanted)


def test_steps_beyond_the_end_do_not_go_negative() -> None:
    assert learning_rate_at(50, StageConfig(max_steps=10, learning_rate=1.0, warmup_steps=2)) == 0.0


def test_no_decay_on_biases_norms_and_the_logit_scale() -> None:
    model = Mvptr(
        MvptrConfig(
            num_words=10, num_rows=12, hidden_size=8, num_attention_heads=2, intermediate_size=8, num_text_layers=1,
            num_visual_layers=1, num_cross_layers=1, max_positions=8, region_feature_dim=4,
        )
    )  # fmt: skip
    named = list(model.named_parameters())
    decayed, others = parameter_groups(named, 0.01)
    assert decayed["weight_decay"] == 0.01 and others["weight_decay"] == 0.0
    names = {id(p): name for name, p in named}
    norms = {f"{m}.weight" for m, module in model.named_modules() if isinstance(module, nn.LayerNorm)}
    wanted = {n for n, _ in named if n.endswith("bias") or n in norms or n == "logit_scale"}
    assert {names[id(p)] for p in others["params"]} == wanted
    assert {names[id(p)] for p in decayed["params"]} == {n for n, _ in named} - wanted


def test_empty_groups_are_left_out() -> None:
    groups = parameter_groups(iter([("a.weight", nn.Parameter(torch.zeros(2, 2)))]), 0.1)
    assert len(groups) == 1 and groups[0]["weight_decay"] == 0.1


def test_adamw_takes_every_setting() -> None:
    """One step by hand: m and v start at 0, so the step is lr * sign(g) up to eps, after the decay."""
    weight = nn.Parameter(torch.tensor([[2.0, -1.0]]))
    config = OptimConfig(beta1=0.8, beta2=0.9, eps=0.5)
    optimizer = build_optimizer(parameter_groups([("w", weight)], 0.1), config, 0.01)
    weight.grad = torch.tensor([[4.0, -0.5]])
    optimizer.step()
    grad, before = torch.tensor([[4.0, -0.5]]), torch.tensor([[2.0, -1.0]])
    wanted = before * (1 - 0.01 * 0.1) - 0.01 * grad / (grad.abs() + 0.5)
    torch.testing.assert_close(weight.data, wanted, rtol=1e-6, atol=1e-7)  # float32
    assert optimizer.defaults["betas"] == (0.8, 0.9)


def test_unknown_optimiser() -> None:
    with pytest.raises(ValueError, match=r"optim\.name is 'sgd'.*adamw"):
        build_optimizer([], OptimConfig(name="sgd"), 0.1)


def test_the_state_of_one_kernel_serves_the_other() -> None:
    """torch keeps `step` beside a parameter's moments, apex (apex/optimizers/fused_adam.py) in the group."""

    def trained(num_steps: int) -> tuple[nn.Parameter, torch.optim.Optimizer]:
        weight = nn.Parameter(torch.tensor([[2.0, -1.0]]))
        optimizer = build_optimizer(parameter_groups([("w", weight)], 0.1), OptimConfig(), 0.01)
        for step in range(num_steps):
            weight.grad = torch.tensor([[4.0, -0.5]]) * (step + 1)
            optimizer.step()
        return weight, optimizer

    straight, _ = trained(3)
    weight, optimizer = trained(2)
    state = optimizer.state_dict()
    of_apex = {
        "state": {0: {name: state["state"][0][name] for name in ("exp_avg", "exp_avg_sq")}},
        "param_groups": [{**state["param_groups"][0], "step": 2, "bias_correction": True}],
    }
    for given in (of_apex, state):
        resumed = nn.Parameter(weight.detach().clone())
        other = build_optimizer(parameter_groups([("w", resumed)], 0.1), OptimConfig(), 0.01)
        other.load_state_dict(copy.deepcopy(given))
        assert "step" not in other.param_groups[0]  # a saved state is that of a run that never stopped
        assert other.state[resumed]["step"] == 2
        resumed.grad = torch.tensor([[4.0, -0.5]]) * 3
        other.step()
        assert torch.equal(resumed, straight)
    of_another_class = torch.optim.SGD([nn.Parameter(torch.zeros(1))])  # as apex's is
    assert _steps_where_they_belong(of_another_class, state)["param_groups"][0]["step"] == 2


def test_the_optimiser_says_which_kernel_it_is() -> None:
    assert str(optimizer_choice(OptimConfig(), torch.device("cpu"))) == (
        "optimiser: torch.optim.AdamW(fused=True) (the device is cpu)"
    )
    assert optimizer_choice(OptimConfig(), torch.device("cuda")).reason == "apex is not installed"
