"""The sections of the stages of a run: those of pre-training, and those of the downstream tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from mvptr_ds.config_reading import Count, NotNegative, PathText, Positive, Share


@dataclass(frozen=True)
class WeightsConfig:
    """Weights of the objectives in the loss of a stage; an objective of weight 0 is not computed."""

    mcr_tags: NotNegative = 0.0
    """Masked tags, predicted by the visual encoder."""
    mcr_regions: NotNegative = 0.0
    """Masked tags, recovered from the image's regions."""
    mcr_phrases: NotNegative = 0.0
    """Masked phrases, predicted by the text encoder; stage 1 alone."""
    mlm: NotNegative = 0.0
    """Masked words."""
    vsc: NotNegative = 0.0
    """Contrast of whole captions and images."""
    wpg: NotNegative = 0.0
    """Grounding of phrases in regions."""
    wpg_cross: NotNegative = 0.0
    """Grounding by the cross encoder, against the mismatched pairs of ITM."""
    itm: NotNegative = 0.0
    """Matched or mismatched pair."""


@dataclass(frozen=True)
class MaskingConfig:
    """What is masked for the objectives to predict."""

    word_prob: Share = 0.15
    """Probability that a word piece is masked."""
    phrase_prob: Share = 0.15
    """Probability that a phrase is masked."""
    tag_prob: Share = 0.15
    """Probability that a word piece of a tag is masked."""


@dataclass(frozen=True)
class StageConfig:
    """One stage of training: its length and learning rate."""

    max_steps: Positive = 100_000
    """Optimiser steps of the stage."""
    learning_rate: NotNegative = 5e-5
    """Learning rate after the warm-up; it then falls linearly to 0 at max_steps."""
    warmup_steps: Count | None = 1_000
    """Steps of the warm-up, in which the learning rate rises linearly from 0. null: a tenth of max_steps."""


@dataclass(frozen=True)
class PretrainingConfig(StageConfig):
    """One stage of pre-training: its length, learning rate, objectives and masks."""

    weights: WeightsConfig = field(default_factory=WeightsConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass(frozen=True)
class FinetuningConfig(StageConfig):
    """Fine-tuning for a task: length, learning rates, and when to stop."""

    warmup_steps: Count | None = None
    """Steps of the warm-up, in which the learning rate rises linearly from 0. null: a tenth of max_steps."""
    learning_rate_factors: dict[str, Any] = field(default_factory=lambda: {"head": 10.0})
    """Factors of the learning rate by part: head (what the task adds), embeddings, text, visual, regions, cross,
    pooler, itm, globals. The others have 1. A part of factor 0 is not trained."""
    probe: bool = False
    """Trains the head alone, over a frozen model: the cheap baseline."""
    patience: Count = 0
    """Training ends early after so many evaluations in a row without a better score (train.evaluate_every_steps). 0: it
    runs all its steps. The checkpoint of the best score is kept in any case."""


@dataclass(frozen=True)
class VqaConfig(FinetuningConfig):
    """Visual question answering over a list of answers."""

    answers: PathText | None = None
    """JSON list of the answers to choose from, as tools/build_answers.py writes it."""
    head: Literal["words", "linear"] = "words"
    """words: the head of masked words on slot 0, with a row for each answer. linear: one layer on the pooled state."""
    tags_in_text: bool = False
    """The tags of all regions also stand behind the question, as in the published models."""
    crossing_tags_from: Count | None = None
    """Tag slots from this one on go into the cross encoder, too: a slip of the published models, which have 20. null:
    none."""


@dataclass(frozen=True)
class ReferringConfig(FinetuningConfig):
    """Which region an expression refers to."""

    score: Literal["product", "cosine", "dot", "region"] = "product"
    """What scores a region. product: the region times a projection of slot 0, trained by cross entropy. Published are
    cosine (to slot 0, trained to be the IoU), dot and region (a layer on the region), both trained by yes and no."""
    detections: PathText | None = None
    """JSON of a detector's boxes [x, y, width, height] by image id. Evaluation then scores by them as well."""
    cross_layers: Positive | None = None
    """Layers of the cross encoder that run, which the published models set to 3 of 6. null: all."""
