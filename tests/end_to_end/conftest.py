"""Tiny demo shards and one run of both stages on two ranks, made once for all end-to-end tests."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.conftest import REPO
from tests.support.launch import free_port, run

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
    """`train(run_dir, *overrides, num_ranks)`: the real launcher; one rank runs as plain `python`, without it."""

    def launch(run_dir: Path, *overrides: str, num_ranks: int = 2) -> tuple[int, str]:
        script = [str(REPO / "mvptr_ds/train.py"), "--deepspeed", str(REPO / "ds_configs/z2.json")]
        starter = [sys.executable]
        if num_ranks > 1:
            starter = ["deepspeed", "--master_port", str(free_port()), "--num_gpus", str(num_ranks)]
        log = tmp_path_factory.mktemp("launch") / "log"
        return run([*starter, *script, *small, f"run.dir={run_dir}", *overrides], log, LIMIT_S)

    return launch


@pytest.fixture(scope="session")
def trained(train: Launch, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Both stages, four steps each, checkpoints at two (kept for good) and four; nobody writes into it."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    kept = ["train.keep_checkpoints=1", "train.keep_every_steps=2"]
    code, output = train(folder, "train.profile_steps=[2,3]", *kept)
    assert code == 0, output
    return Run(folder, output)
