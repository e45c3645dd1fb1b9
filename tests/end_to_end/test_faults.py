"""kill -9 of all ranks at random instants: three tries; `make faults` makes fifty."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.distributed.launch import run
from tools import faults

TRIES = 3


@pytest.mark.timeout(600)
def test_killed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "tools/faults.py"), "--tries", str(TRIES), "--out", str(tmp_path / "out")]
    code, output = run([*command, "--seed", "1"], tmp_path / "log", 550.0)
    assert code == 0, output
    content = json.loads(output.splitlines()[-1])
    assert content["kills"] == TRIES and content["bit_identical"] and content["runs"] >= 1
    assert sum(content["kills_aimed_at"].values()) == TRIES


def fake_run(folder: Path, losses: list[float], digest: str) -> None:
    for stage in faults.STAGES:
        last = folder / stage / f"checkpoints/step-{faults.NUM_STEPS:08d}"
        last.mkdir(parents=True)
        (last / "checksums.json").write_text(json.dumps({"state.json": str(folder), "w": digest}), encoding="utf-8")
        lines = [{"step": i + 1, "time": hash(folder), "loss/mlm": loss} for i, loss in enumerate(losses)]
        (folder / stage / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines), encoding="utf-8")


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        ("nothing", []),
        ("one loss", ["stage1, step 2: loss/mlm", "stage2, step 2: loss/mlm"]),
        ("a weight", ["stage1: w", "stage2: w"]),
    ],
)
def test_the_comparison_sees_one_changed_bit(tmp_path: Path, change: str, wanted: list[str]) -> None:
    losses = [1.0 / (i + 3) for i in range(faults.NUM_STEPS)]
    fake_run(tmp_path / "a", losses, "digest")
    if change == "one loss":
        losses[1] += 1e-16
    fake_run(tmp_path / "b", losses, "digest" if change != "a weight" else "Digest")
    assert faults.differences(tmp_path / "b", tmp_path / "a") == wanted


def test_the_comparison_sees_a_missing_report(tmp_path: Path) -> None:
    losses = [1.0] * faults.NUM_STEPS
    fake_run(tmp_path / "a", losses, "digest")
    fake_run(tmp_path / "b", losses[:-1], "digest")
    assert len(faults.differences(tmp_path / "b", tmp_path / "a")) == 2
