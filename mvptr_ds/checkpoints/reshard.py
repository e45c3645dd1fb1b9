"""Resuming on another number of ranks, or with another ZeRO stage.

The engine's files hold one part for each rank, which another number of ranks cannot read. DeepSpeed's converter joins
the parts to a universal checkpoint, which any number reads. Rank 0 runs it in a process of its own:

    RUN/STAGE/universal/
      partial-XXXX/                being written, or the remains of a conversion that was interrupted
      step-00000100-1a2b3c4d/      complete (renamed last); removed when all ranks have read it
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
from typing import IO

from mvptr_ds.checkpoints.checkpoint import CHECKSUMS
from mvptr_ds.checkpoints.state import CheckpointState
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import CheckpointError
from mvptr_ds.optim.optimizer import PARAMETER_ORDER

logger = logging.getLogger(__name__)
FOLDER = "universal"  # of a stage
REPORT_EVERY_S = 60.0
JOINABLE = ({1, 2}, {3})  # ZeRO stages that can read each other's universal checkpoints


def needs_conversion(checkpoint: Path, saved: CheckpointState, num_ranks: int, zero_stage: int) -> bool:
    """Returns whether these ranks and this ZeRO stage can read the engine's files only once they are joined.

    Raises:
        CheckpointError: no conversion makes them readable.
    """
    if saved.zero_stage == 0:
        raise CheckpointError(
            f"{checkpoint} was written with ZeRO stage 0, which is no longer trained and which no other stage can "
            f"read: start elsewhere from its weights with run.dir=... run.init_from={checkpoint}"
        )
    if saved.zero_stage == zero_stage:
        return saved.parameter_order != PARAMETER_ORDER or saved.num_ranks != num_ranks
    if any({saved.zero_stage, zero_stage} <= stages for stages in JOINABLE):
        return True
    raise CheckpointError(
        f"{checkpoint} was written with ZeRO stage {saved.zero_stage}, which stage {zero_stage} cannot read: go on "
        f"with a --deepspeed JSON of stage {saved.zero_stage}, or start elsewhere with run.dir=... run.init_from=..."
    )


def convert(checkpoint: Path, folder: Path, alive: Callable[[], None] | None = None) -> Path:
    """Converts `checkpoint` to a universal one in `folder`, unless that was done before. All ranks call it.

    Args:
        alive: called again and again while rank 0 converts.

    Returns:
        The universal checkpoint.

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
    """The name of its universal checkpoint, which no other checkpoint of the same step has."""
    return f"{checkpoint.name}-{hashlib.sha256((checkpoint / CHECKSUMS).read_bytes()).hexdigest()[:8]}"


def _run_converter(source: Path, target: Path, output: IO[bytes]) -> int:
    """Runs DeepSpeed's converter and logs every minute that it still runs. Returns its exit code."""
    arguments = ["--input_folder", str(source), "--output_folder", str(target), "--inject_missing_state"]
    # one worker each: more workers hold more of the checkpoint in memory, beside the ranks
    arguments += ["--num_extract_workers", "1", "--num_merge_workers", "1"]
    alone = {key: value for key, value in os.environ.items() if key not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    environment = alone | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, str(Path(__file__).with_name("ds_to_universal.py")), *arguments]
    started_s = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    while True:
        try:
            code = process.wait(REPORT_EVERY_S)
        except subprocess.TimeoutExpired:
            logger.info("... for %.0f s so far", time.monotonic() - started_s)
        else:
            logger.info("... which took %.0f s", time.monotonic() - started_s)
            return code


def _failure(checkpoint: Path, folder: Path, code: int, output: IO[bytes]) -> str:
    """The message of a conversion that has failed, with the converter's last line."""
    output.seek(0)
    lines = [line for line in output.read().decode(errors="replace").splitlines() if line.strip()]
    num_bytes = sum(path.stat().st_size for path in (checkpoint / "engine").rglob("*"))
    return (
        f"{checkpoint} could not be converted to another number of ranks or ZeRO stage (exit code {code}): "
        f"{lines[-1] if lines else 'it said nothing'}; it needs {2 * num_bytes / 2**30:.1f} GiB in {folder} for a "
        "while: make room and start again, or go on with the ranks and the JSON it was written with"
    )
