"""Whether a stage goes on from its newest checkpoint: what has to be as it was."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvptr_ds import checkpointing, elastic, model_folder, parallel
from mvptr_ds.assembly import Vocabs
from mvptr_ds.checkpointing import CheckpointError
from mvptr_ds.config import DataConfig
from mvptr_ds.data.mixture import differences
from mvptr_ds.model.mvptr import Mvptr

AS_IT_WAS = ("batch_size", "bucket_batches", "precision")


def find_checkpoint(
    stage_dir: Path, mode: str, written: Mapping[str, Any], data: DataConfig, model: Mvptr, vocabs: Vocabs
) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. All ranks call it.

    Args:
        mode: `train.resume`.
        written: what this run would write into `state.json`, in the same words.
        data: named in messages.
        model, vocabs: of this run; only names and shapes of the weights are looked at.

    Raises:
        ValueError: there is no such mode.
        CheckpointError: it does not fit this run; found before the engine is built, which takes a while.
    """
    checkpointing.check_resume(mode)
    path = checkpointing.newest_good(stage_dir / "checkpoints") if mode == "auto" else None
    if path is None:
        return None
    state = {"bucket_batches": 0, **checkpointing.read_state(path)}
    for name in AS_IT_WAS:
        if state.get(name, written[name]) != written[name]:
            raise CheckpointError(
                f"{path} was written with {name} {state[name]}, this run has {written[name]}: start it with "
                f"{state[name]}, or elsewhere with run.init_from={stage_dir}"
            )
    elastic.must_convert(path, state, parallel.num_ranks(), written["zero_stage"])
    _check_data(path, state["data"], written["data"], data, stage_dir)
    problems = model_folder.differences(model, vocabs, path / "model")
    if state["trained_parts"] != written["trained_parts"]:
        problems.append(f"trained: {state['trained_parts']} there, {written['trained_parts']} here")
    if problems:
        raise CheckpointError(
            f"{path} does not fit this configuration:\n  - "
            + "\n  - ".join(problems)
            + "\n  use that of the run (config.yaml beside it), another run.dir, or train.resume=never"
        )
    return path


def _check_data(path: Path, there: Any, here: Any, data: DataConfig, stage_dir: Path) -> None:
    if there == here:
        return
    what = f"other shards than {data.train} holds now (a repaired or rebuilt folder is another one): bring them back"
    if data.sources or not isinstance(there, str):
        changes = "\n  - ".join(differences(there, here))
        what = f"another mixture:\n  - {changes}\n  bring data.sources back"
    raise CheckpointError(
        f"{path} was trained on {what}, or start elsewhere with run.dir=... run.init_from={stage_dir}"
    )
