"""Run by every rank: FOLDER/scenarios.json through the real entry point, each disturbed on purpose.

Each scenario is {"name", "arguments", "disturb"}, and {"copy": [RUN, STAGE, STEP]} where it starts from an earlier one
as it was at that step, with "damage" where every checkpoint has changed since; the exit codes go to
FOLDER/codes-rankN.json, and to left-rankN.json how many parameters live on after each stage's close. The process group
stays between them, since start-up is what takes the time.
"""

from __future__ import annotations

import errno
import faulthandler
import json
import os
import resource
import signal
import sys
import time
import weakref
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from threading import Timer
from typing import Any
from unittest.mock import patch

from mvptr_ds import train
from mvptr_ds.data.dataset import ShardDataset
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.shards.storage import LocalFiles
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import DataError
from mvptr_ds.trainer import Trainer
from tests.end_to_end.copies import forget

MAX_FILE_BYTES = 100_000  # above this program's log, below the smallest file of the engine
POISONED_STEPS = (1, 4, 5, 6)  # counted from 0, as the step that is being made
HUNG_STEP = 2
FULL_STEP, RANK1_STEP = 4, 6
HELD_OUT_STEP = 2

train_step, save, load, build_engine = Trainer._train_step, Trainer.save, ShardDataset._load, Trainer._build_engine
loader, evaluate, close = Trainer._loader, Trainer._evaluate, Trainer.close
left: list[int] = []


def poison(trainer: Trainer, micro_batches: list[Any]) -> None:
    """Two boxes of rank 1 are infinite in some steps."""
    if collectives.rank() == 1 and trainer.step in POISONED_STEPS:
        micro_batches[-1].region_geometry_BR6[-2:] = float("inf")
    train_step(trainer, micro_batches)


def save_with_full_disk(trainer: Trainer, must: bool = False) -> None:
    """No space at one step (a full file system where FOLDER/disk is one), at another a limit of rank 1's alone."""
    disk = Path(trainer.config.run.dir).parent
    ballast = disk / "ballast"
    if trainer.step == FULL_STEP and os.path.ismount(disk):
        fill(ballast)
        save(trainer, must)
        return
    ballast.unlink(missing_ok=True)
    save_limited(trainer, must, collectives.rank() == {FULL_STEP: 0, RANK1_STEP: 1}.get(trainer.step))


def save_limited(trainer: Trainer, must: bool, limited: bool) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    if limited:
        resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE_BYTES, hard))
    try:
        save(trainer, must)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def save_the_end_without_room(trainer: Trainer, must: bool = False) -> None:
    save_limited(trainer, must, must and collectives.rank() == 1)


def stop_without_room(trainer: Trainer, must: bool = False) -> None:
    """A signal while the first checkpoint fails; then that of the signal fails."""
    if not must:
        os.kill(os.getpid(), signal.SIGTERM)
    save_limited(trainer, must, collectives.rank() == 1)


def fill(path: Path) -> None:
    with path.open("ab", buffering=0) as file:
        for num_bytes in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(b"\0" * num_bytes)
            except OSError:
                continue
    collectives.barrier()


def load_with_dead_storage(dataset: ShardDataset, wanted: list[tuple[int, int, int]]) -> Any:
    gone = [position for position, _, _ in wanted if position >= 20]
    if collectives.rank() == 1 and gone:
        raise DataError(f"position {gone[0]}: the storage of rank 1 is gone; look after it")
    return load(dataset, wanted)


def get_signal_and_load(trainer: Trainer) -> Any:
    if collectives.rank() == 1:
        os.kill(os.getpid(), signal.SIGUSR1)
        assert trainer.stop.wait(5.0)
    return loader(trainer)


def evaluate_without_storage(trainer: Trainer) -> None:
    """Of the held-out shards, at one step."""
    if trainer.step == HELD_OUT_STEP:
        with patch.object(LocalFiles, "read", side_effect=OSError(errno.ESTALE, "Stale file handle")):
            evaluate(trainer)
    else:
        evaluate(trainer)


def evaluate_and_be_interrupted(trainer: Trainer) -> None:
    """Rank 0 a little after it has begun."""
    timer = Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    if collectives.is_main():
        timer.start()
        with patch.object(SampleBuilder, "begin", lambda *_: time.sleep(60.0)):
            evaluate(trainer)
        timer.join()
    else:
        evaluate(trainer)


def hang(trainer: Trainer, micro_batches: list[Any]) -> None:
    if collectives.rank() == 1 and trainer.step == HUNG_STEP:
        sleep_for_ever()
    if trainer.step == HUNG_STEP:  # rank 1's time is up first: the collective of rank 0 fails
        faulthandler.cancel_dump_traceback_later()
    train_step(trainer, micro_batches)


def close_and_count(trainer: Trainer) -> None:
    """How many of the model's parameters live on, without a further look by the garbage collector."""
    parameters = [weakref.ref(parameter) for parameter in trainer.module.parameters()]
    close(trainer)
    left.append(sum(parameter() is not None for parameter in parameters))


def sleep_for_ever() -> None:
    while True:
        time.sleep(3600)


DISTURBANCES: dict[str, tuple[type, str, Callable[..., Any]]] = {
    "poison": (Trainer, "_train_step", poison),
    "full disk": (Trainer, "save", save_with_full_disk),
    "no room at the end": (Trainer, "save", save_the_end_without_room),
    "signal without room": (Trainer, "save", stop_without_room),
    "dead storage": (ShardDataset, "_load", load_with_dead_storage),
    "signal": (Trainer, "_loader", get_signal_and_load),
    "stale held-out": (Trainer, "_evaluate", evaluate_without_storage),
    "interrupted evaluation": (Trainer, "_evaluate", evaluate_and_be_interrupted),
    "hang": (Trainer, "_train_step", hang),
    "hang in the start-up": (Trainer, "_build_engine", lambda *_: sleep_for_ever()),
}


def copy_run(scenario: dict[str, Any]) -> None:
    """Where the scenario goes on from an earlier one of the same launch."""
    if "copy" not in scenario:
        return
    source, stage, step = scenario["copy"]
    collectives.barrier()  # the others may still be closing the run before
    if collectives.is_main():
        run_dir = next(a for a in scenario["arguments"] if a.startswith("run.dir=")).partition("=")[2]
        forget(Path(source), Path(run_dir), stage, step)
        for weights in (
            Path(run_dir).glob("*/checkpoints/step-*/model/model.safetensors") if "damage" in scenario else ()
        ):
            weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    collectives.barrier()


def main() -> None:
    folder = Path(next(argument for argument in sys.argv[1:] if not argument.startswith("--")))
    codes = {}
    with patch.object(collectives, "shut_down", lambda: None):
        for scenario in json.loads((folder / "scenarios.json").read_text(encoding="utf-8")):
            print(f"=== {scenario['name']}", file=sys.stderr, flush=True)
            copy_run(scenario)
            with ExitStack() as stack:
                stack.enter_context(patch.object(sys, "argv", ["train.py", *scenario["arguments"]]))
                stack.enter_context(patch.object(train, "OTHERS_WAIT_S", 0.0))
                stack.enter_context(patch.object(Trainer, "close", close_and_count))
                if scenario["disturb"]:
                    stack.enter_context(patch.object(*DISTURBANCES[scenario["disturb"]]))
                codes[scenario["name"]] = train.main()
    for name, content in (("codes", codes), ("left", left)):
        (folder / f"{name}-rank{collectives.rank()}.json").write_text(json.dumps(content), encoding="utf-8")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
