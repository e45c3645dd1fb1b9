"""Checks that the pictures a task is scored on were not trained on: by the task itself, or by the pre-training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path

from mvptr_ds.checkpoints.hand_over import PRETRAINED_FIRST, PRETRAINING_LAST_FIRST, find_model
from mvptr_ds.config import Config, load_config
from mvptr_ds.config_data import DataConfig
from mvptr_ds.data.shards.index import Index, SampleIndex
from mvptr_ds.data.shards.shared_keys import shared_keys
from mvptr_ds.data.shards.urls import is_url
from mvptr_ds.errors import CheckpointError, DataError, StorageError
from mvptr_ds.preflight.rank_checks import OK, WARNING, Finding
from mvptr_ds.shard_folders import sources_of

HELD_OUT = "data.held_out"


def pretrained_data(config: Config) -> DataConfig | None:
    """Returns the data of the model that a task starts from; None where it has no start, or none that is there.

    All ranks call it together.
    """
    start = config.run.init_from
    if start is None or not _scores_a_task(config):
        return None
    with suppress(CheckpointError, StorageError, DataError, OSError, ValueError):
        if start == "auto":
            folder = find_model(Path(config.run.dir), PRETRAINING_LAST_FIRST)
        else:
            folder = find_model(Path(start), PRETRAINED_FIRST)
        return load_config(folder / "mvptr.yaml").data
    return None


def examine(
    config: Config, indices: Mapping[str, SampleIndex], pretrained: DataConfig | None = None
) -> Iterator[Finding]:
    """Compares the keys of the held-out pictures with those of every folder that was trained on.

    Args:
        indices: samples of the run's folders, by the key of the configuration that names each.
        pretrained: what the start was trained on, as `pretrained_data` says it.
    """
    held_out = indices.get(HELD_OUT)
    if held_out is None or not _scores_a_task(config):
        return
    trained = {name: index for name, index in indices.items() if name != HELD_OUT} | _opened(pretrained)
    found = {name: shared_keys(held_out, index) for name, index in trained.items()}
    for name, shared in found.items():
        if shared.num:
            text = f"{HELD_OUT} shares {shared.num} of its {held_out.num_records} pictures with {name} ({shared})"
            yield Finding("splits", WARNING, text, "scores on these are too good: leave them out, or say so")
    if found and not any(shared.num for shared in found.values()):
        yield Finding("splits", OK, f"{HELD_OUT} shares no picture with {', '.join(found)}")


def _scores_a_task(config: Config) -> bool:
    return any(config.finetuning(stage) is not None for stage in config.stage_names)


def _opened(pretrained: DataConfig | None) -> dict[str, SampleIndex]:
    """Opens the shards that the model was pre-trained on, where they are still on this machine."""
    out: dict[str, SampleIndex] = {}
    if pretrained is None:
        return out
    with suppress(DataError, OSError, ValueError):
        for name, source in sources_of(pretrained).items():
            if not is_url(source.shards):
                out[f"the pre-training's {name or source.shards}"] = Index.open(source.shards)
    return out
