"""Torch's random state of a rank, which dropout draws from: at a stage's first step, and in a checkpoint."""

from __future__ import annotations

from pathlib import Path

import torch

from mvptr_ds.distributed import collectives
from mvptr_ds.streams import Stream, seed_sequence


def begin_rng(seed: int) -> None:
    """Sets the random state of this rank for a stage's first step; dropout differs between ranks."""
    torch.manual_seed(seed + 1_000_003 * (1 + collectives.rank()))  # of the GPU too


def seed_rng(seed: int, step: int) -> None:
    """Sets a random state by (seed, step, rank), for a run that resumes on another number of ranks."""
    words = seed_sequence(Stream.NEW_RANKS, seed, step, collectives.rank()).generate_state(2)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def save_rng(checkpoint: Path) -> None:
    """Writes this rank's random state."""
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    torch.save(state, _path(checkpoint))


def restore_rng(checkpoint: Path) -> None:
    """Sets the random state that this rank has saved."""
    saved = torch.load(_path(checkpoint), weights_only=True)
    torch.set_rng_state(saved["cpu"])
    if torch.cuda.is_available() and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"])


def _path(checkpoint: Path) -> Path:
    return checkpoint / f"rng-rank{collectives.rank()}.pt"
