"""The state of a checkpoint: its keys, what earlier versions left out, what is no state."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.checkpoints.state import CheckpointState, read_state
from mvptr_ds.errors import CheckpointError

FIRST: dict[str, Any] = {  # what the first version with such states wrote, which knew ZeRO stage 2 and adamw alone
    "step": 10, "num_ranks": 2, "stage": "stage2", "batch_size": 32, "samples_seen": 320, "data": "1d5a",
    "trained_parts": ["text", "itm"], "skipped_steps": 1, "samples": {"read": 320, "bad": 3}, "wandb_id": "w1",
    "versions": {"torch": "2.13.0"},
}  # fmt: skip
KEYS = [
    "step", "num_ranks", "stage", "batch_size", "bucket_batches", "zero_stage", "precision", "data", "trained_parts",
    "learning_rate_factors", "optimizer", "parameter_order", "accumulation_steps", "samples_seen", "skipped_steps",
    "samples", "wandb_id", "versions",
]  # fmt: skip


def test_what_is_written_is_read() -> None:
    content = FIRST | {
        "bucket_batches": 4, "zero_stage": 3, "precision": "bf16", "optimizer": "lamb", "parameter_order": "aligned",
        "accumulation_steps": 2, "learning_rate_factors": {"head": 10.0},
        "data": {"pairs": "share 1/2, samples 1a", "text": "share 1/2, samples 2b"},
    }  # fmt: skip
    written = json.loads(json.dumps(CheckpointState.from_json(content).to_json()))
    assert written == content and list(written) == KEYS  # which earlier versions read, too


def test_what_earlier_versions_left_out_is_what_held_for_them() -> None:
    state = CheckpointState.from_json(FIRST | {"a_key_of_later": 1})
    added = {
        "bucket_batches": 0, "zero_stage": 2, "precision": None, "optimizer": "adamw", "parameter_order": None,
        "accumulation_steps": 1, "learning_rate_factors": {},
    }  # fmt: skip
    assert state.to_json() == FIRST | added


WITHOUT_ONE = [json.dumps({k: v for k, v in FIRST.items() if k != key}) for key in KEYS[:4]]


@pytest.mark.parametrize("text", ["", "[]", "null", "3", '"x"', "{}", '{"samples": 3}', *WITHOUT_ONE])
def test_another_content_is_an_error(tmp_path: Path, text: str) -> None:
    (tmp_path / "state.json").write_text(text, encoding="utf-8")
    with pytest.raises(CheckpointError, match=r"state\.json is not the state of a checkpoint"):
        read_state(tmp_path)


def test_the_order_of_a_mixtures_sources_counts() -> None:
    one = CheckpointState.from_json(FIRST | {"data": {"pairs": "1a", "text": "2b"}})
    assert one.has_data_of(CheckpointState.from_json(FIRST | {"data": {"pairs": "1a", "text": "2b"}}))
    assert not one.has_data_of(CheckpointState.from_json(FIRST | {"data": {"text": "2b", "pairs": "1a"}}))
    assert not one.has_data_of(CheckpointState.from_json(FIRST))
