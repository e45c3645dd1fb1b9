"""Whether a stage goes on from its newest checkpoint: what has to be as it was."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from mvptr_ds.builders import Vocabs
from mvptr_ds.checkpoints import checkpoint as checkpointing
from mvptr_ds.checkpoints import model_folder, reshard
from mvptr_ds.config import Config
from mvptr_ds.config_data import DataConfig
from mvptr_ds.data.sampling.mixture import differences
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import CheckpointError
from mvptr_ds.model.mvptr import Mvptr

AS_IT_WAS = ("batch_size", "bucket_batches", "precision")
# with shards, mixture, batch size and vocabularies, which state.json holds, what decides which samples a step has
ORDER = ("run.seed", "data.block_samples", "data.window_blocks")
ORDER_OF_BUCKETS = (  # the caps of the lengths that buckets are drawn by
    "data.max_tokens", "data.max_text_slots", "data.max_tag_slots", "data.max_regions", "visual.grid_size",
)  # fmt: skip


def find_checkpoint(
    stage_dir: Path, written: Mapping[str, Any], config: Config, model: Mvptr, vocabs: Vocabs
) -> Path | None:
    """The checkpoint to go on from, None for a fresh start. All ranks call it.

    Args:
        written: what this run would write into `state.json`, in the same words.
        model, vocabs: of this run; only names and shapes of the weights are looked at.

    Raises:
        CheckpointError: it does not fit this run, which is found before the engine is built, or none of them is good.
        StorageError: none of them can be read.
    """
    path = checkpointing.newest_good(stage_dir / "checkpoints") if config.train.resume == "auto" else None
    if path is None:
        return None
    state = {"bucket_batches": 0, **checkpointing.read_state(path)}
    for name in AS_IT_WAS:
        if state.get(name, written[name]) != written[name]:
            raise CheckpointError(
                f"{path} was written with {name} {state[name]}, this run has {written[name]}: start it with "
                f"{state[name]}, or elsewhere with run.init_from={stage_dir}"
            )
    reshard.needs_conversion(path, state, collectives.num_ranks(), written["zero_stage"])
    _check_data(path, state["data"], written["data"], config.data, stage_dir)
    _check_order(path, config, stage_dir)
    problems = model_folder.differences(model, vocabs, path / "model")
    if state["trained_parts"] != written["trained_parts"]:
        problems.append(f"trained: {state['trained_parts']} there, {written['trained_parts']} here")
    refuse(path, problems)
    return path


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raises CheckpointError where a checkpoint's model does not fit this run's, with all that differs."""
    if problems:
        raise CheckpointError(
            f"{path} does not fit this configuration:\n  - "
            + "\n  - ".join(problems)
            + "\n  use that of the run (model/mvptr.yaml there), another run.dir, or train.resume=never"
        )


def _check_data(path: Path, there: Any, here: Any, data: DataConfig, stage_dir: Path) -> None:
    if there == here and list(there) == list(here):  # of a mixture, the order of its sources counts too
        return
    what = f"other shards than {data.train} holds now (a repaired or rebuilt folder is another one): bring them back"
    if data.sources or not isinstance(there, str):
        in_order = [f"order: {', '.join(there)} there, {', '.join(here)} here"]
        changes = "\n  - ".join(differences(there, here) or in_order)
        what = f"another mixture:\n  - {changes}\n  bring data.sources back"
    raise CheckpointError(
        f"{path} was trained on {what}, or start elsewhere with run.dir=... run.init_from={stage_dir}"
    )


def _check_order(path: Path, config: Config, stage_dir: Path) -> None:
    """The checkpoint's own mvptr.yaml tells how it was, also one of a version that compared nothing of it."""
    saved = yaml.safe_load((path / "model/mvptr.yaml").read_text(encoding="utf-8"))
    changed = {}
    for key in ORDER + (ORDER_OF_BUCKETS if config.data.bucket_batches else ()):
        section, name = key.split(".")
        here = getattr(getattr(config, section), name)
        there = saved.get(section, {}).get(name, here)
        if there != here:
            changed[key] = (there, here)
    if changed:
        lines = [f"{key}: {there} there, {here} here" for key, (there, here) in changed.items()]
        back = " ".join(f"{key}={there}" for key, (there, _) in changed.items())
        raise CheckpointError(
            f"{path} was trained on the samples in another order:\n  - "
            + "\n  - ".join(lines)
            + f"\n  go on with {back}, or start elsewhere with run.dir=... run.init_from={stage_dir}"
        )
