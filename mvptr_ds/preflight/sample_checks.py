"""Checks that records hold what the objectives of the run's stages need."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mvptr_ds import builders
from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.errors import DataError
from mvptr_ds.objectives.table import OBJECTIVES, PHRASES, REGIONS, TAGS, WORDS
from mvptr_ds.preflight.rank_checks import ERROR, OK, WARNING, Finding
from mvptr_ds.tasks import TASKS
from mvptr_ds.user_io.tool_names import tool

NUM_LOOKED_AT = 256  # samples of a local folder, spread evenly over it
NUM_REMOTE, REMOTE_LIMIT_S = 32, 20.0  # the same behind a URL, where each sample may take a request
DECODE_EVERY = 4  # one in so many pictures is decoded, which takes milliseconds
HELD_OUT = "data.held_out"

KINDS = ("pictures", "features", "regions", TAGS, PHRASES)
REMEDIES = {
    TAGS: "give regions with tags (data.sidecars)",
    PHRASES: "give phrases and the vocabulary that was made of them (data.phrase_vocab)",
    REGIONS: "give pictures, or features (data.sidecars)",
    WORDS: "give captions",
}


@dataclass
class Seen:
    """Counts what the samples of one folder hold."""

    num: int = 0
    decoded: int = 0  # pictures
    holds: Counter[str] = field(default_factory=Counter)  # number of samples that hold each kind
    targets: Counter[str] = field(default_factory=Counter)  # number of samples that suffice for each objective
    unusable: list[str] = field(default_factory=list)  # why samples cannot be used


def examine(config: Config, vocabs: Vocabs, indices: Mapping[str, SampleIndex]) -> Iterator[Finding]:
    """Looks at records of every folder.

    Args:
        indices: samples of the run's folders, by the key of the configuration that names each.
    """
    seen, needs = {}, _needs(config)
    for name, index in indices.items():
        builder = builders.build_samples(config, vocabs, index, needs, tag_noise=False)
        seen[name] = look(index, builder)
        yield from _shares(name, seen[name], config)
    trained_on = [of_folder for name, of_folder in seen.items() if name != HELD_OUT]
    if all(len(of_folder.unusable) == of_folder.num for of_folder in trained_on):
        return  # reported above
    targets = sum((of_folder.targets for of_folder in trained_on), Counter())
    for stage in config.stage_names:
        yield from _objectives(config, stage, targets)


def _needs(config: Config) -> SampleNeeds:
    """Returns what all stages of the run want of a caption's labels; nothing is masked, and any sample will do."""
    of_stages = [TASKS[stage].sample_needs(config) for stage in config.stage_names]
    readers = [needs.read_labels for needs in of_stages if needs.read_labels is not None]

    def read_by_all(labels: Mapping[str, Any], record: Record) -> dict[str, Any]:
        return {name: label for read in readers for name, label in read(labels, record).items()}

    labels = {name: example for needs in of_stages for name, example in needs.labels.items()}
    return SampleNeeds(pairs=False, labels=labels, read_labels=read_by_all)


def look(index: SampleIndex, builder: SampleBuilder) -> Seen:
    """Counts samples spread over the folder, the same at every call. Behind a URL it takes fewer, within a limit."""
    seen = Seen()
    remote = index.read_ahead_bytes > 0
    num = min(NUM_REMOTE if remote else NUM_LOOKED_AT, len(index))
    until_s = time.monotonic() + (REMOTE_LIMIT_S if remote else math.inf)
    for number in range(num):
        if time.monotonic() > until_s:
            break
        seen.num += 1
        sample = (2 * number + 1) * len(index) // (2 * num)
        try:
            _look_at(index, builder, sample, number % DECODE_EVERY == 0, seen)
        except (DataError, OSError) as error:
            place = index.locate(sample)
            seen.unusable.append(f"{error} ({Path(place.path).name}, byte {place.offset})")
    return seen


def _look_at(index: SampleIndex, builder: SampleBuilder, sample: int, decode: bool, seen: Seen) -> None:
    place = index.locate(sample)
    record, members = index.read_sample(place)
    begun = builder.begin(record, members, 0, place.record, 0, np.random.default_rng(0))
    held = {
        WORDS: len(begun.text_ids_T) - begun.num_phrases > 2,
        "pictures": any(extension in members for extension in IMAGE_EXTENSIONS),
        "features": "npy" in members,
        "regions": bool(record.regions),
        REGIONS: len(begun.region_geometry_R6) > 0,
        TAGS: len(begun.tag_ids_G) > 2,
        PHRASES: begun.num_phrases > 0,
    }
    seen.holds.update(kind for kind, holds in held.items() if holds)
    if builder.options.visual_source == "features" or decode:
        builder.add_visual(begun, members)
        seen.decoded += builder.options.visual_source == "image" and held["pictures"]
    seen.targets.update(name for name, row in OBJECTIVES.items() if all(held[kind] for kind in row.needs))


def _shares(name: str, seen: Seen, config: Config) -> Iterator[Finding]:
    """Reports which share of a folder holds what, and whether the samples can be used."""
    shares = ", ".join(f"{kind} {100 * seen.holds[kind] / max(1, seen.num):.0f} %" for kind in KINDS)
    decoded = f" ({seen.decoded} pictures decoded)" if seen.decoded else ""
    yield Finding("records", OK, f"{name}: {seen.num} samples looked at{decoded}: {shares}")
    num_bad = len(seen.unusable)
    if not num_bad:
        return
    text = f"{name}: {num_bad} of {seen.num} samples looked at cannot be used; the first: {seen.unusable[0]}"
    # three standard deviations above the bad samples that are allowed
    allowed = config.data.max_bad_fraction * seen.num
    too_many = num_bad == seen.num or num_bad > allowed + 3 * math.sqrt(allowed) + 1
    if name == HELD_OUT and config.train.evaluate_every_steps == 0:
        yield Finding("records", WARNING, text, "training does not read them, eval.py would end with it")
    elif too_many:
        remedy = "set visual.source and visual.feature_dim to what the shards hold, or give what they lack"
        yield Finding("records", ERROR, text, f"{remedy} (data.sidecars)")
    else:
        remedy = f"each is replaced by another; look at the folder with {tool('validate')}"
        yield Finding("records", WARNING, text, remedy)


def _objectives(config: Config, stage: str, targets: Counter[str]) -> Iterator[Finding]:
    """Reports the objectives of a stage for which no sample holds anything to learn."""
    section, data = config.pretraining(stage), config.data
    if section is None:
        return
    weights = {name: weight for name, weight in vars(section.weights).items() if weight > 0}
    idle = []
    for name, weight in weights.items():
        key = f"{stage}.weights.{name}"
        needs, picked_by = OBJECTIVES[name].needs, OBJECTIVES[name].masked_by
        if picked_by is not None and getattr(section.masking, picked_by) == 0:
            reason, remedy = f"{stage}.masking.{picked_by} is 0, so that nothing is asked for", "raise it"
        elif TAGS in needs and data.tag_withhold_prob == 1:
            reason, remedy = "data.tag_withhold_prob is 1, so that there are no tags", "lower it"
        elif not targets[name]:
            reason = f"none of the training samples looked at has {' and '.join(needs)}"
            remedy = ", and ".join(REMEDIES[kind] for kind in needs)
        else:
            continue
        idle.append(name)
        yield Finding("objectives", WARNING, f"{key} is {weight}, but {reason}", f"{remedy}, or set {key}=0")
    if idle and len(idle) == len(weights):
        yield Finding("objectives", ERROR, f"{stage} has nothing to learn: {', '.join(idle)} lack what they need")
