"""Samples -> micro-batches of a rank, in the order of the plan, whatever the number of ranks and loader processes."""

from __future__ import annotations

import errno
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from mvptr_ds.data.collate import BadSample, Batch, Sample, collate
from mvptr_ds.data.dataset import SampleDataset, load_samples
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.read_ahead import ReadAhead, ReadAheadDataset
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.shards.index import ByteRange, SampleIndex
from mvptr_ds.data.sharing import MAKE_ROOM, CollateAndSend, shared_folder
from mvptr_ds.errors import DataError, PassingError
from mvptr_ds.streams import Stream, generator
from mvptr_ds.user_io.signals import blocked


class _MicroBatches:
    """Batch sampler that gives this rank's positions of every micro-batch of the steps [start_step, end_step)."""

    def __init__(
        self, batches: Batches, start_step: int, end_step: int, rank: int, num_ranks: int, accumulation_steps: int
    ) -> None:
        if not 0 <= start_step <= end_step:
            raise ValueError(f"steps {start_step} to {end_step}: expected 0 <= start <= end")
        batches.positions(start_step, 0, rank, num_ranks, accumulation_steps)  # refuses at once what does not divide
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
    """DataLoader whose processes ignore the signals by which launchers, SLURM and terminals stop a run.

    A rank that is told to stop still needs its batches. All threads of the processes inherit the mask, also those that
    torch starts before any code of ours runs.
    """

    def __iter__(self) -> Any:
        with blocked(_LEFT_TO_THE_RANK):
            return super().__iter__()


def _check_semaphores(num_workers: int) -> None:
    """Makes as many semaphores as the queues of the processes need, and releases them.

    torch's iterator would fail half made, with several errors in a row.

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


def _ignore_foreign_signals(worker: int) -> None:
    """Ends this loader process on a SIGTERM of its own rank alone.

    The signal is blocked (`_Loader`) and waited for in a thread, because a handler is not told who sent it.
    """

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
    pack: Callable[[Batch], Any] | None = None,
) -> DataLoader[Any]:
    """Makes a DataLoader of this rank's micro-batches of the steps [start_step, end_step), in order.

    All ranks get equally many. Workers compute on one thread each: torch sets that itself.

    Args:
        pack: makes what the loader gives of each `Batch`, in the process that has loaded it.

    Raises:
        ValueError: the batch does not divide by ranks and accumulation steps, or the steps are out of order.
        DataError: there is no room in shared memory. The iterator raises it, too, when a batch finds no room.
    """
    micro_batches = _MicroBatches(batches, start_step, end_step, rank, num_ranks, accumulation_steps)
    if num_workers:
        _check_semaphores(num_workers)
    source: Dataset[Sample] = dataset
    if dataset.read_ahead_bytes:
        source = ReadAheadDataset(dataset, micro_batches, dataset.read_ahead_bytes)
    return _Loader(
        source,  # type: ignore[arg-type]  # torch's stubs do not know that collate_fn changes the type
        batch_sampler=micro_batches,
        num_workers=num_workers,
        prefetch_factor=max(1, prefetch_batches) if num_workers else None,
        pin_memory=pin_memory,
        collate_fn=_collation(num_workers * max(1, prefetch_batches), pack),
        worker_init_fn=_ignore_foreign_signals if num_workers else None,
        generator=torch.Generator(),  # else it takes a number from the one that dropout uses, and no resume is exact
    )


def _collation(num_ready: int, pack: Callable[[Batch], Any] | None) -> Callable[[list[Sample]], Any]:
    if num_ready:
        return CollateAndSend(num_ready, pack)
    return collate if pack is None else lambda samples: pack(collate(samples))


def eval_batches(
    index: SampleIndex, builder: SampleBuilder, batch_size: int, indices: Sequence[int] | None = None
) -> Iterator[Batch]:
    """Yields batches of the samples `indices` (all when None) in that order; `position_B` holds the sample numbers.

    The builder decides on masking: an evaluation without masking takes one whose probabilities are 0.

    Raises:
        DataError: a sample cannot be read: no substitute may stand for it in an evaluation.
        PassingError: the same, for a reason that may pass.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}, must be at least 1")
    numbers = range(len(index)) if indices is None else indices

    def chunk_at(batch: int) -> list[int]:
        return [int(number) for number in numbers[batch * batch_size : (batch + 1) * batch_size]]

    ahead = None
    if index.read_ahead_bytes:

        def extents_at(batch: int) -> list[ByteRange] | None:
            return [extent for number in chunk_at(batch) for extent in index.remote_extents(number)] or None

        ahead = ReadAhead(extents_at, index.read_ahead_bytes)
    for batch in range(-(-len(numbers) // batch_size)):
        if ahead is not None:
            ahead.reach(batch)
        requests = ((n, n, generator(Stream.SAMPLE, 0, 0, n)) for n in chunk_at(batch))
        samples = []
        for found in load_samples(index, builder, requests):
            if isinstance(found, BadSample):
                raise PassingError(str(found)) if found.passes else DataError(str(found))
            samples.append(found)
        yield collate(samples)
    if ahead is not None:
        ahead.close()
