"""The functions of the kernels in plain torch, signature by signature, on any device and in any float dtype.

Dropout takes the numbers of philox.py, so both drop the same elements, and tests compare them element by element.
Gradients are autograd's, and logits survive their backward pass.

Legend: as in the files of the kernels.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..attention_tiles import AttentionTiles
from .philox import keep_attention, keep_rows, keep_scale


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
    """Computes `LayerNorm(residual + dropout(x + input_bias)) * weight + bias` (residual_norm.py)."""
    if input_bias_D is not None:
        x_ND = x_ND + input_bias_D.to(x_ND.dtype)
    if p > 0:
        keep_ND = keep_rows(seed_1, call, x_ND.shape[0], x_ND.shape[1], p)
        x_ND = torch.where(keep_ND, x_ND * keep_scale(p), 0.0)
    weight_D, bias_D = weight_D.to(x_ND.dtype), bias_D.to(x_ND.dtype)
    return F.layer_norm(residual_ND + x_ND, x_ND.shape[1:], weight_D, bias_D, eps)


def bias_gelu(x_ND: Tensor, bias_D: Tensor) -> Tensor:
    """Computes `gelu(x + bias)` (bias_gelu.py)."""
    return F.gelu(x_ND + bias_D.to(x_ND.dtype))


def short_attention(qkv_N3HE: Tensor, tiles: AttentionTiles, seed_1: Tensor, call: int, p: float) -> Tensor:
    """Computes `dropout(softmax(query @ key.T / sqrt(E))) @ value` within each sequence (short_attention.py)."""
    num_heads, head_size = qkv_N3HE.shape[2:]
    longest = max(tiles.lengths, default=0)
    keep_BHLL = keep_attention(seed_1, call, len(tiles.lengths), num_heads, longest, p) if p > 0 else None
    out = [qkv_N3HE[:0, 0]]  # the answer where there is no sequence
    for number, qkv_L3HE in enumerate(qkv_N3HE.split(tiles.lengths)):
        query_HLE, key_HLE, value_HLE = qkv_L3HE.permute(1, 2, 0, 3).unbind(0)
        probs_HLL = (query_HLE @ key_HLE.transpose(1, 2) * head_size**-0.5).softmax(-1)
        if keep_BHLL is not None:
            keep_HLL = keep_BHLL[number, :, : len(qkv_L3HE), : len(qkv_L3HE)]
            probs_HLL = torch.where(keep_HLL, probs_HLL * keep_scale(p), 0.0)
        out.append((probs_HLL @ value_HLE).transpose(0, 1))
    return torch.cat(out)


def word_nll(logits_KC: Tensor, labels_K: Tensor, num_valid: int) -> Tensor:
    """Computes the cross entropy of each row's word, at least float32 (word_log_p.py)."""
    return F.cross_entropy(_at_least_float32(logits_KC[:, :num_valid]), labels_K, reduction="none")


def word_log_p(logits_KC: Tensor, rows_M: Tensor, words_M: Tensor, num_valid: int) -> Tensor:
    """Computes the log probability of asked words at asked rows, at least float32 (word_log_p.py)."""
    return _at_least_float32(logits_KC[:, :num_valid]).log_softmax(-1)[rows_M, words_M]


def sum_rows(rows_MD: Tensor, starts_N1: Tensor, places_M: Tensor) -> Tensor:
    """Computes row n as the sum of `rows[places[starts[n] : starts[n + 1]]]` (sum_rows.py)."""
    num_rows = len(starts_N1) - 1
    row_M = torch.searchsorted(starts_N1, torch.arange(len(places_M), device=places_M.device), right=True) - 1
    return rows_MD.new_zeros(num_rows, rows_MD.shape[1]).index_add_(0, row_M, rows_MD.index_select(0, places_M))


def _at_least_float32(logits: Tensor) -> Tensor:
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
