"""Checks that the pictures a task is scored on were not trained on: by the task itself, or by the pre-training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mvptr_ds.checkpoints.hand_over import find_model
from mvptr_ds.config import Config, load_config
from mvptr_ds.data.shards.index import Index, SampleIndex
from mvptr_ds.data.shards.shared_keys import shared_keys
from mvptr_ds.data.shards.urls import is_url
from mvptr_ds.errors import CheckpointError, DataError, StorageError
from mvptr_ds.preflight.rank_checks import OK, WARNING, Finding
from mvptr_ds.shard_folders import sources_of

HELD_OUT = "data.held_out"


def examine(config: Config, indices: Mapping[str, SampleIndex]) -> Iterator[Finding]:
    """Compares the keys of the held-out pictures with those of every folder that was trained on.

    Args:
        indices: samples of the run's folders, by the key of the configuration that names each.
    """
    held_out = indices.get(HELD_OUT)
    if held_out is None or all(config.finetuning(stage) is None for stage in config.stage_names):
        return
    trained = {name: index for name, index in indices.items() if name != HELD_OUT} | _of_start(config)
    found = {name: shared_keys(held_out, index) for name, index in trained.items()}
    for name, shared in found.items():
        if shared.num:
            text = f"{HELD_OUT} shares {shared.num} of its {held_out.num_records} pictures with {name} ({shared})"
            yield Finding("splits", WARNING, text, "scores on these are too good: leave them out, or say so")
    if found and not any(shared.num for shared in found.values()):
        yield Finding("splits", OK, f"{HELD_OUT} shares no picture with {', '.join(found)}")


def _of_start(config: Config) -> dict[str, SampleIndex]:
    """Opens the shards that the model was pre-trained on, where they are still on this machine."""
    start = config.run.init_from
    if start is None or start == "auto":
        return {}
    out: dict[str, SampleIndex] = {}
    with suppress(CheckpointError, StorageError, DataError, OSError, ValueError):
        data = load_config(find_model(Path(start)) / "mvptr.yaml").data
        for name, source in sources_of(data).items():
            if not is_url(source.shards):
                out[f"the pre-training's {name or source.shards}"] = Index.open(source.shards)
    return out
