"""What an encoder layer computes by fused kernels, where `kernels.fused` finds them: the formula of encoder.py.

Dropout's numbers are a function of a seed and of a call number (triton_kernels/philox.py). An encoder draws a seed each
time it runs, from torch's own generator of the device: so ranks, micro-batches and encoders differ, a resumed run draws
what an undisturbed one does, and nothing waits for the value. A layer's call numbers follow from its place. So a layer
that a checkpoint computes again drops the same elements.

Legend: N rows of all sequences, D hidden, O outputs of a product.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from . import kernels

_CALLS_OF_A_LAYER = 3
_ATTENTION, _ATTENTION_OUT, _FFN_OUT = range(_CALLS_OF_A_LAYER)


@dataclass(frozen=True)
class Fused:
    """The fused functions, and where their random numbers come from.

    Attributes:
        functions: those of triton_kernels/functions.py.
        seed_1: int64 [1] on the device.
        first_call: of the call numbers of a layer.
    """

    functions: ModuleType
    seed_1: Tensor
    first_call: int = 0

    @classmethod
    def on(cls, rows_ND: Tensor, drops: bool) -> Fused | None:
        """Returns what serves rows of states; None where torch's separate kernels do.

        Args:
            drops: whether numbers are drawn; else the seed has no value.
        """
        functions = kernels.fused_functions(rows_ND.device, rows_ND.dtype)
        if functions is None or rows_ND.shape[1] > kernels.MAX_FUSED_COLUMNS or _is_traced(rows_ND.device):
            return None
        if drops:
            return cls(functions, torch.randint(2**63 - 1, (1,), device=rows_ND.device))
        return cls(functions, torch.empty(1, dtype=torch.int64, device=rows_ND.device))

    def layer(self, number: int) -> Fused:
        """Returns the same with the call numbers of an encoder's layer."""
        return Fused(self.functions, self.seed_1, _CALLS_OF_A_LAYER * number)

    def attention(self, qkv_N3HE: Tensor, tiles: Any, p: float) -> Tensor:
        """Attends within sequences of at most 128 rows, [N, H, E]."""
        out: Tensor = self.functions.short_attention(qkv_N3HE, tiles, self.seed_1, self.first_call + _ATTENTION, p)
        return out

    def after_attention(self, layer: Any, states_ND: Tensor, attended_ND: Tensor) -> Tensor:
        """Computes all of an EncoderLayer that follows attention, [N, D]; biases are added by the kernels."""
        p = layer.dropout.p if layer.training else 0.0
        out_ND = F.linear(attended_ND, layer.attention_out.weight)
        out_bias_D, fed_bias_D = layer.attention_out.bias, layer.ffn_out.bias
        states_ND = self.add_norm(out_ND, out_bias_D, states_ND, layer.attention_norm, p, _ATTENTION_OUT)
        fed_NO, states_ND = linear_beside(states_ND, layer.ffn_in.weight)
        fed_ND = F.linear(self.functions.bias_gelu(fed_NO, layer.ffn_in.bias), layer.ffn_out.weight)
        return self.add_norm(fed_ND, fed_bias_D, states_ND, layer.ffn_norm, p, _FFN_OUT)

    def add_norm(
        self,
        x_ND: Tensor,
        bias_D: Tensor | None,
        residual_ND: Tensor,
        norm: nn.LayerNorm,
        p: float = 0.0,
        call: int = 0,
    ) -> Tensor:
        """Computes `norm(residual + dropout(x + bias))`, [N, D]."""
        out: Tensor = self.functions.dropout_add_norm(
            x_ND, bias_D, residual_ND, norm.weight, norm.bias, self.seed_1, self.first_call + call, p, norm.eps
        )
        return out


def _is_traced(device: torch.device) -> bool:
    """Whether dtypes change on the way, or the kernels would be traced."""
    return torch.is_autocast_enabled(device.type) or torch.compiler.is_compiling()


def linear_beside(states_ND: Tensor, weight_OD: Tensor, bias_O: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Computes `states @ weight.T + bias`, [N, O], and returns the states beside it for the residual.

    The product of the backward pass adds its result to the residual's gradient, which autograd would add by itself.
    """
    out: tuple[Tensor, Tensor] = _LinearBeside.apply(states_ND, weight_OD, bias_O)
    return out


class _LinearBeside(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, states_ND, weight_OD, bias_O):  # type: ignore[no-untyped-def]
        ctx.save_for_backward(states_ND, weight_OD)
        ctx.set_materialize_grads(False)
        return F.linear(states_ND, weight_OD, bias_O), states_ND

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out_NO, to_states_ND):  # type: ignore[no-untyped-def]
        states_ND, weight_OD = ctx.saved_tensors
        if to_out_NO is None:
            return to_states_ND, None, None
        of_states, of_weight, of_bias = ctx.needs_input_grad
        if not of_states:
            to_states_ND = None
        elif to_states_ND is None:
            to_states_ND = to_out_NO @ weight_OD
        else:  # the kernel before has made this tensor, and nothing else reads it
            to_states_ND = to_states_ND.addmm_(to_out_NO, weight_OD)
        to_weight_OD = to_out_NO.t() @ states_ND if of_weight else None
        return to_states_ND, to_weight_OD, to_out_NO.sum(0) if of_bias else None
