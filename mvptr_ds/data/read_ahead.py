"""Fetches from remote shards what the next micro-batches need, with few requests and bounded memory.

Double buffering: while one half of the memory budget is consumed, the other is fetched. Records that are neighbours in
a shard are merged into one range request. Threads fetch the ranges, those first that are needed first. An order that is
shuffled within windows of blocks is read in runs:

    needed, by time      d7 a1 c4 | a2 d8 a9        a-d shards, numbers records
    runs                 [d7 d8] [a1 a2] [c4] [a9]
"""

from __future__ import annotations

import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from torch.utils.data import Dataset, get_worker_info

from mvptr_ds.data.collate import Sample
from mvptr_ds.data.dataset import SampleDataset
from mvptr_ds.data.pickling import PicklesWithoutCaches
from mvptr_ds.data.shards.index import ByteRange
from mvptr_ds.data.shards.tar_reader import WHOLE_BYTES

if TYPE_CHECKING:  # it imports fsspec, which local shards do without
    from mvptr_ds.data.shards.remote import RemoteFiles

NUM_THREADS = 8  # requests of a process at once
MAX_GAP_BYTES = 64 << 10  # between neighbours of one run, read along because a request costs more; see `_gap`
MAX_RUN_BYTES = WHOLE_BYTES
_MAX_BATCHES = 64  # ahead in one half, however small they are


@dataclass
class _Run:
    """A range of a shard that one request fetches, with the records in it."""

    files: RemoteFiles
    path: str
    start: int
    end: int
    offsets: list[int]  # of its records
    first_needed: int

    def join(self, extent: ByteRange) -> bool:
        """Adds the extent if it lies close behind the run; returns whether it does."""
        end = extent.offset + extent.num_bytes
        is_near = (extent.files, extent.path) == (self.files, self.path) and extent.offset - self.end <= _gap(extent)
        if not is_near or end - self.start > MAX_RUN_BYTES:
            return False
        self.end = max(self.end, end)
        self.offsets.append(extent.offset)
        return True


def _gap(extent: ByteRange) -> int:
    """Returns how many bytes may lie unused before an extent: no more than its own, so that half of a run is used."""
    return min(MAX_GAP_BYTES, extent.num_bytes)


def runs_of(extents: Sequence[ByteRange]) -> list[_Run]:
    """Merges extents, given in the order in which they are needed, into runs of neighbours, ordered by first need."""
    needed: dict[ByteRange, int] = {}
    for number, extent in enumerate(extents):
        needed.setdefault(extent, number)
    runs: list[_Run] = []
    for extent in sorted(needed, key=lambda e: (id(e.files), e.path, e.offset)):
        if runs and runs[-1].join(extent):
            runs[-1].first_needed = min(runs[-1].first_needed, needed[extent])
        else:
            end = extent.offset + extent.num_bytes
            runs.append(_Run(extent.files, extent.path, extent.offset, end, [extent.offset], needed[extent]))
    return sorted(runs, key=lambda run: run.first_needed)


class _Threads:
    """Threads that fetch runs; daemons, because a request that stalls must not hold up the end of the process."""

    def __init__(self) -> None:
        self._jobs: queue.SimpleQueue[tuple[Future[bytes], _Run]] = queue.SimpleQueue()
        for _ in range(NUM_THREADS):
            threading.Thread(target=self._work, daemon=True).start()

    def fetch(self, run: _Run) -> Future[bytes]:
        future: Future[bytes] = Future()
        self._jobs.put((future, run))
        return future

    def _work(self) -> None:
        while True:
            future, run = self._jobs.get()
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(run.files.fetch(run.path, run.start, run.end))
            except Exception as error:  # raised where the record is read
                future.set_exception(error)


@dataclass
class _Half:
    """One half of the memory: consecutive micro-batches, and the runs fetched for them."""

    end: int  # number of the micro-batch behind the last
    runs: list[tuple[_Run, Future[bytes]]] = field(default_factory=list)

    def release(self) -> None:
        for run, future in self.runs:
            future.cancel()
            for offset in run.offsets:
                if run.files.held.get((run.path, offset), (0, None))[1] is future:
                    del run.files.held[run.path, offset]


class ReadAhead:
    """Keeps what is about to be read in the `held` of the files.

    Args:
        extents_at: returns what micro-batch number n reads, in its order; None behind the last.
        max_bytes: how much may be held.
    """

    def __init__(self, extents_at: Callable[[int], list[ByteRange] | None], max_bytes: int) -> None:
        self._extents_at = extents_at
        self._half_bytes = max_bytes // 2
        self._halves: deque[_Half] = deque()
        self._threads = _Threads()

    def reach(self, number: int) -> None:
        """Prepares micro-batch `number`; called before each is read, with numbers that rise by one."""
        while self._halves and self._halves[0].end <= number:
            self._halves.popleft().release()
        while len(self._halves) < 2:
            half = self._take(self._halves[-1].end if self._halves else number)
            if half is None:
                return
            self._halves.append(half)

    def _take(self, first: int) -> _Half | None:
        extents: list[ByteRange] = []
        num_bytes, number = 0, first
        while num_bytes < self._half_bytes and number - first < _MAX_BATCHES:
            more = self._extents_at(number)
            if more is None:
                break
            for extent in more:
                # a record too large to be held is read when it is needed, and so is what exceeds the memory
                cost = extent.num_bytes + _gap(extent)
                if extent.num_bytes <= MAX_RUN_BYTES and num_bytes + cost <= self._half_bytes:
                    extents.append(extent)
                    num_bytes += cost
            number += 1
        if number == first:
            return None
        half = _Half(number)
        for run in runs_of(extents):
            future = self._threads.fetch(run)
            half.runs.append((run, future))
            for offset in run.offsets:
                run.files.held[run.path, offset] = (run.start, future)
        return half

    def close(self) -> None:
        """Releases everything that is held."""
        while self._halves:
            self._halves.popleft().release()


class MicroBatches(Protocol):
    """The positions of each micro-batch, by its number."""

    def __getitem__(self, number: int) -> list[int]: ...

    def __len__(self) -> int: ...


class ReadAheadDataset(PicklesWithoutCaches, Dataset[Sample]):
    """A dataset that fetches ahead: its micro-batches are read in their order, one by one or in turn by the workers.

    Args:
        max_bytes: how much each process may hold.
    """

    _CACHES = ("_pid", "_ahead", "_number")

    def __init__(self, dataset: SampleDataset, micro_batches: MicroBatches, max_bytes: int) -> None:
        self.dataset = dataset
        self.micro_batches = micro_batches
        self.max_bytes = max_bytes
        self._init_caches()

    def _init_caches(self) -> None:
        self._pid = os.getpid()
        self._ahead: ReadAhead | None = None
        self._number = 0

    def __getitems__(self, positions: list[int]) -> list[Sample]:
        """Returns the samples of a whole micro-batch (DataLoader looks for this name)."""
        if self._pid != os.getpid():  # a loader process inherits no threads
            self._init_caches()
        worker = get_worker_info()
        first, step = (worker.id, worker.num_workers) if worker else (0, 1)
        if self._ahead is None or positions == self.micro_batches[first]:  # the first: also of another iteration
            self._begin(first, step)
        assert self._ahead is not None
        self._ahead.reach(self._number)
        self._number += 1
        return self.dataset.__getitems__(positions)

    def _begin(self, first: int, step: int) -> None:
        def extents_at(number: int) -> list[ByteRange] | None:
            own = first + number * step  # DataLoader hands the micro-batches round
            return self.dataset.remote_extents(self.micro_batches[own]) if own < len(self.micro_batches) else None

        if self._ahead is not None:
            self._ahead.close()
        self._ahead, self._number = ReadAhead(extents_at, self.max_bytes), 0
