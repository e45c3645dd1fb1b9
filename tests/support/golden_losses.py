"""Trains both stages for twenty steps and gives the losses of every step, which tests/golden/losses.json keeps.

    python -m tests.support.golden_losses

writes that file anew; `git diff` then shows what a change has done to the numbers. One process, no dropout, a tiny
model: what differs between machines is the order of float32 sums.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from mvptr_ds.demo.build import build_demo_shards
from tests.conftest import REPO
from tests.support.launch import run

PATH = REPO / "tests/golden/losses.json"
NUM_STEPS, LIMIT_S = 20, 250.0
STAGES = ("stage1", "stage2")
SETTINGS = (
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_attention_heads=2", "model.num_text_layers=1",
    "model.num_visual_layers=1", "model.num_cross_layers=1", "model.dropout=0", "model.attention_dropout=0",
    "visual.image_size=48", "train.batch_size=8", "train.accumulation_steps=2", "train.log_every_steps=1",
    "train.preflight=false", "train.checkpoint_every_steps=0", "stage1.warmup_steps=4", "stage2.warmup_steps=4",
    *(f"{stage}.max_steps={NUM_STEPS}" for stage in STAGES),
)  # fmt: skip

Golden = dict[str, list[dict[str, float | None]]]  # of each stage, a mapping a step


def train(folder: Path) -> Golden:
    """Losses by name and norm of the gradient of every step; None for a loss that no sample had a target of."""
    shards = folder / "shards"
    build_demo_shards(shards, "shapes", num_train=64, num_held_out=4, seed=0, num_processes=1)
    names = {"train": "train", "held_out": "held_out", "word_vocab": "word_vocab.txt"}
    names["phrase_vocab"] = "phrase_vocab.json"
    data = [f"data.{key}={shards / name}" for key, name in names.items()]
    command = [sys.executable, str(REPO / "mvptr_ds/train.py"), "--deepspeed", str(REPO / "ds_configs/z2.json")]
    overrides = [*SETTINGS, *data, "data.demo_source=null", f"run.dir={folder / 'run'}"]
    code, said = run([*command, "--config", "demo", *overrides], folder / "log", LIMIT_S)
    assert code == 0, said
    found: Golden = {}
    for stage in STAGES:
        lines = (folder / f"run/{stage}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
        reports = [json.loads(line) for line in lines]
        assert [report["step"] for report in reports] == list(range(1, NUM_STEPS + 1))
        found[stage] = [
            {key: value for key, value in report.items() if key.startswith("loss/") or key == "grad_norm"}
            for report in reports
        ]
    return found


def write(golden: Golden, path: Path = PATH) -> None:
    """A line a step, seven digits a number."""
    stages = []
    for stage, steps in golden.items():
        rounded = [
            {key: None if value is None else float(f"{value:.7g}") for key, value in step.items()} for step in steps
        ]
        stages.append(f"{json.dumps(stage)}: [\n" + ",\n".join(json.dumps(step) for step in rounded) + "\n]")
    path.parent.mkdir(exist_ok=True)
    path.write_text("{\n" + ",\n".join(stages) + "\n}\n", encoding="utf-8")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as name:
        write(train(Path(name)))
