"""Positions of a run -> samples: of one folder of shards (`ShardDataset`), or of several sources (`MixedDataset`).

Everything random about a sample comes from a generator keyed by (seed, epoch, position). So the number of ranks and of
workers changes nothing, and a resume asks for later positions and nothing else.
"""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace

import numpy as np
from torch.utils.data import Dataset

from mvptr_ds.data.collate import BadSample, Sample
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.sampling.mixture import Mixture
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import ByteRange, SampleIndex
from mvptr_ds.errors import DataError, PassingError, may_pass
from mvptr_ds.streams import Stream, generator
from mvptr_ds.user_io.tool_names import tool

logger = logging.getLogger(__name__)

MAX_TRIES = 8


class SampleDataset(Dataset[Sample], ABC):
    """Gives samples by their position in a run: what the loader, the buckets and the run's state need of the data."""

    names: Sequence[str] = ()  # of the sources, where there are several

    @property
    @abstractmethod
    def sources(self) -> list[ShardDataset]:
        """The sources of a mixture, or the dataset itself."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of samples of all sources."""

    @property
    @abstractmethod
    def fingerprint(self) -> str | dict[str, str]:
        """A text that is equal for equal samples in equal order; of a mixture one for each part."""

    @abstractmethod
    def epochs_before(self, position: int) -> dict[str, float]:
        """Returns how many epochs of each of several sources stand before a position of the run."""

    @abstractmethod
    def numbers_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns numbers of sources, and of samples within them, int64 [N] each, at positions int64 [N]."""

    @abstractmethod
    def __getitems__(self, positions: list[int]) -> list[Sample]:
        """Returns the samples of a whole micro-batch (DataLoader looks for this name)."""

    @property
    @abstractmethod
    def read_ahead_bytes(self) -> int:
        """Bytes that a process may fetch ahead; 0 where all is on this machine."""

    @abstractmethod
    def remote_extents(self, positions: list[int]) -> list[ByteRange]:
        """Returns the ranges of these samples that are not on this machine, in the order in which they are read."""


class ShardDataset(SampleDataset):
    """Gives the samples of one folder of shards by the position in the run (in a mixture: of this source's own).

    Picklable; each process opens its own files.

    Raises:
        ValueError: the plan is for another number of samples.
    """

    def __init__(self, index: SampleIndex, plan: Plan, builder: SampleBuilder) -> None:
        if plan.num_samples != len(index):
            raise ValueError(f"the plan is for {plan.num_samples} samples, the index holds {len(index)}")
        self.index = index
        self.plan = plan
        self.builder = builder

    @property
    def sources(self) -> list[ShardDataset]:
        return [self]

    @property
    def num_samples(self) -> int:
        return self.plan.num_samples

    @property
    def fingerprint(self) -> str:
        return self.index.fingerprint

    def epochs_before(self, position: int) -> dict[str, float]:
        return {}

    def numbers_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        return np.zeros(len(positions), dtype=np.int64), self.plan.samples_at(positions)[1]

    def __getitem__(self, position: int) -> Sample:
        return self.load(position, *self.plan.sample_at(position))

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        epochs, numbers = self.plan.samples_at(np.array(positions, dtype=np.int64))
        return self._load(list(zip(positions, epochs.tolist(), numbers.tolist(), strict=True)))

    @property
    def read_ahead_bytes(self) -> int:
        return self.index.read_ahead_bytes

    def remote_extents(self, positions: list[int]) -> list[ByteRange]:
        numbers = self.plan.samples_at(np.array(positions, dtype=np.int64))[1]
        return [extent for number in numbers.tolist() for extent in self.index.remote_extents(number)]

    def load(self, position: int, epoch: int, number: int) -> Sample:
        """Returns the sample `number` at a position; its `bad` lists those in whose place it stands.

        A sample that cannot be read is replaced by one drawn by (seed, epoch, position), the same in every run.

        Raises:
            DataError: `MAX_TRIES` substitutes in a row cannot be read either.
            PassingError: the same, but some of the reasons may pass.
        """
        return self._load([(position, epoch, number)])[0]

    def _load(self, wanted: list[tuple[int, int, int]]) -> list[Sample]:
        requests = [(number, position, self._rng(epoch, position)) for position, epoch, number in wanted]
        loaded = load_samples(self.index, self.builder, requests)
        return [
            found if isinstance(found, Sample) else self._substitute(position, epoch, found)
            for (position, epoch, _), found in zip(wanted, loaded, strict=True)
        ]

    def _rng(self, epoch: int, position: int) -> np.random.Generator:
        return generator(Stream.SAMPLE, self.plan.seed, epoch, position)

    def _substitute(self, position: int, epoch: int, first: BadSample) -> Sample:
        bad = [first]
        substitutes = generator(Stream.SUBSTITUTE, self.plan.seed, epoch, position)
        while len(bad) <= MAX_TRIES:
            logger.warning("bad sample at position %d replaced by another: %s", position, bad[-1])
            number = int(substitutes.integers(len(self.index)))
            (found,) = load_samples(self.index, self.builder, [(number, position, self._rng(epoch, position))])
            if isinstance(found, Sample):
                return replace(found, bad=tuple(bad))
            bad.append(found)
        kind = PassingError if any(one.passes for one in bad) else DataError
        raise kind(
            f"position {position}: {len(bad)} samples in a row cannot be used; the first: {first}; check the "
            f"folder with {tool('validate')} and that visual.source fits what the shards hold"
        )


class MixedDataset(SampleDataset):
    """Gives the samples of several sources by the position in the run. Picklable; each process opens its own files.

    A sample that cannot be read is replaced by another of its source. Images of different sources have different
    numbers.

    Args:
        sources: the datasets by name; the plan of each is keyed by `source_seed`.
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


def differences(saved: str | Mapping[str, str], current: str | Mapping[str, str]) -> list[str]:
    """Lists the differences between the fingerprints of two datasets, at least one of which is a mixture."""
    first, second = ({"data.train": data} if isinstance(data, str) else data for data in (saved, current))
    return [
        f"{name}: {first.get(name, 'none')} there, {second.get(name, 'none')} here"
        for name in {**first, **second}
        if first.get(name) != second.get(name)
    ]


class _Loading:
    """One sample while it is loaded, phase by phase; `found` is the sample, or what is bad about it."""

    def __init__(
        self, index: SampleIndex, builder: SampleBuilder, number: int, position: int, rng: np.random.Generator
    ) -> None:
        self._index, self._builder, self._position, self._rng = index, builder, position, rng
        self._place = index.locate(number)
        self.found: Sample | BadSample | None = None

    def read(self) -> None:
        self._record, self._members = self._index.read_sample(self._place)

    def begin(self) -> None:
        image_index = self._place.record
        self.found = self._builder.begin(self._record, self._members, 0, image_index, self._position, self._rng)

    def add_visual(self) -> None:
        assert isinstance(self.found, Sample)
        self._builder.add_visual(self.found, self._members)

    def run(self, phase: Callable[[_Loading], None]) -> None:
        if isinstance(self.found, BadSample):
            return
        try:
            phase(self)
        except (DataError, OSError) as error:
            path, offset, _, _, caption = self._place
            # the key is read anew for the message; behind a URL that would repeat all the tries that just failed
            is_lost = isinstance(error, OSError) and self._index.read_ahead_bytes
            key = "?" if is_lost else self._index.key_of(self._place)
            self.found = BadSample(self._position, path, key, offset, caption, str(error), may_pass(error))


def load_samples(
    index: SampleIndex, builder: SampleBuilder, requests: Iterable[tuple[int, int, np.random.Generator]]
) -> list[Sample | BadSample]:
    """Reads and builds samples; one that cannot be read or used comes as a BadSample with its place and the reason.

    Phases run over the whole batch (read, text, images): interleaving JPEG decoding evicts the CPU caches and makes the
    rest 3x slower.

    Args:
        requests: number, position and generator of each sample.
    """
    loading = [_Loading(index, builder, *request) for request in requests]
    for phase in (_Loading.read, _Loading.begin, _Loading.add_visual):
        for one in loading:
            one.run(phase)
    return [one.found for one in loading if one.found is not None]


def read_sample_record(index: SampleIndex, number: int) -> tuple[Record, int]:
    """Reads the record that sample `number` belongs to; returns it and the number of the sample's caption there."""
    place = index.locate(number)
    return index.read(place)[0], place.caption
