"""A post-LN BERT encoder: fused QKV, scaled_dot_product_attention with a boolean mask, erf GELU.

Legend: B samples, L slots, D hidden, H heads, K size of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class EncoderSizes:
    hidden_size: int
    num_heads: int
    intermediate_size: int
    norm_eps: float
    hidden_dropout: float
    attention_dropout: float


class EncoderLayer(nn.Module):
    """Self-attention and feed-forward, each followed by dropout, residual and LayerNorm. Source: REFERENCE, Model."""

    def __init__(self, sizes: EncoderSizes) -> None:
        super().__init__()
        self.num_heads = sizes.num_heads
        self.attention_dropout = sizes.attention_dropout
        self.qkv = nn.Linear(sizes.hidden_size, 3 * sizes.hidden_size)
        self.attention_out = nn.Linear(sizes.hidden_size, sizes.hidden_size)
        self.attention_norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)
        self.ffn_in = nn.Linear(sizes.hidden_size, sizes.intermediate_size)
        self.ffn_out = nn.Linear(sizes.intermediate_size, sizes.hidden_size)
        self.ffn_norm = nn.LayerNorm(sizes.hidden_size, eps=sizes.norm_eps)
        self.dropout = nn.Dropout(sizes.hidden_dropout)

    def forward(self, states_BLD: Tensor, mask_B11L: Tensor) -> Tensor:
        attended_BLD = self.attention_out(self._attend(states_BLD, mask_B11L))
        states_BLD = self.attention_norm(states_BLD + self.dropout(attended_BLD))
        fed_BLD = self.ffn_out(F.gelu(self.ffn_in(states_BLD)))
        return self.ffn_norm(states_BLD + self.dropout(fed_BLD))

    def _attend(self, states_BLD: Tensor, mask_B11L: Tensor) -> Tensor:
        qkv_BL3HK = self.qkv(states_BLD).unflatten(-1, (3, self.num_heads, -1))
        query_BHLK, key_BHLK, value_BHLK = qkv_BL3HK.permute(2, 0, 3, 1, 4).unbind(0)
        dropout = self.attention_dropout if self.training else 0.0
        out_BHLK = F.scaled_dot_product_attention(
            query_BHLK, key_BHLK, value_BHLK, attn_mask=mask_B11L, dropout_p=dropout
        )
        return out_BHLK.transpose(1, 2).flatten(2)


class Encoder(nn.Module):
    """A stack of layers over padded sequences."""

    def __init__(self, num_layers: int, sizes: EncoderSizes) -> None:
        super().__init__()
        self.layers = nn.ModuleList(EncoderLayer(sizes) for _ in range(num_layers))

    def forward(self, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] and the bool mask of real slots [B, L] -> [B, L, D].

        Padding is never attended to; what stands in padded slots afterwards is finite and means nothing.
        """
        mask_BL = mask_BL.bool()
        # A sample without any real slot would have nothing to attend to: some kernels answer NaN, so let it see itself.
        mask_BL = mask_BL | ~mask_BL.any(dim=1, keepdim=True)
        mask_B11L = mask_BL[:, None, None, :]
        for layer in self.layers:
            states_BLD = layer(states_BLD, mask_B11L)
        return states_BLD
