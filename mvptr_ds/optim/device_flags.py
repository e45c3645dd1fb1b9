"""One flag a step, decided on the device, and read by a host that does not wait for it."""

from __future__ import annotations

from collections import deque

import torch
from torch import Tensor


class DeviceFlags:
    """Brings flags from the device to the host in the order in which they were noted.

    On CUDA a flag is copied into pinned memory behind the work that decides it. Whoever reads all but the newest waits
    for the step before, which the device has most likely done, and the device meanwhile has the newest to work on.
    """

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor, torch.cuda.Event | None]] = deque()
        self._newest: tuple[Tensor, torch.cuda.Event | None] | None = None

    def note(self, flag: Tensor) -> None:
        """Adds the flag of a step: one element, which nobody writes any more; not 0 is true."""
        event = None
        if flag.is_cuda:
            on_host = torch.empty(flag.shape, dtype=flag.dtype, pin_memory=True)
            flag = on_host.copy_(flag, non_blocking=True)
            event = torch.cuda.Event()
            event.record()
        self._newest = flag, event
        self._waiting.append(self._newest)

    def take(self, newest: bool) -> list[bool]:
        """Returns the flags that no call has returned so far, oldest first; the newest one only if asked for."""
        num = len(self._waiting) if newest else len(self._waiting) - 1
        return [_read(*self._waiting.popleft()) for _ in range(num)]

    def newest(self) -> bool:
        """Returns the flag that was noted last, and leaves it to `take`; waits for the device."""
        assert self._newest is not None, "no flag was noted"
        return _read(*self._newest)


def _read(flag: Tensor, event: torch.cuda.Event | None) -> bool:
    if event is not None:
        event.synchronize()
    return bool(flag.item())
