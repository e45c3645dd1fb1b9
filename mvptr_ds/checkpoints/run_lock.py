"""One start at a time in a run folder: two would overwrite each other's checkpoints.

    RUN/lock    who trains here: host, process, SLURM job; rank 0 renews its time every BEAT_S seconds

The file is made with O_EXCL, which is atomic on network storage too. A start that finds one waits a little for its
owner to end, and takes it over once the owner is gone. An owner is gone when

- it ran on this machine, and its process has ended;
- it was an earlier start of the same SLURM job;
- it ran elsewhere, and the file's time has stood still for SILENT_S.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvptr_ds.distributed import collectives
from mvptr_ds.errors import RunLockError
from mvptr_ds.user_io.atomic import replacing

logger = logging.getLogger(__name__)
NAME = "lock"
BEAT_S = 10.0
POLL_S = 2.0
WAIT_S = 30.0  # for an owner that still runs: it may be about to stop
SILENT_S = 60.0  # several beats
OLD_S = 600.0  # more than the clocks of two machines differ: a lock so old needs no wait
CANNOT_BE_MADE = {errno.EACCES, errno.EEXIST, errno.ENOTDIR, errno.EPERM, errno.EROFS}


@contextmanager
def only_start(run_dir: Path) -> Iterator[Callable[[], None]]:
    """Holds the lock of a run folder, on rank 0, as long as the context lasts. All ranks call it.

    Yields:
        A function for rank 0 that raises RunLockError once another start has taken the lock over.

    Raises:
        RunLockError: on all ranks, where another start trains here.
    """
    lock = RunLock(run_dir)
    collectives.run_on_rank_zero(lock.take)
    try:
        yield lock.check
    finally:
        if collectives.is_main():
            lock.release()


@dataclass(frozen=True)
class Held:
    """A lock that was found: its content, and when its owner last renewed it."""

    text: str
    renewed_ns: int

    @property
    def owner(self) -> dict[str, Any]:
        """The content as written by the owner; empty where the file was found half written."""
        try:
            content = json.loads(self.text)
        except ValueError:
            return {}
        return content if isinstance(content, dict) else {}

    def __str__(self) -> str:
        owner = self.owner
        job = f", SLURM job {owner['job']}" if owner.get("job") else ""
        return f"host {owner.get('host', '?')}, process {owner.get('pid', '?')}{job}, since {owner.get('since', '?')}"


class RunLock:
    """The lock of a run folder, taken, renewed by a thread, released by one process."""

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / NAME
        self.token = secrets.token_hex(8)
        self._text = json.dumps({"token": self.token, **_myself()})
        self._released = threading.Event()

    def take(self) -> None:
        """Takes the lock, after a minute and a half of waiting at most.

        Raises:
            RunLockError: another start has it.
            ValueError, OSError: the run folder cannot be written.
        """
        last: Held | None = None
        waited_s = unchanged_s = 0.0
        while not self._create():
            held = self._read()
            unchanged_s = unchanged_s + POLL_S if held == last else 0.0
            if held is not None:
                alive, why = _alive(held, unchanged_s)
                if alive is False:
                    if self._take_over(held):
                        logger.warning("%s of %s is taken over: %s", self.path, held, why)
                        break
                elif alive and waited_s >= WAIT_S:
                    raise RunLockError(
                        f"{self.path.parent} is trained in by another start ({held}): wait for its end or end it, or "
                        f"give this one another run.dir; remove {self.path} only where you know that it is gone"
                    )
                elif last is None:
                    logger.info("%s is held by another start (%s): waiting for its end", self.path, held)
            last = held
            time.sleep(POLL_S)  # looks are counted, not time: storage may stand still for all
            waited_s += POLL_S
        threading.Thread(target=self._renew, name="run-lock", daemon=True).start()

    def check(self) -> None:
        """Raises RunLockError where another start has taken the lock over."""
        held = None
        with suppress(OSError):  # the save that follows reports what is wrong with the storage
            held = self._read()
        if held is not None and held.text != self._text:
            raise RunLockError(
                f"{self.path.parent} was taken over by another start ({held}), to which this one seemed gone: it ends "
                "without saving"
            )

    def release(self) -> None:
        """Removes the lock, if it is still this one's."""
        self._released.set()
        with suppress(OSError):
            held = self._read()
            if held is not None and held.text == self._text:
                self.path.unlink()

    def _create(self) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            file = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
        except OSError as error:
            if isinstance(error, FileExistsError) and self.path.parent.is_dir():
                return False
            if error.errno in CANNOT_BE_MADE:
                raise ValueError(
                    f"run.dir={self.path.parent}: {error}: set another run.dir, or get the rights to write there"
                ) from error
            raise
        try:
            with os.fdopen(file, "w", encoding="utf-8") as opened:
                opened.write(self._text)
        except OSError:
            with suppress(OSError):
                self.path.unlink()
            raise
        return True

    def _read(self) -> Held | None:
        """Reads the lock, None where there is none. Opening the file again bypasses the cache of network storage."""
        try:
            with self.path.open(encoding="utf-8", errors="replace") as opened:
                return Held(opened.read(), os.fstat(opened.fileno()).st_mtime_ns)
        except FileNotFoundError:
            return None

    def _take_over(self, held: Held) -> bool:
        """Replaces the lock that was found by this one. Returns False where another start was quicker."""
        taking = self.path.with_name(f"{NAME}-taking")
        try:
            os.close(os.open(taking, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            with suppress(OSError):
                if time.time() - taking.stat().st_mtime > SILENT_S:  # of a start that was killed just here
                    taking.unlink()
            return False
        try:
            now = self._read()
            if now is None or now.text != held.text:
                return False
            with replacing(self.path, self.token) as partial:  # so that no start can make one in between
                partial.write_text(self._text, encoding="utf-8")
        finally:
            taking.unlink(missing_ok=True)
        return True

    def _renew(self) -> None:
        while not self._released.wait(BEAT_S):
            with suppress(OSError):  # storage that stands still for a while
                held = self._read()
                if held is None:
                    self._create()
                elif held.text == self._text:
                    os.utime(self.path)


def _myself() -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "machine": _machine(),
        "pid_started": _started(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID"),
        "job_start": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "since": time.strftime("%F %T"),
    }


def _alive(held: Held, unchanged_s: float) -> tuple[bool | None, str]:
    """Whether the owner of a lock still runs, None where that is not known yet; and if it does not, why.

    Args:
        unchanged_s: for how long the lock's time was seen to stand still.
    """
    owner, here = held.owner, _myself()
    if here["job"] is not None and owner.get("job") == here["job"] and owner.get("job_start") != here["job_start"]:
        return False, "this is the same SLURM job, started again"
    if here["machine"] is None or owner.get("machine") != here["machine"]:
        if unchanged_s >= SILENT_S or time.time() - held.renewed_ns / 1e9 > OLD_S:
            return False, "it has given no sign of life for a while"
        return (True if unchanged_s < 2 * BEAT_S else None), ""
    if _started(int(owner["pid"])) == owner["pid_started"]:
        return True, ""
    return False, f"its process {owner['pid']} is gone"


def _machine() -> str | None:
    """Names the boot of this machine and the container, within which a process number means one process."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:  # not Linux
        return None


def _started(pid: int) -> str | None:
    """When a process was started, in clock ticks, None where it is gone. It tells processes of one number apart."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except OSError:
        return None
    return None if state in "ZX" else fields[18]  # a zombie only waits for its parent
