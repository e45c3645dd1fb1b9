"""What takes minutes (`make faults`): a node that dies, a preemption, and a resume on one node instead of two."""

from __future__ import annotations

import json
import os
import signal
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPO
from tests.slurm.cluster import HERE, Cluster, wait_until
from tests.slurm.conftest import freeze_at, submit_chain, text
from tools.dev import faults

pytestmark = [pytest.mark.faults, pytest.mark.timeout(1200)]


def test_a_node_that_dies(cluster: Cluster, settings: list[str], undisturbed: Path, tmp_path: Path) -> None:
    """SLURM notices after its SlurmdTimeout (20 s), requeues the job, and starts it when the node is back.

    The rank on it falls silent, as on a node without power: killed, it would be seen by the other one at once.
    """
    run_dir = tmp_path / "run"
    jobs = submit_chain(cluster, tmp_path, settings)
    cluster.call("scancel", jobs["evaluate"])
    pids = freeze_at(cluster, jobs["stage1"], faults.Watch(run_dir), 4)
    dead = cluster.on_node("node2")
    for process in dead:  # the daemon is killed; the rest would be told of it by the kernel, so it sleeps
        process.kill() if process.name() == "slurmd" else process.suspend()
    os.kill(pids[0], signal.SIGCONT)
    cluster.wait(jobs["stage1"], "PENDING")
    for process in dead:
        with suppress(psutil.NoSuchProcess):
            process.kill()
    said = text(tmp_path / f"mvptr-stage1-{jobs['stage1']}.log")
    assert "DUE TO NODE FAILURE" in said and "back into the queue" not in said, said
    cluster.call(str(HERE / "start_node.sh"), "node2")
    for job in (jobs["stage1"], jobs["stage2"]):
        assert cluster.wait(job) == "COMPLETED"
    assert cluster.job(jobs["stage1"])["Restarts"] == "1"
    assert faults.differences(run_dir, undisturbed / "run") == []


def test_preempted_by_a_higher_partition(
    cluster: Cluster, settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """Another job takes both nodes: the ranks save within the grace time, and go on when it is done."""
    run_dir = tmp_path / "run"
    jobs = submit_chain(cluster, tmp_path, settings)
    cluster.call("scancel", jobs["evaluate"])
    log = tmp_path / f"mvptr-stage1-{jobs['stage1']}.log"
    pids = freeze_at(cluster, jobs["stage1"], faults.Watch(run_dir), 4)
    arguments = ("--partition=urgent", "--nodes=2", "--gpus-per-node=8", "--output=urgent.log", "--wrap=sleep 3")
    urgent = cluster.sbatch(*arguments, cwd=tmp_path)
    wait_until(lambda: cluster.job(jobs["stage1"])["PreemptTime"] != "None", "the job is preempted")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    assert cluster.wait(urgent) == "COMPLETED"
    for job in (jobs["stage1"], jobs["stage2"]):
        assert cluster.wait(job) == "COMPLETED", text(log)
    assert "stage 1 is saved" in text(log) and "start 1] stage 1 ended well" in text(log), text(log)
    assert "stopped at step" in text(run_dir / "logs/stage1-rank0.log")
    assert faults.differences(run_dir, undisturbed / "run") == []


def losses(stage_dir: Path) -> dict[tuple[int, str], float]:
    lines = [json.loads(line) for line in text(stage_dir / "metrics.jsonl").splitlines()]
    return {(line["step"], key): line[key] for line in lines for key in line if key.startswith("loss/")}


def test_one_node_instead_of_two(cluster: Cluster, settings: list[str], tmp_path: Path) -> None:
    """Half of stage 1 on two nodes, the rest on one, with dropout off: the same losses to rounding."""
    plain = [*settings, "model.dropout=0", "model.attention_dropout=0"]
    script = str(REPO / "slurm/stage1.sh")

    def run(name: str, nodes: int, *overrides: str) -> None:
        job = cluster.sbatch(f"--nodes={nodes}", script, *plain, *overrides, f"run.dir={tmp_path / name}", cwd=tmp_path)
        assert cluster.wait(job) == "COMPLETED", text(tmp_path / f"mvptr-stage1-{job}.log")

    run("two", 2)
    job = cluster.sbatch("--nodes=2", script, *plain, f"run.dir={tmp_path / 'fewer'}", cwd=tmp_path)
    pids = freeze_at(cluster, job, faults.Watch(tmp_path / "fewer"), 4)
    cluster.call("scancel", job)
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    cluster.wait(job, "CANCELLED")
    run("fewer", 1)
    assert "trained on 1 ranks" in text(tmp_path / "fewer/logs/stage1-rank0.log")
    assert losses(tmp_path / "fewer/stage1") == pytest.approx(losses(tmp_path / "two/stage1"), rel=1e-6, abs=1e-6)
