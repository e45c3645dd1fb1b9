"""The norm of the gradients under ZeRO 1 and 2, in few kernels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

# of DeepSpeed 0.19.8; private, so that constraints.txt pins the version and a test compares with what they did
_OVERFLOW_CHECK, _NORM = "check_overflow", "get_grad_norm_direct"


def patch_zero_grad_norm(optimizer: Any) -> None:
    """Lets DeepSpeed's ZeRO 1 and 2 find the norm of all gradients at once, and a bad one by it alone.

    DeepSpeed looks at every tensor's gradient for NaN and infinities by a dozen kernels, then takes its norm by three
    more, and skips the step for either. A norm is not finite where a gradient is not: the first look is left out, and
    the norms come from one multi-tensor kernel. Other optimisers (stage 3, offloading) stay as they are.

    Source: measured on one H200, `docs/measurements/gpu.md`: 1,300 of the 2,900 kernels of a small model's step.
    """
    if not isinstance(optimizer, DeepSpeedZeroOptimizer) or optimizer.cpu_offload or not optimizer.compute_grad_norm:
        return

    def norm(gradients: Iterable[Tensor], params: Any, norm_type: float = 2) -> Tensor:
        total = norm_over_ranks(optimizer, gradients)
        return torch.where(total.isfinite(), total, -1.0)  # what DeepSpeed takes for a step to be skipped

    setattr(optimizer, _OVERFLOW_CHECK, lambda partition_gradients=True: None)
    setattr(optimizer, _NORM, norm)


def norm_over_ranks(optimizer: DeepSpeedZeroOptimizer, gradients: Iterable[Tensor]) -> Tensor:
    """Returns the norm of the gradients that all ranks hold parts of, float32; each rank gives its own parts."""
    own = [g.detach() for g in gradients if not getattr(g, "_zero_padding", False)]
    squares = torch.zeros((), dtype=torch.float64, device=optimizer.device)
    if own:
        squares = torch.stack(torch._foreach_norm(own, 2, dtype=torch.float64)).square().sum()
    total = squares.float()
    if comm.get_world_size(group=optimizer.dp_process_group) > 1:
        comm.all_reduce(total, group=optimizer.dp_process_group)
    return total.sqrt()
