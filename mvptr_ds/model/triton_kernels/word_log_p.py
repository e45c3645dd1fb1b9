"""Log probabilities of words from the logits of a product: one pass each way, the second in the logits' own memory.

    log p(word | row) = logits[row, word] - logsumexp(logits[row, :num_valid])

Logits stay as the product wrote them, in half precision: no float32 copy of 30,522 columns, no parts that are computed
again. The backward pass replaces them by their gradient, which is the largest tensor of a step. Columns behind
`num_valid` pad the words to a multiple of 16, without which rows have no aligned loads. Nothing reads what stands
in them, and their gradient is 0.

Legend: K rows, C columns, M asked pairs of a row and a word.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from .launch import launch, require_rows

BLOCK = {"COLS": 4096, "num_warps": 8}


def word_nll(logits_KC: Tensor, labels_K: Tensor, num_valid: int) -> Tensor:
    """Computes the cross entropy of each row's word, float32 [K]. The backward pass destroys the logits.

    Args:
        logits_KC: float32, float16 or bfloat16, contiguous, and used by nothing else.
        labels_K: int64 [K], below num_valid.
        num_valid: how many columns are words; the others are padding.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if labels_K.shape != logits_KC.shape[:1]:
        raise ValueError(f"{list(labels_K.shape)} labels for logits of shape {list(logits_KC.shape)}")
    starts_K1 = torch.arange(len(labels_K) + 1, device=labels_K.device)
    return -_apply(logits_KC, starts_K1, labels_K, num_valid)


def word_log_p(logits_KC: Tensor, rows_M: Tensor, words_M: Tensor, num_valid: int) -> Tensor:
    """Computes the log probability of asked words at asked rows, float32 [M]. The backward pass destroys the logits.

    Args:
        logits_KC, num_valid: as in `word_nll`.
        rows_M: int64 [M], ascending; a row may come often, or never.
        words_M: int64 [M], below num_valid.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if rows_M.shape != words_M.shape or rows_M.dim() != 1:
        raise ValueError(f"rows of shape {list(rows_M.shape)} for words of shape {list(words_M.shape)}")
    row_numbers = torch.arange(len(logits_KC) + 1, device=rows_M.device)
    return _apply(logits_KC, torch.searchsorted(rows_M, row_numbers), words_M, num_valid)


def _apply(logits_KC: Tensor, starts_K1: Tensor, words_M: Tensor, num_valid: int) -> Tensor:
    require_rows("logits", logits_KC)
    if not logits_KC.is_contiguous() or not 0 < num_valid <= logits_KC.shape[1]:
        raise ValueError(f"{num_valid} words in logits of shape {list(logits_KC.shape)}, strides {logits_KC.stride()}")
    out: Tensor = _WordLogP.apply(logits_KC, starts_K1, words_M, num_valid)
    return out


class _WordLogP(torch.autograd.Function):
    """The words asked of row k are `words[starts[k] : starts[k + 1]]`."""

    @staticmethod
    def forward(ctx: Any, logits_KC, starts_K1, words_M, num_valid):
        num_rows, num_columns = logits_KC.shape
        lse_K = torch.empty(num_rows, dtype=torch.float32, device=logits_KC.device)
        log_p_M = torch.empty(len(words_M), dtype=torch.float32, device=logits_KC.device)
        args = (logits_KC, lse_K, starts_K1, words_M, log_p_M, num_columns, num_valid)
        launch(_forward, (num_rows,), logits_KC.device, *args, **BLOCK)
        ctx.save_for_backward(logits_KC, lse_K, starts_K1, words_M)
        ctx.num_valid, ctx.is_spent = num_valid, False
        return log_p_M

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dlog_p_M):
        if ctx.is_spent:
            raise RuntimeError("the logits were replaced by their gradient; compute the loss again")
        ctx.is_spent = True
        logits_KC, lse_K, starts_K1, words_M = ctx.saved_tensors
        num_rows, num_columns = logits_KC.shape
        args = (logits_KC, lse_K, starts_K1, words_M, dlog_p_M.contiguous(), num_columns, ctx.num_valid)
        launch(_backward, (num_rows,), logits_KC.device, *args, **BLOCK)
        return logits_KC, None, None, None


@triton.jit
def _forward(logits_ptr, lse_ptr, starts_ptr, words_ptr, log_p_ptr, C, num_valid, COLS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    peak = -float("inf")
    total = 0.0
    for start in range(0, C, COLS):
        cols = start + tl.arange(0, COLS)
        # the mask of the load is the row's own length, a multiple of 16: that of the words would forbid wide loads
        x = tl.load(logits_ptr + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
        x = tl.where(cols < num_valid, x, -float("inf"))
        higher = tl.maximum(peak, tl.max(x, 0))
        total = total * tl.exp(peak - higher) + tl.sum(tl.exp(x - higher), 0)
        peak = higher
    lse = peak + tl.log(total)
    tl.store(lse_ptr + row, lse)
    for pair in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        word = tl.load(words_ptr + pair)
        tl.store(log_p_ptr + pair, tl.load(logits_ptr + row * C + word).to(tl.float32) - lse)


@triton.jit
def _backward(logits_ptr, lse_ptr, starts_ptr, words_ptr, dlog_p_ptr, C, num_valid, COLS: tl.constexpr):
    """A row's pairs are few, so each block of columns looks at all of them, in their order."""
    row = tl.program_id(0).to(tl.int64)
    lse = tl.load(lse_ptr + row)
    first = tl.load(starts_ptr + row)
    last = tl.load(starts_ptr + row + 1)
    weight = 0.0
    for pair in range(first, last):
        weight += tl.load(dlog_p_ptr + pair)
    for start in range(0, C, COLS):
        cols = start + tl.arange(0, COLS)
        x = tl.load(logits_ptr + row * C + cols, mask=cols < C, other=0.0).to(tl.float32)
        g = -weight * tl.exp(tl.where(cols < num_valid, x, -float("inf")) - lse)
        for pair in range(first, last):
            g += tl.where(cols == tl.load(words_ptr + pair), tl.load(dlog_p_ptr + pair), 0.0)
        tl.store(logits_ptr + row * C + cols, g.to(logits_ptr.dtype.element_ty), mask=cols < C)
