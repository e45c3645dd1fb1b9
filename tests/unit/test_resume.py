"""What decides the order of the samples is compared with the checkpoint's own configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mvptr_ds.checkpoints import resume
from mvptr_ds.config import load_config, override_config, save_config
from mvptr_ds.errors import CheckpointError
from tests.support.checkpoint_states import state_at

OTHERS = ("run.seed=7", "data.block_samples=32", "data.window_blocks=9")
CAPS = (
    "data.max_tokens=9", "data.max_text_slots=20", "data.max_tag_slots=7", "data.max_regions=8", "visual.grid_size=3",
)  # fmt: skip


def compare(tmp_path: Path, before: tuple[str, ...], now: tuple[str, ...]) -> None:
    save_config(load_config("demo", before), tmp_path / "model/mvptr.yaml")
    resume._check_order(tmp_path, load_config("demo", now), tmp_path / "stage1")


@pytest.mark.parametrize("override", OTHERS)
def test_each_key_is_named_with_both_values_and_the_remedy(tmp_path: Path, override: str) -> None:
    key, _, value = override.partition("=")
    with pytest.raises(CheckpointError, match=rf"- {key}: {value} there, (0|64|256) here\n  go on with {override},"):
        compare(tmp_path, (override,), ())
    compare(tmp_path, OTHERS, OTHERS)


@pytest.mark.parametrize("override", CAPS)
def test_caps_count_where_there_are_buckets(tmp_path: Path, override: str) -> None:
    compare(tmp_path, (), CAPS)
    with pytest.raises(CheckpointError, match=override.partition("=")[0]):
        compare(tmp_path, ("data.bucket_batches=4",), ("data.bucket_batches=4", override))


def test_what_decides_nothing_may_change(tmp_path: Path) -> None:
    compare(
        tmp_path, (), ("data.num_workers=3", "stage1.max_steps=3", "optim.weight_decay=0", "data.prefetch_batches=1")
    )


def test_a_configuration_of_another_version_is_compared_as_far_as_it_goes(tmp_path: Path) -> None:
    compare(tmp_path, (), ())
    path = tmp_path / "model/mvptr.yaml"
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    del tree["data"]["window_blocks"], tree["visual"]
    tree["data"]["a_key_of_then"] = 1
    path.write_text(yaml.safe_dump(tree), encoding="utf-8")
    config = load_config("demo", ["data.bucket_batches=4"])
    resume._check_order(tmp_path, config, tmp_path)
    config = override_config(config, ["run.seed=3"])
    with pytest.raises(CheckpointError, match=r"run.seed: 0 there, 3 here"):
        resume._check_order(tmp_path, config, tmp_path)


def test_the_order_of_a_mixtures_sources_counts(tmp_path: Path) -> None:
    """The draws of which source stands where go by their numbers."""
    there = {"pairs": "share 3/4, samples 1a", "text": "share 1/4, samples 2b", "mixture_block_samples": "8"}
    here = {name: there[name] for name in ("text", "pairs", "mixture_block_samples")}
    saved, data = state_at(1, data=there), load_config("demo").data
    resume._check_data(tmp_path, saved, state_at(1, data=dict(there)), data, tmp_path)
    with pytest.raises(
        CheckpointError, match=r"order: pairs, text, .* there, text, pairs, .* here\n  bring data.sources back"
    ):
        resume._check_data(tmp_path, saved, state_at(1, data=here), data, tmp_path)
