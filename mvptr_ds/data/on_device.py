"""Batches of a loader with their copies on a device, on CUDA one batch ahead of the step that reads them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch


class BatchesOnDevice(Iterator[tuple[Any, Any]]):
    """Yields (batch on the host, what is read of it on the device).

    On CUDA the copy runs on a stream of its own while the step before is computed. An error of the loader is raised
    when the batch that it concerns is asked for.

    Args:
        batches: of the loader, pinned for CUDA.
        read_of: returns what is copied of a batch, from the batch and its number, counted from 0. It lies on the host
            in one block, and has `to` and `record_stream` as a tensor has them.
    """

    def __init__(self, batches: Iterator[Any], device: torch.device, read_of: Callable[[Any, int], Any]) -> None:
        self.batches, self.device, self.read_of = batches, device, read_of
        self.number = 0
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.ahead: tuple[Any, Any] | Exception | None = None

    def __next__(self) -> tuple[Any, Any]:
        if self.stream is None:
            return self._copy()
        found = self._try_copy() if self.ahead is None else self.ahead
        if isinstance(found, Exception):
            raise found
        computing = torch.cuda.current_stream(self.device)
        computing.wait_stream(self.stream)
        found[1].record_stream(computing)
        self.ahead = self._try_copy()
        return found

    def _try_copy(self) -> tuple[Any, Any] | Exception:
        with torch.cuda.stream(self.stream):
            try:
                return self._copy()
            except Exception as error:  # also the end of the batches: of a later step
                return error

    def _copy(self) -> tuple[Any, Any]:
        batch = next(self.batches)
        read = self.read_of(batch, self.number)
        self.number += 1
        return batch, read.to(self.device)
