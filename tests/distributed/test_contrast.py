"""VSC and hard negatives of 1, 2 and 4 real gloo ranks against one process that holds the whole batch, in float64."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.losses import LossSum
from tests.distributed.contrast_cases import CASES, LOCAL, NUM_BATCHES, NUM_SAMPLES, build, part
from tests.support.launch import run_ranks
from tests.support.tiny_models import TEXT_SLOTS

EXACT: dict[str, float] = {"rtol": 0, "atol": 1e-9}  # float64 in another order of sums; gradients are below 100
RANKS = (1, 2, 4)
Results = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module", params=RANKS, ids="{}_ranks".format)
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Results]:
    folder: Path = tmp_path_factory.mktemp(f"contrast{request.param}")
    run_ranks("tests.distributed.ranks_contrast", request.param, folder, timeout_s=200)
    return request.param, torch.load(folder / "ranks.pt", weights_only=True)


@cache
def alone(name: str, parts: int) -> list[dict[str, Any]]:
    """One process; the global batch falls into so many parts that know nothing of each other."""
    task = build({**CASES, **LOCAL}[name])
    results = []
    for number in range(NUM_BATCHES):
        task.zero_grad()
        draws = RandomDraws.keyed(task.seed, number, 0, NUM_SAMPLES, TEXT_SLOTS)
        share = NUM_SAMPLES // parts
        found = [task.sums(part(number, i, parts), draws.rows(i * share, share), number) for i in range(parts)]
        loss = torch.stack([weight * mean([f[on] for f in found]) for on, weight in task.weights.items()]).sum()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None}
        results.append({"loss": loss.detach(), "grads": grads})
    return results


def mean(sums: list[LossSum]) -> Tensor:
    return torch.stack([s.sum for s in sums]).sum() / torch.stack([s.count for s in sums]).sum().clamp(min=1.0)


@pytest.mark.timeout(240)
@pytest.mark.parametrize("name", [*CASES, *LOCAL])
def test_ranks_have_the_loss_and_gradients_of_one_process(ranks: tuple[int, Results], name: str) -> None:
    num, results = ranks
    for found, wanted in zip(results[name], alone(name, num if name in LOCAL else 1), strict=True):
        torch.testing.assert_close(found["loss"], wanted["loss"], **EXACT)
        assert found["grads"].keys() == wanted["grads"].keys()
        for parameter, grad in wanted["grads"].items():
            difference = float((found["grads"][parameter] - grad).abs().max())
            torch.testing.assert_close(found["grads"][parameter], grad, **EXACT, msg=f"{parameter} by {difference:.2g}")


def test_the_cases_tell_ranks_apart() -> None:
    """What is compared is not zero, and a rank that saw its own samples only would be found out."""
    for name in CASES:
        assert any(result["loss"] > 1e-3 for result in alone(name, 1)), name
    for whole, parts in (("stage 2", "stage 2, local"), ("joint", "joint, local")):
        for one, other in zip(alone(whole, 1), alone(parts, 2), strict=True):
            assert abs(one["loss"] - other["loss"]) > 1e-6
    chunks = (alone(name, 1) for name in ("vsc", "vsc in chunks", "vsc one by one"))
    for one, two, three in zip(*chunks, strict=True):
        torch.testing.assert_close([two["loss"], three["loss"]], [one["loss"]] * 2, **EXACT)
