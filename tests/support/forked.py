"""Starts `python SCRIPT` and `python -m MODULE` by forking a process that has torch and DeepSpeed imported already.

A start of Python with both takes five seconds of CPU, which the ranks of a test would each pay. What is forked is as if
started afresh but for that: none of the project's modules is imported, no thread runs, streams, environment, working
directory, arguments and session are its own. What is alike in all of them is the order of Python's sets of strings.

The process itself is this file, run with a folder: it reads a request a line from its standard input, answers with the
process id, and leaves the exit code of each in FOLDER/PID. It ends when its input does.
"""

from __future__ import annotations

import atexit
import functools
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PRELOADED = ("torch", "deepspeed", "transformers.modeling_utils", "transformers.models.auto", "webdataset", "PIL.Image")
MUST_BE = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": ""}  # when those are imported
POLL_S = 0.01


class Forked:
    """A process that was forked, with the part of subprocess.Popen that the tests use."""

    def __init__(self, pid: int, code_path: Path) -> None:
        self.pid, self.returncode, self._code_path = pid, None, code_path  # type: ignore[var-annotated]

    def poll(self) -> int | None:
        if self.returncode is None and self._code_path.exists():
            self.returncode = int(self._code_path.read_text(encoding="utf-8"))
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end_s = None if timeout is None else time.monotonic() + timeout
        while (code := self.poll()) is None:
            if end_s is not None and time.monotonic() > end_s:
                assert timeout is not None
                raise subprocess.TimeoutExpired(f"process {self.pid}", timeout)
            time.sleep(POLL_S)
        return code

    def send_signal(self, number: int) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)


def can_fork(command: list[str], env: dict[str, str]) -> bool:
    """Whether the command is a script or a module for this Python, on the CPU and with one thread."""
    is_python = command[0] == sys.executable and (command[1] == "-m" or command[1].endswith(".py"))
    return is_python and all(env.get(name) == value for name, value in MUST_BE.items())


def fork(command: list[str], log: Path, env: dict[str, str], cwd: Path) -> Forked:
    """Starts the command in a session of its own, its output in `log`."""
    forker, folder = _forker()
    assert forker.stdin is not None and forker.stdout is not None
    request = {"arguments": command[1:], "log": str(log), "env": env, "cwd": str(cwd)}
    forker.stdin.write(json.dumps(request) + "\n")
    forker.stdin.flush()
    pid = int(forker.stdout.readline())
    return Forked(pid, folder / str(pid))


@functools.cache
def _forker() -> tuple[subprocess.Popen[str], Path]:
    """The process that forks, started when it is first needed."""
    folder = tempfile.TemporaryDirectory(prefix="forked-")
    repo = str(Path(__file__).resolve().parents[2])
    environment = {**os.environ, **MUST_BE, "PYTHONPATH": repo}
    forker = subprocess.Popen(
        [sys.executable, str(Path(__file__)), folder.name], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        env=environment, text=True, start_new_session=True,
    )  # fmt: skip

    def end() -> None:
        assert forker.stdin is not None
        forker.stdin.close()
        try:
            forker.wait(10.0)
        except subprocess.TimeoutExpired:
            forker.kill()
            forker.wait()
        folder.cleanup()

    atexit.register(end)
    return forker, Path(folder.name)


# ---- in the process that forks


def next_request(folder: Path) -> dict[str, Any] | None:
    """In each forked process, what it shall run; None where the input has ended."""
    running: set[int] = set()
    pending = b""
    while True:
        readable, _, _ = select.select([0], [], [], POLL_S if running else None)
        for pid in sorted(running):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                running.discard(pid)
                (folder / f"{pid}.new").write_text(str(os.waitstatus_to_exitcode(status)), encoding="utf-8")
                os.replace(folder / f"{pid}.new", folder / str(pid))
        if not readable:
            continue
        read = os.read(0, 1 << 20)
        if not read:
            return None
        pending += read
        while b"\n" in pending:
            line, _, pending = pending.partition(b"\n")
            pid = os.fork()
            if pid == 0:
                request: dict[str, Any] = json.loads(line)
                return request
            running.add(pid)
            (folder / str(pid)).unlink(missing_ok=True)  # of an earlier process of this number
            os.write(1, f"{pid}\n".encode())


def become(request: dict[str, Any]) -> None:
    """Makes this process what a new one would be, and runs its script or module."""
    import numpy

    os.setsid()
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND, 0o644)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    os.close(log)
    os.close(nothing)
    numpy.random.seed()
    first, *rest = request["arguments"]
    if first == "-m":
        sys.argv, sys.path[0] = rest, request["cwd"]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0] = [first, *rest], str(Path(first).parent)
        runpy.run_path(first, run_name="__main__")


def main() -> None:
    import importlib

    said = os.dup(1)  # answers alone go to standard output
    os.dup2(2, 1)
    for name in PRELOADED:
        importlib.import_module(name)
    sys.stdout.flush()
    os.dup2(said, 1)
    os.close(said)
    own = {"mvptr_ds", "tests"} & {name.partition(".")[0] for name in sys.modules}
    num_threads = len(os.listdir("/proc/self/task"))
    assert not own and num_threads == 1, (own, num_threads)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    request = next_request(Path(sys.argv[1]))
    if request is not None:
        become(request)


if __name__ == "__main__":
    main()
