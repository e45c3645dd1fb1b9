"""Run by every rank: collectives, then each case on a ZeRO-2 engine; rank 0 writes FOLDER/ranks.pt."""

from __future__ import annotations

import sys
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_grad
from torch.distributed.distributed_c10d import _set_pg_timeout

from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config, load_ds_config
from mvptr_ds.errors import DataError
from mvptr_ds.monitoring.meters import Meters
from mvptr_ds.optim.optimizer import build_optimizer, parameter_groups
from tests.conftest import REPO
from tests.distributed.steps import CASES, NUM_STEPS, OPTIM, TRAIN, batch_of, build_task, learning_rate


def check_gather() -> None:
    """The gradient of a rank's part is the sum over ranks of what reached it."""
    rank, num = collectives.rank(), collectives.num_ranks()
    local = torch.full((2, 3), float(rank + 1), requires_grad=True)
    joined = collectives.gather(local)
    assert joined[:, 0].tolist() == [float(r + 1) for r in range(num) for _ in range(2)]
    coefficients = torch.arange(6.0 * num).reshape(2 * num, 3)
    (joined * coefficients * (rank + 1)).sum().backward()
    assert local.grad is not None
    assert torch.equal(local.grad, coefficients[2 * rank : 2 * rank + 2] * sum(range(1, num + 1)))
    assert collectives.gather(torch.tensor([rank == 0])).tolist() == [r == 0 for r in range(num)]
    assert collectives.gather(torch.tensor([rank])).tolist() == list(range(num))
    assert not collectives.gather(local.detach()).requires_grad
    total = torch.tensor([1.0 + rank])
    assert collectives.all_reduce_sum(total).item() == num * (num + 1) / 2 and total.item() == 1.0 + rank


def check_errors_of_rank_0() -> None:
    class NotPicklable(Exception):
        def __init__(self, first: str, second: str) -> None:
            super().__init__(f"{first} {second}")

    def fail_as_user() -> None:
        raise DataError("shard 7 is cut")

    def fail_oddly() -> None:
        raise NotPicklable("odd", "failure")

    for function, kind, text in ((fail_as_user, DataError, "shard 7 is cut"), (fail_oddly, Exception, "odd failure")):
        try:
            collectives.run_on_rank_zero(function)
        except kind as error:
            assert text in str(error), error
        else:
            raise AssertionError(f"rank {collectives.rank()} heard nothing of {text!r}")
    ran: list[int] = []
    collectives.run_on_rank_zero(lambda: ran.append(1))
    assert len(ran) == (1 if collectives.is_main() else 0)


def check_long_work() -> None:
    """That of one rank may take longer than any collective; all the while every rank shows that it lives."""
    alive_s = [time.monotonic()]
    collectives.POLL_S = 0.2
    _set_pg_timeout(timedelta(seconds=4))
    try:
        collectives.run_on_rank_zero(lambda: time.sleep(9), lambda: alive_s.append(time.monotonic()))
    finally:
        _set_pg_timeout(timedelta(minutes=30))
    assert alive_s[-1] - alive_s[0] >= 9.0 and len(alive_s) > 9, alive_s


def check_work_of_each_rank() -> None:
    """All wait for the last; work that fails is ended, too."""
    started_s = time.monotonic()
    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(int, "one") if collectives.is_main() else pool.submit(time.sleep, 1.0)
        collectives.wait_for_all(work)
        assert work.done() and time.monotonic() - started_s >= 1.0
        collectives.wait_for_all(work if collectives.is_main() else None)
        assert not collectives.is_main() or isinstance(work.exception(), ValueError)


def train(case: str) -> dict[str, Any]:
    rank, num = collectives.rank(), collectives.num_ranks()
    task = build_task(case)
    model = task.model
    trained = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(parameter_groups(trained, OPTIM.weight_decay), OPTIM, 1e-3)
    content = load_ds_config(REPO / "ds_configs" / "z2.json")
    filled = fill_ds_config(content, TRAIN, OPTIM, num, bf16_supported=False, fp16_supported=False)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=filled)
    assert engine.zero_optimization_stage() == 2
    meters = Meters(torch.device("cpu"))
    positions, losses, norms, reports = [], [], [], []
    for step in range(NUM_STEPS):
        for group in engine.optimizer.param_groups:
            group["lr"] = learning_rate(case, step)
        for accumulation in range(TRAIN.accumulation_steps):
            batch = batch_of(case, step, accumulation, rank, num)
            positions.append(collectives.gather(batch.position_B).tolist())
            output = engine(batch, step, accumulation)
            engine.backward(output.loss)
            if step == 0 and engine.is_gradient_accumulation_boundary():
                grads = {name: safe_get_full_grad(p).clone() for name, p in trained}
            engine.step()
            losses.append(collectives.all_reduce_sum(output.loss).item() / num)
            meters.add_parts(output.parts)
            meters.add_batch(batch, 0.0)
        assert engine.was_step_applied()
        norms.append(float(engine.get_global_grad_norm()))
        reports.append(meters.report())
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    checksum = torch.stack([p.double().sum() for p in weights.values()]).sum()
    assert len(set(collectives.gather(checksum[None]).tolist())) == 1  # all ranks hold the same weights
    engine.destroy()
    results = {"positions": positions, "losses": losses, "norms": norms, "reports": reports, "weights": weights}
    return results | {"first_grads": grads}


def main() -> None:
    collectives.init()
    check_gather()
    check_errors_of_rank_0()
    check_long_work()
    check_work_of_each_rank()
    results = {case: train(case) for case in CASES}
    if collectives.is_main():
        torch.save(results, Path(sys.argv[1]) / "ranks.pt")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
