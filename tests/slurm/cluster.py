"""A real two-node SLURM cluster on this machine, and what the tests ask of it."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import REPO

HERE = Path(__file__).parent
PROGRAMS = ("munged", "slurmctld", "slurmd", "srun", "unshare")
WAIT_S = 240.0  # for anything to happen on a busy machine
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE")


def why_not() -> str | None:
    """Why no cluster can be started here, or None."""
    if os.geteuid() != 0:
        return "a SLURM cluster needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"no {', '.join(missing)} here: apt-get install slurmctld slurmd slurm-client munge"
    if subprocess.run(["unshare", "--uts", "--mount", "true"], capture_output=True).returncode != 0:
        return "no name spaces here (unshare --uts --mount)"
    return None


def wait_until(condition: Callable[[], Any], what: str, limit_s: float = WAIT_S) -> Any:
    deadline_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"not within {limit_s:.0f} s: {what}"
        time.sleep(0.02)
    return value


class Cluster:
    """Started on entry; ended on leaving, and also when this process is killed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "SBATCH", "RANK", "WORLD_SIZE"))},
            "CLUSTER_ROOT": str(root),
            "CLUSTER_PORT": str(_free_ports(3)),
            "SLURM_CONF": str(root / "slurm.conf"),
            "MVPTR_DIR": str(REPO),
            "PYTHON": sys.executable,
            "PYTHONPATH": str(REPO),
            "OMP_NUM_THREADS": "1",
            "DS_ACCELERATOR": "cpu",
            "LOCAL_CACHE": str(root / "cache"),
        }

    def __enter__(self) -> Cluster:
        self.root.mkdir(parents=True, exist_ok=True)
        stop = f"tail --pid={os.getpid()} -f /dev/null; exec {HERE / 'stop_cluster.sh'}"
        self.watcher = subprocess.Popen(["bash", "-c", stop], env=self.environment, start_new_session=True)
        try:
            self.call(str(HERE / "start_cluster.sh"))
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.call(str(HERE / "stop_cluster.sh"))
        with suppress(ProcessLookupError):
            os.killpg(self.watcher.pid, signal.SIGKILL)
        self.watcher.wait()

    def call(self, *command: str, cwd: Path = REPO, **variables: str) -> str:
        """What a command prints; it must end with 0."""
        done = subprocess.run(
            command, cwd=cwd, env=self.environment | variables, capture_output=True, text=True, timeout=120
        )
        assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}{done.stderr}"
        return done.stdout

    def sbatch(self, *arguments: str, cwd: Path, **variables: str) -> str:
        """Submits; the id. Logs are written below `cwd`."""
        return self.call("sbatch", "--parsable", *arguments, cwd=cwd, **variables).strip()

    def job(self, job: str) -> dict[str, str]:
        """What `scontrol show job` says of it."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.call("scontrol", "show", "job", "-o", job)))

    def state(self, job: str) -> str:
        return self.job(job)["JobState"]

    def wait(self, job: str, *states: str, limit_s: float = WAIT_S) -> str:
        """Waits until the job has one of these states (default: any in which it has ended); that state."""
        wanted = states or ENDED
        return str(wait_until(lambda: (s := self.state(job)) in wanted and s, f"job {job} is {wanted}", limit_s))

    def ranks(self, job: str) -> dict[int, psutil.Process]:
        """The live ranks of a job's step, by number; their loader processes are left out."""
        found = {}
        for process in psutil.process_iter():
            with suppress(psutil.Error, KeyError, IndexError):
                variables = process.environ()
                if variables["SLURM_JOB_ID"] != job or variables["SLURM_CONF"] != self.environment["SLURM_CONF"]:
                    continue
                if "SLURM_STEP_NUM_TASKS" not in variables or not _trains(process):
                    continue
                parent = process.parent()
                if parent is None or not _trains(parent):
                    found[int(variables["SLURM_PROCID"])] = process
        return found

    def on_node(self, node: str) -> list[psutil.Process]:
        """Everything that runs on a node: it has a name space of its own."""
        own = os.readlink(f"/proc/{(self.root / f'slurmd.{node}.pid').read_text().strip()}/ns/uts")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):
                if os.readlink(f"/proc/{process.pid}/ns/uts") == own:
                    found.append(process)
        return found


def _trains(process: psutil.Process) -> bool:
    return process.cmdline()[1].endswith("mvptr_ds/train.py")


def _free_ports(number: int) -> int:
    """The first of so many neighbouring ports that nobody uses."""
    while True:
        first = random.SystemRandom().randrange(10_000, 19_000)
        with suppress(OSError):
            for port in range(first, first + number):
                with socket.socket() as s:
                    s.bind(("", port))
            return first
