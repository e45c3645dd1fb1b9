"""Rows of states from rank to rank: only those of requested samples, differentiably, in their own dtype.

A sample's states are its valid slots, one row each. Those of a rank lie packed, one sample after another. Where every
slot travels follows from two numbers a sample: its length, and the sample that it requests. All ranks gather both
first, of all choices of a step at once. The rows then travel in one all-to-all, and their gradients in another one
back.

Worked example, two ranks with two samples each (samples 0, 1 and 2, 3 of the global batch):

    rank 0: lengths [2, 3], requests [3, 0]      rank 1: lengths [1, 2], requests [1, 2]

    rank 0 sends  sample 0 to itself (2 rows), sample 1 to rank 1 (3 rows):           send_splits [2, 3]
    rank 0 gets   sample 0 from itself (2 rows), sample 3 from rank 1 (2 rows):       recv_splits [2, 2]
    in the order of ranks they arrive as 0 0 3 3; `restore` puts them as requested:   3 3 0 0

Legend: B samples of this rank, S samples of all ranks, R ranks, N rows of this rank's samples, M rows that it gets;
x stands for any further dimensions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.data import one_block
from mvptr_ds.distributed import collectives
from mvptr_ds.model import kernels
from mvptr_ds.model.gather import RowGather, gather_rows
from mvptr_ds.model.sequence_index import SequenceIndex
from mvptr_ds.model.triton_kernels import reference


@dataclass(frozen=True)
class Request:
    """A choice of samples whose rows are to be fetched.

    Args:
        index: of this rank's samples.
        wanted_B: int64, the sample that each of this rank's samples requests: its place among those of all ranks, B on
            each and in their order. A rank may request its own.
        across: False: the places are those of this rank's own samples.
    """

    index: SequenceIndex
    wanted_B: Tensor
    across: bool = True


@dataclass
class RowExchange:
    """The exchange of rows for one choice of samples; made once, then used for states and masks alike.

    Every rank makes the same exchanges in the same order. With one rank, or within one, nothing is sent.

    Attributes:
        lengths: rows of the requested samples.
        send_splits, recv_splits: rows that travel to and from each rank, itself included.
        sent: the rows that are sent, and which places of them each row takes, for its gradient.
        restore: int64; see the example above.
        num_rows: of this rank's samples.
    """

    lengths: tuple[int, ...]
    send_splits: list[int]
    recv_splits: list[int]
    sent: RowGather
    restore: Tensor
    num_rows: int

    @classmethod
    def of(cls, request: Request) -> RowExchange:
        """Plans one exchange, on the device of the choice; it waits for the choice."""
        (planned,) = PendingExchanges([request]).read()
        return one_block.to_device(planned, request.wanted_B.device)

    @classmethod
    def plan(cls, lengths_RB: Tensor, wanted_RB: Tensor, rank: int) -> RowExchange:
        """Plans what a rank sends and gets, on the host.

        Args:
            lengths_RB: int64, rows of the samples of each rank.
            wanted_RB: int64, which samples they request.
        """
        num_ranks, num_local = lengths_RB.shape
        owner_RB, lengths_S = wanted_RB // num_local, lengths_RB.flatten()
        num_rows_RB = lengths_S[wanted_RB]

        # what leaves: for each rank in turn, the rows of those of our samples that it requests
        from_us_RB = owner_RB == rank
        local_lengths_B = lengths_RB[rank]
        sent = wanted_RB[from_us_RB] - rank * num_local
        sent_rows, num_rows = _rows(_starts(local_lengths_B)[sent], local_lengths_B[sent]), int(local_lengths_B.sum())

        # what arrives: all-to-all delivers in the order of ranks, while our samples requested in an order of their own
        owner_B, num_rows_B = owner_RB[rank], num_rows_RB[rank]
        recv_R = torch.zeros(num_ranks, dtype=torch.int64).index_add(0, owner_B, num_rows_B)
        arrival_B = owner_B.argsort(stable=True)
        starts_B = torch.empty_like(num_rows_B)
        starts_B[arrival_B] = _starts(num_rows_B[arrival_B])
        return cls(
            lengths=tuple(num_rows_B.tolist()),
            send_splits=(num_rows_RB * from_us_RB).sum(1).tolist(),
            recv_splits=recv_R.tolist(),
            sent=RowGather.of(sent_rows.numpy(), num_rows, torch.device("cpu")),
            restore=_rows(starts_B, num_rows_B) if num_ranks > 1 else recv_R[:0],
            num_rows=num_rows,
        )

    def fetch(self, rows_Nx: Tensor) -> Tensor:
        """Returns the rows of the requested samples, [M, ...], from this rank's own packed rows [N, ...]."""
        assert len(rows_Nx) == self.num_rows, (len(rows_Nx), self.num_rows)
        functions = kernels.fused_functions(rows_Nx.device, rows_Nx.dtype) or reference
        sent = gather_rows(rows_Nx, self.sent, functions.sum_rows)
        if len(self.send_splits) == 1:
            return sent
        if sent.dtype == torch.bool:
            received = collectives.all_to_all(sent.to(torch.uint8), self.send_splits, self.recv_splits)
            return received.index_select(0, self.restore).bool()
        states: Tensor = _AllToAll.apply(sent, self.send_splits, self.recv_splits)
        return states.index_select(0, self.restore)


class PendingExchanges:
    """Several choices on their way to the host, where exchanges are planned: one collective and one copy for all.

    Making it waits for nothing. `read` waits for the choices, so let work for the device stand between the two.

    Args:
        requests: the same on every rank but for their content. Of those that are not `across` nothing is sent.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.requests = list(requests)
        self.across = any(request.across for request in requests)
        wanted_CB = torch.stack([request.wanted_B for request in requests])
        device = wanted_CB.device
        if self.across:  # the others must know our lengths, too
            lengths_CB = torch.stack([request.index.on(device, "lengths") for request in requests])
            both_R2CB = collectives.gather(torch.stack([lengths_CB, wanted_CB])[None])
            self._host = HostCopy(both_R2CB)
        else:
            self._host = HostCopy(wanted_CB)

    def read(self) -> list[RowExchange]:
        """Returns the exchanges in the order of the requests, their index arrays still on the host."""
        found = self._host.read()
        return [self._plan(number, request, found) for number, request in enumerate(self.requests)]

    def _plan(self, number: int, request: Request, found: Tensor) -> RowExchange:
        if not self.across:
            return RowExchange.plan(torch.tensor([request.index.lengths]), found[number][None], 0)
        lengths_RB, wanted_RB = found[:, 0, number], found[:, 1, number]
        rank = collectives.rank()
        if request.across:
            return RowExchange.plan(lengths_RB, wanted_RB, rank)
        return RowExchange.plan(lengths_RB[rank][None], wanted_RB[rank][None], 0)


class HostCopy:
    """A tensor on its way to the host. On CUDA it travels while the device computes what comes next."""

    def __init__(self, values: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        if values.device.type == "cpu":
            self._values = values
            return
        pinned = torch.cuda.is_available()
        self._values = torch.empty(values.shape, dtype=values.dtype, pin_memory=pinned)
        self._values.copy_(values, non_blocking=True)
        if pinned:
            self._event = torch.cuda.Event()
            self._event.record()

    def read(self) -> Tensor:
        """Returns the values, when they are there."""
        if self._event is not None:
            self._event.synchronize()
        return self._values


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
