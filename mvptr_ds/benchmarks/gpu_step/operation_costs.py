"""What one operation costs on a device: its kind, bytes, FLOPs and kernels, from shapes and strides alone.

Bytes are those that must be moved: each tensor that is read counts once, each that is written counts once, and caches
are left out. A gather reads the rows that it takes, a scatter touches the rows that it changes. What an expanded tensor
repeats counts once. Launches are a table of the kernels that torch takes for an operation. It was written from torch's
source, and no trace has confirmed it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from mvptr_ds.benchmarks.gpu_step.recording import ATTENTION, OTHER, PRODUCT

ALIGNED_BYTES = 16  # what a kernel loads at a time; else it takes a slower path

PRODUCTS = {
    "mm", "addmm", "addmm_", "bmm", "baddbmm", "baddbmm_", "mv", "addmv", "dot", "convolution", "convolution_backward",
}  # fmt: skip
# Results that nothing has to be computed for. Views are told by their schema.
FREE = {
    "_unsafe_view", "empty", "empty_like", "empty_strided", "empty_permuted", "new_empty", "new_empty_strided",
    "is_pinned", "resize_", "record_stream", "_fused_sdp_choice", "set_",
}  # fmt: skip
FILLS = {
    "fill_", "zero_", "zeros", "zeros_like", "new_zeros", "ones", "ones_like", "new_ones", "full", "full_like",
    "new_full", "arange", "scalar_tensor", "eye", "linspace", "bernoulli_", "uniform_", "normal_", "random_", "rand",
    "randn", "randint", "rand_like", "randn_like", "randperm",
}  # fmt: skip
GATHERS = {"index_select", "index", "embedding", "gather", "take"}
# Of what they write to, these touch the rows of their last tensor alone: which they replace, or add to.
REPLACING = {"index_copy_", "index_copy", "scatter_", "scatter"}
ADDING = {
    "index_add_", "index_add", "scatter_add_", "scatter_add", "index_put_", "index_put", "_index_put_impl_",
    "scatter_reduce_",
}  # fmt: skip

KERNELS = {
    "logsumexp": 7, "sort": 8, "argsort": 8, "cumsum": 2, "nonzero": 5, "topk": 3, "masked_select": 6, "_unique2": 12,
    "native_layer_norm_backward": 2, "nll_loss_backward": 2, "masked_fill": 2, "index_put": 6, "index_put_": 6,
    "_index_put_impl_": 6, "index_add": 2, "index_copy": 2, "scatter": 2, "scatter_add": 2, "slice_backward": 2,
    "select_backward": 2, "embedding_dense_backward": 6, "linalg_vector_norm": 1, "multinomial": 4, "_foreach_norm": 2,
    "_varlen_attn": 2, "_varlen_attn_backward": 4, "_scaled_dot_product_efficient_attention": 2,
    "_scaled_dot_product_efficient_attention_backward": 4, "_scaled_dot_product_flash_attention": 1,
    "_scaled_dot_product_flash_attention_backward": 3, "convolution_backward": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Cost:
    """What one operation costs; see recording.Operation."""

    kind: str
    bytes: int
    flops: int = 0
    launches: int = 1
    is_odd: bool = False


def cost_of(
    name: str,
    packet: object,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    results: Any,
    read: Sequence[Tensor],
    written: Sequence[Tensor],
) -> Cost:
    """Returns the cost of one operation of ATen or of a library.

    Args:
        name: without namespace and overload, such as `addmm`.
        packet: what torch.utils.flop_counter knows the operation by.
        args, kwargs, results: as the operation gets and gives them.
        read: tensors among them, each once; a tensor that is changed in place stands here and in `written`.
        written: tensors that come out.
    """
    launches = KERNELS.get(name, 1)
    if "attention" in name or "attn" in name:
        return Cost(ATTENTION, moved_bytes(name, read, written), attention_flops(name, args), launches)
    if name in PRODUCTS:
        packet = getattr(torch.ops.aten, name.removesuffix("_"), packet)  # in place it costs the same
        flops = int(flop_registry[packet](*args, **kwargs, out_val=results)) if packet in flop_registry else 0
        if name in ("mv", "addmv", "dot"):
            flops = 2 * max(tensor.numel() for tensor in read)
        is_odd = any(is_odd_matrix(tensor) for tensor in (*read, *written) if tensor.ndim >= 2)
        return Cost(PRODUCT, moved_bytes(name, read, written), flops, launches, is_odd)
    return Cost(OTHER, moved_bytes(name, read, written), launches=launches)


def size_of(tensor: Tensor) -> int:
    """Returns the bytes of a tensor's different elements: a dimension of stride 0 holds one."""
    return tensor.element_size() * prod(
        n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step or not n
    )


def moved_bytes(name: str, read: Sequence[Tensor], written: Sequence[Tensor]) -> int:
    """Returns the bytes that an operation reads and writes."""
    out = sum(map(size_of, written))
    if name in FILLS:
        return out
    if name == "copy_":
        return out + sum(map(size_of, read[1:]))
    if name in GATHERS:
        return 2 * out + sum(map(size_of, read[1:]))
    if name in REPLACING or name in ADDING:
        target, *others = read
        touched = size_of(others[-1]) * (1 if name in REPLACING else 2)
        copied = 0 if name.endswith("_") else 2 * size_of(target)
        return sum(map(size_of, others)) + touched + copied
    return out + sum(map(size_of, read))


def is_odd_matrix(matrix_xMN: Tensor) -> bool:
    """Returns whether the rows of a matrix (or its columns, where those are contiguous) do not begin at 16 bytes."""
    *_, num_rows, num_columns = matrix_xMN.shape
    *_, row_step, column_step = matrix_xMN.stride()
    if num_rows == 1 or num_columns == 1:  # a vector: where it begins is the caller's business
        step = max(num_rows, num_columns)
    else:
        step = row_step if column_step == 1 else column_step if row_step == 1 else num_columns
    return step * matrix_xMN.element_size() % ALIGNED_BYTES != 0


def attention_flops(name: str, args: tuple[Any, ...]) -> int:
    """Returns the FLOPs of attention: two products forward and four backward, over what a kernel compares.

    Of sequences of different lengths each is compared with itself; of padded ones every slot with every slot. What the
    backward pass computes again does not count, as in monitoring/flops.py.
    """
    tensors = [tensor for tensor in args if isinstance(tensor, Tensor)]
    products = 4 if "backward" in name else 2
    first = 1 if "backward" in name else 0  # behind the gradient
    query, key = tensors[first], tensors[first + 1]
    offsets = [tensor for tensor in tensors if tensor.dtype == torch.int32 and tensor.ndim == 1]
    if offsets and query.ndim == 3:  # rows x heads x size of a head
        pairs = int((offsets[0].diff().long() ** 2).sum())
        return 2 * products * pairs * query.shape[1] * query.shape[2]
    return 2 * products * prod(query.shape) * key.shape[-2]
