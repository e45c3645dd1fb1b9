"""Schedule, groups, optimiser."""

from __future__ import annotations

import copy
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mvptr_ds.config import OptimConfig
from mvptr_ds.config_stages import StageConfig
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.optim import optimizer as optim
from mvptr_ds.optim.lamb import Lamb
from mvptr_ds.optim.optimizer import (
    build_optimizer,
    learning_rate_at,
    optimizer_choice,
    parameter_groups,
    set_learning_rate,
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


def test_each_factor_has_groups_of_its_own_in_the_order_of_the_parameters() -> None:
    sizes = {"a.weight": (2, 4), "text.weight": (3, 3), "a.bias": (2,), "text.bias": (8,), "head.weight": (1, 8)}
    named = {name: nn.Parameter(torch.zeros(size)) for name, size in sizes.items()}
    factors = {"text.weight": 0.5, "text.bias": 0.5, "head.weight": 10, "a.bias": 1.0}
    groups = parameter_groups(named.items(), 0.1, factors)
    names = {id(parameter): name for name, parameter in named.items()}
    found = [([names[id(p)] for p in group["params"]], group["weight_decay"], group.get("factor")) for group in groups]
    assert found == [
        (["a.weight"], 0.1, None), (["a.bias"], 0.0, None), (["text.weight"], 0.1, 0.5), (["text.bias"], 0.0, 0.5),
        (["head.weight"], 0.1, 10.0),
    ]  # fmt: skip
    optimizer = build_optimizer(groups, OptimConfig(), 1.0)
    set_learning_rate(optimizer.param_groups, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25, 0.125, 0.125, 2.5]


def test_without_factors_groups_are_those_of_older_checkpoints() -> None:
    named = [("a.weight", nn.Parameter(torch.zeros(3, 3))), ("b.weight", nn.Parameter(torch.zeros(2, 4)))]
    for factors in (None, {}, {"a.weight": 1.0}, {"elsewhere": 2.0}):
        (group,) = parameter_groups(named, 0.1, factors)
        assert group.keys() == {"params", "weight_decay"} and group["weight_decay"] == 0.1
        assert group["params"][0] is named[1][1] and group["params"][1] is named[0][1]  # the odd size comes last


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


ADAMW, LAMB, APEX = "adamw", "lamb", "apex"
DECAY, RATE = 0.1, 0.01


class FusedAdam(torch.optim.Optimizer):
    """A stand-in with the signature and the state of apex's (apex/optimizers/fused_adam.py): steps stand in groups."""

    made: list[dict[str, Any]] = []

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        bias_correction: bool = True,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adam_w_mode: bool = True,
        weight_decay: float = 0.0,
        amsgrad: bool = False,
        set_grad_none: bool = True,
        capturable: bool = False,
        master_weights: bool = False,
    ) -> None:
        assert not amsgrad and not capturable and not master_weights and set_grad_none
        self.made.append({"lr": lr, "betas": betas, "eps": eps, "adam_w_mode": adam_w_mode})
        defaults = {"lr": lr, "bias_correction": bias_correction, "betas": betas, "eps": eps}
        super().__init__(params, {**defaults, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                torch.optim._functional.adamw(
                    [p], [p.grad], [state["exp_avg"]], [state["exp_avg_sq"]], [], [torch.tensor(group["step"] - 1.0)],
                    amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
                    weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
                )  # fmt: skip


@pytest.fixture
def apex(monkeypatch: pytest.MonkeyPatch) -> type[FusedAdam]:
    """As if NVIDIA's apex were installed with its extensions (`apex_lacks` has its tests in test_kernels.py)."""
    module = ModuleType("apex.optimizers")
    module.FusedAdam = FusedAdam  # type: ignore[attr-defined]
    for name, stand_in in (("apex", ModuleType("apex")), ("apex.optimizers", module)):
        monkeypatch.setitem(sys.modules, name, stand_in)
    needed = ("optimizers/fused_adam.py", "amp_C", "FusedAdam")
    monkeypatch.setattr(optim, "apex_lacks", lambda *asked: "" if asked == needed else "that is not what it needs")
    FusedAdam.made.clear()
    return FusedAdam


def build(name: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    weights = [nn.Parameter(torch.tensor([[2.0, -1.0]])), nn.Parameter(torch.tensor([3.0]))]
    config = OptimConfig(name=ADAMW if name == APEX else name, beta1=0.8)
    groups = parameter_groups([("w", weights[0]), ("b", weights[1])], DECAY)
    return weights, build_optimizer(groups, config, RATE, torch.device("cuda" if name == APEX else "cpu"))


def take(weights: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        for weight in weights:
            weight.grad = torch.full_like(weight, 4.0 - 3.0 * step)
        optimizer.step()


def handed_over(before: str, after: str) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Two steps by the one, then its state and weights in the other."""
    weights, optimizer = build(before)
    take(weights, optimizer, range(2))
    mine, other = build(after)
    for new, old in zip(mine, weights, strict=True):
        new.data.copy_(old.data)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return mine, other


def test_apex_steps_where_it_is_installed(apex: type[FusedAdam]) -> None:
    weights, optimizer = build(APEX)
    assert isinstance(optimizer, apex)
    assert apex.made == [{"lr": RATE, "betas": (0.8, 0.999), "eps": 1e-8, "adam_w_mode": True}]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    assert str(optimizer_choice(OptimConfig(), torch.device("cuda"))) == (
        "optimiser: apex.optimizers.FusedAdam (apex is installed)"
    )
    wanted, torchs = build(ADAMW)
    for one, other in ((weights, optimizer), (wanted, torchs)):
        take(one, other, range(3))
    torch.testing.assert_close(weights, wanted, rtol=1e-6, atol=0)


@pytest.mark.parametrize("before", [ADAMW, LAMB, APEX])
@pytest.mark.parametrize("after", [ADAMW, LAMB, APEX])
def test_the_state_of_each_serves_the_others(apex: type[FusedAdam], before: str, after: str) -> None:
    """Its moments and counts, the settings of its groups; whatever else stands in a group is the reader's own."""
    weights, optimizer = handed_over(before, after)
    again, straight = handed_over(ADAMW, after)  # the same moments, since both saw the same gradients
    for new, old in zip(again, weights, strict=True):
        new.data.copy_(old.data)
    _, fresh = build(after)
    for group, untouched in zip(optimizer.param_groups, fresh.param_groups, strict=True):
        assert group.keys() - {"step"} == untouched.keys()
        assert {name: group[name] for name in untouched if name != "params"} == {
            name: value for name, value in untouched.items() if name != "params"
        }
        assert ("step" in group) == (after == APEX)  # a saved state is that of a run that never stopped
    for one, other in ((weights, optimizer), (again, straight)):
        take(one, other, range(2, 4))
    torch.testing.assert_close(weights, again, rtol=1e-6, atol=0)
    if before == after:
        undisturbed, untold = build(after)
        take(undisturbed, untold, range(4))
        assert all(torch.equal(one, two) for one, two in zip(weights, undisturbed, strict=True))


def test_settings_are_those_that_were_saved() -> None:
    _, optimizer = build(ADAMW)
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"eps": 0.5, "weight_decay": 0.25, "fused": None}
    _, lamb = build(LAMB)
    for other in (optimizer, lamb):
        other.load_state_dict(copy.deepcopy(state))
        assert {(group["eps"], group["weight_decay"]) for group in other.param_groups} == {(0.5, 0.25)}
    assert all(group["fused"] for group in optimizer.param_groups) and "fused" not in lamb.param_groups[0]


def test_lamb_takes_every_setting() -> None:
    weights, optimizer = build(LAMB)
    assert isinstance(optimizer, Lamb)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [DECAY, 0.0]
    assert optimizer.defaults["betas"] == (0.8, 0.999) and optimizer.defaults["eps"] == 1e-8
    before: Tensor = weights[0].detach().clone()
    take(weights, optimizer, range(1))
    assert float((weights[0].detach() - before).norm()) == pytest.approx(RATE * float(before.norm()), rel=1e-5)


def test_the_optimiser_says_which_kernel_it_is() -> None:
    assert str(optimizer_choice(OptimConfig(), torch.device("cpu"))) == (
        "optimiser: torch.optim.AdamW(fused=True) (the device is cpu)"
    )
    assert optimizer_choice(OptimConfig(), torch.device("cuda")).reason == "apex is not installed"
    assert str(optimizer_choice(OptimConfig(name="lamb"), torch.device("cuda"))) == (
        "optimiser: mvptr_ds.optim.lamb.Lamb (optim.name=lamb; fused kernels know no tensors that ZeRO cuts)"
    )
