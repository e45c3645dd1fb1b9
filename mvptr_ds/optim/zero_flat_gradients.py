"""The gradients of a single rank under ZeRO 1 and 2, handed to DeepSpeed's step as one flat tensor a group."""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

# what DeepSpeed 0.19.8 calls behind a backward pass, in stage 2 and in stage 1; private, so that constraints.txt pins
# the version and a test compares with what they did
_REDUCTIONS = "overlapping_partition_gradients_reduce_epilogue", "reduce_gradients"


class _FlatGroup(list[Tensor]):
    """Holds the gradients of a group where DeepSpeed expects a list of them; `step` then takes the flat tensor."""

    def __init__(self, flat_partition: Tensor) -> None:
        super().__init__([flat_partition])
        self.flat_partition = flat_partition


def flatten_gradients_of_one_rank(optimizer: Any) -> None:
    """Spares a single rank the reduction of its gradients, which has no other to reduce with.

    DeepSpeed copies each gradient into a bucket and out of it again, by a hook of every parameter: two kernels a
    parameter, and a call into Python in the middle of the backward pass. Here the hooks go. Autograd adds up the
    micro-batches' gradients where it leaves them, and behind the last one each group's become one flat tensor.
    The sums are those of DeepSpeed, to the bit.

    Several ranks, stage 3, offloading, and settings that round the gradients on their way stay as they are.
    """
    if not _is_spared(optimizer):
        return
    for hook in optimizer._grad_acc_hooks:
        hook.remove()
    optimizer._grad_acc_hooks.clear()

    def reduce(**_: Any) -> None:
        if optimizer.is_gradient_accumulation_boundary():
            for number, parameters in enumerate(optimizer.bit16_groups):
                size = int(optimizer.partition_size[number])
                optimizer.averaged_gradients[number] = _FlatGroup(_take_flat(parameters, size))

    for name in _REDUCTIONS:
        setattr(optimizer, name, reduce)


def _is_spared(optimizer: Any) -> bool:
    """Whether DeepSpeed's reduction would change no bit, and leave the parameters in the order of their group."""
    return (
        isinstance(optimizer, DeepSpeedZeroOptimizer)
        and comm.get_world_size(group=optimizer.dp_process_group) == 1
        and not optimizer.cpu_offload
        and optimizer.dtype == optimizer.communication_data_type == optimizer.gradient_accumulation_dtype
        and not optimizer.round_robin_gradients
        and not optimizer.parameter_alignment
        and not optimizer.has_moe_layers
    )


def _take_flat(parameters: list[Tensor], size: int) -> Tensor:
    """Moves the gradients into one tensor of `size` elements, zeros behind them; a missing one counts as zeros."""
    parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    rest = size - sum(part.numel() for part in parts)
    if rest:
        parts.append(parts[0].new_zeros(rest))
    flat = torch.cat([part.reshape(-1) for part in parts])
    for parameter in parameters:
        parameter.grad = None  # the memory is free before the next group is taken
    return flat
