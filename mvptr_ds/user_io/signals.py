"""Signals of scripts and of the processes that they start: who heeds which, from the first instruction on."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait
from types import FrameType

EXIT_INTERRUPTED = 128 + signal.SIGINT  # 130, as a shell reports it


def end_on_interrupt(line: str = "interrupted") -> None:
    """Makes Ctrl-C end this script with one line and 130; to be called before the imports that take long.

    What is open on the way out is closed; a second Ctrl-C does not wait for that. A script that was started with
    SIGINT ignored, as a shell does for `script &`, goes on ignoring it.
    """
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        return
    script = os.getpid()

    def end(number: int, frame: FrameType | None) -> None:
        if os.getpid() != script:  # of a fork: its parent says it
            os._exit(EXIT_INTERRUPTED)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.write(2, f"{line}\n".encode())  # a stream of Python's might be in the middle of a write
        raise SystemExit(EXIT_INTERRUPTED)

    signal.signal(signal.SIGINT, end)


def end_with_parent() -> None:
    """Makes a process of `multiprocessing` end when the one that started it does, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextmanager
def blocked(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Processes and threads that are started inside never get these signals; this thread gets them afterwards."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
