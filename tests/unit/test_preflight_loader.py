"""What batches that are held ready take, against what there is."""

from __future__ import annotations

import os
from types import SimpleNamespace

import numpy as np
import pytest

from mvptr_ds.config import load_config
from mvptr_ds.data.collate import Sample, collate
from mvptr_ds.data.sharing import SentBatch
from mvptr_ds.preflight import loader_memory
from mvptr_ds.preflight.loader_memory import largest_batch_bytes

OVERRIDES = ["train.batch_size=8", "train.accumulation_steps=1", "data.num_workers=2", "data.prefetch_batches=3"]


def full_sample(source: str) -> Sample:
    """With every slot of configs/base.yaml taken."""
    data, visual = load_config("base", []).data, load_config("base", []).visual
    text, tags, regions = data.max_text_slots, data.max_tag_slots, data.max_regions
    ids_T, ids_G = np.ones(text, np.int64), np.ones(tags, np.int64)
    return Sample(
        ids_T, np.ones(text, bool), ids_T, ids_T, ids_G, ids_G, np.ones((regions, 6), np.float32),
        np.ones((regions, visual.feature_dim), np.float16) if source == "features" else None,
        np.ones((3, visual.image_size, visual.image_size), np.uint8) if source == "image" else None,
        0, 0, 0, 0,
    )  # fmt: skip


@pytest.mark.parametrize("source", ["features", "image"])
def test_the_largest_batch_is_that_of_full_samples(source: str) -> None:
    config = load_config("base", [f"visual.source={source}"])
    sent = SentBatch(collate([full_sample(source)] * 8)).num_bytes
    assert 0.99 * sent < largest_batch_bytes(config, 8) <= sent


@pytest.mark.parametrize(
    ("limit", "forbidden", "free_blocks", "level", "parts"),
    [
        ("max", False, 0, "ok", ["1 ranks x 6 batches x ", "none of it comes from /dev/shm (0.0 MiB free)"]),
        ("1000000", False, 0, "warning", ["; 1.0 MiB of memory are free"]),  # a container's
        ("max", True, 1000, "warning", ["/dev/shm, where they lie, has 3.9 MiB free"]),
        ("max", True, 10_000, "ok", ["/dev/shm, where they lie, has 39.1 MiB free"]),
    ],
)
def test_memory_is_compared_with_what_batches_take(
    limit: str, forbidden: bool, free_blocks: int, level: str, parts: list[str], tmp_path, monkeypatch
) -> None:  # type: ignore[no-untyped-def]
    def refuse(*_: object) -> int:
        raise PermissionError(1, "Operation not permitted")

    if forbidden:
        monkeypatch.setattr(os, "memfd_create", refuse)
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=free_blocks, f_frsize=4096))
    (tmp_path / "limit").write_text(f"{limit}\n", encoding="ascii")
    monkeypatch.setattr(loader_memory, "CGROUP_LIMIT", tmp_path / "limit")
    (found,) = loader_memory.loader_memory(load_config("base", OVERRIDES))
    assert found.level == level and all(part in found.text for part in parts), found
    assert (level == "ok") != ("data.prefetch_batches" in found.remedy)
