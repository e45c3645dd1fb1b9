"""Prediction heads on top of the encoders' states.

Legend: B samples, D hidden, N picked slots, C classes of a head (word rows or phrases).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RowHead(nn.Module):
    """BERT's masked-word head: linear, erf GELU, LayerNorm, then one logit per class.

    Tied, the decoder is handed in at each call (rows of the embedding table), so that no tensor is shared between
    two names and safetensors, ZeRO and the optimiser each see it once. Untied, the head owns `decoder`.

    Source: REFERENCE, Model (two masked-word heads) and "what we add" (phrase MCR).
    """

    def __init__(self, hidden_size: int, num_classes: int, norm_eps: float, tied: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)
        self.norm = nn.LayerNorm(hidden_size, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.decoder = None if tied else nn.Parameter(torch.zeros(num_classes, hidden_size))

    def forward(self, states_ND: Tensor, tied_CD: Tensor) -> Tensor:
        """[N, D] -> logits [N, C]; `tied_CD` is used when the head has no decoder of its own."""
        hidden_ND = self.norm(F.gelu(self.dense(states_ND)))
        decoder_CD = tied_CD if self.decoder is None else self.decoder
        return F.linear(hidden_ND, decoder_CD, self.bias)


class Pooler(nn.Module):
    """tanh(linear) of slot 0. Source: REFERENCE, Model."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = nn.Linear(hidden_size, hidden_size)

    def forward(self, states_BLD: Tensor) -> Tensor:
        return torch.tanh(self.dense(states_BLD[:, 0]))


def global_state(states_BLD: Tensor, projection_DD: Tensor) -> Tensor:
    """`normalize(slot 0 @ projection)` -> [B, D] of length 1, at least float32 (norms are never half precision)."""
    projected_BD = states_BLD[:, 0] @ projection_DD
    if projected_BD.dtype in (torch.float16, torch.bfloat16):
        projected_BD = projected_BD.float()
    return F.normalize(projected_BD, dim=-1)
