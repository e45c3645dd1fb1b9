"""Log probabilities of picked classes, by heads over many classes. What is large, the logits, exists once at most.

    log p = logit of the picked (row, class) - logsumexp of the row's logits

On CUDA the logits keep the precision of the product, all rows at once, and are kept for the backward pass, where fused
kernels (`kernels.fused`) put their gradient in their place. On a CPU they are made in parts of 64 MiB, and several
parts are computed again in the backward pass.

Legend: K rows, C classes, P picked (row, class) pairs, D hidden.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .gather import place_rows

_LOGITS_AT_ONCE = 2**24  # on a CPU, 64 MiB of float32: 549 rows of 30,522 words


def log_p_of_pairs(hidden_KD: Tensor, weight_CD: Tensor, bias_C: Tensor, rows_P: Tensor, classes_P: Tensor) -> Tensor:
    """Returns log probabilities of picked classes at picked rows by `hidden @ weight.T + bias`, at least float32 [P].

    Args:
        weight_CD: may have more rows than the bias has classes. Those rows get no probability and no gradient.
        rows_P, classes_P: int64, in any order; a pair may occur several times.
    """
    num_classes, fused = len(bias_C), kernels.fused_functions(hidden_KD.device, hidden_KD.dtype)
    weight_CD, bias_C = _aligned(weight_CD, bias_C)
    if fused is None:
        out_P: Tensor = _PickedLogP.apply(hidden_KD, weight_CD, bias_C, rows_P, classes_P)
        return out_P
    rows_P, order_P = rows_P.sort(stable=True)  # the kernel wants the classes of a row together
    logits_KC = kernels.linear(hidden_KD, weight_CD, bias_C)
    return place_rows([fused.word_log_p(logits_KC, rows_P, classes_P[order_P], num_classes)], [order_P])


def nll(hidden_KD: Tensor, weight_CD: Tensor, bias_C: Tensor, labels_K: Tensor) -> Tensor:
    """Returns the cross entropy of each row's label, int64 [K], as at least float32 [K]; see `log_p_of_pairs`."""
    fused = kernels.fused_functions(hidden_KD.device, hidden_KD.dtype)
    if fused is not None:
        logits_KC = kernels.linear(hidden_KD, *_aligned(weight_CD, bias_C))
        out_K: Tensor = fused.word_nll(logits_KC, labels_K, len(bias_C))
        return out_K
    rows_K = torch.arange(len(labels_K), device=labels_K.device)
    return -log_p_of_pairs(hidden_KD, weight_CD, bias_C, rows_K, labels_K)


def _aligned(weight_CD: Tensor, bias_C: Tensor) -> tuple[Tensor, Tensor]:
    """Adds classes without probability, until there are as many as matrix products want."""
    missing = kernels.aligned_classes(len(bias_C), weight_CD.device) - len(weight_CD)
    if missing > 0:
        weight_CD = F.pad(weight_CD, (0, 0, 0, missing))
    if len(weight_CD) > len(bias_C):
        bias_C = F.pad(bias_C, (0, len(weight_CD) - len(bias_C)), value=float("-inf"))
    return weight_CD, bias_C


def _logsumexp(logits_KC: Tensor) -> Tensor:
    """Of each row, at least float32 [K]; half precision is summed in float32."""
    if logits_KC.dtype not in kernels.HALF:
        return logits_KC.logsumexp(-1)
    peak_K1 = logits_KC.amax(-1, keepdim=True).float()
    return (logits_KC - peak_K1).exp_().sum(-1).log_() + peak_K1.squeeze(-1)  # float32 takes half precision along


class _PickedLogP(torch.autograd.Function):
    """The gradient of a row's logits is `g`, scattered to its picked classes, less `sum(g) * softmax`."""

    @staticmethod
    def forward(
        ctx: Any, hidden_KD: Tensor, weight_CD: Tensor, bias_C: Tensor, rows_P: Tensor, classes_P: Tensor
    ) -> Tensor:
        parts = list(_parts(len(hidden_KD), len(weight_CD), rows_P))
        values = []
        for rows, pairs, own_P in parts:
            logits_KC = kernels.linear(hidden_KD[rows], weight_CD, bias_C)
            lse_K = _logsumexp(logits_KC)
            values.append(logits_KC[own_P, classes_P[pairs]].to(lse_K.dtype) - lse_K.index_select(0, own_P))
        kept_KC = logits_KC if len(parts) == 1 and any(ctx.needs_input_grad) else None
        ctx.save_for_backward(hidden_KD, weight_CD, bias_C, rows_P, classes_P, kept_KC)
        if len(parts) == 1:
            return values[0]
        out_P = values[0].new_empty(len(rows_P))
        for (_, pairs, _), of_part in zip(parts, values, strict=True):
            out_P[pairs] = of_part
        return out_P

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> tuple[Tensor | None, ...]:
        hidden_KD, weight_CD, bias_C, rows_P, classes_P, kept_KC = ctx.saved_tensors
        to_hidden, to_weight_CD, to_bias_C = [], None, None
        for rows, pairs, own_P in _parts(len(hidden_KD), len(weight_CD), rows_P):
            logits_KC = kernels.linear(hidden_KD[rows], weight_CD, bias_C) if kept_KC is None else kept_KC
            to_logits_KC = _to_logits(logits_KC, grads[0][pairs], own_P, classes_P[pairs])
            of_hidden, of_weight, of_bias = kernels.linear_gradients(to_logits_KC, hidden_KD[rows], weight_CD)
            to_hidden.append(of_hidden)
            to_weight_CD = of_weight if to_weight_CD is None else to_weight_CD.add_(of_weight)
            to_bias_C = of_bias if to_bias_C is None else to_bias_C.add_(of_bias)
        return to_hidden[0] if len(to_hidden) == 1 else torch.cat(to_hidden), to_weight_CD, to_bias_C, None, None


def _to_logits(logits_KC: Tensor, to_out_P: Tensor, rows_P: Tensor, classes_P: Tensor) -> Tensor:
    of_row_K = to_out_P.new_zeros(len(logits_KC)).index_put_((rows_P,), -to_out_P, accumulate=True)
    to_logits_KC = logits_KC.softmax(-1).mul_(of_row_K.to(logits_KC.dtype)[:, None])
    return to_logits_KC.index_put_((rows_P, classes_P), to_out_P.to(logits_KC.dtype), accumulate=True)


def _parts(num_rows: int, num_classes: int, rows_P: Tensor) -> Iterator[tuple[slice, slice | Tensor, Tensor]]:
    """Yields the rows that are computed at once, which of the pairs are theirs, and the rows of those among them."""
    at_once = max(1, _LOGITS_AT_ONCE // num_classes)
    if rows_P.device.type == "cuda" or num_rows <= at_once:
        yield slice(0, num_rows), slice(None), rows_P
        return
    for start in range(0, num_rows, at_once):
        stop = min(start + at_once, num_rows)
        pairs = ((rows_P >= start) & (rows_P < stop)).nonzero().flatten()
        yield slice(start, stop), pairs, rows_P[pairs] - start
