"""Run by every rank, without an engine: routes of rows, then every case's loss and gradients, to FOLDER/ranks.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from mvptr_ds.distributed import collectives
from mvptr_ds.model.sequence_index import SequenceIndex
from mvptr_ds.objectives.gather_rows import PendingExchanges, Request, RowExchange
from tests.distributed.contrast_cases import CASES, LOCAL, NUM_BATCHES, build, part

PER_RANK = 3


def check_route(wanted_RB: Tensor, dtype: torch.dtype) -> None:
    """The rows that arrive are those of the wanted samples, and their gradients come back to the owner, summed."""
    rank, num = collectives.rank(), collectives.num_ranks()
    generator = torch.Generator().manual_seed(2)
    lengths_S = torch.randint(0, 4, (num * PER_RANK,), generator=generator)
    lengths_S[:2] = torch.tensor([0, 5])  # a sample without rows, and the longest
    # small whole numbers: sums are exact in every dtype
    whole = torch.randint(-8, 8, (int(lengths_S.sum()), 2, 3), generator=generator).to(dtype)
    if dtype.is_floating_point:
        whole.requires_grad_()
    samples = whole.split(lengths_S.tolist())
    own = slice(rank * PER_RANK, (rank + 1) * PER_RANK)
    local = torch.cat(samples[own]).detach().requires_grad_(dtype.is_floating_point)

    lengths = SequenceIndex(tuple(lengths_S[own].tolist()))
    route = RowExchange.of(Request(lengths, wanted_RB[rank]))
    found = route.fetch(local)
    assert found.dtype == dtype and torch.equal(found, torch.cat([samples[i] for i in wanted_RB[rank]]))
    assert route.lengths == tuple(lengths_S[wanted_RB[rank]].tolist())
    assert sum(route.recv_splits) == sum(route.lengths)  # nothing travels but what was asked for
    if not dtype.is_floating_point:
        return
    for asking in range(num):
        rows = torch.cat([samples[i] for i in wanted_RB[asking]])
        weights = torch.arange(len(rows)).remainder(5).sub(2).to(dtype)[:, None, None]
        (rows * weights).sum().backward(retain_graph=True)
        if asking == rank:
            (found * weights).sum().backward()
    assert whole.grad is not None and local.grad is not None and local.grad.dtype == dtype
    assert torch.equal(local.grad, torch.cat(whole.grad.split(lengths_S.tolist())[own]))


def check_several_at_once(local: Request) -> None:
    """Exchanges with all ranks and within one, from one collective."""
    num = collectives.num_ranks()
    everyone = Request(SequenceIndex((1, 2)), torch.tensor([0, 2 * num - 1]))  # the first and the last of all samples
    found = [exchange.fetch(torch.tensor([5, 6, 7])) for exchange in PendingExchanges([everyone, local]).read()]
    assert [rows.tolist() for rows in found] == [[5, 6, 7], [6, 7, 6, 7]]


def check_routes() -> None:
    num = collectives.num_ranks()
    shape = (num, PER_RANK)
    generator = torch.Generator().manual_seed(1)
    own = torch.arange(num * PER_RANK).reshape(shape)
    some = [torch.randint(0, num * PER_RANK, shape, generator=generator) for _ in range(3)]
    for wanted_RB in (*some, own, own.flip(0), torch.ones_like(own), torch.zeros_like(own)):
        for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.bool, torch.int64):
            check_route(wanted_RB, dtype)
    local = Request(SequenceIndex((1, 2)), torch.tensor([1, 1]), across=False)
    assert RowExchange.of(local).fetch(torch.tensor([5, 6, 7])).tolist() == [6, 7, 6, 7]
    check_several_at_once(local)


def run(name: str) -> list[dict[str, Any]]:
    """Loss and gradients of each global batch, of all ranks together."""
    num, results = collectives.num_ranks(), []
    task = build({**CASES, **LOCAL}[name])
    for number in range(NUM_BATCHES):
        task.zero_grad()
        output = task(part(number, collectives.rank(), num), step=number)
        output.loss.backward()
        grads = {n: collectives.all_reduce_sum(p.grad) / num for n, p in task.named_parameters() if p.grad is not None}
        results.append({"loss": collectives.all_reduce_sum(output.loss) / num, "grads": grads})
    return results


def main() -> None:
    dist.init_process_group("gloo")
    check_routes()
    results = {name: run(name) for name in (*CASES, *LOCAL)}
    if collectives.is_main():
        torch.save(results, Path(sys.argv[1]) / "ranks.pt")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
