"""The cluster, tiny shards, and the run that nobody disturbs."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.slurm.cluster import Cluster, wait_until, why_not
from tools.dev import faults


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)
    with Cluster(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(scope="session")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Overrides: nine steps a stage with dropout, accumulation and a checkpoint every second step."""
    return faults.build_shards(tmp_path_factory.mktemp("shards"))


def submit_chain(cluster: Cluster, folder: Path, settings: list[str], **variables: str) -> dict[str, str]:
    """`slurm/submit.sh` on two nodes with a rank each, the run in `folder`/run; name -> id."""
    folder.mkdir(parents=True, exist_ok=True)
    variables = {"NODES": "2", "SBATCH_GPUS_PER_NODE": "1", "RUN_DIR": str(folder / "run"), **variables}
    script = str(Path(cluster.environment["MVPTR_DIR"]) / "slurm/submit.sh")
    printed = cluster.call(script, *settings, cwd=folder, **variables)
    return dict(line.split() for line in printed.splitlines())


@pytest.fixture(scope="session")
def undisturbed(cluster: Cluster, settings: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1, stage 2 and the evaluation by submit.sh; the folder it was submitted from."""
    folder = tmp_path_factory.mktemp("undisturbed")
    jobs = submit_chain(cluster, folder, settings)
    assert list(jobs) == ["stage1", "stage2", "evaluate"]
    for name, job in jobs.items():
        log = folder / f"mvptr-{name}-{job}.log"
        state = cluster.wait(job)
        assert state == "COMPLETED", f"{name} is {state}\n{log.read_text() if log.exists() else ''}"
    return folder


def text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.exists() else ""


def freeze_at(cluster: Cluster, job: str, watch: faults.Watch, num_reports: int) -> list[int]:
    """Stops the ranks once so many steps are logged; their pids by rank. Time passes, the run does not."""
    wait_until(lambda: watch.num_reports() >= num_reports, f"{num_reports} steps are logged")
    ranks = cluster.ranks(job)
    pids = [ranks[rank].pid for rank in range(2)]
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    return pids
