"""The stages of pre-training as tasks: stage 1, stage 2, and both objectives jointly."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from mvptr_ds.builders import SampleNeeds, Vocabs
from mvptr_ds.config import Config
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.evaluation.report import evaluate_model, flatten_scores
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.objectives.module import TaskModule
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES, Stage


@dataclass(frozen=True)
class Pretraining:
    """One stage of pre-training; see `tasks.task.Task` for its methods."""

    stage: Stage
    follows: str | None = None
    fresh_weights: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return self.stage.name

    def sample_needs(self, config: Config) -> SampleNeeds:
        section = config.stage(self.name)
        return SampleNeeds(
            pairs=self.stage.aligned,
            masking=section.masking,
            phrase_labels=not self.stage.aligned and section.weights.mcr_phrases > 0,
        )

    def build(self, config: Config, model: Mvptr, seed: int, per_sample: bool = False) -> PretrainingLosses:
        section = config.stage(self.name)
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

    def step_flops(self, module: TaskModule, num_ranks: int) -> StepFlops | None:
        return StepFlops(module, num_ranks) if isinstance(module, PretrainingLosses) else None

    def evaluate(
        self, module: TaskModule, model: Mvptr, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device
    ) -> dict[str, float]:
        return flatten_scores(evaluate_model(model, vocabs, config, index, device))

    def write(self, folder: Path, config: Config) -> None:
        """Writes nothing: the model folder holds all."""


STAGE1 = Pretraining(STAGES["stage1"])
STAGE2 = Pretraining(STAGES["stage2"], follows="stage1")
JOINT = Pretraining(STAGES["joint"])
