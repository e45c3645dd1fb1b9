"""How the samples of a step are divided: batch size = ranks x accumulation steps x micro-batch."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace

from mvptr_ds.config import TrainConfig
from mvptr_ds.errors import CheckpointError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class BatchSplit:
    """The samples of a step and what divides them."""

    batch_size: int  # of a step, on all ranks together
    num_ranks: int
    accumulation_steps: int

    @property
    def micro_batch_size(self) -> int:
        """Samples of one forward pass on one rank."""
        return self.batch_size // (self.num_ranks * self.accumulation_steps)


def micro_batch_size(train: TrainConfig, num_ranks: int) -> int:
    """Samples of one forward pass on one rank.

    Raises:
        ValueError: the batch does not divide, with numbers that would.
    """
    batch, accumulation = train.batch_size, train.accumulation_steps
    if batch < 1 or accumulation < 1:
        raise ValueError(f"train.batch_size is {batch}, train.accumulation_steps {accumulation}; both are at least 1")
    if batch % (num_ranks * accumulation):
        valid = [n for n in range(1, min(batch, 4096) + 1) if batch % (n * accumulation) == 0]
        unit = num_ranks * accumulation
        raise ValueError(
            f"train.batch_size={batch} cannot be shared by {num_ranks} ranks x {accumulation} accumulation steps; "
            f"use {', '.join(map(str, valid[-8:])) or 'no'} ranks, or a batch of {batch // unit * unit or unit} or "
            f"{(batch // unit + 1) * unit}"
        )
    return batch // (num_ranks * accumulation)


def rounded_batch_size(train: TrainConfig, num_ranks: int) -> int:
    """Returns the multiple of ranks x accumulation steps that is nearest to `train.batch_size`."""
    unit = num_ranks * train.accumulation_steps
    return max(1, round(train.batch_size / unit)) * unit


def fit_batch_to_ranks(train: TrainConfig, saved: BatchSplit | None, num_ranks: int) -> TrainConfig:
    """Returns `train` with the batch size and steps that fit so many ranks. A resumed run keeps its batch size.

    Where ranks x accumulation steps do not divide it, the accumulation steps change, so that the micro-batch of a rank
    is at most what it was.

    Args:
        saved: of the checkpoint that the run resumes from, None for a fresh run.

    Raises:
        CheckpointError: so many ranks cannot share the batch, with the numbers that can.
    """
    if train.round_batch_size:  # only a fresh run rounds; a resumed one may be on another number of ranks
        train = replace(train, batch_size=rounded_batch_size(train, num_ranks) if saved is None else saved.batch_size)
    if saved is None or saved.batch_size != train.batch_size:
        return train
    if train.batch_size % num_ranks:
        valid = [n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
        listed = ", ".join(map(str, valid[:24])) + (", ..." if len(valid) > 24 else "")
        raise CheckpointError(
            f"the run was begun with {train.batch_size} samples a step, which {num_ranks} ranks cannot share: go on "
            f"with {listed} ranks, or start elsewhere with run.dir=... run.init_from=..."
        )
    share = train.batch_size // num_ranks
    if share % train.accumulation_steps:
        fitting = (a for a in range(1, share + 1) if share % a == 0 and share // a <= saved.micro_batch_size)
        given, train = train.accumulation_steps, replace(train, accumulation_steps=next(fitting))
        logger.info("train.accumulation_steps=%d instead of %d", train.accumulation_steps, given)
    now = BatchSplit(train.batch_size, num_ranks, train.accumulation_steps)
    if now != saved:
        logger.info(
            "%d samples a step as before: %d ranks x %d accumulation steps x %d samples (before: %d x %d x %d); "
            "negatives come from %d samples (before: %d)",
            now.batch_size, now.num_ranks, now.accumulation_steps, now.micro_batch_size,
            saved.num_ranks, saved.accumulation_steps, saved.micro_batch_size,
            now.micro_batch_size * now.num_ranks, saved.micro_batch_size * saved.num_ranks,
        )  # fmt: skip
    return train
