"""Counts the bytes that a rank holds: what DeepSpeed keeps of a model, and what encoders keep for the backward pass.

States follow DeepSpeed's own layout (runtime/zero/stage_1_and_2.py of the version in constraints.txt). The trained
parameters of an optimiser group lie in one flat buffer, padded to twice the number of ranks. Each rank owns an equal
part of it, with float32 master weights and Adam's two moments. It also holds the gradients of all parameters that reach
into its part.

Legend: D hidden, F feed-forward.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvptr_ds.ds_config import zero_stage_of
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.objectives.lengths import Lengths

FLOAT32 = 4
MASTER_AND_MOMENTS = 3 * FLOAT32
ALIGNMENT = 2  # times the ranks: the length of a flat buffer is a multiple of it
DEFAULTS = {"reduce_bucket_size": 5e8, "stage3_param_persistence_threshold": 1e5}


@dataclass(frozen=True)
class Zero:
    """Holds the DeepSpeed JSON's settings that affect memory, after `fill_ds_config`."""

    stage: int
    reduce_bucket_size: int  # elements
    overlap_comm: bool
    contiguous_gradients: bool
    offload_optimizer: bool
    persistence_threshold: int  # stage 3: smaller parameters are kept whole

    @classmethod
    def of(cls, content: dict[str, Any]) -> Zero:
        zero, stage = content["zero_optimization"], zero_stage_of(content)
        return cls(
            stage=stage,
            reduce_bucket_size=int(zero.get("reduce_bucket_size", DEFAULTS["reduce_bucket_size"])),
            overlap_comm=bool(zero.get("overlap_comm", stage == 3)),
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            offload_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
            persistence_threshold=int(
                zero.get("stage3_param_persistence_threshold", DEFAULTS["stage3_param_persistence_threshold"])
            ),
        )


@dataclass(frozen=True)
class StateBytes:
    """Counts the bytes of states on one rank's device, between the backward pass and the optimiser's step."""

    parameters: int
    gradients: int
    optimizer: int  # float32 master weights and both moments
    on_host: int  # what offloading moves to the host's memory
    all_gradients: int  # end of the backward pass: until then stage 1 holds the gradients of every parameter
    buckets: int  # DeepSpeed's buffers for gradients in transit, during the backward pass
    step: int  # float32 copy of the rank's gradients and what it is made of, during the optimiser's step

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer


def state_bytes(
    groups: Sequence[Sequence[int]], frozen: int, element_bytes: int, zero: Zero, num_ranks: int, rank: int
) -> StateBytes:
    """Returns the bytes that a rank keeps of the weights.

    Args:
        groups: number of elements of each trained parameter, by optimiser group, in the optimiser's order.
        frozen: number of elements that are not trained.
        element_bytes: bytes of a weight and of its gradient: 2 for bf16 and fp16, 4 for float32.
    """
    parameters = frozen * element_bytes
    gradients = optimizer = largest = 0
    for group in groups:
        total = sum(group)
        unit = ALIGNMENT * num_ranks
        part = -(-total // unit) * ALIGNMENT
        largest = max(largest, part)
        optimizer += part * MASTER_AND_MOMENTS
        if zero.stage == 3:
            whole = sum(n for n in group if n <= zero.persistence_threshold)
            parameters += (part + whole) * element_bytes
            gradients += part * element_bytes
        else:
            parameters += part * num_ranks * element_bytes
            gradients += _reaching_into(group, rank * part, (rank + 1) * part) * element_bytes
    # a single rank has no buckets, and its gradients are flat already (optim/zero_flat_gradients.py)
    spared = num_ranks == 1 and zero.stage < 3 and not zero.offload_optimizer
    bucketed = zero.contiguous_gradients and zero.stage < 3 and not spared
    buffers = (2 if zero.overlap_comm else 1) if bucketed else 0
    return StateBytes(
        parameters=parameters,
        gradients=gradients,
        all_gradients=sum(map(sum, groups)) * element_bytes if zero.stage < 2 else gradients,
        optimizer=0 if zero.offload_optimizer else optimizer,
        step=0 if zero.offload_optimizer else largest * (FLOAT32 if spared else FLOAT32 + element_bytes),
        on_host=optimizer if zero.offload_optimizer else 0,
        buckets=buffers * zero.reduce_bucket_size * element_bytes,
    )


def _reaching_into(group: Sequence[int], first: int, stop: int) -> int:
    """Returns the elements of all parameters that reach into the part first..stop, which are kept whole."""
    kept = start = 0
    for num in group:
        if start < stop and start + num > first:
            kept += num
        start += num
    return kept


def largest_state_bytes(
    groups: Sequence[Sequence[int]], frozen: int, element_bytes: int, zero: Zero, num_ranks: int
) -> StateBytes:
    """Returns the bytes of the rank that keeps most."""
    every = (state_bytes(groups, frozen, element_bytes, zero, num_ranks, rank) for rank in range(num_ranks))
    return max(every, key=lambda held: held.total)


def activation_bytes(
    lengths: Lengths,
    model: MvptrConfig,
    parts: frozenset[str],
    num_cross_calls: int,
    read: Mapping[str, float],
    element_bytes: int,
    checkpointing: bool,
    num_groundings: int = 0,
    mask_bytes: int = 1,
) -> int:
    """Returns the bytes that the encoders keep for the backward pass of a micro-batch of these lengths.

    A position of a layer keeps 9 D + 2 F elements. The first five are its input, query, key, value and the output of
    attention's kernel. The others are attention's joined output, the input and output of the first norm, both sides of
    GELU and the input of the second norm. In the last layer, only the rows of `read` (flops.rows_read) keep these.
    Dropout keeps `mask_bytes` for each element that it decides on: a bool on CUDA, an element of the states on a CPU.
    With activation checkpointing a layer keeps its input alone, and one layer at a time keeps the rest.

    Each of `num_groundings` compares phrases with an image's regions. It keeps the normalised states in float32, and in
    half precision their float32 copy.
    """
    dim, ffn = model.hidden_size, model.intermediate_size
    dropped = dim * mask_bytes if model.hidden_dropout else 0  # bytes of one dropout's mask
    before = 5 * dim * element_bytes + model.num_attention_heads * FLOAT32
    after = (4 * dim + 2 * ffn) * element_bytes + 2 * dropped + 4 * FLOAT32
    stacks = {
        "text": (model.num_text_layers, lengths.text),
        "visual": (model.num_visual_layers, lengths.visual),
        "cross": (model.num_cross_layers, num_cross_calls * lengths.cross),
    }
    used = {name: stack for name, stack in stacks.items() if name in parts}
    layers = sum(num * positions for num, positions in used.values())
    unread = sum(positions - read[name] for name, (_, positions) in used.items())
    embedded = lengths.text + lengths.visual - lengths.regions
    embeddings = embedded * (dim * element_bytes + dropped) + lengths.regions * (
        (model.region_feature_dim + 6) * element_bytes + dropped
    )
    copies = 2 if element_bytes < FLOAT32 else 1
    grounding = num_groundings * copies * (lengths.text + lengths.regions) * dim * FLOAT32
    if not checkpointing:
        return int(layers * (before + after) - unread * after + embeddings + grounding)
    at_once = max(positions for _, positions in used.values()) * (before + after)
    return int(layers * dim * element_bytes + at_once + embeddings + grounding)
