"""Prediction heads on top of the encoders' states.

Legend: B samples, D hidden, K picked rows, C classes of a head (word rows or phrases), A asked classes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import kernels
from .packed import Packed
from .picked_classes import log_p_of_pairs, nll


class RowHead(nn.Module):
    """BERT's masked-word head: linear, erf GELU, LayerNorm, then one logit per class.

    Tied, the decoder is handed in at each call (rows of the embedding table), so that no tensor is shared between
    two names and safetensors, ZeRO and the optimiser each see it once. Untied, the head owns `decoder`.

    Source: the published code, Model (two masked-word heads) and ours (phrase MCR).
    """

    def __init__(self, hidden_size: int, num_classes: int, norm_eps: float, tied: bool) -> None:
        super().__init__()
        self.dense = kernels.Linear(hidden_size, hidden_size)
        self.norm = kernels.LayerNorm(hidden_size, eps=norm_eps)
        self.bias = nn.Parameter(torch.zeros(num_classes))
        self.decoder = None if tied else nn.Parameter(torch.zeros(num_classes, hidden_size))

    def forward(
        self, states_KD: Tensor, tied_CD: Tensor, score: Callable[..., Tensor] = kernels.linear, *asked: Tensor
    ) -> Tensor:
        """Returns the logits [K, C] of [K, D], or what another `score` makes of hidden states, decoder and bias.

        Args:
            tied_CD: used when the head has no decoder of its own. For the scores of picked_classes.py it may have more
                rows than there are classes.
        """
        hidden_KD = self.norm(F.gelu(self.dense(states_KD)))
        return score(hidden_KD, tied_CD if self.decoder is None else self.decoder, self.bias, *asked)

    def nll(self, states_KD: Tensor, labels_K: Tensor, tied_CD: Tensor) -> Tensor:
        """Returns the cross entropy of each row's label (int64 [K]), at least float32 [K]."""
        out: Tensor = self(states_KD, tied_CD, nll, labels_K)
        return out

    def log_p_of_pairs(self, states_KD: Tensor, rows_P: Tensor, classes_P: Tensor, tied_CD: Tensor) -> Tensor:
        """Returns log probabilities of picked classes at picked rows (int64 [P] each), at least float32 [P]."""
        out: Tensor = self(states_KD, tied_CD, log_p_of_pairs, rows_P, classes_P)
        return out


class Pooler(nn.Module):
    """tanh(linear) of slot 0. Source: the published code, Model."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.dense = kernels.Linear(hidden_size, hidden_size)

    def forward(self, states: Packed) -> Tensor:
        return torch.tanh(self.dense(states.firsts()))


def global_state(states: Packed, projection_DD: Tensor) -> Tensor:
    """Returns slot 0 times the projection, scaled to length 1: [B, D], at least float32 (no norm is half precision)."""
    projected_BD = states.firsts() @ projection_DD
    if projected_BD.dtype in (torch.float16, torch.bfloat16):
        projected_BD = projected_BD.float()
    return F.normalize(projected_BD, dim=-1)
