"""Image-text retrieval (COCO, Flickr30k): contrast of captions and images, and matching with hard negatives.

It is stage 2 without its other objectives: negatives come from all ranks and are of other images, and the head that
says whether a pair matches is the pre-trained one.
"""

from __future__ import annotations

import torch

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.evaluation.report import evaluate_model, flatten_scores
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import HEAD, TaskModule
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import Stage
from mvptr_ds.tasks.downstream import frozen_parts
from mvptr_ds.tasks.task import Task

HEAD_PARTS = ("globals", "itm")
STAGE = Stage("retrieval", aligned=True, itm_negatives="sampled")


class Retrieval(Task):
    """Fine-tunes a pre-trained model for retrieval."""

    name, follows, best_by = "retrieval", "stage2", "eval/retrieval/score"
    fresh_weights = (HEAD, "region_embedding.norm.")

    def sample_needs(self, config: Config) -> SampleNeeds:
        return SampleNeeds()

    def build(self, config: Config, model: Mvptr, seed: int, per_sample: bool = False) -> TaskModule:
        module = PretrainingLosses(
            model,
            STAGE,
            WeightsConfig(vsc=1.0, itm=1.0),
            config.task,
            max_text_slots=config.data.max_text_slots,
            max_steps=config.retrieval.max_steps,
            seed=seed,
            per_sample=per_sample,
        )
        module.frozen = frozen_parts(config, self.name, module.trained_parts()).difference(
            HEAD_PARTS if config.retrieval.probe else ()
        )
        return module

    def learning_rate_factors(self, config: Config) -> dict[str, float]:
        head = config.retrieval.learning_rate_factors.get("head", 1.0)
        return {**dict.fromkeys(HEAD_PARTS, head), **config.retrieval.learning_rate_factors}

    def evaluate(
        self, module: TaskModule, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device
    ) -> dict[str, float]:
        scores = flatten_scores(evaluate_model(module.model, vocabs, config, index, device))
        first = [scores[f"eval/rerank/{way}_r1"] for way in ("t2i", "i2t")]
        return {**scores, self.best_by: sum(first) / len(first)}
