"""Which evaluation is the best and when there were enough, and which checkpoint stays and is handed on for it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mvptr_ds.checkpoints.best import BEST, Evaluations, best_checkpoint
from mvptr_ds.checkpoints.checkpoint import CheckpointWriter, complete
from mvptr_ds.checkpoints.hand_over import find_model, finished_model
from mvptr_ds.errors import StorageError
from tests.support.checkpoint_states import state_at

BY = "eval/vqa/score"
NAN, INFINITE = float("nan"), float("inf")


def evaluated(scores: list[float], patience: int = 0, folder: Path = Path("vqa")) -> Evaluations:
    """One score every ten steps."""
    evaluations = Evaluations(folder, BY, patience)
    for number, score in enumerate(scores, start=1):
        evaluations = evaluations.after(10 * number, score)
    return evaluations


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ([0.2, 0.5, 0.4], (20, 0.5)),
        ([0.5, 0.5, 0.4], (10, 0.5)),  # of equal ones the earlier stays
        ([NAN, 0.1], (20, 0.1)),
        ([0.3, NAN, INFINITE], (10, 0.3)),
        ([0.0], (10, 0.0)),
        ([-2.0, -1.0, -3.0], (20, -1.0)),
        ([NAN, NAN], None),
        ([], None),
    ],
)
def test_the_highest_score_is_the_best(scores: list[float], best: tuple[int, float] | None) -> None:
    assert evaluated(scores).best == best


@pytest.mark.parametrize(
    ("scores", "patience", "stopped_at"),
    [
        ([0.5, 0.4, 0.4, 0.4], 0, None),
        ([0.5, 0.4, 0.3], 2, 30),
        ([0.5, 0.4, 0.6, 0.5], 2, None),
        ([0.5, 0.4, 0.6, 0.5, 0.6], 2, 50),  # as high is not better
        ([0.5, 0.4, 0.3, 0.9], 2, 30),  # the patience became shorter
        ([NAN, NAN], 2, 20),
        ([NAN, 0.1, NAN], 2, None),
        ([0.5, 0.5], 1, 20),
        ([0.5], 1, None),
        ([], 1, None),
    ],
)
def test_the_patience_ends_after_so_many_in_a_row(scores: list[float], patience: int, stopped_at: int | None) -> None:
    assert evaluated(scores, patience).stopped_at == stopped_at


def test_the_file_holds_what_people_ask_and_the_whole_list(tmp_path: Path) -> None:
    evaluated([0.25, NAN, 0.2], 2, tmp_path).record()
    assert json.loads((tmp_path / BEST).read_text(encoding="utf-8")) == {
        "step": 10, "score": 0.25, "by": BY, "stopped_at": 30, "evaluations": [[10, 0.25], [20, None], [30, 0.2]],
    }  # fmt: skip
    evaluated([NAN], 2, tmp_path).record()
    assert json.loads((tmp_path / BEST).read_text(encoding="utf-8"))["step"] is None
    assert [path.name for path in tmp_path.iterdir()] == [BEST]


def test_a_resume_takes_up_what_its_checkpoint_has_seen(tmp_path: Path) -> None:
    whole = evaluated([0.25, 0.5, 0.4, 0.3], 2, tmp_path)
    whole.record()
    again = Evaluations.resume(tmp_path, BY, 2, 40)
    assert again == whole and again.stopped_at == 40
    assert not again.lacks(40) and again.lacks(41) and not again.lacks(0)
    longer = Evaluations.resume(tmp_path, BY, 5, 40)
    assert longer.stopped_at is None and "stopped_at" not in json.loads((tmp_path / BEST).read_text(encoding="utf-8"))
    # the checkpoint of 40 is gone: that evaluation is to come again
    earlier = Evaluations.resume(tmp_path, BY, 2, 35)
    assert earlier == evaluated([0.25, 0.5, 0.4], 2, tmp_path) and earlier.stopped_at is None
    assert json.loads((tmp_path / BEST).read_text(encoding="utf-8"))["evaluations"][-1] == [30, 0.4]
    assert Evaluations.resume(tmp_path, BY, 2, 0).done == () and not (tmp_path / BEST).exists()


def test_other_scores_are_no_history(tmp_path: Path) -> None:
    evaluated([0.25], 0, tmp_path).record()
    assert Evaluations.resume(tmp_path, "eval/vqa/other", 0, 10).done == ()
    pretraining = Evaluations.resume(tmp_path, None, 0, 10)
    assert pretraining.done == () and pretraining.best is None and not pretraining.lacks(10)


@pytest.mark.parametrize(
    "content", ["", "[]", "{}", '{"step": 3, "score": null, "by": "a", "evaluations": []}', '{"step": 3']
)
def test_a_damaged_file_counts_as_missing_and_is_reported(
    content: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / BEST).write_text(content, encoding="utf-8")
    assert Evaluations.resume(tmp_path, BY, 0, 10).done == () and best_checkpoint(tmp_path) is None
    assert "says not which checkpoint is the best" in caplog.text


def save(stage: Path, step: int, best_step: int | None = None, keep: int = 1) -> Path:
    """A checkpoint as the trainer writes one."""

    def write_model(path: Path) -> None:
        path.mkdir()
        (path / "model.safetensors").write_text(str(step), encoding="utf-8")

    writer = CheckpointWriter(stage / "checkpoints", keep, 0, best_step)
    path = writer.save(state_at(step), lambda path: path.mkdir(), write_model)
    assert path is not None
    return path


def steps(stage: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete(stage / "checkpoints")]


def test_the_best_checkpoint_stays_until_another_one_is_better(tmp_path: Path) -> None:
    for step, best_step, left in ((1, None, [1]), (2, 1, [2, 1]), (3, 1, [3, 1]), (4, 3, [4, 3]), (5, None, [5])):
        save(tmp_path, step, best_step)
        assert steps(tmp_path) == left


def test_the_best_checkpoint_is_handed_on(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stage = tmp_path / "vqa"
    best, newest = save(stage, 10, keep=2), save(stage, 20, keep=2)
    assert finished_model(stage, 20) == find_model(stage) == find_model(tmp_path) == newest / "model"
    evaluated([0.75, 0.5], 0, stage).record()
    with caplog.at_level(logging.INFO, logger="mvptr_ds"):
        assert finished_model(stage, 20) == find_model(stage) == find_model(tmp_path) == best / "model"
    assert f"vqa was best at step 10 ({BY} 0.7500): {best}" in caplog.text
    assert find_model(newest) == newest / "model"  # who names one gets that
    evaluated([NAN, NAN], 0, stage).record()
    assert finished_model(stage, 20) == newest / "model"


def test_where_the_best_checkpoint_is_gone_or_damaged_the_newest_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    best, newest = save(tmp_path, 10, keep=2), save(tmp_path, 20, keep=2)
    evaluated([0.75, 0.5], 0, tmp_path).record()
    (best / "model/model.safetensors").write_text("changed", encoding="utf-8")
    assert find_model(tmp_path) == newest / "model"
    assert "model/model.safetensors has changed): its newest one is taken instead" in caplog.text
    (best / "checksums.json").unlink()
    assert find_model(tmp_path) == newest / "model" and "cannot be used (it is gone)" in caplog.text
    evaluated([0.5, 0.75], 0, tmp_path).record()
    monkeypatch.setattr("mvptr_ds.checkpoints.best.verify", lambda path: "state.json is unreadable (EIO)")
    with pytest.raises(StorageError, match=r"the best of .*: state\.json is unreadable"):
        find_model(tmp_path)
