"""Signals that ask a run, or a script, to stop."""

from __future__ import annotations

import ctypes
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from mvptr_ds.stopping import SAME_INTERRUPT_S, STOP_SIGNALS, Interrupted, StopSignal
from tests.conftest import REPO

pytestmark = pytest.mark.timeout(120)


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_a_signal_is_noted_and_a_second_changes_nothing(number: signal.Signals) -> None:
    before = [signal.getsignal(each) for each in STOP_SIGNALS]
    with StopSignal() as stop:
        stop.note_only()
        assert stop.received is None and not stop.wait(0.0)
        os.kill(os.getpid(), number)
        assert stop.wait(5.0) and stop.received == number.name
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        assert stop.received == number.name
    assert [signal.getsignal(each) for each in STOP_SIGNALS] == before
    assert signal.set_wakeup_fd(-1) == -1 and not any(t.name == stop._thread.name for t in threading.enumerate())


@contextmanager
def held_in_a_collective(prepare: Callable[[StopSignal], object]) -> Iterator[int]:
    """A process whose main thread runs nothing of Python's for a minute, and gets no signal either."""
    pid = os.fork()
    if pid == 0:
        with suppress(BaseException), StopSignal() as stop:
            prepare(stop)
            signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
            ctypes.CDLL(None).sleep(60)
        os._exit(99)
    time.sleep(0.5)
    try:
        yield pid
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(pid, 0)


def code_of(pid: int, within_s: float) -> int | None:
    """None while it runs."""
    until_s = time.monotonic() + within_s
    while time.monotonic() < until_s:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    return None


@pytest.mark.parametrize("number", STOP_SIGNALS)
def test_while_a_run_starts_a_signal_ends_it_at_once(number: signal.Signals) -> None:
    with held_in_a_collective(lambda stop: None) as pid:
        os.kill(pid, number)
        assert code_of(pid, 10.0) == 75


def test_a_signal_between_two_stages_ends_the_start_of_the_second() -> None:
    def prepare(stop: StopSignal) -> None:
        stop.note_only()
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.wait(5.0)
        stop.start()

    with held_in_a_collective(prepare) as pid:
        assert code_of(pid, 10.0) == 75


def test_a_second_interrupt_ends_at_once_and_a_doubled_one_does_not() -> None:
    with held_in_a_collective(StopSignal.note_only) as pid:
        for _ in range(2):  # by the terminal and by a launcher
            os.kill(pid, signal.SIGINT)
            time.sleep(0.02)
        os.kill(pid, signal.SIGTERM)  # as deepspeed's launcher sends it next
        assert code_of(pid, 2 * SAME_INTERRUPT_S) is None
        os.kill(pid, signal.SIGINT)
        assert code_of(pid, 10.0) == 130


def test_what_is_not_needed_is_given_up_for_a_signal() -> None:
    with StopSignal() as stop:
        stop.note_only()
        with stop.interrupting():
            pass
        with pytest.raises(Interrupted), stop.interrupting():
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(5.0)
        with pytest.raises(Interrupted), stop.interrupting():  # by the signal of before
            pytest.fail("it was begun")
        os.kill(os.getpid(), signal.SIGTERM)  # outside nothing is given up


def test_an_ignored_interrupt_stays_ignored() -> None:
    """As a shell without job control starts `train.py &`."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignal() as stop:
            stop.note_only()
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.wait(0.2)
    finally:
        signal.signal(signal.SIGINT, before)


SCRIPT = r"""
import os, time
from mvptr_ds.user_io.signals import end_on_interrupt
end_on_interrupt()
try:
    child = os.fork()
    os.write(1, b"ready\n")
    time.sleep(60)
except Exception:
    print("an error", flush=True)
finally:
    if child: print("closed", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


def test_an_interrupted_script_says_one_line_and_ends_with_130() -> None:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", SCRIPT], cwd=REPO, start_new_session=True, text=True, **pipes)
    assert process.stdout is not None
    assert process.stdout.readline() == process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, said = process.communicate(timeout=60)
    assert (process.returncode, out, said) == (130, "closed 130\n", "interrupted\n")


SCRIPTS = [
    path
    for path in (*sorted((REPO / "tools").rglob("*.py")), REPO / "mvptr_ds/train.py", REPO / "mvptr_ds/eval.py")
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8") and path.stem != "coco_phrases"  # its own handler
]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_every_script_heeds_interrupts_before_its_imports(path: Path) -> None:
    """The first import of the package, or of what takes as long, is what brings the handler."""
    imports = re.findall(r"^ *(?:from|import) ((?:mvptr_ds|torch|tools)\S*)", path.read_text(encoding="utf-8"), re.M)
    assert imports[0] == "mvptr_ds.user_io.signals"
    assert re.search(r"^    end_on_interrupt\(", path.read_text(encoding="utf-8"), re.M)
