"""States of a checkpoint for tests that need no trainer."""

from __future__ import annotations

from typing import Any

from mvptr_ds.checkpoints.state import CheckpointState


def state_at(step: int, **changes: Any) -> CheckpointState:
    """The state of a small stage 1 on one rank at this step, with other values where they are given."""
    values: dict[str, Any] = {"num_ranks": 1, "stage": "stage1", "batch_size": 8, "data": "f00d", "trained_parts": []}
    return CheckpointState(step=step, **(values | changes))
