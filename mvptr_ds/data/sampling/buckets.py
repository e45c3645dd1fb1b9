"""Draws global batches of samples of about equal lengths, so that little is padding and ranks stay equal.

    positions of 256 batches -> their lengths -> cut in two along the length that saves most padding, again and again,
    to single batches -> batches in drawn order, the samples of each in an order that gives all ranks as much to do

A pure function of (seed, step), like the plan. A position keeps its sample and its draws. Only its step changes, and by
less than the pool. So a resume costs nothing, and any number of ranks sees the same global batches.

Legend: N positions of a pool, B samples of a batch.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import numpy as np

from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.streams import Stream, generator

_MAX_POOLS = 4  # the current one, the one that is read ahead, and the first, which read_ahead.py compares with
# encoders that process a slot of text, a slot of tags, a region: text and cross; visual; visual and cross
ENCODERS_3 = np.array([2, 1, 2])


class BucketedBatches(Batches):
    """Draws global batches out of pools of `pool_batches` consecutive ones.

    Args:
        lengths_at: positions int64 [N] -> slots of text, slots of tags and regions there, [N, 3].

    Raises:
        ValueError: a size is below 1.
    """

    def __init__(
        self, batch_size: int, pool_batches: int, seed: int, lengths_at: Callable[[np.ndarray], np.ndarray]
    ) -> None:
        super().__init__(batch_size)
        if pool_batches < 1:
            raise ValueError(f"pool_batches is {pool_batches}, must be at least 1")
        self.pool_batches, self.seed, self.lengths_at = pool_batches, seed, lengths_at
        self._pools: OrderedDict[int, np.ndarray] = OrderedDict()

    def of_step(self, step: int) -> np.ndarray:
        number, place = divmod(step, self.pool_batches)
        if number not in self._pools:
            self._pools[number] = self._draw(number)
            if len(self._pools) > _MAX_POOLS:
                self._pools.popitem(last=False)
        self._pools.move_to_end(number)
        return self._pools[number][place]

    def _draw(self, number: int) -> np.ndarray:
        """Returns the positions of a pool's batches in their order, int64 [pool_batches, batch_size]."""
        num_positions = self.pool_batches * self.batch_size
        positions = np.arange(number * num_positions, (number + 1) * num_positions, dtype=np.int64)
        lengths_N3 = self.lengths_at(positions)
        costs_N = lengths_N3 @ ENCODERS_3
        batches = [rows[balanced_order(costs_N[rows])] for rows in cut(lengths_N3, self.pool_batches)]
        order = generator(Stream.BUCKETS, self.seed, number).permutation(self.pool_batches)
        return np.stack([positions[batches[place]] for place in order])


def cut(lengths_N3: np.ndarray, num_parts: int) -> list[np.ndarray]:
    """Divides rows into `num_parts` equal parts of similar lengths, by recursive bisection.

    Each cut is along the length that saves most padding.

    Source: measured against a grid of slices per length, whose numbers need tuning to the data.
    """

    def halves(rows: np.ndarray, num: int) -> list[np.ndarray]:
        if num == 1:
            return [rows]
        at = len(rows) // num * (num // 2)
        best, first, second = None, rows[:at], rows[at:]
        for column in range(lengths_N3.shape[1]):
            ordered = rows[np.argsort(lengths_N3[rows, column], kind="stable")]
            slots = sum(len(part) * int(lengths_N3[part].max(0) @ ENCODERS_3) for part in (ordered[:at], ordered[at:]))
            if best is None or slots < best:
                best, first, second = slots, ordered[:at], ordered[at:]
        return [*halves(first, num // 2), *halves(second, num - num // 2)]

    return halves(np.arange(len(lengths_N3)), num_parts)


def balanced_order(costs_B: np.ndarray) -> np.ndarray:
    """Returns an order whose halves, quarters, eighths ... cost nearly the same: the shares of ranks and micro-batches.

    By cost they are dealt out like cards, to and fro: to 2 players 0 1 1 0 0 1 1 0, to 4 players 0 1 3 2 2 3 1 0.
    That is the reflected Gray code, whose last k bits deal to 2^k players. Sorting by its bits from the last to the
    first gives an order that is right for all of them at once. Other numbers of ranks come out nearly as equal.
    """
    numbers = np.arange(len(costs_B))
    gray = numbers ^ (numbers >> 1)
    keys = np.zeros_like(gray)
    for bit in range(max(1, (len(costs_B) - 1).bit_length())):
        keys = (keys << 1) | ((gray >> bit) & 1)
    return np.argsort(costs_B, kind="stable")[np.argsort(keys, kind="stable")]
