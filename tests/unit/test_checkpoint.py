"""Checkpoints: an interrupted or damaged one is never used, the one before it is."""

from __future__ import annotations

import errno
import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from mvptr_ds.checkpoints.checkpoint import CheckpointWriter, newest_good, verify
from mvptr_ds.checkpoints.hand_over import find_model, finished_model, first_model, resumes, set_aside
from mvptr_ds.checkpoints.rng import restore_rng
from mvptr_ds.checkpoints.state import read_state
from mvptr_ds.config import load_config
from mvptr_ds.errors import CheckpointError, StorageError
from mvptr_ds.tasks import TASKS
from tests.support.checkpoint_states import state_at


def save(
    folder: Path,
    step: int,
    keep: int = 10,
    keep_every_steps: int = 0,
    error: Exception | None = None,
    must: bool = False,
) -> Path:
    """A checkpoint, or one whose engine cannot be written for this error."""

    def write_engine(path: Path) -> None:
        if error is not None:
            raise error
        path.mkdir()
        torch.save({"step": step}, path / "states.pt")

    def write_model(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors").write_bytes(bytes(range(256)) * (step + 1))
        (path / "config.json").write_text("{}", encoding="utf-8")
        (path / "mvptr.yaml").write_text("stage1: {max_steps: 6}", encoding="utf-8")

    writer = CheckpointWriter(folder, keep, keep_every_steps)
    return writer.save(state_at(step), write_engine, write_model, must)


def change(path: Path) -> None:
    """One byte of its weights."""
    weights = path / "model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


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
    assert read_state(path) == state_at(7)
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


def test_none_that_is_good_is_an_error_with_the_reason_of_each(tmp_path: Path) -> None:
    """Not a fresh start, which would remove them."""
    change(save(tmp_path, 1))
    (save(tmp_path, 2) / "state.json").unlink()
    before = contents(tmp_path)
    with pytest.raises(CheckpointError) as error:
        newest_good(tmp_path)
    for part in (
        str(tmp_path),
        "step-00000001: model/model.safetensors has changed",
        "step-00000002: state.json is missing",
    ):
        assert part in str(error.value)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("name", ["state.json", "checksums.json"])
def test_storage_that_fails_is_told_from_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    path = save(tmp_path / "stage1/checkpoints", 1)

    def open_stale(file: Path, *args: Any, **kwargs: Any) -> Any:
        if file.name == name:
            raise OSError(errno.ESTALE, "Stale file handle", str(file))
        return open(file, *args, **kwargs)

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", open_stale)
        with pytest.raises(StorageError, match=rf"step-00000001: {name} is unreadable \(.*Stale file handle"):
            newest_good(path.parent)
        with pytest.raises(StorageError):
            find_model(tmp_path)
    assert newest_good(path.parent) == path


def test_a_folder_that_cannot_be_listed_is_not_an_empty_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(path: Path) -> list[str]:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr("os.listdir", stale)
    with pytest.raises(StorageError, match=r"cannot be listed: .*Stale file handle"):
        newest_good(tmp_path)
    with pytest.raises(StorageError):
        resumes(load_config("demo", [f"run.dir={tmp_path}"]), "stage1")


def test_a_save_that_is_interrupted_leaves_the_one_before(tmp_path: Path) -> None:
    good = save(tmp_path, 1, keep=1)

    def write_model(path: Path) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        CheckpointWriter(tmp_path, 1).save(state_at(2), lambda path: path.mkdir(), write_model)
    assert (tmp_path / "step-00000002").is_dir()
    assert newest_good(tmp_path) == good
    assert (tmp_path / "latest").read_text(encoding="utf-8") == good.name
    again = save(tmp_path, 2, keep=1)  # and is written over when the run comes there again
    assert newest_good(tmp_path) == again and not good.exists()


def test_keep(tmp_path: Path) -> None:
    for step in (5, 10, 100, 1000):
        save(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000100", "step-00001000"]


def test_some_are_kept_for_good(tmp_path: Path) -> None:
    for step in (5, 10, 15, 20, 25, 35):
        save(tmp_path, step, keep=1, keep_every_steps=10)
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000020", "step-00000035"]
    save(tmp_path, 12, keep=1, keep_every_steps=10)  # of a run that was started again: what is later goes all the same
    assert sorted(p.name for p in tmp_path.glob("step-*")) == ["step-00000010", "step-00000012"]


def test_checkpoints_of_an_abandoned_future_do_not_outlive_a_new_start(tmp_path: Path) -> None:
    """A run that starts again in its folder must not end with the weights of the run before it."""
    for step in (100, 200):
        save(tmp_path, step, keep=2)
    fresh = save(tmp_path, 10, keep=2)
    assert fresh.is_dir() and newest_good(tmp_path) == fresh


def test_what_a_run_passes_over_stays_until_it_has_come_as_far(tmp_path: Path) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, keep=9)
    before = contents(tmp_path / "step-00000200")
    for step in (110, 200):  # goes on from 100
        fresh = save(tmp_path, step, keep=9)
        assert newest_good(tmp_path) == fresh
        there = sorted(path.name for path in (tmp_path / "passed-over").iterdir())
        assert there == {110: ["step-00000200", "step-00000300"], 200: ["step-00000300"]}[step]
        if step == 110:
            assert contents(tmp_path / "passed-over/step-00000200") == before
    save(tmp_path, 300, keep=9)
    assert list((tmp_path / "passed-over").iterdir()) == []


def test_a_save_that_fails_takes_nothing_that_was_there(tmp_path: Path) -> None:
    """At the step of one that the run could not use."""
    save(tmp_path, 1)
    before = contents(save(tmp_path, 2))
    assert save(tmp_path, 2, error=OSError(errno.ENOSPC, "No space left on device")) is None
    assert contents(tmp_path / "passed-over/step-00000002") == before
    again = save(tmp_path, 2)
    assert newest_good(tmp_path) == again and not (tmp_path / "passed-over/step-00000002").exists()


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"), CheckpointError),
        (OSError(errno.EIO, "Input/output error"), StorageError),
    ],
)
def test_a_last_save_that_fails_is_an_error(tmp_path: Path, error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind, match=r"step 6 could not be saved in .*rank 0: .*goes on from the beginning"):
        save(tmp_path, 6, error=error, must=True)
    good = save(tmp_path, 4)
    with pytest.raises(kind, match="goes on from step 4"):
        save(tmp_path, 6, error=error, must=True)
    assert newest_good(tmp_path) == good and not (tmp_path / "step-00000006").exists()


def test_random_state_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(3)
    path = save(tmp_path, 1)
    wanted = torch.rand(3)
    torch.manual_seed(4)
    restore_rng(path)
    assert torch.equal(torch.rand(3), wanted)


def test_find_model(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(CheckpointError, match="run does not exist; give a run folder"):
        find_model(run)
    run.mkdir()
    with pytest.raises(CheckpointError, match="run holds no complete checkpoint"):
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
    change(bad)
    assert find_model(tmp_path) == good / "model"


def test_find_model_takes_nothing_else_for_a_damaged_one(tmp_path: Path) -> None:
    """Neither an earlier stage's, nor the damaged one itself because it was named."""
    first = save(tmp_path / "stage1/checkpoints", 4)
    second = save(tmp_path / "stage2/checkpoints", 4)
    (second / "engine/states.pt").unlink()
    assert find_model(second) == second / "model"  # of which nothing is missing
    change(second)
    for named in (tmp_path, tmp_path / "stage2", second, second / "model"):
        with pytest.raises(CheckpointError, match=r"(?s)step-00000004.*name another stage folder"):
            find_model(named)
    assert find_model(tmp_path / "stage1") == first / "model"
    (first / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="its save was interrupted"):
        find_model(first)


def test_a_stage_that_has_ended_hands_over_its_end(tmp_path: Path) -> None:
    checkpoints = tmp_path / "stage1/checkpoints"
    with pytest.raises(CheckpointError, match="has ended at step 6, but its newest good checkpoint is of step 0"):
        finished_model(tmp_path / "stage1", 6)
    save(checkpoints, 4)
    end = save(checkpoints, 6)
    assert finished_model(tmp_path / "stage1", 6) == finished_model(tmp_path / "stage1", 3) == end / "model"
    change(end)
    with pytest.raises(CheckpointError, match="has ended at step 6, but its newest good checkpoint is of step 4"):
        finished_model(tmp_path / "stage1", 6)


def test_what_a_run_that_begins_anew_finds_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stages = ["stage1", "stage2"]
    set_aside(tmp_path, stages, [])
    (tmp_path / "stage1").mkdir()
    set_aside(tmp_path, stages, [])  # of a start that has saved nothing
    assert [path.name for path in tmp_path.iterdir()] == ["stage1"]
    for number in (1, 2):
        for stage in stages:
            save(tmp_path / stage / "checkpoints", number)
            (tmp_path / stage / "metrics.jsonl").write_text("{}", encoding="utf-8")
        before = contents(tmp_path / "stage1")
        with caplog.at_level(logging.INFO, logger="mvptr_ds"):
            set_aside(tmp_path, ["stage1"], [tmp_path / "stage2/checkpoints" / f"step-0000000{number}" / "model"])
        assert contents(tmp_path / f"before-{number}/stage1") == before and not (tmp_path / "stage1").exists()
        assert f"the earlier stage1 stays in {tmp_path}/before-{number}" in caplog.text
    assert find_model(tmp_path) == tmp_path / "stage2/checkpoints/step-00000002/model"
    with pytest.raises(CheckpointError, match=r"give it another run.dir"):
        set_aside(tmp_path, stages, [tmp_path / "stage2/checkpoints/step-00000002/model"])
    set_aside(tmp_path, stages, [])
    assert not (tmp_path / "stage2").exists() and newest_good(tmp_path / "before-3/stage2/checkpoints") is not None


def test_stage_2_starts_from_the_finished_stage_1_of_its_run_folder(tmp_path: Path) -> None:
    def start(*overrides: str) -> Path | None:
        config = load_config("demo", [f"run.dir={tmp_path}", "run.stages=[2]", *overrides])
        return first_model(config, TASKS[config.stage_names[0]].follows, config.stage_names[0])

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
    for overrides in ((), ("run.init_from=nowhere",)):
        assert start(*overrides) is None  # it goes on from its own checkpoint, which holds everything
    shutil.rmtree(tmp_path / "stage1")
    assert start() is None
    with pytest.raises(CheckpointError, match="holds no complete checkpoint"):
        start("train.resume=never")
