"""The layers of an encoder as one graph of torch.compile: for any number of rows, in sequences of any lengths.

Attention is one operation of the graph. It reads from tensors where sequences begin, so that no length is a constant of
the graph, and a batch of other lengths needs no other graph.

Legend: N rows of all sequences, K rows that are needed, B sequences, L slots of the longest, D hidden, H heads, E size
of a head, I J queries and keys of one sequence.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .attention import _KERNELS, PaddedAttention, SegmentAttention
from .fused_layer import Fused

Run = Callable[..., Tensor]  # layers, states, attention, needed rows or None -> states


class CompiledLayers:
    """Runs layers as one graph. It is made at the first call, and once more where gradients are not wanted.

    Args:
        run: computes the states [N, D] or [K, D] by layers, from states [N, D], attention and needed rows (`Encoder`).
        backend: of torch.compile.
    """

    def __init__(self, run: Run, backend: str | Callable[..., Any] = "inductor") -> None:
        self._run = run
        self._graph = torch.compile(_with_own_code(_run_traced), fullgraph=True, dynamic=True, backend=backend)

    def __call__(
        self, layers: Sequence[Any], states_ND: Tensor, attend: SegmentAttention, needed_K: Tensor | None
    ) -> Tensor:
        """Computes what `run` does. Without any row it runs as it is."""
        if not attend.longest:
            return self._run(layers, states_ND, attend, needed_K)
        device, layer = states_ND.device, layers[0]
        is_cast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if is_cast else states_ND.dtype
        dropout = layer.attention_dropout if layer.training else 0.0
        head_size = states_ND.shape[-1] // layer.num_heads
        kernel = kernels.attention(device, dtype, dropout, head_size).implementation
        arrays = {name: attend.index.on(device, name) for name in ("offsets", "slots", "mask")}
        out: Tensor = self._graph(self._run, layers, states_ND, kernel, arrays, attend.longest, needed_K)
        return out


def _run_traced(
    run: Run,
    layers: Sequence[Any],
    states_ND: Tensor,
    kernel: str,
    arrays: dict[str, Tensor],
    longest: int,
    needed_K: Tensor | None,
) -> Tensor:
    return run(layers, states_ND, _TracedAttention(kernel, arrays, longest), needed_K)


def _with_own_code(function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a copy of a function. torch.compile counts the graphs of a code object, and each encoder has its own."""
    copied = types.FunctionType(function.__code__.replace(), function.__globals__)
    assert copied.__code__ is not function.__code__
    return copied


class _Arrays:
    """What a `SequenceIndex` answers, of arrays that are there."""

    def __init__(self, arrays: dict[str, Tensor]) -> None:
        self.arrays = arrays

    def on(self, device: torch.device, name: str) -> Tensor:
        return self.arrays[name]


class _TracedAttention(SegmentAttention):
    """Attention within a graph, by the kernel that was chosen outside of it."""

    def __init__(self, kernel: str, arrays: dict[str, Tensor], longest: int) -> None:
        self.kernel, self.longest = kernel, longest
        self.index, self.device = _Arrays(arrays), arrays["offsets"].device  # type: ignore[assignment]
        self._masked = PaddedAttention(arrays["mask"])  # at once: torch.compile reads no cached property

    def __call__(self, qkv_N3HE: Tensor, dropout: float, fused: Fused | None = None) -> Tensor:
        assert fused is None
        if self.kernel != kernels.SDPA_EACH:
            return _KERNELS[self.kernel](self, qkv_N3HE, dropout)
        # one number a call: the gradient draws the same mask again, and so does a layer that is recomputed
        seed_1 = torch.randint(2**62, (1,), device=qkv_N3HE.device) if dropout else None
        out: Tensor = attention_of_each(qkv_N3HE, self.offsets, dropout, seed_1)
        return out


# --- attention by a call a sequence, as an operation with a gradient of its own; the name as in kernels.py


@torch.library.custom_op(f"{__name__.replace('.', '_')}::attention_of_each", mutates_args=())
def attention_of_each(qkv_N3HE: Tensor, offsets: Tensor, dropout: float, seed_1: Tensor | None) -> Tensor:
    """Computes attention within each sequence on a CPU, [N, H, E].

    Args:
        offsets: int32 [B + 1], the first row of each sequence, and N.
        seed_1: int64 [1], of the mask of dropout; None without dropout.
    """
    out = [torch.empty_like(qkv_N3HE[:0, 0])]
    for query, key, value, keep_HIJ in _sequences(qkv_N3HE, offsets, dropout, seed_1):
        if keep_HIJ is None:
            found_HIE = F.scaled_dot_product_attention(query, key, value)
        else:
            found_HIE = (_probabilities(query, key) * keep_HIJ) @ value
        out.append(found_HIE.transpose(0, 1))
    return torch.cat(out)


@attention_of_each.register_fake
def _(qkv_N3HE: Tensor, offsets: Tensor, dropout: float, seed_1: Tensor | None) -> Tensor:
    return qkv_N3HE.new_empty(qkv_N3HE.shape[0], *qkv_N3HE.shape[2:])


@torch.library.custom_op(f"{__name__.replace('.', '_')}::attention_of_each_backward", mutates_args=())
def _backward_of_each(
    to_out_NHE: Tensor, qkv_N3HE: Tensor, offsets: Tensor, dropout: float, seed_1: Tensor | None
) -> Tensor:
    to_qkv_N3HE = torch.empty_like(qkv_N3HE, memory_format=torch.contiguous_format)
    start, scale = 0, qkv_N3HE.shape[-1] ** -0.5
    for query, key, value, keep_HIJ in _sequences(qkv_N3HE, offsets, dropout, seed_1):
        rows = slice(start, start + query.shape[1])
        start = rows.stop
        to_out_HIE, p_HIJ = to_out_NHE[rows].transpose(0, 1), _probabilities(query, key)
        to_p_HIJ, kept_HIJ = to_out_HIE @ value.transpose(1, 2), p_HIJ
        if keep_HIJ is not None:
            to_p_HIJ, kept_HIJ = to_p_HIJ * keep_HIJ, p_HIJ * keep_HIJ
        to_score_HIJ = p_HIJ * (to_p_HIJ - (to_p_HIJ * p_HIJ).sum(-1, keepdim=True)) * scale
        to_parts = to_score_HIJ @ key, to_score_HIJ.transpose(1, 2) @ query, kept_HIJ.transpose(1, 2) @ to_out_HIE
        to_qkv_N3HE[rows] = torch.stack(to_parts).permute(2, 0, 1, 3)
    return to_qkv_N3HE


@_backward_of_each.register_fake
def _(to_out_NHE: Tensor, qkv_N3HE: Tensor, offsets: Tensor, dropout: float, seed_1: Tensor | None) -> Tensor:
    return torch.empty_like(qkv_N3HE, memory_format=torch.contiguous_format)


def _setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    qkv_N3HE, offsets, ctx.dropout, seed_1 = inputs
    ctx.save_for_backward(qkv_N3HE, offsets, seed_1)


def _backward(ctx, to_out_NHE: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    qkv_N3HE, offsets, seed_1 = ctx.saved_tensors
    return _backward_of_each(to_out_NHE, qkv_N3HE, offsets, ctx.dropout, seed_1), None, None, None


attention_of_each.register_autograd(_backward, setup_context=_setup)


def _sequences(
    qkv_N3HE: Tensor, offsets: Tensor, dropout: float, seed_1: Tensor | None
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor | None]]:
    """Yields each sequence's queries, keys and values [H, I, E], and by what dropout multiplies probabilities."""
    generator = None if seed_1 is None else torch.Generator().manual_seed(int(seed_1))
    for qkv_L3HE in qkv_N3HE.split(offsets.diff().tolist()):
        query, key, value = qkv_L3HE.permute(1, 2, 0, 3).unbind(0)
        keep_HIJ = None
        if generator is not None:
            shape = (query.shape[0], len(qkv_L3HE), len(qkv_L3HE))
            keep_HIJ = (torch.rand(shape, generator=generator) >= dropout).to(query.dtype) / (1.0 - dropout)
        yield query, key, value, keep_HIJ


def _probabilities(query_HIE: Tensor, key_HIE: Tensor) -> Tensor:
    return (query_HIE @ key_HIE.transpose(1, 2) * query_HIE.shape[-1] ** -0.5).softmax(-1)
