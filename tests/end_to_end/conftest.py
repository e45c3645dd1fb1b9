"""Tiny demo shards and one run of both stages on two ranks, made once for all end-to-end tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.launch import free_port, run, run_on_ranks

LIMIT_S = 200.0  # of one launch; it takes 15 to 40 s
SMALL = [
    "model.hidden_size=32",
    "model.intermediate_size=64",
    "model.num_attention_heads=2",
    "model.num_text_layers=1",
    "model.num_visual_layers=1",
    "model.num_cross_layers=1",
    "visual.image_size=48",
    "train.batch_size=8",
    "train.log_every_steps=2",
    "train.checkpoint_every_steps=2",
    "stage1.max_steps=4",
    "stage2.max_steps=4",
    "data.demo_train_scenes=64",
    "data.demo_held_out_scenes=16",
]


@dataclass
class Run:
    """A finished run and what it printed."""

    dir: Path
    output: str


Launch = Callable[..., tuple[int, str]]


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    tool = [sys.executable, str(REPO / "tools/make_demo_shards.py"), "--source", "shapes", "--processes", "1"]
    arguments = ["--out", str(folder / "shards"), "--train", "64", "--held-out", "16"]
    code, output = run([*tool, *arguments], folder / "log", LIMIT_S)
    assert code == 0, output
    return folder / "shards"


@pytest.fixture(scope="session")
def small(shards: Path) -> list[str]:
    """Overrides of the demo configuration: tiny, and on the tiny shards."""
    names = {"word_vocab": "word_vocab.txt", "phrase_vocab": "phrase_vocab.json"}
    paths = {key: shards / names.get(key, key) for key in ("train", "held_out", "word_vocab", "phrase_vocab")}
    return [*SMALL, *(f"data.{key}={path}" for key, path in paths.items())]


@pytest.fixture(scope="session")
def train(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Launch:
    """`train(run_dir, *overrides, num_ranks, launcher)`: exit code and output of a run, by DeepSpeed's launcher or not.

    Without it, which takes as long to start as the ranks, the code is the first error's, and both ranks' output is
    that of rank 0, then that of rank 1.
    """

    def launch(run_dir: Path, *overrides: str, num_ranks: int = 2, launcher: bool = False) -> tuple[int, str]:
        script = [str(REPO / "mvptr_ds/train.py"), "--deepspeed", str(REPO / "ds_configs/z2.json")]
        command, logs = [*script, *small, f"run.dir={run_dir}", *overrides], tmp_path_factory.mktemp("launch")
        if launcher:
            starter = ["deepspeed", "--master_port", str(free_port()), "--num_gpus", str(num_ranks)]
            return run([*starter, *command], logs / "log", LIMIT_S)
        if num_ranks == 1:
            return run([sys.executable, *command], logs / "log", LIMIT_S)
        codes = run_on_ranks(command, num_ranks, logs, LIMIT_S)
        output = "".join((logs / f"rank{rank}.log").read_text(encoding="utf-8") for rank in range(num_ranks))
        assert None not in codes or any(codes), f"still ran after {LIMIT_S:.0f} s\n{output}"
        return next((code for code in codes if code), 0), output

    return launch


@pytest.fixture(scope="session")
def trained(train: Launch, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages, four steps each, checkpoints at two (kept for good) and four; nobody writes into it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    kept = ["train.keep_checkpoints=1", "train.keep_every_steps=2"]
    code, output = train(folder, "train.profile_steps=[2,3]", *kept, launcher=True)
    assert code == 0, output
    return Run(folder, output)
