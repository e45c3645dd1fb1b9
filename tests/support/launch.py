"""Starts a program on several gloo ranks of this machine, with a time limit, and leaves no process behind."""

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

TAIL_CHARS = 6000


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
def started(command: list[str], log: Path, env: dict[str, str], cwd: Path = REPO) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, all of which is ended on leaving, whatever happened."""
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
    port, deadline = str(free_port()), time.monotonic() + timeout_s
    with _all_started(module, num_ranks, folder, port) as processes:
        codes: list[int | None] = [None] * num_ranks
        while None in codes and time.monotonic() < deadline and not any(codes):
            codes = [process.poll() for process in processes]
            time.sleep(0.05)
    if any(code != 0 for code in codes):
        outputs = "\n".join(f"--- rank {rank}\n{tail(folder / f'rank{rank}.log')}" for rank in range(num_ranks))
        raise AssertionError(f"exit codes {codes} (None: still running after {timeout_s} s)\n{outputs}")


@contextmanager
def _all_started(module: str, num_ranks: int, folder: Path, port: str) -> Iterator[list[subprocess.Popen[bytes]]]:
    with ExitStack() as stack:
        yield [
            stack.enter_context(
                started(
                    [sys.executable, "-m", module, str(folder)],
                    folder / f"rank{rank}.log",
                    environment(
                        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(num_ranks), LOCAL_SIZE=str(num_ranks),
                        MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                    ),
                )
            )
            for rank in range(num_ranks)
        ]  # fmt: skip
