"""Signals that ask a run to stop: heeded at once while it starts, from then on noted until the step can be saved."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from mvptr_ds.distributed.collectives import launched_as_main
from mvptr_ds.user_io.signals import EXIT_INTERRUPTED

logger = logging.getLogger(__name__)

EXIT_STOPPED = 75  # a signal asked to stop: saved, start again to go on (EX_TEMPFAIL of sysexits.h)
STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_INTERRUPT_S = 0.3  # a terminal and a launcher may both send one Ctrl-C


class Interrupted(BaseException):
    """Work that is not needed is given up for the signal of this name; nothing that catches errors is to catch it."""


class StopSignal:
    """Heeds SIGTERM, SIGUSR1 and SIGINT (Ctrl-C) from its entry on.

    While a run starts they end this process at once, with `EXIT_STOPPED`: nothing is done yet that is not saved. After
    `note_only` the first one is noted: the loop asks before each step, and all ranks save and stop at the same one
    (saving inside a handler would catch them at different steps). Further ones change nothing, but a second Ctrl-C
    ends this process at once.

    The system's own handler writes each signal into a pipe, and a thread reads them there: a handler of Python's would
    wait for as long as the main thread is in a collective.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self._is_starting, self._can_interrupt = True, False
        self._is_noted = False
        self._interrupted_s: float | None = None
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignal:
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_fd = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for number in STOP_SIGNALS:
            if number != signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as a shell does for `run &`
                self._previous[number] = signal.signal(number, self._in_main_thread)
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_fd)
        os.write(self._write_end, b"\0")  # a loader process may still have this end open: closing it tells nothing
        self._thread.join()
        os.close(self._write_end)
        os.close(self._read_end)

    def start(self) -> None:
        """Begins a stage: nothing has to be saved until `note_only`."""
        self._is_starting = True
        if self.received is not None:
            self._end_start()

    def note_only(self) -> None:
        """Notes every later signal; the caller asks whether there was one."""
        self._is_starting = False

    @contextmanager
    def interrupting(self) -> Iterator[None]:
        """Marks work that can be given up: a signal, also an earlier one, raises Interrupted there.

        To be used in the main thread.
        """
        self._can_interrupt = True
        try:
            if self.received is not None:
                raise Interrupted(self.received)
            yield
        finally:
            self._can_interrupt = False

    def wait(self, timeout_s: float) -> bool:
        """Waits for a signal, at most so long; whether there was one."""
        deadline_s = time.monotonic() + timeout_s
        while self.received is None and time.monotonic() < deadline_s:
            time.sleep(0.05)
        return self.received is not None

    def _in_main_thread(self, number: int, frame: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name  # the thread may be a little later
        if self._can_interrupt:
            self._can_interrupt = False  # for one of them
            raise Interrupted(self.received)

    def _read(self) -> None:
        while numbers := os.read(self._read_end, 64):
            for number in numbers:
                if number == 0:
                    return
                if number in self._previous:
                    self._note(signal.Signals(number))

    def _note(self, number: signal.Signals) -> None:
        now_s = time.monotonic()
        if number == signal.SIGINT:
            if self._interrupted_s is not None and now_s - self._interrupted_s > SAME_INTERRUPT_S:
                os._exit(EXIT_INTERRUPTED)
            self._interrupted_s = now_s
        if self._is_noted:
            return
        self._is_noted = True
        self.received = self.received or number.name
        if self._is_starting:
            self._end_start()
        if number == signal.SIGINT:
            logger.info("Ctrl-C: the run saves its step and stops; press it again to end at once, without saving")

    def _end_start(self) -> None:
        if launched_as_main():
            logger.info("stopped by %s in the start: nothing is lost, start it again to go on", self.received)
        os._exit(EXIT_STOPPED)
