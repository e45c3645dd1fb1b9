"""A post-LN BERT encoder: fused QKV, the attention of attention.py, erf GELU.

Legend: N rows of all sequences, x leading dimensions (N, or padded B and L), D hidden, H heads, E size of a head.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from . import kernels
from .attention import Attend, PaddedAttention, SegmentAttention
from .compiled_layers import CompiledLayers
from .fused_layer import Fused, linear_beside
from .gather import pick_rows
from .kernels import LayerNorm, Linear
from .packed import Packed

Execution = Literal["packed", "padded"]


@dataclass(frozen=True)
class EncoderSizes:
    hidden_size: int
    num_heads: int
    intermediate_size: int
    norm_eps: float
    hidden_dropout: float
    attention_dropout: float


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm, as published."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.attention_dropout = sizes.attention_dropout
        self.qkv = Linear(sizes.hidden_size, 3 * sizes.hidden_size)
        self.attention_out = Linear(sizes.hidden_size, sizes.hidden_size)
        self.attention_norm = LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)
        self.ffn_in = Linear(sizes.hidden_size, sizes.intermediate_size)
        self.ffn_out = Linear(sizes.intermediate_size, sizes.hidden_size)
        self.ffn_norm = LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)
        self.dropout = nn.Dropout(sizes.hidden_dropout)

    def forward(
        self, states_xD: Tensor, attend: Attend, needed_K: Tensor | None = None, fused: Fused | None = None
    ) -> Tensor:
        """Computes new states [..., D] from states [..., D]; `attend` knows which belong to one sequence.

        Args:
            needed_K: int64, of [N, D] the rows that are wanted: [N, D] -> [K, D]. Each once, but for those that only
                fill a bucket.
            fused: kernels for [N, D] that take the place of torch's separate ones.
        """
        if fused is None:
            qkv_xX = self.qkv(states_xD)
        else:
            qkv_xX, states_xD = linear_beside(states_xD, self.qkv.weight, self.qkv.bias)
        qkv_x3HE = qkv_xX.unflatten(-1, (3, self.num_heads, -1))
        attended_xD = attend(qkv_x3HE, self.attention_dropout if self.training else 0.0, fused).flatten(-2)
        if needed_K is not None:
            states_xD, attended_xD = _needed(states_xD, needed_K), _needed(attended_xD, needed_K)
        if fused is None:
            return self.after_attention(states_xD, attended_xD)
        return fused.after_attention(self, states_xD, attended_xD)

    def after_attention(self, states_xD: Tensor, attended_xD: Tensor) -> Tensor:
        """Computes all that follows attention, row by row: here by torch's kernels, by fused ones in `Fused`."""
        states_xD = self.attention_norm(states_xD + self.dropout(self.attention_out(attended_xD)))
        fed_xD = self.ffn_out(F.gelu(self.ffn_in(states_xD)))
        return self.ffn_norm(states_xD + self.dropout(fed_xD))


class Encoder(nn.Module):
    """A stack of layers over sequences.

    `execution` is how: `packed`, on the valid positions alone, or `padded` to the longest sequence and with a mask,
    which gives the same states and is what tests compare with.
    """

    def __init__(self, num_layers: int, sizes: EncoderSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(sizes) for _ in range(num_layers))
        self.execution: Execution = "packed"
        self.activation_checkpointing = False
        self._compiled: CompiledLayers | None = None

    def forward(self, packed: Packed, needed_K: Tensor | None = None, num_layers: int | None = None) -> Packed:
        """Rows [N, D] of sequences -> their states, same shape; attention stays within each sequence.

        Args:
            needed_K: int64, the rows whose states are wanted, each once (default: all). The others come back as zeros;
                packed, the last layer does not compute them behind its attention.
            num_layers: how many layers to run (default: all).
        """
        layers = list(self.layers)[:num_layers]
        if self.execution == "padded":
            states_BLD = self._run(layers, packed.padded(), PaddedAttention(packed.mask()))
            states = packed.unpadded(states_BLD)
            if needed_K is None:
                return states
            wanted_N1 = states.rows.new_zeros(len(states.rows), 1).index_fill(0, needed_K, 1.0)
            return states.like(states.rows * wanted_N1)
        states_KD = self._run_packed(layers, packed, needed_K)
        if needed_K is None:
            return packed.like(states_KD)
        return packed.like(states_KD.new_zeros(packed.rows.shape).index_copy_(0, needed_K, states_KD))

    def _drops(self) -> bool:
        """Whether a layer drops anything out."""
        layers = (layer for layer in self.layers if isinstance(layer, EncoderLayer))
        return self.training and any(layer.dropout.p or layer.attention_dropout for layer in layers)

    def _run_packed(self, layers: Sequence[nn.Module], packed: Packed, needed_K: Tensor | None) -> Tensor:
        """The states of the needed rows, [K, D]; rows that only fill a bucket come and go here."""
        rows_ND, index, device = packed.rows, packed.index, packed.rows.device
        num_wanted = len(rows_ND) if needed_K is None else len(needed_K)
        if kernels.fills_buckets(device):
            rows_ND, index = kernels.fill_bucket(rows_ND), index.in_bucket
            if needed_K is not None:  # filled up with row 0, whose states are computed again and dropped
                needed_K = kernels.fill_bucket(needed_K)
        attend = SegmentAttention(index, device)
        if self._compiled is not None:  # in place of fused kernels
            states_MD = self._compiled(layers, rows_ND, attend, needed_K)
        else:
            states_MD = self._run(layers, rows_ND, attend, needed_K, Fused.on(rows_ND, self._drops()))
        return kernels.without_fill(states_MD, num_wanted)

    def _run(
        self,
        layers: Sequence[nn.Module],
        states_xD: Tensor,
        attend: Attend,
        needed_K: Tensor | None = None,
        fused: Fused | None = None,
    ) -> Tensor:
        for number, layer in enumerate(layers):
            own = None if fused is None else fused.layer(number)
            inputs = (states_xD, attend, needed_K if layer is layers[-1] else None, own)
            if self.activation_checkpointing and torch.is_grad_enabled():
                states_xD = checkpoint(layer, *inputs, use_reentrant=False)
            else:
                states_xD = layer(*inputs)
        return states_xD

    def compile_layers(self, backend: str | Callable[..., Any] = "inductor") -> None:
        """Lets packed layers run as one graph of torch.compile from now on; it is made when they first run."""
        self._compiled = CompiledLayers(self._run, backend)


def _needed(rows_ND: Tensor, needed_K: Tensor) -> Tensor:
    """The needed rows. `pick_rows` takes each once: a filled bucket may repeat one, and a graph traces torch's own."""
    if torch.compiler.is_compiling() or kernels.fills_buckets(rows_ND.device):
        return rows_ND.index_select(0, needed_K)
    return pick_rows(rows_ND, needed_K)
