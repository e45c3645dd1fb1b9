"""Checkpoints: an interrupted or damaged one is never used, the one before it is."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch

from mvptr_ds import checkpointing
from mvptr_ds.checkpointing import CheckpointError, newest_good, verify
from mvptr_ds.config import load_config
from mvptr_ds.hand_over import find_model, first_model


def save(folder: Path, step: int, keep: int = 10) -> Path:
    def write_engine(path: Path) -> None:
        path.mkdir()
        torch.save({"step": step}, path / "states.pt")

    def write_model(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(range(256)) * (step + 1))
        (path / "config.json").write_text("{}", encoding="utf-8")
        (path / "mvptr.yaml").write_text("stage1: {max_steps: 6}", encoding="utf-8")

    return checkpointing.save(folder, step, {"stage": "stage1"}, write_engine, write_model, keep)


FILES = (
    "engine/states.pt",
    "model/model.safetensors",
    "model/config.json",
    "model/mvptr.yaml",
    "rng-rank0.pt",
    "state.json",
    "checksums.json",
)


def test_a_checkpoint_holds_what_it_says(tmp_path: Path) -> None:
    path = save(tmp_path, 7)
    assert path == tmp_path / "step-00000007" and verify(path) is None
    assert {str(p.relative_to(path)) for p in path.rglob("*") if p.is_file()} == set(FILES)
    assert set(json.loads((path / "checksums.json").read_text(encoding="utf-8"))) == set(FILES) - {"checksums.json"}
    assert checkpointing.read_state(path) == {"step": 7, "num_ranks": 1, "stage": "stage1"}
    assert (tmp_path / "latest").read_text(encoding="utf-8") == path.name
    assert newest_good(tmp_path) == path
    assert not list(tmp_path.rglob("*.partial"))


def test_without_any_checkpoint(tmp_path: Path) -> None:
    assert newest_good(tmp_path / "nowhere") is None


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["flipped byte", "truncated", "empty", "missing"])
def test_the_one_before_a_damaged_one_is_used(
    tmp_path: Path, name: str, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    good, bad = save(tmp_path, 9), save(tmp_path, 10)
    content = bytearray((bad / name).read_bytes())
    if damage == "missing":
        (bad / name).unlink()
    else:
        content[len(content) // 2] ^= 0x80
        damaged = {"flipped byte": content, "truncated": content[:-1], "empty": bytearray()}[damage]
        (bad / name).write_bytes(damaged)
    with caplog.at_level(logging.WARNING):
        assert newest_good(tmp_path) == good
    if name != "checksums.json":
        assert verify(bad) is not None and name in str(verify(bad))
    if (name, damage) != ("checksums.json", "missing"):  # that one looks like an interrupted save: nothing to say
        assert bad.name in caplog.text


@pytest.mark.parametrize("content", ["[]", "null", '"x"', '{"engine/states.pt": 3}'])
def test_checksums_of_another_form_are_damage(tmp_path: Path, content: str) -> None:
    good, bad = save(tmp_path, 1), save(tmp_path, 2)
    (bad / "checksums.json").write_text(content, encoding="utf-8")
    assert newest_good(tmp_path) == good


def test_all_damaged(tmp_path: Path) -> None:
    for step in (1, 2):
        (save(tmp_path, step) / "state.json").unlink()
    assert newest_good(tmp_path) is None


def test_a_save_that_is_interrupted_leaves_the_one_before(tmp_path: Path) -> None:
    good = save(tmp_path, 1, keep=1)

    def write_model(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        checkpointing.save(tmp_path, 2, {}, lambda path: path.mkdir(), write_model, keep=1)
    assert (tmp_path / "step-00000002").is_dir()
    assert newest_good(tmp_path) == good
    assert (tmp_path / "latest").read_text(encoding="utf-8") == good.name
    again = save(tmp_path, 2, keep=1)  # and is written over when the run comes there again
    assert newest_good(tmp_path) == again and not good.exists()


def test_keep(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000100", "step-00001000"]


def test_checkpoints_of_an_abandoned_future_do_not_outlive_a_new_start(tmp_path: Path) -> None:
    """A run that starts again in its folder must not end with the weights of the run before it."""
    for step in (100, 200):
        save(tmp_path, step, keep=2)
    fresh = save(tmp_path, 10, keep=2)
    assert fresh.is_dir() and newest_good(tmp_path) == fresh


def test_random_state_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = save(tmp_path, 1)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    checkpointing.restore_rng(path)
    assert torch.equal(torch.rand(3), wanted)


def test_find_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="no complete checkpoint"):
        find_model(run)
    stage1 = save(run / "stage1" / "checkpoints", 4)
    assert find_model(run) == stage1 / "model"
    stage2 = save(run / "stage2" / "checkpoints", 2)
    assert find_model(run) == stage2 / "model"  # the later stage
    assert find_model(run / "stage1") == stage1 / "model"
    assert find_model(stage1) == stage1 / "model"
    assert find_model(stage1 / "model") == stage1 / "model"
    newest = save(run / "stage2" / "checkpoints", 11)
    assert find_model(run) == newest / "model"
    shutil.rmtree(stage2)
    (newest / "checksums.json").unlink()
    assert find_model(run) == stage1 / "model"


def test_find_model_passes_over_a_damaged_one(tmp_path: Path) -> None:
    good, bad = (save(tmp_path / "stage1" / "checkpoints", step) for step in (4, 5))
    content = bytearray((bad / "model" / "model.safetensors").read_bytes())
    content[100] ^= 1
    (bad / "model" / "model.safetensors").write_bytes(content)
    assert find_model(tmp_path) == good / "model"


def test_stage_2_starts_from_the_finished_stage_1_of_its_run_folder(tmp_path: Path) -> None:
    def start(*overrides: str) -> Path | None:
        return first_model(load_config("demo", [f"run.dir={tmp_path}", "run.stages=[2]", *overrides]))

    assert start("run.stages=[1, 2]") is None and start("run.stages=[joint]") is None
    assert start("run.init_from=null") is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        start()
    save(tmp_path / "stage1/checkpoints", 4)
    with pytest.raises(CheckpointError, match="is at step 4 of 6"):  # of its own configuration, not of stage 2's
        start("stage1.max_steps=4")
    assert start(f"run.init_from={tmp_path / 'stage1'}") == tmp_path / "stage1/checkpoints/step-00000004/model"
    done = save(tmp_path / "stage1/checkpoints", 6)
    assert start("stage1.max_steps=9") == done / "model"
    assert start("run.stages=[1, 2]") is None  # stage 1 itself goes on from its own checkpoint
    save(tmp_path / "stage2/checkpoints", 1)
    shutil.rmtree(tmp_path / "stage1")
    assert start() is None  # it goes on from its own checkpoint, which holds everything
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        start("train.resume=never")
