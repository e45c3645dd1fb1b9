"""The seam between data and engine: what a stage of a run has to say of itself.

The trainer, resume, checkpoints, preflight and evaluation know this protocol alone. A task is one file beside this
one, a section of the configuration that bears its name (config.py), and a line in `tasks/__init__.py`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

import torch

from mvptr_ds.builders import SampleNeeds, Vocabs
from mvptr_ds.config import Config
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.objectives.module import TaskModule


class Task(Protocol):
    """What stands between data and engine in one stage of a run.

    Attributes:
        name: of the section of the configuration (a `StageConfig`), of the folder below `run.dir`, and in `run.stages`.
        follows: the stage whose finished weights it starts from with `run.init_from=auto`; None: fresh weights.
        fresh_weights: prefixes of the names of weights that a model folder may lack. They then start fresh, and the
            log lists them.
    """

    @property
    def name(self) -> str: ...

    @property
    def follows(self) -> str | None: ...

    @property
    def fresh_weights(self) -> tuple[str, ...]: ...

    def sample_needs(self, config: Config) -> SampleNeeds:
        """Which samples it trains on, and what is masked in them."""

    def build(self, config: Config, model: Mvptr, seed: int, per_sample: bool = False) -> TaskModule:
        """The losses over `model`, and the head that the task adds to it.

        Args:
            seed: of all random choices.
            per_sample: whether losses are also summed by sample, as the meters of a mixture want them.

        Raises:
            ValueError: the configuration asks for what the task cannot compute.
        """

    def step_flops(self, module: TaskModule, num_ranks: int) -> StepFlops | None:
        """What counts the training FLOPs of a batch; None where nothing does, then no MFU is logged."""

    def evaluate(
        self, module: TaskModule, model: Mvptr, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device
    ) -> dict[str, float]:
        """Scores of a split, flat, with keys such as `eval/retrieval/t2i_r1`. Called on rank 0 alone.

        Args:
            module: the task under training, whose head is to be used.
            model: the whole model, which with ZeRO 3 is a copy of the module's.

        Raises:
            DataError: a sample cannot be read.
        """

    def write(self, folder: Path, config: Config) -> None:
        """Writes what a user of the model folder needs beside its weights, such as the answers of a head."""
