"""Signals, damaged checkpoints, full disks, bad samples, gradients that are not finite, a rank that hangs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

from mvptr_ds.checkpoints.checkpoint import verify
from mvptr_ds.stopping import EXIT_STOPPED
from tests.conftest import REPO
from tests.end_to_end.ranks_disturbed import FULL_STEP, HUNG_STEP, POISONED_STEPS, RANK1_STEP
from tests.support.launch import environment, free_port, run, run_ranks, started
from tools.dev import small_runs

pytestmark = pytest.mark.timeout(600)
LIMIT_S = 200.0


def wait_until(condition: Callable[[], Any], limit_s: float = LIMIT_S) -> Any:
    deadline_s = time.monotonic() + limit_s
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"{condition} was not met in {limit_s} s"
        time.sleep(0.02)
    return value


def reports(stage_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (stage_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def ranks_below(launcher: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """The ranks, in their order: children of launch.py, without their loader processes."""
    found = []
    for process in psutil.Process(launcher.pid).children(recursive=True):
        if "deepspeed.launcher.launch" in " ".join(process.cmdline()):
            found += process.children()
    return sorted(found, key=lambda process: int(process.environ()["RANK"]))


# ---- signals, exact resume, a damaged checkpoint: one run, interrupted in four ways


def with_launcher(run_dir: Path, overrides: list[str]) -> list[str]:
    script = [str(REPO / "mvptr_ds/train.py"), "--deepspeed", str(REPO / "ds_configs/z2.json")]
    return [
        "deepspeed",
        "--master_port",
        str(free_port()),
        "--num_gpus",
        "2",
        *script,
        f"run.dir={run_dir}",
        *overrides,
    ]


def check_saved(watch: small_runs.Watch, reports_before: int) -> None:
    """What was logged is saved, to the last step, and complete."""
    assert watch.num_saved() == watch.num_reports() >= reports_before and not watch.begun()


def signal_the_group(watch: small_runs.Watch, overrides: list[str]) -> None:
    """SIGUSR1 to the ranks and their loader processes."""
    ranks = small_runs.launch(watch.run_dir, overrides)
    try:
        wait_until(lambda: watch.num_reports() >= 1 or small_runs.finished(ranks))
        os.killpg(ranks[0].pid, signal.SIGUSR1)
        os.killpg(ranks[0].pid, signal.SIGTERM)  # a second one does not spoil it
        assert [rank.wait(LIMIT_S) for rank in ranks] == [EXIT_STOPPED] * 2
    finally:
        small_runs.kill(ranks)
    check_saved(watch, 1)


def signal_one_rank(watch: small_runs.Watch, overrides: list[str], log: Path) -> None:
    """SIGTERM to rank 1 alone, then SIGUSR1 to both, below the real launcher, which hands the code on."""
    before = watch.num_reports()
    with started(with_launcher(watch.run_dir, overrides), log, environment()) as launcher:
        wait_until(lambda: watch.num_reports() > before or launcher.poll() is not None)
        ranks = ranks_below(launcher)
        ranks[1].send_signal(signal.SIGTERM)
        for rank in ranks:
            rank.send_signal(signal.SIGUSR1)
        assert launcher.wait(LIMIT_S) == EXIT_STOPPED, log.read_text(encoding="utf-8")
    assert log.read_text(encoding="utf-8").count("stopped at step") == 1
    check_saved(watch, before + 1)


def signal_the_launcher(watch: small_runs.Watch, overrides: list[str], log: Path) -> None:
    """SIGTERM to launch.py, which signals the whole tree and ends with 1 whatever the ranks say."""
    before = watch.num_reports()
    with started(with_launcher(watch.run_dir, overrides), log, environment()) as launcher:
        wait_until(lambda: watch.num_reports() > before or launcher.poll() is not None)
        ranks_below(launcher)[0].parent().send_signal(signal.SIGTERM)
        assert launcher.wait(LIMIT_S) == 1, log.read_text(encoding="utf-8")
    assert "stopped at step" in log.read_text(encoding="utf-8")
    check_saved(watch, before + 1)


def test_interrupted_four_ways_and_bit_identical_in_the_end(tmp_path: Path) -> None:
    overrides = small_runs.build_shards(tmp_path)
    reference, watch = small_runs.Watch(tmp_path / "undisturbed"), small_runs.Watch(tmp_path / "run")
    small_runs.run_undisturbed(reference.run_dir, overrides)
    signal_the_group(watch, overrides)
    signal_one_rank(watch, overrides, tmp_path / "log-rank")
    signal_the_launcher(watch, overrides, tmp_path / "log-launcher")
    stage = [stage for stage in small_runs.STAGES if (watch.run_dir / stage).exists()][-1]
    good, damaged = sorted((watch.run_dir / stage / "checkpoints").glob("step-*"))[-2:]
    weights = damaged / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-5] ^= 0x10
    weights.write_bytes(content)
    small_runs.run_undisturbed(watch.run_dir, overrides)
    said = (watch.run_dir / "rank0.log").read_text(encoding="utf-8")
    assert f"{damaged} is damaged (model/model.safetensors has changed); trying the one before it" in said
    assert f"{stage} goes on from step {int(good.name[5:])} ({good})" in said
    assert small_runs.differences(watch.run_dir, reference.run_dir) == []


# ---- what goes wrong inside: all scenarios in one launch of two ranks


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A small file system of its own, where this process may mount one; else an ordinary folder."""
    folder = tmp_path_factory.mktemp("disk")
    mount = ["mount", "-t", "tmpfs", "-o", "size=48m", "tmpfs", str(folder)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True).returncode == 0
    yield folder
    if mounted:
        subprocess.run(["umount", str(folder)], check=True)


def damaged_copy(shards: Path, folder: Path, every: int) -> list[str]:
    """The shards with every so-many-th image overwritten, in place; the damaged keys."""
    folder.mkdir()
    keys: list[str] = []
    for path in shards.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    for path in sorted(folder.glob("*.tar")):
        content = bytearray(path.read_bytes())
        with tarfile.open(path) as tar:
            images = [member for member in tar if not member.name.endswith(".json")]
        for member in images[::every]:
            content[member.offset_data : member.offset_data + member.size] = b"\xff" * member.size
            keys.append(member.name.rpartition(".")[0])
        path.write_bytes(content)
    return keys


Outcomes = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def outcomes(small: list[str], shards: Path, disk: Path, tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """Of every scenario: run folder, exit codes and output of both ranks."""
    folder = tmp_path_factory.mktemp("scenarios")
    keys = damaged_copy(shards / "train", folder / "damaged", every=4)
    extra = {
        "nan": ["train.max_skipped_in_row=3", "train.log_every_steps=1", "stage1.max_steps=8"],
        "bad samples": [
            f"data.train={folder / 'damaged'}",
            "data.demo_source=null",
            "data.max_bad_fraction=0.005",
            "train.preflight=false",  # which would look at some of them, and end the run before it begins
            "stage1.max_steps=40",
        ],
        "no data": ["stage1.max_steps=8"],
        "full disk": ["stage1.max_steps=8", "train.log_every_steps=1", "wandb.mode=online"],
        "signal": ["stage1.max_steps=8"],
        "stale held-out": ["train.evaluate_every_steps=2"],
        "interrupted evaluation": ["train.evaluate_every_steps=2", "train.checkpoint_every_steps=0"],
    }
    disturb = {"nan": "poison", "no data": "dead storage", "full disk": "full disk"}
    disturb |= {name: name for name in ("signal", "stale held-out", "interrupted evaluation")}
    dirs = {name: folder / name for name in extra} | {"full disk": disk / "run"}
    common = ["--config", "demo", "--deepspeed", str(REPO / "ds_configs/z2.json"), *small, "run.stages=[1]"]
    scenarios = [
        {"name": name, "arguments": [*common, *more, f"run.dir={dirs[name]}"], "disturb": disturb.get(name)}
        for name, more in extra.items()
    ]
    (folder / "scenarios.json").write_text(json.dumps(scenarios), encoding="utf-8")
    run_ranks("tests.end_to_end.ranks_disturbed", 2, folder, 2 * LIMIT_S)
    codes = [json.loads((folder / f"codes-rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    outputs = [(folder / f"rank{rank}.log").read_text(encoding="utf-8").split("=== ")[1:] for rank in range(2)]
    return {
        name: {
            "dir": dirs[name] / "stage1",
            "codes": [code[name] for code in codes],
            "outputs": [output[number].partition("\n")[2] for output in outputs],
            "keys": keys,
        }
        for number, name in enumerate(extra)
    }


def weights_of(stage_dir: Path, step: int) -> dict[str, torch.Tensor]:
    return load_file(stage_dir / f"checkpoints/step-{step:08d}/model/model.safetensors")


def test_a_gradient_that_is_not_finite_is_left_out_on_all_ranks(outcomes: Outcomes) -> None:
    """Infinite boxes on rank 1 alone."""
    outcome = outcomes["nan"]
    assert outcome["codes"] == [2, 2]
    lines = reports(outcome["dir"])
    skipped = [line["skipped_steps"] for line in lines]
    wanted = [sum(step < line for step in POISONED_STEPS) for line in range(1, 8)]
    assert skipped == wanted[: len(skipped)] and len(skipped) >= 6
    assert lines[1]["grad_norm"] is None and lines[2]["grad_norm"] > 0
    early, late = weights_of(outcome["dir"], 4), weights_of(outcome["dir"], 6)
    assert all(torch.equal(early[name], late[name]) for name in early)  # steps 5 and 6 were left out
    assert all(bool(torch.isfinite(value).all()) for value in late.values())
    assert "step 2 left out: its gradient is not finite (1 so far)" in outcome["outputs"][0]
    assert "error: 3 steps in a row had a gradient that is not finite" in outcome["outputs"][0]
    assert not any("Traceback" in output for output in outcome["outputs"])


def test_bad_samples_are_replaced_counted_and_end_the_run_when_too_many(outcomes: Outcomes) -> None:
    outcome = outcomes["bad samples"]
    assert outcome["codes"] == [2, 2]
    lines = reports(outcome["dir"])
    bad = sum(line["data/bad_samples"] for line in lines)
    assert bad > 5 >= bad - lines[-1]["data/bad_samples"]  # 0.005 of 1,000 are allowed
    assert all(line["loss/mlm"] is not None for line in lines)
    said = [line for output in outcome["outputs"] for line in output.splitlines() if "bad sample at" in line]
    assert len(said) >= bad and all("shard-000000.tar, key '" in line for line in said)  # more were read ahead
    assert {line.partition("key '")[2].partition("'")[0] for line in said} <= set(outcome["keys"])
    message = (
        f"error: {bad:.0f} samples could not be read among {8 * lines[-1]['step']}, more than data.max_bad_fraction"
    )
    written = [json.loads(line) for line in (outcome["dir"].parent / "bad_samples.jsonl").open(encoding="utf-8")]
    assert len(written) == bad and {line["key"] for line in written} <= set(outcome["keys"])
    assert {line["position"] % 8 // 4 for line in written} == {0, 1}  # of both ranks
    assert message in outcome["outputs"][0]
    last = lines[-1]["step"]  # the work so far is not lost
    assert f"the run is saved at step {last}" in outcome["outputs"][0] and weights_of(outcome["dir"], last)
    assert not any("Traceback" in output for output in outcome["outputs"])


def test_data_that_fail_on_one_rank_end_all_with_one_error(outcomes: Outcomes) -> None:
    outcome = outcomes["no data"]
    assert outcome["codes"] == [2, 2]
    assert "error: position 20: the storage of rank 1 is gone; look after it" in outcome["outputs"][0]
    assert not any("Traceback" in output for output in outcome["outputs"])


def test_a_full_disk_costs_a_checkpoint_and_nothing_else(outcomes: Outcomes) -> None:
    outcome = outcomes["full disk"]
    assert outcome["codes"] == [0, 0], outcome["outputs"][0]
    said = [line for line in outcome["outputs"][0].splitlines() if "no checkpoint at step" in line]
    assert [f"at step {step}," in line for step, line in zip((FULL_STEP, RANK1_STEP), said, strict=True)] == [True] * 2
    assert "rank 0" in said[0] and "rank 1" in said[1]
    checkpoints = sorted((outcome["dir"] / "checkpoints").glob("step-*"))
    assert [path.name for path in checkpoints] == ["step-00000002", "step-00000008"]
    assert all(verify(path) is None for path in checkpoints)
    assert [line["step"] for line in reports(outcome["dir"])] == list(range(1, 9))


def test_wandb_without_an_account_goes_offline_and_is_the_run_of_the_checkpoint(outcomes: Outcomes) -> None:
    outcome = outcomes["full disk"]
    assert "there is no account here (wandb login): logging offline" in outcome["outputs"][0]
    state = json.loads((outcome["dir"] / "checkpoints/step-00000008/state.json").read_text(encoding="utf-8"))
    assert state["wandb_id"] == (outcome["dir"] / "wandb_id").read_text(encoding="utf-8")
    assert list(outcome["dir"].glob(f"wandb/offline-run-*-{state['wandb_id']}/run-{state['wandb_id']}.wandb"))
    assert {"torch", "deepspeed", "python"} <= state["versions"].keys()


def test_a_signal_before_the_first_step_stops_as_well(outcomes: Outcomes) -> None:
    outcome = outcomes["signal"]
    assert outcome["codes"] == [EXIT_STOPPED] * 2
    assert "stage1 stopped at step 0, as asked" in outcome["outputs"][0]


def test_an_evaluation_that_cannot_read_is_passed_over(outcomes: Outcomes) -> None:
    outcome = outcomes["stale held-out"]
    assert outcome["codes"] == [0, 0], outcome["outputs"][0]
    said = [line for line in outcome["outputs"][0].splitlines() if "not evaluated" in line]
    assert len(said) == 1 and said[0].startswith("stage1 2 not evaluated, training goes on: ")
    assert "Stale file handle" in said[0] and "shard-000000.tar, key '" in said[0]
    assert [line["step"] for line in reports(outcome["dir"]) if "eval/retrieval/t2i_r1" in line] == [4]


def test_an_interrupt_does_not_wait_for_an_evaluation(outcomes: Outcomes) -> None:
    outcome = outcomes["interrupted evaluation"]
    assert outcome["codes"] == [EXIT_STOPPED] * 2, outcome["outputs"][0]
    said = outcome["outputs"][0]
    assert "stage1 2 not evaluated: SIGINT" in said and "stage1 stopped at step 2, as asked (SIGINT)" in said
    assert verify(outcome["dir"] / "checkpoints/step-00000002") is None
    assert not any("Traceback" in output for output in outcome["outputs"])


def test_a_rank_that_hangs_ends_the_run_with_everyones_stacks(small: list[str], tmp_path: Path) -> None:
    limit_s = 15.0
    arguments = [
        "--config",
        "demo",
        *small,
        "run.stages=[1]",
        f"train.hang_timeout_s={limit_s}",
        f"run.dir={tmp_path}/run",
    ]
    scenario = {"name": "hang", "arguments": arguments, "disturb": "hang"}
    (tmp_path / "scenarios.json").write_text(json.dumps([scenario]), encoding="utf-8")
    program = [str(REPO / "tests/end_to_end/ranks_disturbed.py"), str(tmp_path)]
    command = ["deepspeed", "--master_port", str(free_port()), "--num_gpus", "2", *program]
    with started(command, tmp_path / "log", environment()) as launcher:
        code = launcher.wait(LIMIT_S)
        assert code == 1, (tmp_path / "log").read_text(encoding="utf-8")
        stacks = [(tmp_path / f"run/stage1/stacks-rank{rank}.txt").read_text(encoding="utf-8") for rank in range(2)]
        wait_until(lambda: not group_of(launcher), 60.0)  # loader processes look after their rank every 5 s
    assert "sleep_for_ever" in stacks[1] and "without a step" in stacks[0] and "in train" in stacks[0]
    assert (tmp_path / f"run/stage1/checkpoints/step-{HUNG_STEP:08d}").is_dir()


def test_a_start_up_that_hangs_ends_with_its_stacks(small: list[str], tmp_path: Path) -> None:
    arguments = ["--config", "demo", *small, "run.stages=[1]", "train.start_timeout_s=4", f"run.dir={tmp_path}/run"]
    scenario = {"name": "hang", "arguments": arguments, "disturb": "hang in the start-up"}
    (tmp_path / "scenarios.json").write_text(json.dumps([scenario]), encoding="utf-8")
    code, output = run(
        [sys.executable, "-m", "tests.end_to_end.ranks_disturbed", str(tmp_path)], tmp_path / "log", LIMIT_S
    )
    assert code == 1, output
    assert "sleep_for_ever" in (tmp_path / "run/stage1/stacks-rank0.txt").read_text(encoding="utf-8")


def group_of(launcher: subprocess.Popen[bytes]) -> list[int]:
    """Processes of the launcher's group that still live."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == launcher.pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
