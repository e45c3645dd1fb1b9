"""Small shards whose captions carry labels, and the settings of a run of seconds on them."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvptr_ds.data.schema import Caption, Extractor, Record, Region
from mvptr_ds.data.shards.writer import write_shards

FEATURES = 5


def write_labelled(
    folder: Path, labels: Sequence[Mapping[str, Any]], texts: Sequence[str] = ("a dog sleeps",), first: int = 0
) -> Path:
    """Writes a record with one caption and two regions for each of `labels`, and returns the folder.

    Args:
        texts: the captions, taken in turn.
        first: number of the first record, which its key is made of.
    """
    rng = np.random.default_rng(0)

    def items() -> Iterator[tuple[str, Record, dict[str, bytes]]]:
        for number, of_caption in enumerate(labels, start=first):
            captions = (Caption(texts[number % len(texts)], (), dict(of_caption)),)
            regions = (Region((0.0, 0.0, 8.0, 8.0), "dog"), Region((1.0, 1.0, 4.0, 4.0), "cat"))
            features = io.BytesIO()
            np.save(features, rng.standard_normal((2, FEATURES)).astype(np.float16))
            record = Record(str(number), 8, 8, captions, regions, Extractor("e", "1"))
            yield f"{number:04d}", record, {"npy": features.getvalue()}

    write_shards(folder, items(), 100)
    return folder


def small_run(shards: Path) -> list[str]:
    """Returns overrides of `demo`: a tiny model on these shards, in one process, without preflight."""
    return [
        f"data.train={shards}", f"data.held_out={shards}", "data.demo_source=null", "data.phrase_vocab=null",
        "data.word_vocab=null", "visual.source=features", f"visual.feature_dim={FEATURES}",
        "visual.backbone_config=null", "model.hidden_size=8", "model.num_attention_heads=1",
        "model.intermediate_size=8", "model.num_text_layers=1", "model.num_visual_layers=1",
        "model.num_cross_layers=1", "train.batch_size=8", "data.num_workers=0", "train.preflight=false",
        "train.log_every_steps=1",
    ]  # fmt: skip
