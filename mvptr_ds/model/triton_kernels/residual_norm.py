"""LayerNorm(residual + dropout(x + bias)) in one pass over memory each way: what ends both halves of an encoder layer.

`x` is a product without its bias: the bias is added here, since its gradient, a sum over rows, falls out of the
backward pass. That pass reads the gradient and z = residual + dropout(x + bias), and draws the dropped elements again.

Sums over rows: each program sums consecutive rows, and sum_stripes.py adds the sums of all programs.

Legend: N rows, D columns, P programs of the backward pass.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import launch, require_columns, require_rows
from .philox import drop_threshold, keep_scale
from .philox_bits import draw_bits
from .sum_stripes import sum_stripes

MAX_COLUMNS = 8192  # of a row that stays in the registers of one program
NUM_WARPS = 4
_MAX_PROGRAMS = 264  # two for each multiprocessor of an H100; a fixed number, so that sums are the same on any GPU


def dropout_add_norm(
    x_ND: Tensor,
    input_bias_D: Tensor | None,
    residual_ND: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    seed_1: Tensor,
    call: int,
    p: float,
    eps: float,
) -> Tensor:
    """Computes `LayerNorm(residual + dropout(x + input_bias)) * weight + bias`, in the dtype of x, [N, D].

    Args:
        x_ND, residual_ND: float32, float16 or bfloat16, both of one dtype; computed in float32.
        input_bias_D: of the product that made x; None: nothing is added.
        seed_1: int64 [1] on the device of x, another one for every step. Nothing waits for its value.
        call: below 2**31, another one for every use within a step.
        p: share that is dropped, 0 in evaluation.

    Raises:
        ValueError: shapes or dtypes do not fit, p is outside [0, 1), or rows have more than 8,192 columns.
    """
    require_rows("x", x_ND)
    if residual_ND.shape != x_ND.shape or residual_ND.dtype != x_ND.dtype:
        raise ValueError(
            f"the residual is {residual_ND.dtype} {list(residual_ND.shape)}, x is {x_ND.dtype} {list(x_ND.shape)}"
        )
    if x_ND.shape[1] > MAX_COLUMNS:
        raise ValueError(f"rows of {x_ND.shape[1]} columns; at most {MAX_COLUMNS} fit in a program")
    for name, vector_D in (("input_bias", input_bias_D), ("weight", weight_D), ("bias", bias_D)):
        if vector_D is not None:
            require_columns(name, vector_D, x_ND.shape[1])
    out: Tensor = _DropoutAddNorm.apply(x_ND, input_bias_D, residual_ND, weight_D, bias_D, seed_1, call, p, eps)
    return out


class _DropoutAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_ND, input_bias_D, residual_ND, weight_D, bias_D, seed_1, call, p, eps):
        num_rows, num_columns = x_ND.shape
        y_ND, z_ND = (torch.empty_like(x_ND, memory_format=torch.contiguous_format) for _ in range(2))
        mean_N, rstd_N = (torch.empty(num_rows, dtype=torch.float32, device=x_ND.device) for _ in range(2))
        ctx.settings = {
            "BLOCK": triton.next_power_of_2(num_columns),
            "HAS_BIAS": input_bias_D is not None,
            "DROPS": p > 0,
            "num_warps": NUM_WARPS,
        }
        ctx.dropout = call, drop_threshold(p), keep_scale(p)
        launch(
            _forward,
            (num_rows,),
            x_ND.device,
            x_ND.contiguous(),
            input_bias_D,
            residual_ND.contiguous(),
            weight_D,
            bias_D,
            y_ND,
            z_ND,
            mean_N,
            rstd_N,
            seed_1,
            *ctx.dropout,
            num_columns,
            eps,
            **ctx.settings,
        )
        ctx.save_for_backward(z_ND, weight_D, mean_N, rstd_N, seed_1)
        ctx.dtypes = weight_D.dtype, bias_D.dtype, None if input_bias_D is None else input_bias_D.dtype
        return y_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_ND):
        z_ND, weight_D, mean_N, rstd_N, seed_1 = ctx.saved_tensors
        num_rows, num_columns = z_ND.shape
        num_programs = min(_MAX_PROGRAMS, num_rows)
        dresidual_ND = torch.empty_like(z_ND)
        dx_ND = torch.empty_like(z_ND) if ctx.settings["DROPS"] else dresidual_ND
        sums_P3D = torch.empty(num_programs, 3, num_columns, dtype=torch.float32, device=z_ND.device)
        launch(
            _backward,
            (num_programs,),
            z_ND.device,
            dy_ND.contiguous(),
            z_ND,
            weight_D,
            mean_N,
            rstd_N,
            dx_ND,
            dresidual_ND,
            sums_P3D,
            seed_1,
            *ctx.dropout,
            num_rows,
            num_columns,
            triton.cdiv(num_rows, max(1, num_programs)),
            **ctx.settings,
        )
        dweight_D, dbias_D, dinput_D = sum_stripes(sums_P3D, ctx.dtypes)
        return dx_ND, dinput_D, dresidual_ND, dweight_D, dbias_D, None, None, None, None


@triton.jit(do_not_specialize=["call", "threshold"])
def _forward(
    x_ptr,
    input_bias_ptr,
    residual_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    z_ptr,
    mean_ptr,
    rstd_ptr,
    seed_ptr,
    call,
    threshold,
    scale,
    D,
    eps,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
):
    """A program takes one row."""
    row = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    valid = cols < D
    at = row.to(tl.int64) * D + cols
    x = tl.load(x_ptr + at, mask=valid, other=0.0).to(tl.float32)
    if HAS_BIAS:
        x += tl.load(input_bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    if DROPS:
        bits = draw_bits(tl.load(seed_ptr), tl.arange(0, BLOCK // 8), row, call, 0)
        x = tl.where(tl.reshape(bits, [BLOCK]).to(tl.int32) >= threshold, x * scale, 0.0)
    z = (x + tl.load(residual_ptr + at, mask=valid, other=0.0).to(tl.float32)).to(z_ptr.dtype.element_ty)
    tl.store(z_ptr + at, z, mask=valid)
    z = z.to(tl.float32)  # what the backward pass will read, rounded alike
    mean = tl.sum(z, 0) / D
    centred = tl.where(valid, z - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / D + eps)
    weight = tl.load(weight_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    tl.store(y_ptr + at, (centred * rstd * weight + bias).to(y_ptr.dtype.element_ty), mask=valid)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["call", "threshold", "N", "rows_each"])
def _backward(
    dy_ptr,
    z_ptr,
    weight_ptr,
    mean_ptr,
    rstd_ptr,
    dx_ptr,
    dresidual_ptr,
    sums_ptr,
    seed_ptr,
    call,
    threshold,
    scale,
    N,
    D,
    rows_each,
    BLOCK: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DROPS: tl.constexpr,
):
    """A program takes `rows_each` consecutive rows, and keeps three sums over them, one for each vector of weights."""
    program = tl.program_id(0)
    cols = tl.arange(0, BLOCK)
    valid = cols < D
    weight = tl.load(weight_ptr + cols, mask=valid, other=0.0).to(tl.float32)
    of_weight = tl.zeros([BLOCK], tl.float32)
    of_bias = tl.zeros([BLOCK], tl.float32)
    of_input = tl.zeros([BLOCK], tl.float32)
    for row in range(program * rows_each, tl.minimum((program + 1) * rows_each, N)):
        at = tl.cast(row, tl.int64) * D + cols
        dy = tl.load(dy_ptr + at, mask=valid, other=0.0).to(tl.float32)
        z = tl.load(z_ptr + at, mask=valid, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        normal = tl.where(valid, (z - tl.load(mean_ptr + row)) * rstd, 0.0)
        of_weight += dy * normal
        of_bias += dy
        to_normal = dy * weight
        dz = (to_normal - tl.sum(to_normal, 0) / D - normal * (tl.sum(to_normal * normal, 0) / D)) * rstd
        tl.store(dresidual_ptr + at, dz.to(dresidual_ptr.dtype.element_ty), mask=valid)
        if DROPS:
            bits = draw_bits(tl.load(seed_ptr), tl.arange(0, BLOCK // 8), tl.cast(row, tl.int32), call, 0)
            dz = tl.where(tl.reshape(bits, [BLOCK]).to(tl.int32) >= threshold, dz * scale, 0.0)
            tl.store(dx_ptr + at, dz.to(dx_ptr.dtype.element_ty), mask=valid)
        if HAS_BIAS:
            of_input += dz
    sums = sums_ptr + program.to(tl.int64) * 3 * D + cols
    tl.store(sums, of_weight, mask=valid)
    tl.store(sums + D, of_bias, mask=valid)
    tl.store(sums + 2 * D, of_input, mask=valid)
