"""The stages of pre-training as tasks: stage 1, stage 2, and both objectives jointly."""

from __future__ import annotations

import torch

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.config_stages import PretrainingConfig
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.evaluation.report import evaluate_model, flatten_scores
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import HEAD, TaskModule
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES, Stage
from mvptr_ds.tasks.task import Task


class Pretraining(Task):
    """One stage of pre-training."""

    fresh_weights = (HEAD,)  # what objectives own: a folder of other objectives lacks them

    def __init__(self, stage: Stage, follows: str | None = None) -> None:
        self.stage, self.name, self.follows = stage, stage.name, follows

    def sample_needs(self, config: Config) -> SampleNeeds:
        section = self._section(config)
        return SampleNeeds(
            pairs=self.stage.aligned,
            masking=section.masking,
            phrase_labels=not self.stage.aligned and section.weights.mcr_phrases > 0,
        )

    def build(self, config: Config, model: Mvptr, seed: int, per_sample: bool = False) -> PretrainingLosses:
        section = self._section(config)
        return PretrainingLosses(
            model,
            self.stage,
            section.weights,
            config.task,
            max_text_slots=config.data.max_text_slots,
            max_steps=section.max_steps,
            seed=seed,
            per_sample=per_sample,
        )

    def _section(self, config: Config) -> PretrainingConfig:
        section = config.pretraining(self.name)
        assert section is not None
        return section

    def evaluate(
        self, module: TaskModule, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device
    ) -> dict[str, float]:
        return flatten_scores(evaluate_model(module.model, vocabs, config, index, device))


STAGE1 = Pretraining(STAGES["stage1"])
STAGE2 = Pretraining(STAGES["stage2"], follows="stage1")
JOINT = Pretraining(STAGES["joint"])
