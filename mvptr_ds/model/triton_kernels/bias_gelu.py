"""gelu(x + bias) by erf, as the model was published with; the gradient of the bias is summed in the same pass.

Sums over rows: each program sums the rows of one stripe, and sum_stripes.py adds the stripes.

Legend: N rows, D columns, P stripes of rows.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import launch, require_columns, require_rows
from .sum_stripes import sum_stripes

BLOCK = {"ROWS": 8, "COLS": 256, "num_warps": 4}
_MAX_STRIPES = 64  # a fixed number, so that sums are the same on any GPU


def bias_gelu(x_ND: Tensor, bias_D: Tensor) -> Tensor:
    """Computes `gelu(x + bias)` in the dtype of x, [N, D]; float32 inside.

    Args:
        x_ND: a product without its bias; float32, float16 or bfloat16.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    require_rows("x", x_ND)
    require_columns("bias", bias_D, x_ND.shape[1])
    out: Tensor = _BiasGelu.apply(x_ND, bias_D)
    return out


class _BiasGelu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND, bias_D):
        x_ND = x_ND.contiguous()
        num_rows, num_columns = x_ND.shape
        out_ND = torch.empty_like(x_ND)
        grid = (triton.cdiv(num_rows, BLOCK["ROWS"]), triton.cdiv(num_columns, BLOCK["COLS"]))
        launch(_forward, grid, x_ND.device, x_ND, bias_D, out_ND, num_rows, num_columns, **BLOCK)
        ctx.save_for_backward(x_ND, bias_D)
        return out_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND):
        x_ND, bias_D = ctx.saved_tensors
        num_rows, num_columns = x_ND.shape
        num_blocks = triton.cdiv(num_rows, BLOCK["ROWS"])
        num_stripes = min(_MAX_STRIPES, num_blocks)
        rows_each = triton.cdiv(num_blocks, max(1, num_stripes)) * BLOCK["ROWS"]
        dx_ND = torch.empty_like(x_ND)
        sums_P1D = torch.empty(num_stripes, 1, num_columns, dtype=torch.float32, device=x_ND.device)
        grid = (num_stripes, triton.cdiv(num_columns, BLOCK["COLS"]))
        args = (dy_ND.contiguous(), x_ND, bias_D, dx_ND, sums_P1D, num_rows, num_columns, rows_each)
        launch(_backward, grid, x_ND.device, *args, **BLOCK)
        (dbias_D,) = sum_stripes(sums_P1D, [bias_D.dtype])
        return dx_ND, dbias_D


@triton.jit(do_not_specialize=["N"])
def _forward(x_ptr, bias_ptr, out_ptr, N, D, ROWS: tl.constexpr, COLS: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    valid = (rows < N)[:, None] & (cols < D)[None, :]
    at = rows[:, None].to(tl.int64) * D + cols[None, :]
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) + bias[None, :]
    tl.store(out_ptr + at, (x * _normal_cdf(x)).to(out_ptr.dtype.element_ty), mask=valid)


@triton.jit(do_not_specialize=["N", "rows_each"])
def _backward(dy_ptr, x_ptr, bias_ptr, dx_ptr, sums_ptr, N, D, rows_each, ROWS: tl.constexpr, COLS: tl.constexpr):
    stripe = tl.program_id(0)
    cols = tl.program_id(1) * COLS + tl.arange(0, COLS)
    bias = tl.load(bias_ptr + cols, mask=cols < D, other=0.0).to(tl.float32)
    total = tl.zeros([COLS], tl.float32)
    for first in range(stripe * rows_each, tl.minimum((stripe + 1) * rows_each, N), ROWS):
        rows = first + tl.arange(0, ROWS)
        valid = (rows < N)[:, None] & (cols < D)[None, :]
        at = rows[:, None].to(tl.int64) * D + cols[None, :]
        x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32) + bias[None, :]
        dy = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        dx = dy * (_normal_cdf(x) + x * density)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=valid)
        total += tl.sum(dx, 0)  # rows behind the last have dy = 0
    tl.store(sums_ptr + stripe.to(tl.int64) * D + cols, total, mask=cols < D)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
