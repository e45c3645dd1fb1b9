"""slurm/*.sh on a real two-node cluster: stages chained, a killed rank, the time limit; what is not started again."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.slurm.cluster import Cluster, wait_until
from tests.slurm.conftest import freeze_at, submit_chain, text
from tools.dev import faults

pytestmark = pytest.mark.timeout(900)


def test_stage_1_then_stage_2_then_the_evaluation(undisturbed: Path) -> None:
    run_dir = undisturbed / "run"
    assert "stage2 starts from " + str(run_dir / "stage1/checkpoints/step-00000009/model") in text(
        run_dir / "logs/stage2-rank0.log"
    )
    assert "trained on 2 ranks" in text(run_dir / "logs/stage1-rank0.log")
    assert (run_dir / "logs/stage1-rank1.log").exists()
    report = json.loads(text(run_dir / "report.json"))
    assert report["num_scenes"] == 4
    (log,) = undisturbed.glob("mvptr-evaluate-*.log")
    assert "RETRIEVAL" in text(log)


def test_a_killed_rank_and_the_time_limit_change_nothing(
    cluster: Cluster, settings: list[str], undisturbed: Path, tmp_path: Path
) -> None:
    """In stage 1 rank 1 is killed with -9, stage 2 reaches its time limit: each goes on by itself, to the same bits."""
    run_dir = tmp_path / "run"
    overrides = [*settings, "wandb.mode=offline"]
    jobs = submit_chain(cluster, tmp_path, overrides, SBATCH_SIGNAL="B:USR1@120")
    cluster.call("scancel", jobs["evaluate"])
    watch = faults.Watch(run_dir)
    wait_until(lambda: watch.num_reports() >= 3, "3 steps are logged")
    cluster.ranks(jobs["stage1"])[1].kill()
    assert cluster.wait(jobs["stage1"]) == "COMPLETED"
    said = text(tmp_path / f"mvptr-stage1-{jobs['stage1']}.log")
    assert "srun ended with 137" in said and "start 1] stage 1 ended well" in said, said

    stage2 = jobs["stage2"]
    pids = freeze_at(cluster, stage2, watch, faults.NUM_STEPS + 3)
    elapsed = cluster.job(stage2)["RunTime"].split(":")  # H:M:S
    minutes = int(elapsed[0]) * 60 + int(elapsed[1])
    cluster.call("scontrol", "update", f"JobId={stage2}", f"TimeLimit={minutes + 3}")
    log = tmp_path / f"mvptr-stage2-{stage2}.log"
    wait_until(lambda: "the time limit is near" in text(log), "SLURM warns of the time limit")
    for pid in pids:
        os.kill(pid, signal.SIGCONT)
    cluster.wait(stage2, "PENDING")
    cluster.call("scontrol", "update", f"JobId={stage2}", "TimeLimit=60")
    assert cluster.wait(stage2) == "COMPLETED", text(log)
    said = text(log)
    assert "start 0] stage 2 is saved" in said and "start 1] stage 2 ended well" in said, said
    rank_0 = text(run_dir / "logs/stage2-rank0.log")  # both starts in one file
    assert "stage2 stopped at step" in rank_0 and "stage2 goes on from step" in rank_0
    assert faults.differences(run_dir, undisturbed / "run") == []
    for stage in ("stage1", "stage2"):
        run_id = text(run_dir / stage / "wandb_id")
        assert len(list((run_dir / stage).glob(f"wandb/offline-run-*-{run_id}"))) == 2


def test_fine_tuning_follows_stage_2_and_is_what_is_evaluated(
    cluster: Cluster, settings: list[str], tmp_path: Path
) -> None:
    """Retrieval on the same shards, which ends early: a second evaluation in a row is not better."""
    tuning = tmp_path / "tuning.yaml"
    tuning.write_text("extends: demo\nrun: {dir: elsewhere, stages: [retrieval]}\n", encoding="utf-8")
    own = ["retrieval.max_steps=8", "retrieval.learning_rate=0", "retrieval.patience=1", "train.evaluate_every_steps=2"]
    data = [item for item in settings if item.startswith(("data.", "train."))]
    jobs = submit_chain(cluster, tmp_path, settings, FINETUNE=str(tuning), FINETUNE_OVERRIDES=" ".join([*data, *own]))
    assert list(jobs) == ["stage1", "stage2", "finetune", "evaluate"]
    run_dir = tmp_path / "run"
    for name, job in jobs.items():
        assert cluster.wait(job) == "COMPLETED", text(tmp_path / f"mvptr-{name}-{job}.log")
    said = text(run_dir / "logs/retrieval-rank0.log")
    stage2 = run_dir / "stage2/checkpoints" / f"step-{faults.NUM_STEPS:08d}/model"
    assert f"retrieval starts from {stage2}" in said and "retrieval is finished: it stopped at step 4" in said
    assert "retrieval ended well" in text(tmp_path / f"mvptr-finetune-{jobs['finetune']}.log")
    report = json.loads(text(run_dir / "report.json"))
    assert report["model"] == str(run_dir / "retrieval/checkpoints/step-00000002/model")


def test_stage_2_without_a_finished_stage_1_is_refused_and_not_started_again(
    cluster: Cluster, settings: list[str], tmp_path: Path
) -> None:
    arguments = ["--nodes=2", str(REPO / "slurm/stage2.sh"), *settings, f"run.dir={tmp_path / 'run'}"]
    job = cluster.sbatch(*arguments, cwd=tmp_path)
    assert cluster.wait(job) == "FAILED" and cluster.job(job)["ExitCode"] == "2:0"
    said = text(tmp_path / f"mvptr-stage2-{job}.log")
    assert "not started again" in said and "stage 2 starts from a finished stage 1" in said, said
    assert "Restarts=0" in cluster.call("scontrol", "show", "job", job)


def test_preflight_only_looks_at_both_nodes_and_trains_nothing(
    cluster: Cluster, settings: list[str], tmp_path: Path
) -> None:
    """Two jobs at once: one that is well, and one with two mistakes, which are both said."""

    def submit(name: str, *overrides: str) -> str:
        arguments = [*settings, "train.preflight_only=true", f"run.dir={tmp_path / name}", *overrides]
        return cluster.sbatch("--nodes=2", str(REPO / "slurm/stage1.sh"), *arguments, cwd=tmp_path)

    well, wrong = submit("well"), submit("wrong", "train.profile_steps=[1]", "data.held_out=nowhere")
    assert cluster.wait(well) == "COMPLETED", text(tmp_path / f"mvptr-stage1-{well}.log")
    said = text(tmp_path / "well/logs/stage1-rank0.log")
    for part in (
        r"ok +all-reduce +2 ranks, [\d.]+ GB/s a rank \(gloo, 16 MiB\)",
        r"ok +devices +cpu on node1, node2\n",
        r"ok +run folder +\S+/well is written and seen by all ranks",
        r"ok +batch +16 samples a step = 2 ranks x 2 accumulated x 4",
        r"preflight: \d+ checks well, 0 warnings",
    ):
        assert re.search(part, said), f"{part} is not in\n{said}"
    assert [path.name for path in (tmp_path / "well").iterdir()] == ["logs"]

    assert cluster.wait(wrong) == "FAILED" and cluster.job(wrong)["ExitCode"] == "2:0"
    said = text(tmp_path / f"mvptr-stage1-{wrong}.log")
    assert "preflight found 2 errors:" in said and "not started again" in said, said
    assert "train.profile_steps is [1]" in said and "nowhere (data.held_out) holds no .tar file" in said, said
    assert cluster.job(wrong)["Restarts"] == "0"


# ---- without training: a stand-in for python


def stand_in(tmp_path: Path, commands: str) -> str:
    path = tmp_path / "python"
    path.write_text(f"#!/bin/bash\n{commands}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def test_a_job_that_makes_no_step_is_not_started_for_ever(cluster: Cluster, tmp_path: Path) -> None:
    variables = {"PYTHON": stand_in(tmp_path, "exit 1"), "MAX_NO_PROGRESS": "1"}
    job = cluster.sbatch(str(REPO / "slurm/stage1.sh"), cwd=tmp_path, **variables)
    assert cluster.wait(job) == "FAILED"
    said = text(tmp_path / f"mvptr-stage1-{job}.log")
    assert said.count("srun ended with 1") == 2 and "1 restarts have saved no step (MAX_NO_PROGRESS=1)" in said, said


def test_a_step_that_is_saved_counts_as_progress(cluster: Cluster, tmp_path: Path) -> None:
    """Each start saves one more step and dies; the fourth is done, though only one fruitless restart is allowed."""
    saves = (
        'n=${SLURM_RESTART_COUNT:-0}; c=runs/demo/stage1/checkpoints/step-$n; mkdir -p "$c"; touch "$c/checksums.json"'
    )
    variables = {"PYTHON": stand_in(tmp_path, f"{saves}; [ $n -ge 2 ]"), "MAX_NO_PROGRESS": "0"}
    job = cluster.sbatch(str(REPO / "slurm/stage1.sh"), cwd=tmp_path, **variables)
    assert cluster.wait(job) == "COMPLETED", text(tmp_path / f"mvptr-stage1-{job}.log")


def test_a_cancelled_job_stays_cancelled(cluster: Cluster, tmp_path: Path) -> None:
    """Though the ranks save and end with 75, as they do on every SIGTERM."""
    python = stand_in(tmp_path, "trap 'exit 75' TERM; touch started; for i in {1..600}; do sleep 0.1; done")
    job = cluster.sbatch(str(REPO / "slurm/stage1.sh"), cwd=tmp_path, PYTHON=python)
    wait_until((tmp_path / "started").exists, "the rank has started")
    cluster.call("scancel", job)
    assert cluster.wait(job) == "CANCELLED"
    time.sleep(8.0)  # cred_expire and more: it would have started again
    assert cluster.state(job) == "CANCELLED" and cluster.job(job)["Restarts"] == "0"


def test_what_a_rank_is_given(cluster: Cluster, tmp_path: Path) -> None:
    """Two ranks a node on two nodes, a site's hooks, and a container's launcher (a stand-in) on the path."""
    stand_in(tmp_path, 'echo "$@" > args-$SLURM_PROCID; env > env-$SLURM_PROCID')
    launcher = tmp_path / "bin/apptainer"
    launcher.parent.mkdir()
    launcher.write_text('#!/bin/bash\nshift 2; image=$1; shift; IMAGE=$image exec "$@"\n', encoding="utf-8")
    launcher.chmod(0o755)
    (tmp_path / "setup.sh").write_text("export PATH=$PWD/bin:$PATH FROM_SETUP=1\n", encoding="utf-8")
    (tmp_path / "data/train").mkdir(parents=True)
    (tmp_path / "data/phrase_vocab.json").touch()
    variables = {
        "PYTHON": str(tmp_path / "python"), "SETUP": "setup.sh", "CONTAINER": "image.sif", "CONFIG": "base",
        "DATA_DIR": "data", "NODES": "2",
    }  # fmt: skip
    script = str(REPO / "slurm/stage1.sh")
    job = cluster.sbatch("--nodes=2", "--gpus-per-node=2", script, "train.seed=3", cwd=tmp_path, **variables)
    assert cluster.wait(job) == "COMPLETED", text(tmp_path / f"mvptr-stage1-{job}.log")
    for rank in range(4):
        given = dict(line.partition("=")[::2] for line in text(tmp_path / f"env-{rank}").splitlines())
        assert given["SLURM_STEP_NUM_TASKS"] == "4" and given["SLURM_LOCALID"] == str(rank % 2)
        assert given["CUDA_VISIBLE_DEVICES"] == "0,1" and given["FROM_SETUP"] == "1" and given["IMAGE"] == "image.sif"
        assert given["TRITON_CACHE_DIR"] == f"{cluster.root}/cache/triton" and given["NCCL_DEBUG"] == "WARN"
        arguments = text(tmp_path / f"args-{rank}").split()
        assert arguments[0] == str(REPO / "mvptr_ds/train.py")
        wanted = {"run.stages=[1]", "run.dir=runs/base", "data.train=data/train", "train.seed=3"}
        assert wanted | {"data.phrase_vocab=data/phrase_vocab.json"} <= set(arguments)
        assert not any(argument.startswith("data.held_out=") for argument in arguments)


def test_the_environment_need_not_be_passed_on(cluster: Cluster, tmp_path: Path) -> None:
    """`--export=NONE`: all variables stand in the site's file."""
    python = stand_in(tmp_path, 'echo "$@" > args')
    (tmp_path / "site.sh").write_text(f"PYTHON={python} CONFIG=large RUN_DIR=here MODULES=cuda/13\n", encoding="utf-8")
    with (tmp_path / "site.sh").open("a", encoding="utf-8") as file:
        file.write('module() { echo "$@" > modules; }\n')  # the sites' command
    job = cluster.sbatch(f"--export=NONE,MVPTR_DIR={REPO},SETUP=site.sh", str(REPO / "slurm/stage1.sh"), cwd=tmp_path)
    assert cluster.wait(job) == "COMPLETED", text(tmp_path / f"mvptr-stage1-{job}.log")
    assert {"large", "run.dir=here"} <= set(text(tmp_path / "args").split())
    assert text(tmp_path / "modules") == "load cuda/13\n"


def test_inside_an_interactive_allocation(cluster: Cluster, tmp_path: Path) -> None:
    """The script runs where it is called; there is no batch job that could be requeued, and it says so."""
    python = stand_in(tmp_path, "touch rank-$SLURM_PROCID; exit 75")
    command = ["salloc", "--nodes=2", "--gpus-per-node=2", "--cpus-per-gpu=1", "bash", str(REPO / "slurm/stage1.sh")]
    environment = cluster.environment | {"PYTHON": python, "MAX_NO_PROGRESS": "3"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 75 and "cannot be requeued here: submit it again" in done.stdout, done
    assert sorted(path.name for path in tmp_path.glob("rank-*")) == [f"rank-{rank}" for rank in range(4)]


def test_mistakes_are_named(cluster: Cluster, tmp_path: Path) -> None:
    script = str(REPO / "slurm/stage1.sh")
    lost = cluster.sbatch(script, cwd=tmp_path, MVPTR_DIR="")
    fewer = cluster.sbatch(script, cwd=tmp_path, NODES="2")
    renamed = cluster.sbatch(
        "--job-name=mvptr-evaluate", "--output=mvptr-stage1-%j.log", script, cwd=tmp_path, NODES="2"
    )
    without = cluster.sbatch("--gpus-per-node=0", script, cwd=tmp_path)
    for job, message in (
        (renamed, "NODES is 2, but the job got 1"),
        (without, "a node has no rank: SLURM gave the job no GPU, or RANKS_PER_NODE is 0; ask for GPUs"),
        (lost, f"no slurm/common.sh in {tmp_path}: submit from the checkout, or set MVPTR_DIR to it"),
        (fewer, "NODES is 2, but the job got 1: sbatch reads no such variable, write sbatch --nodes=2"),
    ):
        assert cluster.wait(job) == "FAILED" and cluster.job(job)["ExitCode"] == "2:0"
        assert message in text(tmp_path / f"mvptr-stage1-{job}.log")
