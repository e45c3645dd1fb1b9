"""A run that goes on elsewhere: on another number of ranks, or with another ZeRO stage.

The engine's files are cut by ranks, so that another number of them cannot read them. DeepSpeed's own converter joins
them to a universal checkpoint, which any number reads; rank 0 runs it in a process of its own:

    RUN/STAGE/universal/
      partial-XXXX/                being written, or the remains of a conversion that was interrupted
      step-00000100-1a2b3c4d/      whole (renamed last); removed when all ranks have read it
"""

from __future__ import annotations

import hashlib
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from mvptr_ds.checkpoints.checkpoint import CHECKSUMS
from mvptr_ds.config import TrainConfig
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import rounded_batch_size
from mvptr_ds.errors import CheckpointError
from mvptr_ds.optim.optimizer import PARAMETER_ORDER

logger = logging.getLogger(__name__)
FOLDER = "universal"  # of a stage
SAY_EVERY_S = 60.0
JOINABLE = ({1, 2}, {3})  # ZeRO stages whose universal checkpoints read alike


def fit_batch_to_ranks(train: TrainConfig, saved: dict[str, Any] | None, num_ranks: int) -> None:
    """Fits `train` to the number of ranks; the global batch of a run that goes on stays.

    Where ranks x accumulation steps do not divide it, the accumulation steps change, so that the micro-batch of a rank
    is at most what it was.

    Args:
        saved: `state.json` of the checkpoint that the run goes on from, None for a fresh one.

    Raises:
        CheckpointError: so many ranks cannot share the batch, with the numbers that can.
    """
    if train.round_batch_size:
        # a run that goes on keeps what it was begun with, on however many ranks that was
        train.batch_size = rounded_batch_size(train, num_ranks) if saved is None else saved["batch_size"]
    if saved is None or saved["batch_size"] != train.batch_size:
        return
    ranks_before, accumulation_before = saved["num_ranks"], saved.get("accumulation_steps", 1)
    micro_before = train.batch_size // (ranks_before * accumulation_before)
    if train.batch_size % num_ranks:
        valid = [n for n in range(1, train.batch_size + 1) if train.batch_size % n == 0]
        listed = ", ".join(map(str, valid[:24])) + (", ..." if len(valid) > 24 else "")
        raise CheckpointError(
            f"the run was begun with {train.batch_size} samples a step, which {num_ranks} ranks cannot share: go on "
            f"with {listed} ranks, or start elsewhere with run.dir=... run.init_from=..."
        )
    share = train.batch_size // num_ranks
    if share % train.accumulation_steps:
        fitting = (a for a in range(1, share + 1) if share % a == 0 and share // a <= micro_before)
        given, train.accumulation_steps = train.accumulation_steps, next(fitting)
        if collectives.is_main():
            logger.info("train.accumulation_steps=%d instead of %d", train.accumulation_steps, given)
    micro = share // train.accumulation_steps
    now, before = (num_ranks, train.accumulation_steps), (ranks_before, accumulation_before)
    if now != before and collectives.is_main():
        logger.info(
            "%d samples a step as before: %d ranks x %d accumulation steps x %d samples (before: %d x %d x %d); "
            "negatives come from %d samples (before: %d)",
            train.batch_size, *now, micro, *before, micro_before, micro * num_ranks, micro_before * ranks_before,
        )  # fmt: skip


def needs_conversion(checkpoint: Path, saved: dict[str, Any], num_ranks: int, zero_stage: int) -> bool:
    """Whether the engine's files have to be joined before this run can read them.

    Raises:
        CheckpointError: no conversion makes them readable.
    """
    stage_before = saved.get("zero_stage", 2)
    same_order = saved.get("parameter_order") == PARAMETER_ORDER
    if stage_before == 0:
        raise CheckpointError(
            f"{checkpoint} was written with ZeRO stage 0, which is no longer trained and which no other stage can "
            f"read: start elsewhere from its weights with run.dir=... run.init_from={checkpoint}"
        )
    if stage_before == zero_stage:
        return not same_order or saved["num_ranks"] != num_ranks
    if any({stage_before, zero_stage} <= stages for stages in JOINABLE):
        return True
    raise CheckpointError(
        f"{checkpoint} was written with ZeRO stage {stage_before}, which stage {zero_stage} cannot read: go on with a "
        f"--deepspeed JSON of stage {stage_before}, or start elsewhere with run.dir=... run.init_from=..."
    )


def convert(checkpoint: Path, folder: Path, alive: Callable[[], None] | None = None) -> Path:
    """The universal checkpoint of `checkpoint` in `folder`; all ranks call it.

    Rank 0 converts, in a process of its own, unless it was done before.

    Args:
        alive: called all the while.

    Raises:
        CheckpointError: on all ranks, with what the converter said.
    """
    target = folder / collectives.broadcast_object(_name(checkpoint) if collectives.is_main() else None)
    collectives.run_on_rank_zero(lambda: _convert(checkpoint, folder, target), alive)
    return target


def _convert(checkpoint: Path, folder: Path, target: Path) -> None:
    for stale in folder.glob("*"):
        if stale != target:
            shutil.rmtree(stale)
    if target.exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix="partial-", dir=folder))
    logger.info("%s is converted for %d ranks and this ZeRO stage", checkpoint, collectives.num_ranks())
    with tempfile.TemporaryFile() as output:
        code = _run_converter(checkpoint / "engine", partial / "engine", output)
        if code != 0:
            shutil.rmtree(partial, ignore_errors=True)
            raise CheckpointError(_failure(checkpoint, folder, code, output))
    os.replace(partial, target)


def _name(checkpoint: Path) -> str:
    """Tells this checkpoint from another of the same step."""
    return f"{checkpoint.name}-{hashlib.sha256((checkpoint / CHECKSUMS).read_bytes()).hexdigest()[:8]}"


def _run_converter(source: Path, target: Path, output: IO[bytes]) -> int:
    """Its exit code; says now and then that it still runs."""
    arguments = ["--input_folder", str(source), "--output_folder", str(target), "--inject_missing_state"]
    # one worker each: more of them hold more of the checkpoint in memory, beside the ranks
    arguments += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = alone | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("ds_to_universal.py")), *arguments]
    started_s = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    while True:
        try:
            code = process.wait(SAY_EVERY_S)
        except subprocess.TimeoutExpired:
            logger.info("... for %.0f s so far", time.monotonic() - started_s)
        else:
            logger.info("... which took %.0f s", time.monotonic() - started_s)
            return code


def _failure(checkpoint: Path, folder: Path, code: int, output: IO[bytes]) -> str:
    output.seek(0)
    lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    num_bytes = sum(path.stat().st_size for path in (checkpoint / "engine").rglob("*"))
    return (
        f"{checkpoint} could not be converted to another number of ranks or ZeRO stage (exit code {code}): "
        f"{lines[-1] if lines else 'it said nothing'}; it needs {2 * num_bytes / 2**30:.1f} GiB in {folder} for a "
        "while: make room and start again, or go on with the ranks and the JSON it was written with"
    )
