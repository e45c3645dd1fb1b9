"""Sums of the rows that the programs of a backward pass have left: the second half of each gradient of a vector.

One kernel adds them in float32, always in one order, and writes the dtype of the weights: by torch that is one
operation for the sums and one for each vector's dtype.

Legend: P programs, K vectors, D columns.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launch import launch

BLOCK = {"PROGRAMS": 32, "COLS": 64, "num_warps": 4}


def sum_stripes(sums_PKD: Tensor, dtypes: Sequence[torch.dtype | None]) -> list[Tensor | None]:
    """Computes the sums over programs, float32 [P, K, D], as K vectors [D] of these dtypes; None where none is asked.

    Args:
        sums_PKD: contiguous.
    """
    num_programs, num_vectors, num_columns = sums_PKD.shape
    asked = {dtype for dtype in dtypes if dtype is not None}
    dtype = asked.pop() if len(asked) == 1 else torch.float32
    out_KD = torch.empty(num_vectors, num_columns, dtype=dtype, device=sums_PKD.device)
    width = num_vectors * num_columns
    grid = (triton.cdiv(width, BLOCK["COLS"]),)
    launch(_sum_stripes, grid, sums_PKD.device, sums_PKD, out_KD, num_programs, width, **BLOCK)
    return [None if own is None else out_D.to(own) for own, out_D in zip(dtypes, out_KD.unbind(0), strict=True)]


@triton.jit(do_not_specialize=["P"])
def _sum_stripes(sums_ptr, out_ptr, P, W, PROGRAMS: tl.constexpr, COLS: tl.constexpr):
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros([PROGRAMS, COLS], tl.float32)
    for first in range(0, P, PROGRAMS):
        rows = first + tl.arange(0, PROGRAMS)
        at = rows[:, None].to(tl.int64) * W + cols[None, :]
        total += tl.load(sums_ptr + at, mask=(rows < P)[:, None] & (cols < W)[None, :], other=0.0)
    tl.store(out_ptr + cols, tl.sum(total, 0).to(out_ptr.dtype.element_ty), mask=cols < W)
