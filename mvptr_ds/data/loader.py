"""Positions of the plan -> samples -> micro-batches, in order, whatever the number of ranks and workers.

Everything random about a sample comes from a generator keyed by (seed, epoch, position), so a rank or a worker more
changes nothing, and a resume asks for later positions and nothing else. Several sources: data.mixture.
"""

from __future__ import annotations

import errno
import logging
import multiprocessing
import os
import signal
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mvptr_ds.data.collate import BadSample, Batch, Sample, collate
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import ByteRange, SampleIndex
from mvptr_ds.data.sharing import MAKE_ROOM, CollateAndSend, shared_folder
from mvptr_ds.errors import DataError, PassingError, may_pass
from mvptr_ds.streams import Stream, generator
from mvptr_ds.user_io.signals import blocked

logger = logging.getLogger(__name__)

MAX_TRIES = 8


class SampleDataset(Dataset[Sample]):
    """Samples by their position in a run."""

    names: Sequence[str] = ()  # of the sources, where there are several

    @property
    @abstractmethod
    def sources(self) -> list[ShardDataset]:
        """What a mixture is of, or the one there is."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Of all sources."""

    @property
    @abstractmethod
    def fingerprint(self) -> str | dict[str, str]:
        """Equal for equal samples in equal order; of a mixture by its parts."""

    @abstractmethod
    def epochs_before(self, position: int) -> dict[str, float]:
        """How often each of several sources has been gone through before a position of the run."""

    @abstractmethod
    def numbers_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Numbers of the sources and of the samples in them, int64 [N] each, at positions int64 [N]."""

    @abstractmethod
    def __getitems__(self, positions: list[int]) -> list[Sample]:
        """Samples of a whole micro-batch (the name DataLoader looks for)."""

    @property
    @abstractmethod
    def read_ahead_bytes(self) -> int:
        """What a process may hold of what it is about to read; 0 where all is on this machine."""

    @abstractmethod
    def remote_extents(self, positions: list[int]) -> list[ByteRange]:
        """What of the samples at these positions is not on this machine, in the order in which it is read."""


class ShardDataset(SampleDataset):
    """Sample at a position of the run (of its source, in a mixture). Picklable; each process opens its own files."""

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
        """The sample; its `num_bad` says how many others had to be passed over.

        A sample that cannot be read is replaced by one drawn by (seed, epoch, position), the same in every run.

        Raises:
            DataError: `MAX_TRIES` substitutes in a row cannot be read either; PassingError: some of them for now.
        """
        return self._load([(position, epoch, number)])[0]

    def _load(self, wanted: list[tuple[int, int, int]]) -> list[Sample]:
        asked = [(number, position, self._rng(epoch, position)) for position, epoch, number in wanted]
        return [
            found if isinstance(found, Sample) else self._substitute(position, epoch, found)
            for (position, epoch, _), found in zip(wanted, load_samples(self.index, self.builder, asked), strict=True)
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
            "folder with tools/validate_shards.py and that visual.source fits what the shards hold"
        )


class _Loading:
    """One sample on its way, or what is bad about it."""

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

    def add_picture(self) -> None:
        assert isinstance(self.found, Sample)
        self._builder.add_picture(self.found, self._members)

    def run(self, step: Callable[[_Loading], None]) -> None:
        if isinstance(self.found, BadSample):
            return
        try:
            step(self)
        except (DataError, OSError) as error:
            path, offset, _, _, caption = self._place
            # what failed behind a URL was tried several times, and would be again; here the header may well be read
            gone = isinstance(error, OSError) and self._index.read_ahead_bytes
            key = "?" if gone else self._index.key_of(self._place)
            self.found = BadSample(self._position, path, key, offset, caption, str(error), may_pass(error))


def load_samples(
    index: SampleIndex, builder: SampleBuilder, asked: Iterable[tuple[int, int, np.random.Generator]]
) -> list[Sample | BadSample]:
    """Reads and builds samples, each asked for by its number, its position and its generator.

    In place of one that cannot be used, or whose file cannot be read, comes a BadSample with its place and the reason.
    All are read, then all texts made, then all pictures: a picture decoded between them would leave nothing of the rest
    in the processor's caches, and the rest would take three times as long.
    """
    loading = [_Loading(index, builder, *one) for one in asked]
    for step in (_Loading.read, _Loading.begin, _Loading.add_picture):
        for one in loading:
            one.run(step)
    return [one.found for one in loading if one.found is not None]


def read_sample_record(index: SampleIndex, number: int) -> tuple[Record, int]:
    """The record that sample `number` belongs to, and the number of its caption there."""
    place = index.locate(number)
    return index.read(place)[0], place.caption


class _MicroBatches:
    """Batch sampler: this rank's positions of every micro-batch of the steps [start_step, end_step)."""

    def __init__(
        self, batches: Batches, start_step: int, end_step: int, rank: int, num_ranks: int, accumulation_steps: int
    ) -> None:
        if not 0 <= start_step <= end_step:
            raise ValueError(f"steps {start_step} to {end_step}: expected 0 <= start <= end")
        batches.positions(start_step, 0, rank, num_ranks, accumulation_steps)  # refuses what does not divide, at once
        self.batches = batches
        self.steps = range(start_step, end_step)
        self.share = (rank, num_ranks, accumulation_steps)

    def __getitem__(self, number: int) -> list[int]:
        step, accumulation = divmod(number, self.share[2])
        return self.batches.positions(self.steps[step], accumulation, *self.share).tolist()

    def __iter__(self) -> Iterator[list[int]]:
        return (self[number] for number in range(len(self)))

    def __len__(self) -> int:
        return len(self.steps) * self.share[2]


_LEFT_TO_THE_RANK = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class _Loader(DataLoader[Batch]):
    """Its processes never get the signals by which launchers, SLURM and terminals stop a run: a rank needs its batches.

    All their threads inherit the mask, also those that torch starts before any code of ours runs.
    """

    def __iter__(self) -> Any:
        with blocked(_LEFT_TO_THE_RANK):
            return super().__iter__()


def _check_semaphores(num_workers: int) -> None:
    """Takes as many as the queues of so many processes, and lets them go: half made, torch's iterator says too much.

    Raises:
        DataError: /dev/shm, where they lie, is full.
    """
    try:
        [multiprocessing.Semaphore() for _ in range(8 + 3 * num_workers)]
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        what = f"loader processes cannot be started, there is no room for their semaphores: {shared_folder()}"
        raise DataError(f"{what}; {MAKE_ROOM}") from error


def _end_with_own_rank(worker: int) -> None:
    """SIGTERM of the rank itself, which ends its processes so, is heeded; a handler could not tell who sent it."""

    def wait_for_own_rank() -> None:
        while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
            pass
        os._exit(0)

    threading.Thread(target=wait_for_own_rank, daemon=True).start()


def make_loader(
    dataset: SampleDataset,
    batches: Batches,
    start_step: int,
    end_step: int,
    rank: int = 0,
    num_ranks: int = 1,
    accumulation_steps: int = 1,
    num_workers: int = 0,
    prefetch_batches: int = 4,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """DataLoader of this rank's micro-batches of the steps [start_step, end_step), in order, equally many on all ranks.

    Workers compute on one thread each: torch sets that itself.

    Raises:
        ValueError: the batch does not divide by ranks and accumulation steps, or the steps are out of order.
        DataError: there is no room in shared memory; also by the iterator, when it is a batch that finds none.
    """
    micro_batches = _MicroBatches(batches, start_step, end_step, rank, num_ranks, accumulation_steps)
    if num_workers:
        _check_semaphores(num_workers)
    source: Dataset[Sample] = dataset
    if dataset.read_ahead_bytes:
        from mvptr_ds.data.read_ahead import ReadAheadDataset

        source = ReadAheadDataset(dataset, micro_batches, dataset.read_ahead_bytes)
    return _Loader(
        source,  # type: ignore[arg-type]  # torch's stubs do not know that collate_fn changes the type
        batch_sampler=micro_batches,
        num_workers=num_workers,
        prefetch_factor=max(1, prefetch_batches) if num_workers else None,
        pin_memory=pin_memory,
        collate_fn=CollateAndSend(num_workers * max(1, prefetch_batches)) if num_workers else collate,
        worker_init_fn=_end_with_own_rank if num_workers else None,
        generator=torch.Generator(),  # else it takes a number from the one that dropout uses, and no resume is exact
    )


def eval_batches(
    index: SampleIndex, builder: SampleBuilder, batch_size: int, indices: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Batches of the samples `indices` (all when None) in that order; `position_B` holds the sample numbers.

    Without masking only if the builder masks nothing.

    Raises:
        DataError: a sample cannot be read: an evaluation on other samples than asked for would be wrong.
        PassingError: the same, but for now.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    numbers = range(len(index)) if indices is None else indices

    def chunk_at(batch: int) -> list[int]:
        return [int(number) for number in numbers[batch * batch_size : (batch + 1) * batch_size]]

    ahead = None
    if index.read_ahead_bytes:
        from mvptr_ds.data.read_ahead import ReadAhead

        def extents_at(batch: int) -> list[ByteRange] | None:
            return [extent for number in chunk_at(batch) for extent in index.remote_extents(number)] or None

        ahead = ReadAhead(extents_at, index.read_ahead_bytes)
    for batch in range(-(-len(numbers) // batch_size)):
        if ahead is not None:
            ahead.reach(batch)
        asked = ((n, n, generator(Stream.SAMPLE, 0, 0, n)) for n in chunk_at(batch))
        samples = []
        for found in load_samples(index, builder, asked):
            if isinstance(found, BadSample):
                raise PassingError(str(found)) if found.passes else DataError(str(found))
            samples.append(found)
        yield collate(samples)
    if ahead is not None:
        ahead.close()
