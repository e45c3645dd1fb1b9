"""One start at a time in a run folder, and what a start that is gone leaves."""

from __future__ import annotations

import json
import logging
import os
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.checkpoints import run_lock
from mvptr_ds.checkpoints.run_lock import RunLock, only_start
from mvptr_ds.errors import RunLockError

ELSEWHERE = {"host": "node7", "pid": 1, "machine": "another", "pid_started": "1", "job": None, "job_start": "0"}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second of the real limits is a hundredth here."""
    for name in ("BEAT_S", "POLL_S", "WAIT_S", "SILENT_S"):
        monkeypatch.setattr(run_lock, name, getattr(run_lock, name) / 100)
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def process() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "600"]) as started:
        yield started
        started.kill()


def write(run_dir: Path, **owner: Any) -> Path:
    run_dir.mkdir(parents=True, exist_ok=True)
    path = run_dir / "lock"
    path.write_text(json.dumps({**ELSEWHERE, "since": "2026-11-29 10:00:00", **owner}), encoding="utf-8")
    return path


def owned_by(pid: int) -> dict[str, Any]:
    return {"pid": pid, "machine": run_lock._machine(), "pid_started": run_lock._started(pid)}


def take_at_once(run_dir: Path) -> None:
    """By a lock that would wait for a minute if it had to ask anybody."""
    started_s = time.monotonic()
    lock = RunLock(run_dir)
    lock.take()
    lock.release()
    assert time.monotonic() - started_s < run_lock.WAIT_S


def test_a_second_start_is_refused_with_who_has_it(tmp_path: Path) -> None:
    run_dir = tmp_path / "deep/run"
    with only_start(run_dir) as check:
        check()
        with pytest.raises(
            RunLockError, match=rf"process {os.getpid()}, since .* another run.dir; remove .*/lock only"
        ):
            RunLock(run_dir).take()
        check()
    assert list(run_dir.iterdir()) == []
    with pytest.raises(KeyError), only_start(run_dir):
        raise KeyError
    take_at_once(run_dir)


def test_a_start_waits_for_one_that_is_about_to_end(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.take()
    threading.Timer(run_lock.WAIT_S / 2, first.release).start()
    second.take()
    second.check()
    second.release()


def test_a_lock_of_a_killed_process_is_taken_over_at_once(
    tmp_path: Path, process: subprocess.Popen[bytes], caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, **owned_by(process.pid))
    with pytest.raises(RunLockError, match=f"host node7, process {process.pid}, since 2026-11-29 10:00:00"):
        RunLock(tmp_path).take()
    os.kill(process.pid, 9)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # its parent has not asked for it yet
    with caplog.at_level(logging.WARNING):
        take_at_once(tmp_path)
    assert f"is taken over: its process {process.pid} is gone" in caplog.text


def test_the_number_of_a_process_may_be_used_again(tmp_path: Path) -> None:
    write(tmp_path, **owned_by(os.getpid()) | {"pid_started": "1"})
    take_at_once(tmp_path)


def test_a_lock_of_another_machine_lives_by_its_time(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, over = write(tmp_path), threading.Event()

    def renew() -> None:
        while not over.wait(run_lock.BEAT_S):
            os.utime(path)

    with ThreadPoolExecutor(1) as pool:
        work = pool.submit(renew)
        with pytest.raises(RunLockError, match="host node7"):
            RunLock(tmp_path).take()
        over.set()
        work.result()
    started_s, lock = time.monotonic(), RunLock(tmp_path)
    with caplog.at_level(logging.WARNING):
        lock.take()
    assert time.monotonic() - started_s >= run_lock.SILENT_S
    assert "is taken over: it has given no sign of life for a while" in caplog.text
    lock.release()


@pytest.mark.parametrize("text", ["", "[]", '{"host"'])
def test_a_lock_that_was_cut_is_taken_over(tmp_path: Path, text: str) -> None:
    (tmp_path / "lock").write_text(text, encoding="utf-8")
    lock = RunLock(tmp_path)
    lock.take()
    lock.release()


def test_an_old_lock_of_another_machine_is_taken_over_at_once(tmp_path: Path) -> None:
    os.utime(write(tmp_path), (time.time() - 3600,) * 2)
    take_at_once(tmp_path)


def test_a_requeued_job_takes_over_its_own_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    write(tmp_path, job="17", job_start="0")
    take_at_once(tmp_path)
    write(tmp_path, job="17", job_start="0", **owned_by(os.getpid()))  # a step that SLURM has left behind, stopped
    take_at_once(tmp_path)
    for other in ({"job": "17", "job_start": "1"}, {"job": "16"}):  # two starts in one job, another job
        write(tmp_path, **owned_by(os.getpid()), **other)
        with pytest.raises(RunLockError, match="SLURM job 1"):
            RunLock(tmp_path).take()


def test_of_many_that_take_over_one_wins(tmp_path: Path) -> None:
    for _ in range(6):
        write(tmp_path, **owned_by(os.getpid()) | {"pid_started": "1"})
        locks = [RunLock(tmp_path) for _ in range(6)]

        def won(lock: RunLock) -> bool:
            try:
                lock.take()
            except RunLockError:
                return False
            return True

        with ThreadPoolExecutor(len(locks)) as pool:
            winners = [lock for lock, has_won in zip(locks, pool.map(won, locks), strict=True) if has_won]
        assert len(winners) == 1
        winners[0].check()  # nobody has taken it over from there
        winners[0].release()
        assert list(tmp_path.iterdir()) == []


def test_one_that_was_taken_over_ends_and_leaves_the_lock(tmp_path: Path) -> None:
    """A process that stood still for minutes, say."""
    lock = RunLock(tmp_path)
    lock.take()
    path = write(tmp_path)
    with pytest.raises(RunLockError, match=r"was taken over by another start \(host node7"):
        lock.check()
    time.sleep(5 * run_lock.BEAT_S)
    lock.release()
    assert "node7" in path.read_text(encoding="utf-8")


def test_a_lock_is_renewed_and_made_again(tmp_path: Path) -> None:
    with only_start(tmp_path) as check:
        path = tmp_path / "lock"
        for _ in range(2):
            os.utime(path, (0, 0))
            deadline_s = time.monotonic() + 60.0
            while not path.exists() or path.stat().st_mtime == 0:
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
            check()
            path.unlink()  # and again, once it was removed
            while not path.exists():
                assert time.monotonic() < deadline_s
                time.sleep(0.01)
