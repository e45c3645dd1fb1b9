"""LAMB on the flat partitions of real gloo ranks: every tensor's own norms, also of those that two ranks share."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from mvptr_ds.optim.lamb import Lamb
from mvptr_ds.optim.optimizer import parameter_groups
from tests.distributed.ranks_lamb import CASES, CLIP_NORM, NUM_STEPS, RATE, Small, batch_at
from tests.support.lamb_reference import BETA1, BETA2, DECAY, EPS, Reference, clipped
from tests.support.launch import run_ranks

TOLERANCE = {"rtol": 0.0, "atol": 1e-6}  # float32: sums run in another order; a ratio of half a tensor shows at 1e-3
FLOAT32 = [case for case in CASES if "bf16" not in case]


@pytest.fixture(scope="module", params=[1, 2], ids=["1 rank", "2 ranks"])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("lamb")
    run_ranks("tests.distributed.ranks_lamb", request.param, folder, timeout_s=200)
    results: dict[str, Any] = torch.load(folder / "ranks.pt", weights_only=True)
    return results


@pytest.fixture(scope="module")
def alone() -> list[dict[str, torch.Tensor]]:
    """The weights after each step of one process without DeepSpeed."""
    model, weights = Small(), []
    optimizer = Lamb(parameter_groups(model.named_parameters(), DECAY), lr=RATE, betas=(BETA1, BETA2), eps=EPS)
    for step in range(NUM_STEPS):
        optimizer.zero_grad()
        model(*batch_at(step)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    return weights


@pytest.mark.parametrize("case", FLOAT32)
def test_ranks_train_like_one_process(ranks: dict[str, Any], alone: list[dict[str, torch.Tensor]], case: str) -> None:
    for ours, theirs in zip(ranks[case]["weights"], alone, strict=True):
        for name, weight in theirs.items():
            torch.testing.assert_close(ours[name], weight, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_each_step_is_the_papers_for_its_gradients(ranks: dict[str, Any], case: str) -> None:
    """With float32 weights beside bf16 ones too, and with clipping, which acts."""
    found = ranks[case]
    names = list(found["begun"])
    reference = Reference(
        [found["begun"][name].bfloat16() if "bf16" in case else found["begun"][name] for name in names]
    )
    for gradients, weights in zip(found["gradients"], found["weights"], strict=True):
        whole = [gradients[name] for name in names]
        scaled = clipped(whole, CLIP_NORM)
        assert any(not torch.equal(one.double(), two) for one, two in zip(whole, scaled, strict=True))
        reference.step(scaled, RATE)
        for name, wanted in zip(names, reference.weights, strict=True):
            torch.testing.assert_close(weights[name].double(), wanted, **TOLERANCE, msg=lambda m, n=name: f"{n}: {m}")


def test_the_border_lies_within_a_matrix(ranks: dict[str, Any]) -> None:
    held = ranks["z2"]["held"]
    assert held == ([[0, 1, 2, 3]] if len(held) == 1 else [[0, 1], [1, 2, 3]])
