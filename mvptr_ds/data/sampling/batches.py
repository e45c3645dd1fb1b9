"""Divides the positions of the run into micro-batches of ranks: equally many on all ranks, in every step."""

from __future__ import annotations

import numpy as np


class Batches:
    """Gives step s the positions [s * batch_size, (s + 1) * batch_size); a subclass may choose others.

    The parts of a global batch are contiguous: first the micro-batches, in each of them the shares of the ranks. So the
    samples of a micro-batch, and their order, do not depend on the number of ranks.

    Raises:
        ValueError: the batch size is below 1.
    """

    def __init__(self, batch_size: int) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}, must be at least 1")
        self.batch_size = batch_size

    def of_step(self, step: int) -> np.ndarray:
        """Returns the positions of the global batch, int64 [batch_size]."""
        return np.arange(step * self.batch_size, (step + 1) * self.batch_size, dtype=np.int64)

    def positions(self, step: int, accumulation: int, rank: int, num_ranks: int, accumulation_steps: int) -> np.ndarray:
        """Returns this rank's share of a micro-batch, int64 [batch_size / (num_ranks x accumulation_steps)].

        Raises:
            ValueError: the batch does not divide (the message lists numbers of ranks that fit), or an argument is out
                of range.
        """
        if num_ranks < 1 or accumulation_steps < 1 or self.batch_size % (num_ranks * accumulation_steps):
            raise ValueError(
                f"a batch of {self.batch_size} samples does not divide by {num_ranks} ranks x {accumulation_steps} "
                f"accumulation steps; {self._advice(accumulation_steps)}"
            )
        if step < 0 or not 0 <= accumulation < accumulation_steps or not 0 <= rank < num_ranks:
            raise ValueError(
                f"step {step}, accumulation {accumulation} of {accumulation_steps}, rank {rank} of {num_ranks}: "
                "out of range"
            )
        share = self.batch_size // (num_ranks * accumulation_steps)
        start = (accumulation * num_ranks + rank) * share
        return self.of_step(step)[start : start + share]

    def _advice(self, accumulation_steps: int) -> str:
        if accumulation_steps < 1 or self.batch_size % accumulation_steps:
            return "set train.accumulation_steps to a divisor of train.batch_size"
        micro = self.batch_size // accumulation_steps
        valid = [n for n in range(1, micro + 1) if micro % n == 0]
        listed = ", ".join(map(str, valid[:24])) + (", ..." if len(valid) > 24 else "")
        return f"use {listed} ranks, or change train.batch_size"
