"""Several sources in one run: which source stands at each position, and which position of that source.

Worked example: weights 3 and 1, blocks of 8 positions. Every block holds 6 samples of A and 2 of B, in drawn order:

    A A B A A A B A | A B A A A A B A | ...      block 0 takes A's positions 0-5 and B's 0-1, block 1 A's 6-11, ...

Each source has a plan of its own, so its epochs pass at its own speed, and draws of its own, keyed by its name and its
own positions: what a source gives does not depend on the sources beside it.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np

from mvptr_ds.data.collate import Sample
from mvptr_ds.data.loader import SampleDataset, ShardDataset
from mvptr_ds.data.shards.index import ByteRange
from mvptr_ds.streams import Stream, generator

MAX_BLOCK_SAMPLES = 1 << 20  # drawn as a whole: 16 MiB and a second
_MAX_BLOCKS = 8


def source_seed(seed: int, name: str) -> int:
    """Seed of everything random about one source of a run."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {name}".encode(), digest_size=8).digest(), "little")


class Mixture:
    """A pure function of (seed, position): the source there, and the position within that source.

    Up to the end of every block each source has had its share of the positions to within one sample (largest
    remainders of the exact sums, so nothing adds up); a block whose shares are whole numbers holds exactly these.

    Args:
        weights: of the sources, as they are written (0.1 means a tenth).
        block_samples: length of a block, at least `default_block(weights, 1)`, at most MAX_BLOCK_SAMPLES.

    Raises ValueError for a weight that is not positive, or blocks in which a source has less than one sample, or which
    are too long.
    """

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
        self._forget()

    def _forget(self) -> None:
        self._blocks: OrderedDict[int, tuple[np.ndarray, np.ndarray]] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_blocks"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget()

    def places_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Sources and positions within them, int64 [N] each, at positions int64 [N] of the run."""
        positions = np.asarray(positions, dtype=np.int64)
        numbers, offsets = np.divmod(positions, self.block_samples)
        sources, places = np.empty_like(positions), np.empty_like(positions)
        for number in np.unique(numbers).tolist():
            here = numbers == number
            block_sources, block_places = self._block(number)
            sources[here], places[here] = block_sources[offsets[here]], block_places[offsets[here]]
        return sources, places

    def taken_before(self, position: int) -> list[int]:
        """How many samples of each source stand at positions below this one."""
        number, offset = divmod(position, self.block_samples)
        part = np.bincount(self._block(number)[0][:offset], minlength=len(self.shares)).tolist()
        return [whole + more for whole, more in zip(self._taken_by_blocks(number), part, strict=True)]

    def _taken_by_blocks(self, num_blocks: int) -> list[int]:
        """Samples of each source in the first blocks: whole numbers that are less than 1 from the exact ones.

        They never fall from block to block, because each source has at least one whole sample more.
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
    """Exact shares that add up to 1. Raises ValueError for a weight that is not a positive number."""
    wrong = [weight for weight in weights if not (weight > 0 and math.isfinite(weight))]
    if wrong or not weights:
        raise ValueError(f"weights are {list(weights)}, expected positive numbers")
    exact = [Fraction(repr(weight)) for weight in weights]
    return [weight / sum(exact) for weight in exact]


def default_block(weights: Sequence[float], at_least: int) -> int:
    """The shortest block of `at_least` samples in which every source has one."""
    return max(at_least, math.ceil(1 / min(shares_of(weights))))


def differences(there: str | Mapping[str, str], here: str | Mapping[str, str]) -> list[str]:
    """Between the fingerprints of two datasets, one of which is a mixture; a line each."""
    first, second = ({"data.train": data} if isinstance(data, str) else data for data in (there, here))
    return [
        f"{name}: {first.get(name, 'none')} there, {second.get(name, 'none')} here"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]


class MixedDataset(SampleDataset):
    """Sample at a position of a run over several sources. Picklable; each process opens its own files.

    A sample that cannot be read is replaced by another of its source. Images of different sources are different ones.

    Args:
        sources: by name; the plan of each is keyed by `source_seed`.
    """

    def __init__(self, sources: Mapping[str, ShardDataset], mixture: Mixture) -> None:
        assert len(sources) == len(mixture.shares)
        self.names = list(sources)
        self._sources = list(sources.values())
        self.mixture = mixture
        num_records = [source.index.num_records for source in self.sources]
        self._first_images = np.cumsum([0, *num_records[:-1]]).tolist()

    @property
    def sources(self) -> list[ShardDataset]:
        return self._sources

    @property
    def num_samples(self) -> int:
        return sum(source.num_samples for source in self.sources)

    @property
    def fingerprint(self) -> dict[str, str]:
        shares = {
            name: f"share {share}, samples {source.fingerprint[:16]}"
            for name, share, source in zip(self.names, self.mixture.shares, self.sources, strict=True)
        }
        return {**shares, "mixture_block_samples": str(self.mixture.block_samples)}

    def epochs_before(self, position: int) -> dict[str, float]:
        taken = self.mixture.taken_before(position)
        return {
            name: number / source.num_samples
            for name, number, source in zip(self.names, taken, self.sources, strict=True)
        }

    @property
    def read_ahead_bytes(self) -> int:
        return max(source.read_ahead_bytes for source in self.sources)

    def remote_extents(self, positions: list[int]) -> list[ByteRange]:
        sources_N, places_N = self.mixture.places_at(np.array(positions, dtype=np.int64))
        return [
            extent
            for number, source in enumerate(self.sources)
            for extent in source.remote_extents(places_N[sources_N == number].tolist())
        ]

    def numbers_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        sources_N, places_N = self.mixture.places_at(positions)
        numbers_N = np.empty_like(places_N)
        for number, source in enumerate(self.sources):
            own_N = sources_N == number
            numbers_N[own_N] = source.plan.samples_at(places_N[own_N])[1]
        return sources_N, numbers_N

    def __getitem__(self, position: int) -> Sample:
        return self.__getitems__([position])[0]

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        sources_N, places_N = self.mixture.places_at(np.array(positions, dtype=np.int64))
        out: dict[int, Sample] = {}
        for number, source in enumerate(self.sources):
            own_N = np.flatnonzero(sources_N == number)
            for place, sample in zip(own_N.tolist(), source.__getitems__(places_N[own_N].tolist()), strict=True):
                out[place] = replace(
                    sample,
                    position=positions[place],
                    source=number,
                    image_index=self._first_images[number] + sample.image_index,
                )
        return [out[place] for place in range(len(positions))]
