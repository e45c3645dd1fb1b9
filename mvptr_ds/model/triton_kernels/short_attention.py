"""Attention within packed sequences of at most 128 rows, with dropout: a program holds a sequence's head whole.

All queries of a sequence stand in one tile of 32, 64 or 128 rows, and its keys come in one to four blocks. So each
gradient has one program that writes it, straight into one tensor [N, 3, H, E], and nothing is added by atomics.
Sequences of this model have 3 to 110 rows, where flash attention would pad each to tiles of 128.

Legend: N rows, H heads, E size of a head; in kernels i queries, j keys, d columns of a head.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..attention_tiles import AttentionTiles
from .launch import FLOATS, launch
from .philox import drop_threshold, keep_scale
from .philox_bits import draw_bits

MAX_HEAD_SIZE = 128
SMALLEST_DOT = 16  # rows and columns that a tensor core takes at least
# keys of a block and warps of a program, forward and backward, by tile: chosen so that nothing spills on sm_80, sm_90
FORWARD = {32: (32, 2), 64: (64, 4), 128: (32, 8)}
BACKWARD = {32: (32, 4), 64: (64, 8), 128: (32, 8)}


def short_attention(qkv_N3HE: Tensor, tiles: AttentionTiles, seed_1: Tensor, call: int, p: float) -> Tensor:
    """Computes `dropout(softmax(query @ key.T / sqrt(E))) @ value` within each sequence, [N, H, E] in the dtype of qkv.

    Args:
        qkv_N3HE: queries, keys and values; float32, float16 or bfloat16; softmax in float32.
        tiles: the sequences, which must have all N rows.
        seed_1, call, p: as in `dropout_add_norm`; p is the share of probabilities that is dropped.

    Raises:
        ValueError: the shape or dtype does not fit, p is outside [0, 1), or heads have more than 128 columns.
    """
    if qkv_N3HE.dim() != 4 or qkv_N3HE.shape[1] != 3 or qkv_N3HE.dtype not in FLOATS:
        raise ValueError(f"qkv is {qkv_N3HE.dtype} {list(qkv_N3HE.shape)}; expected [rows, 3, heads, size] of {FLOATS}")
    if len(qkv_N3HE) != sum(tiles.lengths):
        raise ValueError(f"{len(qkv_N3HE)} rows for sequences of {sum(tiles.lengths)} together")
    if qkv_N3HE.shape[3] > MAX_HEAD_SIZE:
        raise ValueError(f"heads of {qkv_N3HE.shape[3]} columns; at most {MAX_HEAD_SIZE} fit in a tile")
    out: Tensor = _ShortAttention.apply(qkv_N3HE, tiles, seed_1, call, p)
    return out


class _ShortAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, qkv_N3HE, tiles, seed_1, call, p):
        qkv_N3HE = qkv_N3HE.contiguous()
        num_rows, _, num_heads, _ = qkv_N3HE.shape
        out_NHE = torch.empty_like(qkv_N3HE[:, 0], memory_format=torch.contiguous_format)
        lse_HN = torch.empty(num_heads, num_rows, dtype=torch.float32, device=out_NHE.device)
        ctx.save_for_backward(qkv_N3HE, out_NHE, lse_HN, seed_1)
        ctx.tiles, ctx.dropout, ctx.drops = tiles, (call, drop_threshold(p), keep_scale(p)), p > 0
        _launch_tiles(_forward, FORWARD, ctx, (qkv_N3HE, out_NHE, lse_HN), seed_1)
        return out_NHE

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout_NHE):
        qkv_N3HE, out_NHE, lse_HN, seed_1 = ctx.saved_tensors
        dqkv_N3HE = torch.empty_like(qkv_N3HE)
        tensors = (qkv_N3HE, out_NHE, lse_HN, dout_NHE.contiguous(), dqkv_N3HE)
        _launch_tiles(_backward, BACKWARD, ctx, tensors, seed_1)
        return dqkv_N3HE, None, None, None, None


def _launch_tiles(
    kernel: Any, blocks: dict[int, tuple[int, int]], ctx: Any, tensors: tuple[Tensor, ...], seed_1: Tensor
) -> None:
    """Starts a kernel once for each tile size that occurs."""
    num_rows, _, num_heads, head_size = tensors[0].shape
    for size, sequences in ctx.tiles.sequences.items():
        num_keys, num_warps = blocks[size]
        launch(
            kernel,
            (len(sequences), num_heads),
            seed_1.device,
            *tensors,
            ctx.tiles.offsets,
            sequences,
            seed_1,
            *ctx.dropout,
            head_size**-0.5,
            num_rows,
            num_heads,
            E=head_size,
            E_BLOCK=max(SMALLEST_DOT, triton.next_power_of_2(head_size)),
            QUERIES=size,
            KEYS=num_keys,
            DROPS=ctx.drops,
            num_warps=num_warps,
        )


@triton.jit(do_not_specialize=["call", "threshold", "N"], do_not_specialize_on_alignment=["sequences_ptr"])
def _forward(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    offsets_ptr,
    sequences_ptr,
    seed_ptr,
    call,
    threshold,
    keep_scale,
    scale,
    N,
    H,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DROPS: tl.constexpr,
):
    seq, head = tl.load(sequences_ptr + tl.program_id(0)), tl.program_id(1)
    first = tl.load(offsets_ptr + seq)
    length = tl.load(offsets_ptr + seq + 1) - first
    i, d = tl.arange(0, QUERIES), tl.arange(0, E_BLOCK)
    is_query = (i < length)[:, None] & (d < E)[None, :]
    row = (first + i).to(tl.int64)[:, None]
    q = tl.load(qkv_ptr + row * (3 * H * E) + head * E + d[None, :], mask=is_query, other=0.0)
    peak = tl.full([QUERIES], -float("inf"), tl.float32)
    total = tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, E_BLOCK], tl.float32)
    for start in tl.range(0, QUERIES, KEYS, num_stages=1):  # the first key is real, so the peak is finite from then on
        j = start + tl.arange(0, KEYS)
        is_key = (j < length)[:, None] & (d < E)[None, :]
        at = (first + j).to(tl.int64)[:, None] * (3 * H * E) + (H + head) * E + d[None, :]
        k = tl.load(qkv_ptr + at, mask=is_key, other=0.0)
        v = tl.load(qkv_ptr + at + H * E, mask=is_key, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        score = tl.where((j < length)[None, :], score, -float("inf"))
        higher = tl.maximum(peak, tl.max(score, 1))
        e = tl.exp(score - higher[:, None])
        shrink = tl.exp(peak - higher)
        total = total * shrink + tl.sum(e, 1)
        if DROPS:
            keep = _keep(seed_ptr, call, threshold, seq, head, start, i, QUERIES, KEYS)
            e = tl.where(keep, e * keep_scale, 0.0)
        out = out * shrink[:, None] + tl.dot(e.to(v.dtype), v, input_precision="ieee")
        peak = higher
    out = (out / total[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * (H * E) + head * E + d[None, :], out, mask=is_query)
    tl.store(lse_ptr + head.to(tl.int64) * N + first + i, peak + tl.log(total), mask=i < length)


@triton.jit(do_not_specialize=["call", "threshold", "N"], do_not_specialize_on_alignment=["sequences_ptr"])
def _backward(
    qkv_ptr,
    out_ptr,
    lse_ptr,
    dout_ptr,
    dqkv_ptr,
    offsets_ptr,
    sequences_ptr,
    seed_ptr,
    call,
    threshold,
    keep_scale,
    scale,
    N,
    H,
    E: tl.constexpr,
    E_BLOCK: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    DROPS: tl.constexpr,
):
    """Rows behind a sequence's last have q = dout = 0: they add nothing to the gradients of keys and values."""
    seq, head = tl.load(sequences_ptr + tl.program_id(0)), tl.program_id(1)
    first = tl.load(offsets_ptr + seq)
    length = tl.load(offsets_ptr + seq + 1) - first
    i, d = tl.arange(0, QUERIES), tl.arange(0, E_BLOCK)
    is_query = (i < length)[:, None] & (d < E)[None, :]
    row = (first + i).to(tl.int64)[:, None]
    at_q = row * (3 * H * E) + head * E + d[None, :]
    at_out = row * (H * E) + head * E + d[None, :]
    q = tl.load(qkv_ptr + at_q, mask=is_query, other=0.0)
    dout = tl.load(dout_ptr + at_out, mask=is_query, other=0.0)
    out = tl.load(out_ptr + at_out, mask=is_query, other=0.0)
    delta = tl.sum(dout.to(tl.float32) * out.to(tl.float32), 1)
    lse = tl.load(lse_ptr + head.to(tl.int64) * N + first + i, mask=i < length, other=0.0)
    dq = tl.zeros([QUERIES, E_BLOCK], tl.float32)
    for start in tl.range(0, QUERIES, KEYS, num_stages=1):
        j = start + tl.arange(0, KEYS)
        is_key = (j < length)[:, None] & (d < E)[None, :]
        at = (first + j).to(tl.int64)[:, None] * (3 * H * E) + (H + head) * E + d[None, :]
        k = tl.load(qkv_ptr + at, mask=is_key, other=0.0)
        v = tl.load(qkv_ptr + at + H * E, mask=is_key, other=0.0)
        score = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        probs = tl.where((j < length)[None, :], tl.exp(score - lse[:, None]), 0.0)
        dprobs = tl.dot(dout, tl.trans(v), input_precision="ieee")
        dropped = probs
        if DROPS:
            keep = _keep(seed_ptr, call, threshold, seq, head, start, i, QUERIES, KEYS)
            dropped = tl.where(keep, probs * keep_scale, 0.0)
            dprobs = tl.where(keep, dprobs * keep_scale, 0.0)
        dv = tl.dot(tl.trans(dropped.to(dout.dtype)), dout, input_precision="ieee")
        tl.store(dqkv_ptr + at + H * E, dv.to(dqkv_ptr.dtype.element_ty), mask=is_key)
        dscore = (probs * (dprobs - delta[:, None]) * scale).to(q.dtype)
        dk = tl.dot(tl.trans(dscore), q, input_precision="ieee")
        tl.store(dqkv_ptr + at, dk.to(dqkv_ptr.dtype.element_ty), mask=is_key)
        dq += tl.dot(dscore, k, input_precision="ieee")
    tl.store(dqkv_ptr + at_q, dq.to(dqkv_ptr.dtype.element_ty), mask=is_query)


@triton.jit
def _keep(seed_ptr, call, threshold, seq, head, start, i, QUERIES: tl.constexpr, KEYS: tl.constexpr):
    """Returns which probabilities of a block are kept, [QUERIES, KEYS]; 128 is philox.ROWS_OF_A_SEQUENCE."""
    group = start // 8 + tl.arange(0, KEYS // 8)[None, :]
    bits = draw_bits(tl.load(seed_ptr), group, (seq * 128 + i)[:, None], call, 1 + head)
    return tl.reshape(bits, [QUERIES, KEYS]).to(tl.int32) >= threshold
