"""`mvptr demo-tasks` from a demo run of a few steps to its table, and its second call."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mvptr_ds.commands import demo_tasks
from mvptr_ds.tasks import TASKS
from mvptr_ds.transfer.arms import ARMS
from tests.conftest import REPO
from tests.support.launch import environment

pytestmark = pytest.mark.timeout(400)
SIZES = [
    "model.hidden_size=16", "model.num_attention_heads=2", "model.intermediate_size=32", "model.num_text_layers=1",
    "model.num_visual_layers=1", "model.num_cross_layers=1", "train.batch_size=16", "train.preflight=false",
]  # fmt: skip


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=REPO, env=environment(), capture_output=True, text=True, timeout=300)


def test_from_a_demo_run_to_the_table(tmp_path: Path) -> None:
    demo, out = tmp_path / "demo", tmp_path / "tasks"
    shards = demo / "shards"
    trained = run(
        "mvptr_ds/train.py", "--config", "demo", f"run.dir={demo}", "stage1.max_steps=2", "stage2.max_steps=2",
        "data.demo_train_scenes=120", "data.demo_held_out_scenes=12", f"data.train={shards / 'train'}",
        f"data.held_out={shards / 'held_out'}", f"data.word_vocab={shards / 'word_vocab.txt'}",
        f"data.phrase_vocab={shards / 'phrase_vocab.json'}", *SIZES,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    command = [
        "tools/demo_tasks.py", "--demo", str(demo), "--out", str(out), "--tasks", "entailment", "--steps", "2",
        "--scenes", "40", "--batch-size", "16",
    ]  # fmt: skip
    first = run(*command)
    assert first.returncode == 0, first.stderr
    report = json.loads((out / "report.json").read_text(encoding="utf-8"))
    assert list(report) == ["entailment"] and list(report["entailment"]) == [*ARMS, "permuted"]
    for scores in report["entailment"].values():
        assert 0 <= scores["score"] <= 1 and set(scores["by_kind"]) == {"attribute", "relation"}
    assert first.stdout.startswith("ENTAILMENT") and f"written: {out / 'report.json'}" in first.stdout
    assert (out / "shapes/pretraining/stage2_alone/stage2/checkpoints/step-00000004").is_dir()
    log = (out / "shapes/entailment/stage2_alone/seed-0/log.txt").read_text(encoding="utf-8")
    assert (
        f"entailment starts from {out / 'shapes/pretraining/stage2_alone/stage2/checkpoints/step-00000004/model'}"
        in log
    )

    again = run(*command)  # everything is there
    assert again.returncode == 0 and again.stdout == first.stdout, again.stderr
    other = run(*command, "--steps", "3")
    assert other.returncode == 2 and "was made with other arguments" in other.stderr

    probe = ["--arms", "pretrained", "--set", "entailment.probe=true", "--out", str(tmp_path / "probe")]
    third = run(*command, *probe)
    assert third.returncode == 0, third.stderr
    report = json.loads((tmp_path / "probe/report.json").read_text(encoding="utf-8"))
    assert list(report["entailment"]) == ["pretrained", "permuted"]
    assert not (tmp_path / "probe/shapes/pretraining").exists()
    log = (tmp_path / "probe/shapes/entailment/pretrained/seed-0/log.txt").read_text(encoding="utf-8")
    assert "entailment: 0.0001 M parameters trained" in log  # 51 of the head alone


def test_help_names_what_there_is() -> None:
    assert demo_tasks.ARMS == ARMS and set(demo_tasks.TASKS) <= set(TASKS)
