"""Starts a program on several gloo ranks of this machine, with a time limit, and leaves no process behind.

A Python script or module is forked from a process that has torch imported (forked.py); anything else is started.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from tests.conftest import REPO
from tests.support.forked import Forked, can_fork, fork

TAIL_CHARS = 6000
Process = subprocess.Popen[bytes] | Forked


def environment(**changes: str) -> dict[str, str]:
    """This process's environment without what would make a rank of it; one thread a rank."""
    kept = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")}
    tools = f"{Path(sys.executable).parent}{os.pathsep}{kept.get('PATH', '')}"
    paths = os.pathsep.join([str(REPO), *filter(None, [kept.get("PYTHONPATH")])])
    defaults = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "PATH": tools}
    return {**kept, **defaults, "PYTHONPATH": paths, **changes}


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


@contextmanager
def started(command: list[str], log: Path, env: dict[str, str], cwd: Path = REPO) -> Iterator[Process]:
    """A process in a session of its own, all of which is ended on leaving, whatever happened."""
    process: Process
    if can_fork(command, env):
        process = fork(command, log, env, cwd)
    else:
        with log.open("wb") as file:
            process = subprocess.Popen(
                command, cwd=cwd, env=env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
            )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def tail(log: Path) -> str:
    return log.read_text(encoding="utf-8", errors="replace")[-TAIL_CHARS:]


def run(command: list[str], log: Path, timeout_s: float, cwd: Path = REPO, **env: str) -> tuple[int, str]:
    """Exit code and output of a command; a hang is a failure.

    Raises:
        AssertionError: it did not end in time.
    """
    with started(command, log, environment(**env), cwd) as process:
        try:
            code = process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{command[:4]} still ran after {timeout_s} s\n{tail(log)}") from None
    return code, log.read_text(encoding="utf-8", errors="replace")


def run_ranks(module: str, num_ranks: int, folder: Path, timeout_s: float) -> None:
    """`python -m MODULE FOLDER` on every rank; all must end with 0 in time.

    Raises:
        AssertionError: with the end of every rank's output.
    """
    codes = run_on_ranks(["-m", module, str(folder)], num_ranks, folder, timeout_s)
    if any(code != 0 for code in codes):
        outputs = "\n".join(f"--- rank {rank}\n{tail(folder / f'rank{rank}.log')}" for rank in range(num_ranks))
        raise AssertionError(f"exit codes {codes} (None: still running after {timeout_s} s)\n{outputs}")


def run_on_ranks(arguments: list[str], num_ranks: int, logs: Path, timeout_s: float) -> list[int | None]:
    """`python ARGUMENTS` on every rank, without a launcher: the exit codes when all have ended, or one with an error.

    Then, and when the time is up (None: still running), all are ended. Each rank writes to LOGS/rankN.log.
    """
    common = {"WORLD_SIZE": str(num_ranks), "LOCAL_SIZE": str(num_ranks), "MASTER_ADDR": "127.0.0.1"}
    common["MASTER_PORT"] = str(free_port())
    codes: list[int | None] = [None] * num_ranks
    deadline = time.monotonic() + timeout_s
    with ExitStack() as stack:
        processes = [
            stack.enter_context(
                started(
                    [sys.executable, *arguments],
                    logs / f"rank{rank}.log",
                    environment(**common, RANK=str(rank), LOCAL_RANK=str(rank)),
                )
            )
            for rank in range(num_ranks)
        ]
        while None in codes and time.monotonic() < deadline and not any(codes):
            codes = [process.poll() for process in processes]
            time.sleep(0.02)
    return codes
