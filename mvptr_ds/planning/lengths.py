"""Provides the lengths to plan with: drawn from stated ranges, or measured on the samples of real shards."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from mvptr_ds import builders, shard_folders
from mvptr_ds.config import Config
from mvptr_ds.config_data import DataConfig
from mvptr_ds.config_stages import MaskingConfig
from mvptr_ds.data.collate import collate
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.tasks import TASKS

NUM_DRAWN = 20_000
MEASURED_AT_ONCE = 64


@dataclass(frozen=True)
class Ranges:
    """Holds uniform ranges, both ends included. The defaults are as on COCO with VinVL's detector."""

    tokens: tuple[int, int] = (8, 20)
    phrases: tuple[int, int] = (0, 5)
    tags: tuple[int, int] = (10, 20)  # slots, [CLS] and [SEP] included
    regions: tuple[int, int] = (20, 50)


def drawn(
    ranges: Ranges, data: DataConfig, masking: MaskingConfig, with_images: bool, tags_in_text: bool = False
) -> Lengths:
    """Returns the mean lengths of drawn samples. The draws are always the same.

    Args:
        tags_in_text: whether the tags of all regions stand behind the text; each is taken for one wordpiece.
    """
    rng = np.random.default_rng(0)
    tokens, phrases, tags, regions = (rng.integers(low, high + 1, NUM_DRAWN) for low, high in asdict(ranges).values())
    tokens, tags = np.minimum(tokens, data.max_tokens), np.minimum(tags, data.max_tag_slots)
    regions = np.minimum(regions, data.max_regions)
    phrases = np.minimum(phrases, np.maximum(0, data.max_text_slots - 2 - tokens))
    text = tokens + phrases + 2
    if tags_in_text:
        text = np.minimum(text + regions, data.max_text_slots)
    picked_tags = rng.binomial(np.maximum(0, tags - 2), masking.tag_prob)
    return _means(
        Lengths(
            samples=NUM_DRAWN,
            text=text.sum(),
            text_pairs=(text**2).sum(),
            visual=(tags + regions).sum(),
            visual_pairs=((tags + regions) ** 2).sum(),
            cross=(text + regions).sum(),
            cross_pairs=((text + regions) ** 2).sum(),
            regions=regions.sum(),
            phrases=phrases.sum(),
            picked_tokens=masking.word_prob * tokens.sum(),
            picked_tags=picked_tags.sum(),
            picked_phrases=masking.phrase_prob * phrases.sum(),
            scored_regions=(regions * (picked_tags > 0)).sum(),
            images=NUM_DRAWN if with_images else 0,
        )
    )


def measured(config: Config, stage: str, num_samples: int) -> tuple[Lengths, float]:
    """Returns the mean lengths of a run's first samples, and how many samples one core prepares in a second.

    Raises:
        DataError: the shards cannot be read.
    """
    torch.set_num_threads(1)
    data = replace(config.data, demo_source=None, held_out=None)  # plans with what is there to train on
    config = replace(config, data=data)
    shard_folders.prepare_shards(config.data, config.run.seed, 1)
    needs = TASKS[stage].sample_needs(config)
    with tempfile.TemporaryDirectory() as joins:
        dataset = builders.build_dataset(
            config, builders.build_vocabs(config.data), stage, needs, config.run.seed, Path(joins)
        )
        dataset[0]  # opens the files, which is not timed
        started_s = time.process_time()
        samples = dataset.__getitems__(list(range(num_samples)))
        cpu_s = time.process_time() - started_s
    totals = [Lengths.of(collate(samples[i : i + MEASURED_AT_ONCE])) for i in range(0, num_samples, MEASURED_AT_ONCE)]
    summed = Lengths(**{f.name: sum(getattr(t, f.name) for t in totals) for f in fields(Lengths)})
    return _means(summed), num_samples / cpu_s


def _means(total: Lengths) -> Lengths:
    return Lengths(**{name: float(value) / total.samples for name, value in asdict(total).items()})


def times(lengths: Lengths, factor: float) -> Lengths:
    """Returns the lengths of `factor` samples."""
    return Lengths(**{name: value * factor for name, value in asdict(lengths).items()})
