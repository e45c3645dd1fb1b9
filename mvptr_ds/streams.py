"""The streams of random numbers of a run: each purpose has a number, which is the first word of its generators' keys.

A key is (purpose, seed, where in the run), so that nothing has to be saved or replayed, and no two purposes share a
stream. The purpose stands first, because keys that end in zeros are those without them.
"""

from __future__ import annotations

import hashlib
from enum import IntEnum, unique

import numpy as np


@unique
class Stream(IntEnum):
    """What numbers are drawn for. A number in use never changes: a run goes on as it began."""

    ROTATION = 1  # where an epoch's numbering begins
    BLOCKS = 2  # order of an epoch's blocks
    WINDOW = 3  # order within a window of blocks
    MIXTURE = 4  # order of the sources within a block
    BUCKETS = 5  # order of a pool's batches
    SAMPLE = 11  # masking and tag noise of a sample
    SUBSTITUTE = 12  # what stands in for a sample that cannot be read
    STEP = 21  # negatives of a micro-batch
    PERMUTED_REGIONS = 31  # of an evaluation
    NEW_RANKS = 32  # dropout of a run that goes on with another number of ranks
    OTHER_PICTURES = 33  # which other picture a record is shown with


_FIRST_STAGES = ("stage1", "stage2", "joint")


def stage_seed(name: str, run_seed: int) -> int:
    """Returns a stage's seed, from its name: stages of a run differ, and a new one changes no other's numbers.

    The first three keep the seeds that they had when they were counted: checkpoints of then go on as they began.
    """
    if name in _FIRST_STAGES:
        return run_seed * len(_FIRST_STAGES) + _FIRST_STAGES.index(name)
    return int.from_bytes(hashlib.sha256(f"{name} {run_seed}".encode()).digest()[:7], "big")


def seed_sequence(stream: Stream, *key: int) -> np.random.SeedSequence:
    """Returns the numbers that any generator of this stream begins with; `key` holds no negative ones."""
    return np.random.SeedSequence([stream, *key])


def generator(stream: Stream, *key: int) -> np.random.Generator:
    """Returns a generator of its own for one purpose and one place of a run."""
    return np.random.default_rng(seed_sequence(stream, *key))
