"""Sums of picked rows, each row of the result written once: the gradient of a gather that repeats or leaves out rows.

Autograd's own gradient of index_select fills zeros and adds rows by atomics, so its bits differ from run to run.

Legend: M picked rows, N rows that they were picked from, D columns.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch, require_rows

MAX_BLOCK = 1024
NUM_WARPS = 4


def sum_rows(rows_MD: Tensor, starts_N1: Tensor, places_M: Tensor) -> Tensor:
    """Computes row n as the sum of `rows[places[starts[n] : starts[n + 1]]]`, [N, D] in the dtype of the rows.

    Args:
        rows_MD: float32, float16 or bfloat16; summed in float32, in the order of places.
        starts_N1, places_M: int64 (`gather.RowGather` makes them).

    Raises:
        ValueError: the shape or dtype of the rows does not fit.
    """
    require_rows("the picked rows", rows_MD)
    num_columns = rows_MD.shape[1]
    out_ND = torch.empty(len(starts_N1) - 1, num_columns, dtype=rows_MD.dtype, device=rows_MD.device)
    block = min(MAX_BLOCK, triton.next_power_of_2(num_columns))
    grid = (len(out_ND), triton.cdiv(num_columns, block))
    args = (rows_MD.contiguous(), out_ND, starts_N1, places_M, num_columns)
    launch(_sum_rows, grid, rows_MD.device, *args, COLS=block, num_warps=NUM_WARPS)
    return out_ND


@triton.jit
def _sum_rows(rows_ptr, out_ptr, starts_ptr, places_ptr, D, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    total = tl.zeros([COLS], tl.float32)
    for at in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        place = tl.load(places_ptr + at)
        total += tl.load(rows_ptr + place * D + cols, mask=cols < D, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * D + cols, total.to(out_ptr.dtype.element_ty), mask=cols < D)
