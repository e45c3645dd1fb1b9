"""Several sources in one run: which source stands at each position, and which position of that source.

Worked example: weights 3 and 1, blocks of 8 positions. Every block holds 6 samples of A and 2 of B, in drawn order:

    A A B A A A B A | A B A A A A B A | ...      block 0 takes A's positions 0-5 and B's 0-1, block 1 A's 6-11, ...

Each source has a plan of its own, so its epochs pass at its own speed. It has draws of its own, keyed by its name and
its own positions. So what a source gives does not depend on the other sources.

Legend: N positions.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction

import numpy as np

from mvptr_ds.data.pickling import PicklesWithoutCaches
from mvptr_ds.streams import Stream, generator

MAX_BLOCK_SAMPLES = 1 << 20  # drawn as a whole: 16 MiB and a second
_MAX_BLOCKS = 8


def source_seed(seed: int, name: str) -> int:
    """Returns the seed of everything random about one source of a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


class Mixture(PicklesWithoutCaches):
    """Tells which source stands at each position of the run, and the position within that source.

    Up to the end of every block each source has had its share of the positions to within one sample. Largest remainders
    of the exact sums give that, so errors do not add up. A block whose shares are whole numbers holds exactly these.

    Args:
        weights: weights of the sources, as they are written (0.1 means a tenth).
        block_samples: length of a block, at least `default_block(weights, 1)`, at most MAX_BLOCK_SAMPLES.

    Raises:
        ValueError: a weight is not positive, or blocks are too long, or a source has less than one sample in each.
    """

    _CACHES = ("_blocks",)

    def __init__(self, weights: Sequence[float], block_samples: int, seed: int) -> None:
        self.shares = shares_of(weights)
        self.block_samples = block_samples
        self.seed = seed
        needed = default_block(weights, 1)
        if needed > MAX_BLOCK_SAMPLES:
            raise ValueError(
                f"the weights {', '.join(f'{weight:.12g}' for weight in weights)} need blocks of {Decimal(needed):.8g} "
                f"samples, in which each source has one; more than {MAX_BLOCK_SAMPLES} are refused: bring the weights "
                "nearer to each other"
            )
        if block_samples < needed:
            raise ValueError(
                f"blocks of {block_samples} samples hold less than one of a source whose share is "
                f"{float(min(self.shares)):.2g}; they need {needed} at least"
            )
        if block_samples > MAX_BLOCK_SAMPLES:
            raise ValueError(f"blocks of {block_samples} samples are too long; choose at most {MAX_BLOCK_SAMPLES}")
        self._init_caches()

    def _init_caches(self) -> None:
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def places_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns sources and positions within them, int64 [N] each, at positions int64 [N] of the run."""
        positions = np.asarray(positions, dtype=np.int64)
        numbers, offsets = np.divmod(positions, self.block_samples)
        sources, places = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            block_sources, block_places = self._block(number)
            sources[here], places[here] = block_sources[offsets[here]], block_places[offsets[here]]
        return sources, places

    def taken_before(self, position: int) -> list[int]:
        """Counts the samples of each source at positions below this one."""
        number, offset = divmod(position, self.block_samples)
        part = np.bincount(self._block(number)[0][:offset], minlength=len(self.shares)).tolist()
        return [whole + more for whole, more in zip(self._taken_by_blocks(number), part, strict=True)]

    def _taken_by_blocks(self, num_blocks: int) -> list[int]:
        """Counts the samples of each source in the first blocks, each less than 1 from the exact share.

        The counts never fall from block to block, because each block gives each source at least one whole sample.
        """
        exact = [num_blocks * self.block_samples * share for share in self.shares]
        taken = [math.floor(number) for number in exact]
        by_remainder = sorted(range(len(taken)), key=lambda s: (taken[s] - exact[s], s))
        for source in by_remainder[: num_blocks * self.block_samples - sum(taken)]:
            taken[source] += 1
        return taken

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        if number not in self._blocks:
            first, end = self._taken_by_blocks(number), self._taken_by_blocks(number + 1)
            counts = [e - f for f, e in zip(first, end, strict=True)]
            rng = generator(Stream.MIXTURE, self.seed, number)
            sources = rng.permutation(np.repeat(np.arange(len(counts)), counts))
            places = np.empty_like(sources)
            for source, start in enumerate(first):
                places[sources == source] = np.arange(start, end[source])
            self._blocks[number] = (sources, places)
            if len(self._blocks) > _MAX_BLOCKS:
                self._blocks.popitem(last=False)
        return self._blocks[number]


def shares_of(weights: Sequence[float]) -> list[Fraction]:
    """Returns exact shares that add up to 1. Raises ValueError for a weight that is not a positive number."""
    wrong = [weight for weight in weights if not (weight > 0 and math.isfinite(weight))]
    if wrong or not weights:
        raise ValueError(f"weights are {list(weights)}, expected positive numbers")
    exact = [Fraction(repr(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def default_block(weights: Sequence[float], at_least: int) -> int:
    """Returns the length of the shortest block of `at_least` samples in which every source has one."""
    return max(at_least, math.ceil(1 / min(shares_of(weights))))
