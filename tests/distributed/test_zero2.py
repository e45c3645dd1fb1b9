"""Two real gloo ranks with DeepSpeed's ZeRO-2 against one process with torch's AdamW on the same global batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mvptr_ds.monitoring.meters import Meters
from mvptr_ds.optim.optimizer import parameter_groups
from tests.distributed.steps import CASES, NUM_STEPS, ONE_MODALITY, OPTIM, TRAIN, batch_of, build_task, learning_rate
from tests.support.launch import run_ranks

# float32: sums over ranks run in another order, about 1e-7 relative a step, which AdamW's division by a small root of
# the second moment raises; steps are 1e-3, so that a wrong factor or a lost sample shows at 1e-4 and more
TOLERANCE: dict[str, Any] = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("zero2")
    run_ranks("tests.distributed.ranks_zero2", 2, folder, timeout_s=200)
    results: dict[str, Any] = torch.load(folder / "ranks.pt", weights_only=True)
    return results


def train_alone(case: str) -> dict[str, Any]:
    """The same steps without DeepSpeed and without ranks."""
    task = build_task(case)
    trained = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
    groups = parameter_groups(trained, OPTIM.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(OPTIM.beta1, OPTIM.beta2), eps=OPTIM.eps)
    meters = Meters(torch.device("cpu"))
    positions, losses, norms, reports = [], [], [], []
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(case, step)
        optimizer.zero_grad()
        for accumulation in range(TRAIN.accumulation_steps):
            batch = batch_of(case, step, accumulation, 0, 1)
            positions.append(batch.position_B.tolist())
            output = task(batch, step, accumulation)
            (output.loss / TRAIN.accumulation_steps).backward()
            losses.append(output.loss.item())
            meters.add_parts(output.parts)
            meters.add_batch(batch, 0.0)
        if step == 0:
            grads = {name: p.grad.clone() for name, p in trained if p.grad is not None}
        norms.append(float(torch.nn.utils.clip_grad_norm_([p for _, p in trained], OPTIM.clip_norm)))
        optimizer.step()
        reports.append(meters.report())
    weights = {name: p.detach().clone() for name, p in task.model.named_parameters()}
    results = {"positions": positions, "losses": losses, "norms": norms, "reports": reports, "weights": weights}
    return results | {"first_grads": grads}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_like_one_process(ranks: dict[str, Any], case: str) -> None:
    alone, together = train_alone(case), ranks[case]
    assert together["positions"] == alone["positions"]
    torch.testing.assert_close(torch.tensor(together["losses"]), torch.tensor(alone["losses"]), **TOLERANCE)
    torch.testing.assert_close(torch.tensor(together["norms"]), torch.tensor(alone["norms"]), rtol=1e-4, atol=1e-5)
    assert max(alone["norms"]) > OPTIM.clip_norm  # clipping did act
    for name, weight in alone["weights"].items():
        difference = float((together["weights"][name] - weight).abs().max())
        torch.testing.assert_close(together["weights"][name], weight, **TOLERANCE, msg=f"{name} by {difference:.2g}")
    for one, two in zip(alone["reports"], together["reports"], strict=True):
        assert one.keys() == two.keys()
        for key in [k for k in one if k.startswith(("loss/", "data/oov"))]:
            if one[key] is None:  # nothing to learn from in this step, such as no masked region among texts alone
                assert two[key] is None, key
            else:
                assert two[key] == pytest.approx(one[key], rel=1e-4, abs=1e-5), key


@pytest.mark.parametrize("case", CASES)
def test_losses_and_gradients_of_the_first_step(ranks: dict[str, Any], case: str) -> None:
    """Through the engine, before anything has moved, both micro-batches: within 1e-6 of one process, in float32."""
    alone, together = train_alone(case), ranks[case]
    first = slice(0, TRAIN.accumulation_steps)
    one, two = (torch.tensor(results["losses"][first]) for results in (alone, together))
    torch.testing.assert_close(two, one, rtol=1e-6, atol=0)
    assert together["first_grads"].keys() == alone["first_grads"].keys()
    for name, grad in alone["first_grads"].items():
        difference = float((together["first_grads"][name] - grad).abs().max())
        assert difference < 1e-6, f"{name} by {difference:.2g} of {float(grad.abs().max()):.2g}"
    assert max(float(grad.abs().max()) for grad in alone["first_grads"].values()) > 1e-2


@pytest.mark.parametrize("case", CASES)
def test_the_steps_did_train(case: str) -> None:
    """What the comparison above compares has moved, and only what the stage trains."""
    before, after = build_task(case), train_alone(case)["weights"]
    for name, parameter in before.model.named_parameters():
        assert torch.equal(parameter, after[name]) is not parameter.requires_grad, name


def test_texts_alone_and_images_alone_reach_every_parameter() -> None:
    """ZeRO's buckets differ between ranks where a parameter has no gradient on one of them: none may lack it."""
    for rank in range(2):
        batch = batch_of(ONE_MODALITY, 0, 0, rank, 2)
        assert bool(batch.region_mask_BR.any()) is (rank == 1)
        task = build_task(ONE_MODALITY)
        task(batch, 0).loss.backward()
        trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
        assert [name for name, p in trained.items() if p.grad is None] == []
        assert all(torch.isfinite(p.grad).all() for p in trained.values() if p.grad is not None)
