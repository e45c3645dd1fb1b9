"""The losses of a pre-training stage over the model: what the engine differentiates.

Sequences are packed (model/packed.py); only WPG's scores pad theirs, phrases by regions.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mvptr_ds.config import TaskConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.distributed import collectives
from mvptr_ds.model import kernels
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.batch_plan import BatchPlan
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.module import TaskModule, TaskOutput
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.passes import AlignedPass, Choices, ModelPass
from mvptr_ds.objectives.stages import Stage
from mvptr_ds.objectives.table import Chosen


class PretrainingLosses(TaskModule):
    """The objectives of one stage over one model.

    Args:
        weights: of the objectives; those of weight 0 are not computed.
        max_text_slots: the most that a sample has; WPG draws a number for each.
        max_steps: of the stage; the schedule of ITM's negatives is a share of it.
        seed: of the random choices of every step.
        per_sample: whether masked predictions are also summed by sample, as a mixture's meters want them.

    Raises:
        ValueError: an objective has a weight that the stage cannot compute, or none has.
    """

    objectives: Chosen

    def __init__(
        self,
        model: Mvptr,
        stage: Stage,
        weights: WeightsConfig,
        config: TaskConfig,
        *,
        max_text_slots: int,
        max_steps: int,
        seed: int,
        per_sample: bool = False,
    ) -> None:
        super().__init__(model, max_scale=config.vsc.max_scale)
        self.stage, self.config = stage, config
        self.weights = {name: weight for name, weight in vars(weights).items() if weight}
        self.max_text_slots, self.max_steps, self.seed = max_text_slots, max_steps, seed
        self.per_sample = per_sample
        if not self.weights or not set(self.weights) <= set(stage.objectives):
            given = ", ".join(self.weights) or "nothing"
            known = ", ".join(name for name in vars(weights) if name in stage.objectives)
            raise ValueError(f"{stage.name}.weights sets {given}; {stage.name} computes {known}")
        if "mcr_phrases" in self.weights and not model.config.num_phrases:
            raise ValueError(
                f"{stage.name}.weights.mcr_phrases is {weights.mcr_phrases}, but there is no phrase vocabulary: set "
                f"data.phrase_vocab, or {stage.name}.weights.mcr_phrases=0"
            )

        def resolved(given: str, auto: str) -> str:
            return auto if given == "auto" else given

        self.wpg_states = resolved(config.wpg.states, stage.wpg_states)
        self.wpg_negatives = resolved(config.wpg.negatives, stage.wpg_negatives)
        self.itm_negatives = resolved(config.itm.negatives, stage.itm_negatives)
        self.objectives = Chosen.of(self.weights, stage.aligned, self.wpg_states)
        if scalars := self.objectives.scalars():
            # float32 whatever the model computes in, and of one dimension, since DeepSpeed refuses those of none
            self.head = nn.ModuleDict({name: _parameters(first) for name, first in scalars.items()})
            self.head_settings = {"task": "pretraining"}
        self.output_rows = self.objectives.output_rows()

    @property
    def scalars(self) -> dict[str, dict[str, Tensor]]:
        """The weights that the objectives own, by objective and name, one element each."""
        named = {} if self.head is None else dict(self.head.named_children())
        return {objective: dict(owned.named_parameters()) for objective, owned in named.items()}

    def trained_parts(self) -> list[str]:
        """Returns the parts of the model that the objectives reach; see `Chosen.trained_parts`."""
        return self.objectives.trained_parts()

    def batch_plan(self) -> BatchPlan:
        """Returns what packs batches for the stage."""
        aligned = self.stage.aligned
        alone = aligned and self.objectives.crosses() and not self.objectives.needs_mismatched()
        return BatchPlan(
            self.output_rows,
            alone,
            aligned,
            self.max_text_slots if aligned else 0,
            kernels.fills_buckets(self.model.device),
        )

    def complete(self, packed: PackedBatch, step: int, accumulation: int) -> None:
        """Writes the random choices of a micro-batch, on the host."""
        if packed.draws is not None:
            num = len(packed) * collectives.num_ranks()
            self._write_draws(packed, RandomDraws.keyed(self.seed, step, accumulation, num, self.max_text_slots))

    def forward(self, batch: Batch | PackedBatch, step: int, accumulation: int = 0) -> TaskOutput:
        """Computes all objectives of one micro-batch, normalised over the global micro-batch."""
        if isinstance(batch, Batch):
            packed = self.batch_plan().pack(batch)
            self.complete(packed, step, accumulation)
            batch = packed.to(self.model.device)
        return self.normalised(self._sums(self._pass(batch, step)), self.weights)

    def sums(self, batch: Batch, draws: RandomDraws, step: int = 0) -> dict[str, LossSum]:
        """Sums and counts of this rank's samples, in the order of the stage; `draws` are those of all ranks."""
        return self._sums(self.outputs(batch, draws, step))

    def outputs(self, batch: Batch, draws: RandomDraws, step: int = 0) -> ModelPass:
        """Runs the model over a batch and returns the outputs that the objectives share."""
        packed = self.batch_plan().pack(batch)
        self._write_draws(packed, draws)
        return self._pass(packed.to(self.model.device), step)

    def _write_draws(self, packed: PackedBatch, draws: RandomDraws) -> None:
        if packed.draws is not None:
            packed.draws.fill(draws.rows(collectives.rank() * len(packed), len(packed)))

    def _sums(self, outputs: ModelPass) -> dict[str, LossSum]:
        return {name: objective.compute(outputs) for name, objective in self.objectives.by_name.items()}

    def _pass(self, packed: PackedBatch, step: int) -> ModelPass:
        if not self.stage.aligned:
            with_phrases = "mcr_phrases" in self.weights
            return ModelPass(
                self.model,
                packed,
                self.output_rows,
                with_phrases=with_phrases,
                per_sample=self.per_sample,
                scalars=self.scalars,
            )
        assert packed.draws is not None
        return AlignedPass(
            self.model,
            packed,
            self.output_rows,
            scalars=self.scalars,
            config=self.config,
            choices=Choices(self._itm_negatives(step), self.wpg_negatives, self.wpg_states),
            draws=packed.draws,
            scale=self.scale(),
            needs_mismatched=self.objectives.needs_mismatched(),
            needs_grounding=self.objectives.needs_grounding(),
            per_sample=self.per_sample,
        )

    def _itm_negatives(self, step: int) -> str:
        if self.itm_negatives != "schedule":
            return self.itm_negatives
        return "random" if step < self.config.itm.random_until * self.max_steps else "hardest"


def _parameters(first_values: Mapping[str, float]) -> nn.ParameterDict:
    return nn.ParameterDict({name: nn.Parameter(torch.tensor([value])) for name, value in first_values.items()})
