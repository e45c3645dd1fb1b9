"""DeepSpeed's step under ZeRO 1 and 2 without a wait for the device: clipping and skipping inside AdamW's kernel."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from mvptr_ds.optim.zero_grad_norm import norm_over_ranks

# of DeepSpeed 0.19.8; partly private, so that constraints.txt pins the version and a test compares with what it did
_STEP, _CLIP, _POINT_WEIGHTS = "step", "unscale_and_clip_grads", "_update_model_bit16_weights"
_EPS = 1e-6  # what DeepSpeed adds to a norm before it clips


def step_without_waiting(optimizer: Any) -> bool:
    """Lets DeepSpeed's ZeRO 1 and 2 step without knowing on the host whether the gradients are finite.

    DeepSpeed reads the norm on the host, three times a step: to skip the step where it is not finite, and to clip.
    torch's fused AdamW reads both from the device: `grad_scale` divides the gradient, and `found_inf` leaves weights,
    moments and the count of updates as they are. So the host runs ahead of the device, and learns of a skipped step
    from `found_inf` when it likes. The norm of all groups is one exchange between the ranks instead of one a group.

    Other optimisers (apex, LAMB), fp16 with its loss scale, stage 3 and offloading stay as they are.

    Returns:
        Whether it is so: `skip_flag` then tells of the last step.
    """
    if not _can_skip_on_device(optimizer):
        return False
    adamw, waiting_step = optimizer.optimizer, optimizer.step

    def step(closure: Any = None) -> None:
        held = optimizer.averaged_gradients
        norm = norm_over_ranks(optimizer, (gradient for number in sorted(held) for gradient in held[number]))
        bad = (norm - norm).isnan()  # true of NaN and of infinity, in two kernels; isfinite takes four
        adamw.found_inf = bad.float()
        adamw.grad_scale = _clipping_divisor(norm, optimizer.clip_grad) if optimizer.clip_grad > 0 else None
        # told that there is no norm, DeepSpeed's own step looks at none; where it loads a checkpoint there must be one
        optimizer.check_grad_overflow = optimizer.compute_grad_norm = False
        waiting_step()
        optimizer.compute_grad_norm = True
        optimizer._global_grad_norm = torch.where(bad, torch.inf, norm)  # DeepSpeed's engine reports it

    setattr(optimizer, _STEP, step)
    setattr(optimizer, _CLIP, lambda gradients, norm: None)
    # each step ends by pointing every parameter at the part of the flat buffer that it points at anyway
    setattr(optimizer, _POINT_WEIGHTS, lambda group: None)
    return True


def skip_flag(optimizer: Any) -> Tensor:
    """Returns 1.0 where the last step was skipped, on all ranks alike, else 0.0: one element on the device."""
    flag: Tensor = optimizer.optimizer.found_inf
    return flag


def _can_skip_on_device(optimizer: Any) -> bool:
    return (
        isinstance(optimizer, DeepSpeedZeroOptimizer)
        and not optimizer.cpu_offload
        and optimizer.compute_grad_norm
        and optimizer.dtype != torch.float16
        and optimizer.torch_autocast_gradscaler is None
        and type(optimizer.optimizer) is torch.optim.AdamW
        and bool(optimizer.optimizer.defaults["fused"])
    )


def _clipping_divisor(norm: Tensor, clip_norm: float) -> Tensor:
    """Returns what the gradient is divided by: 1 below the norm that is allowed. Source: DeepSpeed's own clipping."""
    return ((norm + _EPS) / clip_norm).clamp(min=1.0)
