"""Rows of states from rank to rank: only those of requested samples, differentiably, in their own dtype.

A sample's states are its valid slots, one row each. Those of a rank lie packed, one sample after another. Where every
slot travels follows from two numbers a sample: its length, and the sample that it requests. All ranks gather both
first. The rows then travel in one all-to-all, and their gradients in another one back.

Worked example, two ranks with two samples each (samples 0, 1 and 2, 3 of the global batch):

    rank 0: lengths [2, 3], requests [3, 0]      rank 1: lengths [1, 2], requests [1, 2]

    rank 0 sends  sample 0 to itself (2 rows), sample 1 to rank 1 (3 rows):           send_splits [2, 3]
    rank 0 gets   sample 0 from itself (2 rows), sample 3 from rank 1 (2 rows):       recv_splits [2, 2]
    in the order of ranks they arrive as 0 0 3 3; `restore` puts them as requested:   3 3 0 0

Legend: B samples of this rank, S samples of all ranks, R ranks, N rows of this rank's samples, M rows that it gets;
x stands for any further dimensions.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mvptr_ds.distributed import collectives


class RowExchange:
    """The exchange of rows for one choice of samples; made once, then used for states and masks alike.

    Every rank makes the same exchanges in the same order. Making one waits for the device: the sizes of what is sent
    must be known on the host. With one rank, or within one, nothing is sent.

    Args:
        lengths_B: int64, rows of each of this rank's samples; on the host.
        requested_B: int64, the sample that each of this rank's samples requests: its place among those of all ranks,
            B on each and in their order. A rank may request its own.
        across: False: the places are those of this rank's own samples.

    Attributes:
        lengths: rows of the requested samples.
        send_splits, recv_splits: rows that travel to and from each rank, itself included.
    """

    def __init__(self, lengths_B: Tensor, requested_B: Tensor, across: bool = True) -> None:
        if across:
            local_2B = torch.stack([lengths_B.to(requested_B.device, non_blocking=True), requested_B])
            all_R2B = collectives.gather(local_2B[None]).cpu()
        else:
            all_R2B = torch.stack([lengths_B, requested_B.cpu()])[None]
        self.rank = collectives.rank() if across else 0
        self._plan(all_R2B[:, 0], all_R2B[:, 1], requested_B.device)

    def _plan(self, lengths_RB: Tensor, requested_RB: Tensor, device: torch.device) -> None:
        num_ranks, num_local = lengths_RB.shape
        owner_RB, lengths_S = requested_RB // num_local, lengths_RB.flatten()
        num_rows_RB = lengths_S[requested_RB]

        # what leaves: for each rank in turn, the rows of those of our samples that it requests
        from_us_RB = owner_RB == self.rank
        self.send_splits: list[int] = (num_rows_RB * from_us_RB).sum(1).tolist()
        local_lengths_B = lengths_RB[self.rank]
        sent = requested_RB[from_us_RB] - self.rank * num_local
        self.sent = _rows(_starts(local_lengths_B)[sent], local_lengths_B[sent]).to(device, non_blocking=True)

        # what arrives: all-to-all delivers in the order of ranks, while our samples requested in an order of their own
        owner_B, num_rows_B = owner_RB[self.rank], num_rows_RB[self.rank]
        recv_R = torch.zeros(num_ranks, dtype=torch.int64).index_add(0, owner_B, num_rows_B)
        self.recv_splits: list[int] = recv_R.tolist()
        arrival_B = owner_B.argsort(stable=True)
        starts_B = torch.empty_like(num_rows_B)
        starts_B[arrival_B] = _starts(num_rows_B[arrival_B])
        self.restore = _rows(starts_B, num_rows_B).to(device, non_blocking=True)
        self.num_rows = int(local_lengths_B.sum())
        self.lengths: list[int] = num_rows_B.tolist()

    def fetch(self, rows_Nx: Tensor) -> Tensor:
        """Returns the rows of the requested samples, [M, ...], from this rank's own packed rows [N, ...]."""
        assert len(rows_Nx) == self.num_rows, (len(rows_Nx), self.num_rows)
        sent = rows_Nx[self.sent]
        if len(self.send_splits) == 1:
            return sent
        if sent.dtype == torch.bool:
            received = collectives.all_to_all(sent.to(torch.uint8), self.send_splits, self.recv_splits)
            return received[self.restore].bool()
        states: Tensor = _AllToAll.apply(sent, self.send_splits, self.recv_splits)
        return states[self.restore]


def _starts(lengths: Tensor) -> Tensor:
    return lengths.cumsum(0) - lengths


def _rows(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of every sample, one after another."""
    offsets = torch.arange(int(lengths.sum())) - _starts(lengths).repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + offsets


class _AllToAll(torch.autograd.Function):
    """Rows in the order of the ranks that they travel to -> rows in the order of those that they come from."""

    @staticmethod
    def forward(ctx: Any, rows_Nx: Tensor, send_splits: list[int], recv_splits: list[int]) -> Tensor:
        ctx.splits = send_splits, recv_splits
        return collectives.all_to_all(rows_Nx, send_splits, recv_splits)

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor, None, None]:
        send_splits, recv_splits = ctx.splits
        return collectives.all_to_all(grads[0], recv_splits, send_splits), None, None
