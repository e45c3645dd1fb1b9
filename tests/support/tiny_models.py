"""A tiny model and samples for the tests that run a Task: small enough for milliseconds a step.

Legend: B samples, T text slots, G tag slots, R regions.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from mvptr_ds.data.collate import IGNORE, Batch, Sample, collate
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr

NUM_WORDS, NUM_PHRASES, FEATURE_DIM = 30, 6, 5
TEXT_SLOTS, REGIONS = 12, 6


def tiny_model(**changes: Any) -> Mvptr:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "num_words": NUM_WORDS,
        "num_rows": NUM_WORDS + NUM_PHRASES,
        "num_phrases": NUM_PHRASES,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "num_text_layers": 1,
        "num_visual_layers": 1,
        "num_cross_layers": 1,
        "max_positions": 16,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "region_feature_dim": FEATURE_DIM,
    }
    model = Mvptr(MvptrConfig(**{**sizes, **changes}))
    model.set_phrase_rows(torch.arange(NUM_WORDS, NUM_WORDS + NUM_PHRASES))
    return model


def sample(
    seed: int, image: int, tokens: int = 4, phrases: int = 2, tags: int = 3, regions: int = 4, masked: bool = True
) -> Sample:
    rng = np.random.default_rng(seed)
    num_text, num_tags = tokens + phrases + 2, tags + 2
    is_phrase = np.zeros(num_text, dtype=bool)
    is_phrase[1 + tokens : -1] = True
    words, rows = rng.integers(5, NUM_WORDS, tokens), NUM_WORDS + rng.integers(0, NUM_PHRASES, phrases)
    text = np.concatenate([[2], words, rows, [3]])
    labels = {name: np.full(num, IGNORE) for name, num in (("mlm", num_text), ("phrase", num_text), ("tag", num_tags))}
    if masked:
        labels["mlm"][1 : min(2, 1 + tokens)] = 7
        labels["phrase"][is_phrase] = 2
        labels["tag"][1:-1] = 9
    return Sample(
        text_ids_T=text.astype(np.int64),
        phrase_mask_T=is_phrase,
        mlm_labels_T=labels["mlm"],
        phrase_labels_T=labels["phrase"],
        tag_ids_G=np.concatenate([[2], rng.integers(5, NUM_WORDS, tags), [3]]).astype(np.int64),
        tag_labels_G=labels["tag"],
        region_geometry_R6=rng.random((regions, 6), dtype=np.float32),
        region_features_RF=rng.standard_normal((regions, FEATURE_DIM), dtype=np.float32),
        image_3HW=None,
        image_index=image,
        position=seed,
        num_oov_phrases=0,
        num_phrases=phrases,
    )


def whole_batch(num: int = 4) -> Batch:
    return collate([sample(i, i, tokens=3 + i, regions=2 + i) for i in range(num)])
