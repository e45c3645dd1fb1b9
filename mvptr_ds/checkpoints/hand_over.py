"""What a run starts from: a stage's own checkpoint, the stage before, another run, or nothing.

All ranks call every function here together.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from contextlib import suppress
from itertools import count
from pathlib import Path

from mvptr_ds.checkpoints.best import best_checkpoint
from mvptr_ds.checkpoints.checkpoint import CHECKSUMS, complete, damaged, newest_good, verify
from mvptr_ds.checkpoints.state import CheckpointState, read_state
from mvptr_ds.config import STAGES, Config, load_config
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import CheckpointError

logger = logging.getLogger(__name__)
EARLIER = "before-"  # RUN/before-1/stage1: what a run with train.resume=never found
PRETRAINING_LAST_FIRST = ("stage2", "joint", "stage1")
LAST_FIRST = (*(name for name in reversed(STAGES) if name not in PRETRAINING_LAST_FIRST), *PRETRAINING_LAST_FIRST)
PRETRAINED_FIRST = (
    *PRETRAINING_LAST_FIRST,
    *LAST_FIRST,
)  # a task starts from no other task
NAME_ANOTHER = "name another stage folder, checkpoint or model folder"


def newest_state(run_dir: Path, stages: Sequence[str]) -> CheckpointState | None:
    """Returns the state of the newest checkpoint of the last stage that has one, None without any.

    Nothing is verified.
    """

    def read() -> CheckpointState | None:
        state = None
        for path in (path for stage in stages for path in reversed(complete(run_dir / stage / "checkpoints"))):
            with suppress(OSError, ValueError):
                state = read_state(path)
        return state

    return collectives.of_main(read)


def find_model(path: Path, stages: Sequence[str] = LAST_FIRST) -> Path:
    """Returns the model folder meant by a run folder, a stage folder, a checkpoint or a model folder itself.

    Of a stage it is that of the best checkpoint, where its evaluations say which is the best, else of the newest.

    Args:
        stages: of several in a run folder, the first of these that has a checkpoint counts.

    Raises:
        CheckpointError: there is none below `path`, or none that is good.
        StorageError: there are some, but they cannot be read.
    """
    candidates = (path, path / "model")
    found = collectives.of_main(lambda: next((c for c in candidates if (c / "model.safetensors").is_file()), None))
    if found is not None:
        _check_whole(found)
        return found
    for stage in (path, *(path / name for name in stages)):
        chosen = best_checkpoint(stage) or newest_good(stage / "checkpoints", NAME_ANOTHER)
        if chosen is not None:
            return chosen / "model"
    there = "holds no complete checkpoint" if collectives.of_main(path.exists) else "does not exist"
    raise CheckpointError(f"{path} {there}; give a run folder, a stage folder or a model folder")


def _check_whole(model: Path) -> None:
    """Raises CheckpointError or StorageError where the model folder is of a damaged or incomplete checkpoint."""
    checkpoint = model.parent
    if collectives.of_main(lambda: (checkpoint / CHECKSUMS).exists()):
        problem = verify(checkpoint, model.name)
        if problem is not None:
            raise damaged(f"{checkpoint} is damaged ({problem}): ", [problem], NAME_ANOTHER)
    elif collectives.of_main(lambda: (checkpoint / "engine").is_dir()):
        raise CheckpointError(f"{checkpoint} is not complete, its save was interrupted: {NAME_ANOTHER}")


def resumes(config: Config, stage: str) -> bool:
    """Returns whether a stage has checkpoints of its own to resume from."""
    own = Path(config.run.dir) / stage / "checkpoints"
    return config.train.resume == "auto" and collectives.of_main(lambda: bool(complete(own)))


def stage_before(config: Config, stage: str, follows: str | None) -> str | None:
    """Returns which of `run.stages` another one starts from; None where no stage of this run makes its start.

    A stage of pre-training starts from the one before it. A downstream task starts from the stage that it follows, not
    from the task before it.

    Args:
        follows: the stage whose finished weights it takes with `run.init_from=auto`; None: it starts fresh.
    """
    earlier = config.stage_names[: config.stage_names.index(stage)]
    if config.finetuning(stage) is None:
        pretrained = [name for name in earlier if config.pretraining(name) is not None]
        return pretrained[-1] if pretrained else None
    return next((name for name in _followed(config, stage, follows) if name in earlier), None)


def _followed(config: Config, stage: str, follows: str | None) -> list[str]:
    """The stages that one may start from: of pre-training its own, of a task also joint, which takes its place."""
    names = [] if follows is None else [follows]
    return names if config.finetuning(stage) is None else list(dict.fromkeys((*names, "joint")))


def first_model(config: Config, follows: str | None, stage: str) -> Path | None:
    """Returns the model folder that a stage starts from, as `run.init_from` says.

    Args:
        follows: see `stage_before`.

    Returns:
        None where it starts from its own checkpoint, which holds everything, or with fresh weights.

    Raises:
        CheckpointError: there is none where it says; or stage 2 is to follow on a stage 1 that is not finished.
        StorageError: there are some, but they cannot be read.
    """
    if resumes(config, stage):
        return None
    if config.run.init_from != "auto":
        order = LAST_FIRST if config.finetuning(stage) is None else PRETRAINED_FIRST
        return find_model(Path(config.run.init_from), order) if config.run.init_from else None
    if follows is None:
        return None
    run_dir = Path(config.run.dir)
    starts = f"{_spoken(stage)} starts from a finished {_spoken(follows)}"
    alone = f"run.stages=[{follows.removeprefix('stage')}]"
    for name in _followed(config, stage, follows):
        newest = newest_good(run_dir / name / "checkpoints")
        if newest is not None:
            break
    else:
        raise CheckpointError(
            f"{starts}, and {run_dir / follows} holds no complete checkpoint: train it first ({alone}), name another "
            "start (run.init_from=...), or begin with fresh weights (run.init_from=null)"
        )
    step, max_steps = read_state(newest).step, load_config(newest / "model/mvptr.yaml").stage(name).max_steps
    if step < max_steps:
        raise CheckpointError(
            f"{_spoken(stage)} starts from a finished {_spoken(name)}, and that of {run_dir} is at step {step} of "
            f"{max_steps}: let it finish first (run.stages=[{name.removeprefix('stage')}]), or take it as it is "
            f"(run.init_from={run_dir / name})"
        )
    return newest / "model"


def _spoken(stage: str) -> str:
    """`stage2` as a person says it: stage 2."""
    return stage.replace("stage", "stage ")


def finished_model(stage_dir: Path, num_steps: int) -> Path:
    """Returns the model folder of a stage that has just ended after so many steps: of its best checkpoint, if any is.

    Raises:
        CheckpointError: its newest good checkpoint is of an earlier step.
        StorageError: none can be read.
    """
    newest = newest_good(stage_dir / "checkpoints")
    step = 0 if newest is None else read_state(newest).step
    if newest is None or step < num_steps:
        raise CheckpointError(
            f"{stage_dir} has ended at step {num_steps}, but its newest good checkpoint is of step {step}: start "
            "again, it goes on from there"
        )
    return (best_checkpoint(stage_dir) or newest) / "model"


def set_aside(run_dir: Path, stages: Sequence[str], starts: Sequence[Path]) -> None:
    """Moves what earlier starts have left of these stages to `RUN/before-N`. Nothing is deleted.

    Raises:
        CheckpointError: one of `starts`, whose weights the run is to start from, is among it.
    """

    def move() -> None:
        old = [run_dir / stage for stage in stages if complete(run_dir / stage / "checkpoints")]
        if not old:
            return
        for start in starts:
            if any(start.resolve().is_relative_to(path.resolve()) for path in old):
                raise CheckpointError(
                    f"the run is to start from {start}, which train.resume=never moves out of its way: give it another "
                    "run.dir"
                )
        target = next(path for n in count(1) if not (path := run_dir / f"{EARLIER}{n}").exists())
        target.mkdir()
        for path in old:
            os.replace(path, target / path.name)
        names = " and ".join(path.name for path in old)
        logger.info("train.resume=never: the earlier %s stays in %s, until you remove it", names, target)

    collectives.of_main(move)
