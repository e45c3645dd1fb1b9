"""Runs with `optim.name=lamb` through the real entry point: resume, other ranks, and adamw's state taken over."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import REPO
from tests.end_to_end.copies import forget
from tests.end_to_end.scenarios import launch

pytestmark = pytest.mark.timeout(400)
LIMIT_S = 200.0
STEPS, CUT = 4, 2
TOLERANCE = 1e-6  # eps: see test_other_ranks.py
SETTINGS = ("run.stages=[1]", "optim.eps=1e-5", "train.log_every_steps=1")
LAMB = ("optim.name=lamb", "stage1.learning_rate=1e-2")


def scenario(small: list[str], run_dir: Path, *more: str, stage: int = 2) -> dict[str, Any]:
    json_path = REPO / f"ds_configs/z{stage}.json"
    arguments = ["--config", "demo", "--deepspeed", str(json_path), *small, *SETTINGS, *more, f"run.dir={run_dir}"]
    return {"name": run_dir.name, "arguments": arguments, "disturb": None}


@pytest.fixture(scope="module")
def runs(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """On two ranks, then alone what had two steps on two."""
    folder = tmp_path_factory.mktemp("lamb")
    from_start = [
        scenario(small, folder / "lamb", *LAMB),
        scenario(small, folder / "z1", *LAMB, stage=1),
        scenario(small, folder / "adamw"),
    ]
    again = [scenario(small, folder / "again", *LAMB), scenario(small, folder / "taken over", *LAMB)]
    for one, source in zip(again, ("lamb", "adamw"), strict=True):
        one["copy"] = [str(folder / source), "stage1", CUT]
    launch([*from_start, *again], 2, folder / "two", LIMIT_S)
    alone = []
    for name, source in (("alone", "lamb"), ("taken over alone", "adamw")):
        alone.append(scenario(small, forget(folder / source, folder / name, "stage1", CUT), *LAMB))
    launch(alone, 1, folder / "one", LIMIT_S)
    return folder


def weights(run_dir: Path, step: int = STEPS) -> dict[str, torch.Tensor]:
    return load_file(run_dir / f"stage1/checkpoints/step-{step:08d}/model/model.safetensors")


def difference(one: Path, two: Path) -> float:
    ours, theirs = weights(one), weights(two)
    return max(float((ours[name].float() - theirs[name].float()).abs().max()) for name in theirs)


def test_a_resume_is_bit_identical(runs: Path) -> None:
    assert difference(runs / "again", runs / "lamb") == 0.0
    engine = f"stage1/checkpoints/step-{STEPS:08d}/engine"
    optimizers = sorted(path.name for path in (runs / "lamb" / engine).glob("*optim_states.pt"))
    assert len(optimizers) == 2
    for name in optimizers:
        assert (runs / "again" / engine / name).read_bytes() == (runs / "lamb" / engine / name).read_bytes()


@pytest.mark.parametrize("name", ["z1", "alone"])
def test_another_stage_or_number_of_ranks_trains_alike(runs: Path, name: str) -> None:
    assert difference(runs / name, runs / "lamb") < TOLERANCE
    moved = weights(runs / "lamb", CUT)
    assert any(float((moved[key] - value).abs().max()) > 1e-3 for key, value in weights(runs / "lamb").items())


def test_adamws_state_is_taken_over_and_the_log_says_so(runs: Path) -> None:
    assert difference(runs / "taken over alone", runs / "taken over") < TOLERANCE
    assert difference(runs / "taken over", runs / "adamw") > 1e-3
    for said in ("two", "one"):
        log = (runs / said / "rank0.log").read_text(encoding="utf-8")
        assert log.count("optim.name=lamb instead of adamw goes on with its moments; mind learning_rate") == 1
        assert "optimiser: mvptr_ds.optim.lamb.Lamb (optim.name=lamb;" in log


def test_each_matrix_moves_by_its_norm_times_the_learning_rate(runs: Path) -> None:
    """Of all of them, on any rank: what no wrong cut of a partition would give."""
    before, after = weights(runs / "lamb", CUT), weights(runs / "lamb")
    reports = (runs / "lamb/stage1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    allowed = sum(json.loads(line)["learning_rate"] for line in reports[CUT:])
    moved = {k: float((after[k] - w).norm() / w.norm()) for k, w in before.items() if w.ndim > 1 and bool(w.any())}
    trained = {key: value for key, value in moved.items() if value > 0}
    assert len(trained) > 10 and all(0.1 * allowed < value < 1.1 * allowed for value in trained.values())
