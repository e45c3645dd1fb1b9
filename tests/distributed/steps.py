"""What the two-rank test and its one-process counterpart share: samples by position, stages, settings."""

from __future__ import annotations

from mvptr_ds.config import Config, OptimConfig, TrainConfig
from mvptr_ds.config_stages import PretrainingConfig
from mvptr_ds.data.collate import Batch, Sample, collate
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.optim.optimizer import learning_rate_at
from tests.support.tiny_models import TEXT_SLOTS, sample, tiny_model

NUM_STEPS = 5
ONE_MODALITY = "stage1 of single modalities"  # a rank's share holds nothing but texts, or nothing but images
CASES = (*STAGES, ONE_MODALITY)
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


def single_at(position: int) -> Sample:
    """As text-only and image-only records give them; by turns the first rank has the texts and the second."""
    micro, place = divmod(position, MICRO)
    if (place < MICRO // 2) == (micro % 2 == 0):
        return sample(position, position, tokens=2 + position % 4, phrases=position % 3, tags=0, regions=0)
    return sample(position, position, tokens=0, phrases=0, tags=1 + position % 3, regions=1 + position % 5)


def stage_config(case: str) -> PretrainingConfig:
    weights = Config().stage(case.split()[0]).weights
    return PretrainingConfig(max_steps=NUM_STEPS + 1, learning_rate=1e-3, warmup_steps=2, weights=weights)


def build_task(case: str) -> PretrainingLosses:
    task = PretrainingLosses(
        tiny_model(),
        STAGES[case.split()[0]],
        stage_config(case).weights,
        Config().task,
        max_text_slots=TEXT_SLOTS,
        max_steps=NUM_STEPS + 1,
        seed=3,
    )
    trained = set(task.model.parameters_of(task.trained_parts()))
    for name, parameter in task.model.named_parameters():
        parameter.requires_grad_(name in trained)
    return task


def batch_of(case: str, step: int, accumulation: int, rank: int, num_ranks: int) -> Batch:
    positions = Batches(TRAIN.batch_size).positions(step, accumulation, rank, num_ranks, TRAIN.accumulation_steps)
    sample_of = single_at if case == ONE_MODALITY else sample_at
    return collate([sample_of(int(position)) for position in positions])


def learning_rate(case: str, step: int) -> float:
    return learning_rate_at(step, stage_config(case))
