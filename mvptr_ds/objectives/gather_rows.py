"""Rows of states from rank to rank: only those that somebody asked for, differentiably, in their own dtype.

A sample's states are its valid slots, one row each; those of a rank lie packed, one sample after another. Where every
slot goes follows from two numbers a sample, its length and the sample that it asks for, which all ranks tell each
other first; the rows then travel in one all-to-all, and their gradients in another one back.

Legend: B samples of this rank, S samples of all ranks, R ranks, N rows of this rank's samples, M rows that it gets;
x stands for any further dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvptr_ds.distributed import collectives


class RowExchange:
    """The way of the rows for one choice of samples; made once, then used for states and masks alike.

    Every rank makes the same routes in the same order. Making one waits for the device: the sizes of what is sent
    must be known on the host. With one rank, or within one, nothing is sent.

    Args:
        lengths_B: int64, rows of each of this rank's samples; on the host.
        wanted_B: int64, the sample that each of this rank's samples asks for: its place among those of all ranks, B on
            each and in their order; its own are allowed.
        across: False: the places are those of this rank's own samples.

    Attributes:
        lengths: rows of the samples that were asked for.
        num_sent_R, num_got_R: rows that go to and come from each rank, itself included.
    """

    def __init__(self, lengths_B: Tensor, wanted_B: Tensor, across: bool = True) -> None:
        if across:
            told_2B = torch.stack([lengths_B.to(wanted_B.device, non_blocking=True), wanted_B])
            told_R2B = collectives.gather(told_2B[None]).cpu()
        else:
            told_R2B = torch.stack([lengths_B, wanted_B.cpu()])[None]
        self.own = collectives.rank() if across else 0
        self._plan(told_R2B[:, 0], told_R2B[:, 1], wanted_B.device)

    def _plan(self, lengths_RB: Tensor, wanted_RB: Tensor, device: torch.device) -> None:
        num_ranks, num_own = lengths_RB.shape
        owner_RB, lengths_S = wanted_RB // num_own, lengths_RB.flatten()
        num_rows_RB = lengths_S[wanted_RB]
        asked_RB = owner_RB == self.own  # of this rank, by each
        self.num_sent_R: list[int] = (num_rows_RB * asked_RB).sum(1).tolist()
        owner_B, num_rows_B = owner_RB[self.own], num_rows_RB[self.own]
        self.num_got_R: list[int] = torch.zeros(num_ranks, dtype=torch.int64).index_add(0, owner_B, num_rows_B).tolist()

        own_lengths_B = lengths_RB[self.own]
        asked = wanted_RB[asked_RB] - self.own * num_own
        self.sent = _rows(_starts(own_lengths_B)[asked], own_lengths_B[asked]).to(device, non_blocking=True)
        arrival_B = owner_B.argsort(stable=True)  # rows come in the order of ranks, not of the samples that asked
        starts_B = torch.empty_like(num_rows_B)
        starts_B[arrival_B] = _starts(num_rows_B[arrival_B])
        self.restored = _rows(starts_B, num_rows_B).to(device, non_blocking=True)
        self.num_rows = int(own_lengths_B.sum())
        self.lengths: list[int] = num_rows_B.tolist()

    def fetch(self, rows_Nx: Tensor) -> Tensor:
        """The rows of the wanted samples, [M, ...], from this rank's own packed rows."""
        assert len(rows_Nx) == self.num_rows, (len(rows_Nx), self.num_rows)
        sent = rows_Nx[self.sent]
        if len(self.num_sent_R) == 1:
            return sent
        if sent.dtype == torch.bool:
            return collectives.all_to_all(sent.to(torch.uint8), self.num_sent_R, self.num_got_R)[self.restored].bool()
        got: Tensor = _AllToAll.apply(sent, self.num_sent_R, self.num_got_R)
        return got[self.restored]


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _rows(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of every sample, one after another."""
    offsets = torch.arange(int(lengths.sum())) - _starts(lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + offsets


class _AllToAll(torch.autograd.Function):
    """Rows in the order of the ranks that they go to -> rows in the order of those that they come from."""

    @staticmethod
    def forward(ctx: Any, rows_Nx: Tensor, num_sent_R: list[int], num_got_R: list[int]) -> Tensor:
        ctx.sizes = num_sent_R, num_got_R
        return collectives.all_to_all(rows_Nx, num_sent_R, num_got_R)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        num_sent_R, num_got_R = ctx.sizes
        return collectives.all_to_all(grads[0], num_got_R, num_sent_R), None, None
