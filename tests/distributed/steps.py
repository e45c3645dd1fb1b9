"""What the two-rank test and its one-process counterpart share: samples by position, stages, settings."""

from __future__ import annotations

from mvptr_ds.config import Config, OptimConfig, StageConfig, TrainConfig
from mvptr_ds.data.collate import Batch, Sample, collate
from mvptr_ds.data.plan import Plan
from mvptr_ds.optim import learning_rate_at
from mvptr_ds.task import Task
from tests.tiny import REGIONS, TEXT_SLOTS, sample, tiny_model

NUM_STEPS = 5
STAGES = ("stage1", "stage2", "joint")
TRAIN = TrainConfig(batch_size=16, accumulation_steps=2)  # two micro-batches of 8 a step, 4 samples a rank
# eps: a gradient that is only rounding noise (attention's key bias) must not become a step of its own sign;
# clip_norm: low enough that clipping acts
OPTIM = OptimConfig(eps=1e-5, clip_norm=1.0)
MICRO = TRAIN.batch_size // TRAIN.accumulation_steps


def sample_at(position: int) -> Sample:
    """Masked slots and phrases are uneven: by turns both ranks have some, the first alone, the second alone, none."""
    micro, place = divmod(position, MICRO)
    first_half = place < MICRO // 2
    full = (True, first_half, not first_half, False)[micro % 4]
    image = 0 if micro == 6 else position % 6  # two captions of one image on different ranks; once the same throughout
    return sample(
        position,
        image,
        tokens=2 + position % 4,
        phrases=1 + position % 2 if full else 0,
        tags=1 + position % 3,
        regions=1 + position % 5,
        masked=full,
    )


def stage_config(stage: str) -> StageConfig:
    weights = Config().stage(stage).weights
    return StageConfig(max_steps=NUM_STEPS + 1, learning_rate=1e-3, warmup_steps=2, weights=weights)


def build_task(stage: str) -> Task:
    task = Task(
        tiny_model(),
        stage,
        stage_config(stage).weights,
        Config().task,
        max_text_slots=TEXT_SLOTS,
        max_regions=REGIONS,
        max_steps=NUM_STEPS + 1,
        seed=3,
    )
    trained = set(task.model.parameters_of(task.trained_parts()))
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name in trained)
    return task


def batch_of(step: int, accumulation: int, rank: int, num_ranks: int) -> Batch:
    plan = Plan(1000, TRAIN.batch_size, seed=0)
    positions = plan.positions(step, accumulation, rank, num_ranks, TRAIN.accumulation_steps)
    return collate([sample_at(int(position)) for position in positions])


def learning_rate(stage: str, step: int) -> float:
    return learning_rate_at(step, stage_config(stage))
