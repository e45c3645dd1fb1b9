"""The seam between data and engine: what a stage of a run has to say of itself.

Trainer, resume, checkpoints and preflight know this class alone. A task is one file beside this one, a section of the
configuration that bears its name (config.py), and its name in `tasks/__init__.py`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.objectives.module import TaskModule


class Task(ABC):
    """What stands between data and engine in one stage of a run.

    Attributes:
        name: of the section of the configuration (a `StageConfig`), of the folder below `run.dir`, and in `run.stages`.
        follows: the stage whose finished weights it starts from with `run.init_from=auto`; None: fresh weights.
        fresh_weights: prefixes of the names of weights that a model folder may lack. They then start fresh, and the
            log lists them.
        best_by: the key of `evaluate` whose highest value is of the best checkpoint; None: the newest is the best.
    """

    name: str
    follows: str | None = None
    fresh_weights: tuple[str, ...] = ()
    best_by: str | None = None

    @abstractmethod
    def sample_needs(self, config: Config) -> SampleNeeds:
        """Returns which samples it trains on, and what is masked in them."""

    @abstractmethod
    def build(self, config: Config, model: Mvptr, seed: int, per_sample: bool = False) -> TaskModule:
        """Returns the losses over `model`, and the head that the task adds to it.

        Args:
            seed: of all random choices.
            per_sample: whether losses are also summed by sample, as the meters of a mixture want them.

        Raises:
            ValueError: the configuration asks for what the task cannot compute.
        """

    def build_from(self, settings: Mapping[str, Any], config: Config, model: Mvptr) -> TaskModule:
        """Returns the losses over a trained model, whose head gets its weights next (`model_folder.load_weights`).

        Args:
            settings: of the head, as task.json of the model folder has them. A task whose configuration names files
                takes their content from here: they may be gone where the model is used.
            config: of the run that trained the model.

        Raises:
            CheckpointError: the settings lack what the head needs.
        """
        return self.build(config, model, config.run.seed)

    @abstractmethod
    def evaluate(
        self, module: TaskModule, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device
    ) -> dict[str, float]:
        """Scores of a split, flat, with keys such as `eval/retrieval/t2i_r1`. Called on rank 0 alone.

        Raises:
            DataError: a sample cannot be read.
        """

    def learning_rate_factors(self, config: Config) -> Mapping[str, float]:
        """Returns factors of the learning rate by part of the model, `head` for its own; the others have 1."""
        return {}

    def step_flops(self, module: TaskModule, num_ranks: int) -> StepFlops | None:
        """Returns what counts the training FLOPs of a batch; None where the module does not say what it computes."""
        return None if module.objectives is None else StepFlops(module, num_ranks)
