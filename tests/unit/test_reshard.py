"""Resuming on another number of ranks: what is converted, what is refused, a conversion that fails."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from mvptr_ds.checkpoints import hand_over, reshard
from mvptr_ds.checkpoints.checkpoint import CHECKSUMS, CheckpointWriter
from mvptr_ds.checkpoints.rng import seed_rng
from mvptr_ds.config import Config
from mvptr_ds.engine import Engine
from mvptr_ds.errors import CheckpointError
from mvptr_ds.guards import SkippedSteps
from mvptr_ds.monitoring.bad_samples import BadSamples
from mvptr_ds.optim.optimizer import PARAMETER_ORDER
from mvptr_ds.trainer import Trainer
from tests.support.checkpoint_states import state_at
from tests.unit.test_optim import APEX, apex, build, take

__all__ = ["apex"]  # the fixture


@pytest.mark.parametrize(
    ("before", "now", "wanted"),
    [
        ((2, 2), (2, 2), False),
        ((2, 2), (1, 2), True),
        ((2, 2), (2, 1), True),
        ((4, 1), (2, 2), True),
        ((2, 3), (4, 3), True),
        ((2, 3), (2, 3), False),
    ],
)
def test_what_is_converted(before: tuple[int, int], now: tuple[int, int], wanted: bool) -> None:
    state = state_at(1, num_ranks=before[0], zero_stage=before[1], parameter_order=PARAMETER_ORDER)
    assert reshard.needs_conversion(Path("step"), state, *now) is wanted


@pytest.mark.parametrize("stages", [(2, 3), (3, 1)])
def test_stages_that_do_not_read_each_other_are_refused(stages: tuple[int, int]) -> None:
    state = state_at(1, num_ranks=2, zero_stage=stages[0])
    with pytest.raises(CheckpointError, match=f"written with ZeRO stage {stages[0]}, which stage {stages[1]} cannot"):
        reshard.needs_conversion(Path("step"), state, 2, stages[1])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_checkpoint_of_stage_0_says_how_its_weights_go_on(stage: int) -> None:
    """Nobody writes them any more, but some lie about."""
    state = state_at(1, num_ranks=2, zero_stage=0, parameter_order=PARAMETER_ORDER)
    with pytest.raises(CheckpointError, match=r"ZeRO stage 0, .*with run\.dir=\.\.\. run\.init_from=RUN/step"):
        reshard.needs_conversion(Path("RUN/step"), state, 2, stage)


def checkpoint_of_garbage(folder: Path) -> Path:
    def write_engine(path: Path) -> None:
        path.mkdir()
        (path / "zero_pp_rank_0_mp_rank_00_optim_states.pt").write_bytes(b"garbage")

    path = CheckpointWriter(folder, 1).save(state_at(3), write_engine, lambda path: path.mkdir())
    assert path is not None
    return path


def test_a_conversion_that_fails_says_why_and_leaves_nothing(tmp_path: Path) -> None:
    path = checkpoint_of_garbage(tmp_path / "checkpoints")
    stale = tmp_path / "universal" / "partial-of-a-killed-one"
    stale.mkdir(parents=True)
    with pytest.raises(CheckpointError) as error:
        reshard.convert(path, tmp_path / "universal")
    for part in (str(path), "could not be converted", "exit code 1", "UnpicklingError", "GiB in"):
        assert part in str(error.value), str(error.value)
    assert list((tmp_path / "universal").iterdir()) == []


def test_one_that_is_there_is_taken_unless_the_checkpoint_has_changed(tmp_path: Path) -> None:
    """The converter would fail on this checkpoint: it is not run."""
    path = checkpoint_of_garbage(tmp_path / "checkpoints")
    whole = tmp_path / "universal" / reshard._name(path)
    whole.mkdir(parents=True)
    assert reshard.convert(path, tmp_path / "universal") == whole
    (path / CHECKSUMS).write_text("{}", encoding="utf-8")  # another of the same step
    with pytest.raises(CheckpointError):
        reshard.convert(path, tmp_path / "universal")
    assert not whole.exists()


@pytest.mark.usefixtures("apex")
def test_apex_goes_on_with_the_count_of_updates() -> None:
    """DeepSpeed gives it another; the count decides how far the moments' bias is corrected."""
    weights, optimizer = build(APEX)
    take(weights, optimizer, range(3))
    for group in optimizer.param_groups:
        group["step"] = 99
    engine = Engine.__new__(Engine)  # nothing of DeepSpeed is asked
    engine._optimizer = optimizer
    engine._mend_optimizer(3)
    undisturbed, wanted = build(APEX)
    take(undisturbed, wanted, range(4))
    take(weights, optimizer, range(3, 4))
    assert [group["step"] for group in optimizer.param_groups] == [4, 4]
    assert all(torch.equal(one, two) for one, two in zip(weights, undisturbed, strict=True))


def test_steps_that_were_left_out_are_no_updates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The engine is a stand-in: only apex's optimiser asks for their number, and that runs on CUDA alone."""
    state = state_at(8, zero_stage=1, parameter_order=PARAMETER_ORDER, skipped_steps=3)
    path = CheckpointWriter(tmp_path, 1).save(state, lambda p: p.mkdir(), lambda p: p.mkdir())
    assert path is not None
    loaded: list[tuple[Path, int | None]] = []
    trainer = Trainer.__new__(Trainer)
    trainer.config, trainer.dir, trainer.zero_stage, trainer.seed = Config(), tmp_path, 2, 0
    trainer.skipped, trainer.bad_samples, trainer.starting = SkippedSteps(9), BadSamples(1.0, tmp_path), lambda: None
    trainer.module, trainer.stage = SimpleNamespace(model=None), Config().stage1
    trainer.engine = SimpleNamespace(load=lambda path, universal_steps: loaded.append((path, universal_steps)))
    monkeypatch.setattr(trainer, "_build_engine", lambda filled: None)
    monkeypatch.setattr("mvptr_ds.checkpoints.model_folder.load_weights", lambda *_: None)
    monkeypatch.setattr("mvptr_ds.checkpoints.reshard.convert", lambda path, folder, alive: folder)
    trainer._resume(path, {})
    assert loaded == [(tmp_path / reshard.FOLDER / "engine", 8 - 3)]
    assert (trainer.step, trainer.skipped.total) == (8, 3)


def test_ranks_that_are_new_draw_from_step_and_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    def draw(seed: int, step: int, rank: int) -> float:
        monkeypatch.setattr("mvptr_ds.distributed.collectives.rank", lambda: rank)
        seed_rng(seed, step)
        return float(torch.rand(()))

    drawn = [draw(*key) for key in ((0, 4, 0), (0, 4, 1), (0, 5, 0), (1, 4, 0))]
    assert len(set(drawn)) == 4 and draw(0, 4, 1) == drawn[1]


def test_newest_state(tmp_path: Path) -> None:
    assert hand_over.newest_state(tmp_path, ["stage1", "stage2"]) is None
    for stage, step in (("stage1", 4), ("stage1", 6), ("stage2", 2)):
        writer = CheckpointWriter(tmp_path / stage / "checkpoints", 9)
        checkpoint = writer.save(state_at(step, stage=stage), lambda p: p.mkdir(), lambda p: p.mkdir())
        assert checkpoint is not None
        state = hand_over.newest_state(tmp_path, ["stage1", "stage2"])
        assert state is not None and (state.stage, state.step) == (stage, step)
