"""slurm/*.sh with stand-ins for SLURM's own commands: what a real cluster does too rarely or too slowly for tests."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from tests.conftest import REPO

STAND_INS = {
    "srun": 'echo "$@" >> "$PLACE/started"; [ ! -f "$PLACE/ranks.sh" ] || . "$PLACE/ranks.sh"; exit "${CODE:-0}"',
    "squeue": "echo RUNNING",
    "scontrol": 'echo "$@" >> "$PLACE/requeued"',
    "sleep": 'echo "$@" >> "$PLACE/slept"',
}


def run(place: Path, script: str, *arguments: str, **variables: str) -> tuple[int, str]:
    """Exit code and output of a job's script, as SLURM would start it in `place`."""
    for name, content in STAND_INS.items():
        (place / "bin").mkdir(exist_ok=True)
        (place / "bin" / name).write_text(f"#!/bin/bash\n{content}\n", encoding="utf-8")
        (place / "bin" / name).chmod(0o755)
    given = {
        "PATH": f"{place / 'bin'}:{os.environ['PATH']}", "PLACE": str(place), "MVPTR_DIR": str(REPO),
        "SLURM_JOB_ID": "7", "SLURM_JOB_NUM_NODES": "2", "SLURM_JOB_NAME": "mine", "SLURM_JOB_CPUS_PER_NODE": "64(x2)",
        "SLURM_GPUS_ON_NODE": "8", "HOME": str(place), "PYTHON": "python",
    }  # fmt: skip
    command = ["bash", str(REPO / "slurm" / script), *arguments]
    done = subprocess.run(command, cwd=place, env=given | variables, capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout + done.stderr


def started(place: Path) -> list[list[str]]:
    path = place / "started"
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"SLURM_GPUS_ON_NODE": "0"}, "a node has no rank: SLURM gave the job no GPU, or RANKS_PER_NODE is 0"),
        ({"RANKS_PER_NODE": "0"}, "a node has no rank"),
        ({"RANKS_PER_NODE": "two"}, "there are 'two' ranks a node, expected a number"),
        ({"SLURM_GPUS_ON_NODE": "", "SLURM_GPUS_PER_NODE": "a100:2,h100:6"}, "there are 'a100:2,h100:6' ranks a node"),
        ({"NODES": "4"}, "NODES is 4, but the job got 2"),
    ],
)
def test_a_job_that_cannot_be_laid_out_starts_nothing(variables: dict[str, str], message: str, tmp_path: Path) -> None:
    code, said = run(tmp_path, "stage1.sh", **variables)
    assert code == 2 and message in said and len(said.splitlines()) == 1, said
    assert started(tmp_path) == []


@pytest.mark.parametrize(
    ("per_node", "gpus", "cpus"),
    [("64(x2)", "8", 8), ("64,16", "4", 4), ("16,64(x3)", "4", 4), ("8(x2),16", "2", 4), ("4", "8", 1), ("", "2", 1)],
)
def test_ranks_get_the_cpus_that_every_node_has(per_node: str, gpus: str, cpus: int, tmp_path: Path) -> None:
    code, said = run(tmp_path, "stage1.sh", SLURM_JOB_CPUS_PER_NODE=per_node, SLURM_GPUS_ON_NODE=gpus)
    assert code == 0, said
    ((*options,),) = started(tmp_path)
    assert {f"--cpus-per-task={cpus}", f"--ntasks-per-node={gpus}", "--nodes=2"} <= set(options)


def test_cpus_alone_train_where_ranks_are_given(tmp_path: Path) -> None:
    assert run(tmp_path, "stage1.sh", SLURM_GPUS_ON_NODE="0", RANKS_PER_NODE="4")[0] == 0
    assert "--ntasks-per-node=4" in started(tmp_path)[0]


def test_an_evaluation_is_one_rank_whatever_it_is_called_and_whatever_trains(tmp_path: Path) -> None:
    variables = {"SLURM_JOB_NUM_NODES": "1", "NODES": "2", "RANKS_PER_NODE": "8", "SLURM_JOB_CPUS_PER_NODE": "4"}
    code, said = run(tmp_path, "evaluate.sh", **variables)
    assert code == 0, said
    assert {"--ntasks=1", "--cpus-per-task=4"} <= set(started(tmp_path)[0])


def test_a_requeue_that_takes_its_time_is_no_success(tmp_path: Path) -> None:
    """The next job of the chain would start."""
    code, said = run(tmp_path, "stage1.sh", CODE="75")
    assert code == 75 and "back into the queue" in said, said
    assert (tmp_path / "requeued").read_text(encoding="utf-8") == "requeue 7\n"


def save(stage: str, step: int) -> str:
    folder = f"runs/demo/{stage}/checkpoints/step-{step:08d}"
    return f"mkdir -p {folder}; touch {folder}/checksums.json\n"


@pytest.mark.parametrize(
    ("arguments", "saves", "goes_on"),
    [
        ((), ("stage1",), True),
        ((), (), False),
        ((), ("stage2",), False),  # of another job: not this one's progress
        (("run.stages=[2]",), ("stage2",), True),
        (("run.stages=[1, 2]",), ("stage1",), True),
        (("run.stages=[1,2]",), ("stage2",), True),
        (("run.stages=[joint]",), ("joint",), True),
        (("run.stages=[joint]",), ("stage1",), False),
    ],
)
def test_only_its_own_stages_count_as_progress(
    arguments: tuple[str, ...], saves: tuple[str, ...], goes_on: bool, tmp_path: Path
) -> None:
    """A stage 2 of before lies there; the second start is the last one that may save nothing."""
    for step, restarts in ((10, "0"), (12, "1"), (14, "2")):
        content = save("stage2", 90) + "".join(save(stage, step) for stage in saves)
        if saves == ("stage2",):
            content = save("stage2", 90 + step)
        (tmp_path / "ranks.sh").write_text(content, encoding="utf-8")
        code, said = run(tmp_path, "stage1.sh", *arguments, CODE="1", SLURM_RESTART_COUNT=restarts, MAX_NO_PROGRESS="1")
        assert code == 1, said
    assert ("have saved no step" not in said) is goes_on, said


def asked(place: Path) -> list[str]:
    """What the one start of the ranks asks of train.py."""
    (command,) = started(place)
    return command[next(number for number, word in enumerate(command) if word.endswith("train.py")) + 1 :]


@pytest.mark.parametrize(
    ("variables", "task", "config", "run_dir"),
    [
        ({"CONFIG": "vqa"}, "vqa", "vqa", "runs/vqa"),
        ({"CONFIG": "snli_ve", "RUN_DIR": "here"}, "entailment", "snli_ve", "here"),
        ({"CONFIG": "base", "FINETUNE": "retrieval_flickr30k"}, "retrieval", "retrieval_flickr30k", "runs/base"),
        ({"CONFIG": "mine.yaml"}, "referring", "mine.yaml", "runs/mine"),
        ({"CONFIG": "base", "TASK": "vqa"}, "vqa", "base", "runs/base"),
    ],
)
def test_fine_tuning_finds_its_task_in_the_configuration(
    variables: dict[str, str], task: str, config: str, run_dir: str, tmp_path: Path
) -> None:
    (tmp_path / "mine.yaml").write_text("# stages: [vqa]\nextends: base\nrun:\n  stages: [ referring ]\n", "utf-8")
    code, said = run(tmp_path, "finetune.sh", "run.init_from=runs/other", **variables)
    assert code == 0 and f"{task} ended well" in said, said
    words = asked(tmp_path)
    assert words[words.index("--config") + 1 :][:1] == [config]
    assert [f"run.stages=[{task}]", f"run.dir={run_dir}", "run.init_from=runs/other"] == words[-3:]
    assert f"--output={run_dir}/logs/{task}-rank%t.log" in started(tmp_path)[0]


def test_fine_tuning_has_data_of_its_own_and_the_vocabularies_of_its_start(tmp_path: Path) -> None:
    for name in ("pre/train", "vqa/train", "vqa/held_out"):
        (tmp_path / name).mkdir(parents=True)
    for name in ("vqa/phrase_vocab.json", "vqa/word_vocab.txt", "vqa/answers.json"):
        (tmp_path / name).touch()
    variables = {"FINETUNE": "vqa", "DATA_DIR": "pre", "FINETUNE_DATA_DIR": "vqa", "RUN_DIR": "here"}
    code, said = run(tmp_path, "finetune.sh", FINETUNE_OVERRIDES="vqa.patience=2 run.seed=3", **variables)
    assert code == 0, said
    data = [word for word in asked(tmp_path) if word.startswith(("data.", "vqa."))]
    assert data == [
        "data.demo_source=null", "data.train=vqa/train", "data.held_out=vqa/held_out", "vqa.answers=vqa/answers.json",
        "vqa.patience=2",
    ]  # fmt: skip


def test_a_configuration_without_a_task_is_no_fine_tuning(tmp_path: Path) -> None:
    code, said = run(tmp_path, "finetune.sh", CONFIG="base")
    assert code == 2 and "base names no task as 'stages: [vqa]' in one line: set TASK to retrieval, vqa" in said
    assert started(tmp_path) == []


def test_progress_of_fine_tuning_is_its_own(tmp_path: Path) -> None:
    (tmp_path / "ranks.sh").write_text(save("vqa", 10), encoding="utf-8")
    code, said = run(tmp_path, "finetune.sh", CONFIG="vqa", RUN_DIR="runs/demo", CODE="75", MAX_NO_PROGRESS="0")
    assert code == 75 and "vqa is saved" in said and "back into the queue" in said


def test_fine_tuning_comes_between_stage_2_and_the_evaluation(tmp_path: Path) -> None:
    """`submit.sh` with a stand-in for sbatch, which numbers the jobs and notes what it was given."""
    (tmp_path / "bin").mkdir()
    sbatch = 'n=$(($(wc -l < "$PLACE/jobs") + 1)); echo "${RUN_DIR-} $*" >> "$PLACE/jobs"; echo "$n"'
    (tmp_path / "bin/sbatch").write_text(f"#!/bin/bash\n{sbatch}\n", encoding="utf-8")
    (tmp_path / "bin/sbatch").chmod(0o755)
    (tmp_path / "jobs").touch()
    variables = {"FINETUNE": "vqa", "FINETUNE_OVERRIDES": "vqa.patience=2", "NODES": "2"}
    code, said = run(tmp_path, "submit.sh", "train.batch_size=8", "run.dir=here", **variables)
    assert code == 0 and said.split() == ["stage1", "1", "stage2", "2", "finetune", "3", "evaluate", "4"], said
    jobs = (tmp_path / "jobs").read_text(encoding="utf-8").splitlines()
    assert [line.partition(" ")[0] for line in jobs] == ["", "", "here", "here"]
    assert [" --dependency=afterok:" in line for line in jobs] == [False, True, True, True]
    assert "--nodes=2 --dependency=afterok:2 " in jobs[2] and jobs[2].endswith("/slurm/finetune.sh")
    assert "--dependency=afterok:3 " in jobs[3] and jobs[3].endswith("/slurm/evaluate.sh vqa.patience=2")
    assert jobs[1].endswith("/slurm/stage2.sh train.batch_size=8 run.dir=here")
