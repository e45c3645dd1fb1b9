"""Each kind of fault once at a random instant, on two ranks; `make faults` tries more, on four too."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.launch import run
from tools.dev import small_runs
from tools.dev.faults import FAULTS

TRIES = len(FAULTS)


@pytest.mark.timeout(900)
def test_disturbed_runs_end_like_undisturbed_ones(tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "tools/dev/faults.py"), "--tries", str(TRIES), "--out", str(tmp_path / "out")]
    code, output = run([*command, "--seed", "1"], tmp_path / "log", 850.0)
    assert code == 0, output
    content = json.loads(output.splitlines()[-1])
    assert content["tried"] == content["survived"] == TRIES and content["bit_identical"]
    assert content["samples_lost_or_repeated"] == 0 and content["steps_lost"][1] <= 3
    assert {kind: values["tried"] for kind, values in content["kinds"].items()} == dict.fromkeys(FAULTS, 1)
    for kind in ("kill", "hang", "nan"):  # the others have ended by themselves
        assert content["kinds"][kind]["others_ended_s"], kind
    assert content["kinds"]["hang"]["others_ended_s"][0] > 1.0  # by their guard


def fake_run(folder: Path, losses: list[float], digest: str) -> None:
    for stage in small_runs.STAGES:
        last = folder / stage / f"checkpoints/step-{small_runs.NUM_STEPS:08d}"
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
    losses = [1.0 / (i + 3) for i in range(small_runs.NUM_STEPS)]
    fake_run(tmp_path / "a", losses, "digest")
    if change == "one loss":
        losses[1] += 1e-16
    fake_run(tmp_path / "b", losses, "digest" if change != "a weight" else "Digest")
    assert small_runs.differences(tmp_path / "b", tmp_path / "a") == wanted


def test_the_comparison_sees_a_missing_report(tmp_path: Path) -> None:
    losses = [1.0] * small_runs.NUM_STEPS
    fake_run(tmp_path / "a", losses, "digest")
    fake_run(tmp_path / "b", losses[:-1], "digest")
    assert len(small_runs.differences(tmp_path / "b", tmp_path / "a")) == 2
