"""Gathers of rows whose gradient is a gather as well: each row of it is written once, and nothing is added by atomics.

    gather_rows   index 2, 0, 1, of 3 rows   a permutation: its gradient is the inverse one, 1, 2, 0
                  index 2, 0, 0, of 4 rows   row 0 gets the sum of places 1 and 2, row 2 that of place 0, others zero
    pick_rows     an index that repeats no row: its gradient puts the rows back among zeros
    place_rows    every row of some tensors at its place among those of all: its gradient picks them again
    split_rows    the same the other way round

Autograd's own gradient of index_select fills zeros and adds every row to them.

Legend: N rows, M picked rows, x what a row holds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .sequence_index import on_device

SumRows = Callable[[Tensor, Tensor, Tensor], Tensor]  # rows [M, D], starts [N + 1], places [M] -> [N, D]


@dataclass(frozen=True)
class RowGather:
    """An index of rows and its inverse, made on the host.

    Attributes:
        index_M: int64 on the device, the rows to pick.
        places_M: int64 on the device, the places of `index_M` sorted by the row that they pick.
        starts_N1: int64 [N + 1] on the device: places[starts[n] : starts[n + 1]] pick row n. None: a permutation,
            whose inverse the places are.
    """

    index_M: Tensor
    places_M: Tensor
    starts_N1: Tensor | None

    @classmethod
    def of(cls, index: np.ndarray, num_rows: int, device: torch.device) -> RowGather:
        """Inverts an index of the host. Raises ValueError for a row outside [0, num_rows)."""
        if len(index) and (index.min() < 0 or index.max() >= num_rows):
            raise ValueError(f"rows {index.min()} to {index.max()} are picked of {num_rows}")
        counts_N = np.bincount(index, minlength=num_rows)
        is_permutation = len(index) == num_rows and bool((counts_N == 1).all())
        places_M = np.argsort(index, kind="stable")
        starts_N1 = None if is_permutation else on_device(np.concatenate([[0], np.cumsum(counts_N)]), device)
        return cls(on_device(index, device), on_device(places_M, device), starts_N1)


def gather_rows(rows_Nx: Tensor, gather: RowGather, sum_rows: SumRows) -> Tensor:
    """Returns the picked rows, [M, ...].

    Args:
        rows_Nx: [N, ...]; floats, if they have a gradient.
        sum_rows: makes the gradient where the gather is no permutation (`triton_kernels`: sum_rows or reference).
    """
    out: Tensor = _GatherRows.apply(rows_Nx, gather, sum_rows)
    return out


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_Nx, gather, sum_rows):  # type: ignore[no-untyped-def]
        ctx.gather, ctx.sum_rows = gather, sum_rows
        return rows_Nx.index_select(0, gather.index_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_picked_Mx):  # type: ignore[no-untyped-def]
        starts_N1, places_M = ctx.gather.starts_N1, ctx.gather.places_M
        if starts_N1 is None:
            return to_picked_Mx.index_select(0, places_M), None, None
        flat_MD = to_picked_Mx.reshape(len(to_picked_Mx), to_picked_Mx.shape[1:].numel())
        sums_ND = ctx.sum_rows(flat_MD, starts_N1, places_M)
        return sums_ND.reshape(len(starts_N1) - 1, *to_picked_Mx.shape[1:]), None, None


def pick_rows(rows_Nx: Tensor, index_M: Tensor) -> Tensor:
    """Returns the picked rows, [M, ...], of which none is picked twice; int64 [M]."""
    out: Tensor = _PickRows.apply(rows_Nx, index_M)
    return out


class _PickRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_Nx, index_M):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(index_M)
        ctx.num_rows = len(rows_Nx)
        return rows_Nx.index_select(0, index_M)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_picked_Mx):  # type: ignore[no-untyped-def]
        (index_M,) = ctx.saved_tensors
        return to_picked_Mx.new_zeros(ctx.num_rows, *to_picked_Mx.shape[1:]).index_copy_(0, index_M, to_picked_Mx), None


def place_rows(parts: Sequence[Tensor], places: Sequence[Tensor]) -> Tensor:
    """Puts row i of each part at row `places[i]` of one tensor.

    Args:
        parts: [N, ...] each, alike but for the number of rows.
        places: int64 [N] each; together they name every row of the result once.
    """
    out: Tensor = _PlaceRows.apply(len(parts), *parts, *places)
    return out


def split_rows(whole_Mx: Tensor, places: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Undoes `place_rows`: returns the rows at the places of each part, which together name every row once."""
    out: tuple[Tensor, ...] = _SplitRows.apply(whole_Mx, *places)
    return out


class _PlaceRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, num_parts, *given):  # type: ignore[no-untyped-def]
        parts, ctx.places = given[:num_parts], given[num_parts:]
        return _placed(parts, ctx.places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_whole_Mx):  # type: ignore[no-untyped-def]
        wanted = ctx.needs_input_grad[1 : 1 + len(ctx.places)]
        to_parts = [to_whole_Mx.index_select(0, p) if w else None for p, w in zip(ctx.places, wanted, strict=True)]
        return None, *to_parts, *[None] * len(ctx.places)


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, whole_Mx, *places):  # type: ignore[no-untyped-def]
        ctx.places = places
        ctx.set_materialize_grads(False)  # a part that nothing has read costs no tensor of zeros
        return tuple(whole_Mx.index_select(0, place_N) for place_N in places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *to_parts):  # type: ignore[no-untyped-def]
        if all(to_part is None for to_part in to_parts):
            return None, *[None] * len(ctx.places)
        return _placed(to_parts, ctx.places), *[None] * len(ctx.places)


def _placed(parts: Sequence[Tensor | None], places: Sequence[Tensor]) -> Tensor:
    """One tensor of all rows; zeros where there is no part."""
    given = next(part for part in parts if part is not None)
    whole_Mx = given.new_empty(sum(map(len, places)), *given.shape[1:])
    if any(part is None for part in parts):
        whole_Mx.zero_()
    for part, place_N in zip(parts, places, strict=True):
        if part is not None:
            whole_Mx.index_copy_(0, place_N, part)
    return whole_Mx
