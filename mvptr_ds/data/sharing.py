"""Sends a batch from a loader process to its rank, in one piece of shared memory.

Everything that may fail does so in the main thread of the loader process, from where an exception reaches the rank. An
exception in the thread that feeds the queue is printed there alone, and the rank would wait for that batch for ever.
"""

from __future__ import annotations

import errno
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.data import one_block
from mvptr_ds.data.collate import Batch, Sample, collate
from mvptr_ds.errors import DataError

SHARED_FOLDER = "/dev/shm"
MAKE_ROOM = (
    "give the container more (docker run --shm-size=8g, or --ipc=host), or lower data.num_workers, "
    "data.prefetch_batches or train.batch_size"
)


class SentBatch:
    """Holds a batch ready to be sent; the process that unpickles it gets the batch itself.

    All tensors are sent as one, because each would take a file descriptor and 0.3 ms. So the batch that arrives lies
    on the host, on whatever device this one lies.

    Args:
        batch: a `Batch`, or what a task has made of one.

    Raises:
        OSError, RuntimeError: there is no shared memory for it, or no file descriptor.
    """

    def __init__(self, batch: Any) -> None:
        whole, with_parts = one_block.write(batch, _shared_bytes)
        self.num_bytes = len(whole)
        self._pickled = bytes(ForkingPickler.dumps((whole, with_parts)))

    def __reduce__(self) -> tuple[Any, ...]:
        return _received, (self._pickled,)


@dataclass(frozen=True)
class CollateAndSend:
    """Collates and sends: the `collate_fn` of a loader process.

    Args:
        num_ready: how many batches the loader processes of a rank hold ready, for the message.
        pack: makes what is sent of the batch.
    """

    num_ready: int
    pack: Callable[[Batch], Any] | None = None

    def __call__(self, samples: list[Sample]) -> SentBatch:
        """Raises DataError where the batch finds no room; the message says what there is and what is needed."""
        batch = collate(samples)
        packed = batch if self.pack is None else self.pack(batch)
        try:
            return SentBatch(packed)
        except (OSError, RuntimeError) as error:
            raise DataError(_no_room(error, one_block.num_bytes(packed), self.num_ready)) from error


def _no_room(error: Exception, batch_bytes: int, num_ready: int) -> str:
    reason = " ".join(str(error).split())
    if os.strerror(errno.EMFILE) in reason:
        return (
            f"a batch cannot be sent to its rank ({reason}): each takes a file descriptor of both; raise the limit of "
            "open files (ulimit -n), or lower data.num_workers or data.prefetch_batches"
        )
    ready = f"the {num_ready} that a rank's loader processes hold ready take {_mib(num_ready * batch_bytes)}"
    return (
        f"no shared memory for a batch of {_mib(batch_bytes)} ({reason}): {shared_folder()}, and {ready}; {MAKE_ROOM}"
    )


def shared_folder() -> str:
    """Says size and free room of /dev/shm, for messages."""
    try:
        found = os.statvfs(SHARED_FOLDER)
    except OSError as error:
        return f"{SHARED_FOLDER} cannot be looked at ({error.strerror})"
    return f"{SHARED_FOLDER} has {_mib(found.f_blocks * found.f_frsize)}, {_mib(free_shared_bytes())} of it free"


def free_shared_bytes() -> int:
    """Returns the free bytes of /dev/shm, 0 where there is none."""
    try:
        found = os.statvfs(SHARED_FOLDER)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def _mib(num_bytes: int) -> str:
    return f"{num_bytes / 2**20:,.1f} MiB"


def _shared_bytes(num_bytes: int) -> Tensor:
    """Allocates bytes that another process can map; all at once, so that no later write fails (SIGBUS).

    Where the system allows it they are no file of /dev/shm, which containers keep small (Docker: 64 MiB).
    """
    # private names of torch, by which its own collation allocates: memory from elsewhere would be copied once more
    storage: Any = torch.UntypedStorage
    if without_folder():
        file = os.memfd_create("mvptr_ds")
        try:
            os.posix_fallocate(file, 0, num_bytes)
            return torch.empty(0, dtype=torch.uint8).set_(storage._new_shared_fd_cpu(file, num_bytes))
        finally:
            os.close(file)
    return torch.empty(0, dtype=torch.uint8).set_(storage._new_shared(num_bytes))


def without_folder() -> bool:
    """Tells whether memory can be shared here without /dev/shm: on Linux, unless a sandbox forbids it."""
    if not hasattr(os, "memfd_create") or torch.multiprocessing.get_sharing_strategy() != "file_descriptor":
        return False
    try:
        os.close(os.memfd_create("mvptr_ds"))
    except OSError as error:
        return error.errno in (errno.EMFILE, errno.ENFILE)  # which the next call says better
    return True


def _received(pickled: bytes) -> Any:
    whole, with_parts = pickle.loads(pickled)
    return one_block.read(with_parts, whole)
