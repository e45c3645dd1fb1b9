"""What the kernels of `model/triton_kernels` cost, where that is not one pass over each of their tensors.

Legend: B sequences, S sequences of a tile, H heads, E size of a head.
"""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

from mvptr_ds.benchmarks.gpu_step.custom_kernels import Tensors, register_kernel
from mvptr_ds.benchmarks.gpu_step.operation_costs import size_of
from mvptr_ds.benchmarks.gpu_step.recording import ATTENTION

PRODUCTS = {"forward": 2, "backward": 4}  # of attention; what the backward pass computes again does not count


def register_own_kernels() -> None:
    """Says how they are counted."""
    for way, num_products in PRODUCTS.items():
        register_kernel(
            f"short_attention_{way}",
            kind=ATTENTION,
            count_bytes=_attention_bytes,
            count_flops=lambda tensors, num=num_products: _attention_flops(tensors, num),  # type: ignore[misc]
        )
    register_kernel("word_log_p_backward", count_bytes=lambda tensors: size_of(tensors[0]) + sum(map(size_of, tensors)))


def _lengths(tensors: Tensors) -> tuple[Tensor, Tensor]:
    """Returns the lengths of the sequences of the launch's tile, int64 [S], and of all, [B]."""
    offsets_B1, numbers_S = (tensor for tensor in tensors if tensor.dtype == torch.int32)
    lengths_B = offsets_B1.long().diff()
    return lengths_B[numbers_S.long()], lengths_B


def _attention_bytes(tensors: Tensors) -> int:
    """Rows of the tile's sequences, of each tensor that has rows."""
    own_S, lengths_B = _lengths(tensors)
    share = Fraction(int(own_S.sum()), int(lengths_B.sum()))
    return int(share * sum(size_of(tensor) for tensor in tensors if tensor.dtype.is_floating_point))


def _attention_flops(tensors: Tensors, num_products: int) -> int:
    own_S, _ = _lengths(tensors)
    _, _, num_heads, head_size = tensors[0].shape
    return 2 * num_products * int((own_S**2).sum()) * num_heads * head_size
