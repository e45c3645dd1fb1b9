"""What the ranks' test of negatives and its one-process counterpart share: cases, global batches, the task."""

from __future__ import annotations

from dataclasses import dataclass, field

from mvptr_ds.config import Config, ItmConfig, TaskConfig, VscConfig, WpgConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import Batch, collate
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from tests.support.tiny_models import TEXT_SLOTS, sample, tiny_model

NUM_SAMPLES = 8  # of all ranks
NUM_BATCHES = 4
THREE_ROWS_MIB = 3 * NUM_SAMPLES * 4 / 2**20  # what a chunk of three samples takes: the last one is shorter


@dataclass
class Case:
    stage: str
    weights: WeightsConfig
    config: TaskConfig = field(default_factory=TaskConfig)


def case(
    on: str, itm: str = "auto", states: str = "auto", wpg: str = "auto", scope: str = "global", scores_mib: float = 16.0
) -> Case:
    """`on`: names of objectives of stage 2, or the stage whose default weights are taken."""
    whole = on in ("stage2", "joint")
    weights = Config().stage(on).weights if whole else WeightsConfig(**dict.fromkeys(on.split(), 1.0))
    config = TaskConfig(
        VscConfig(scope=scope),
        WpgConfig(states=states, negatives=wpg, scope=scope),
        ItmConfig(negatives=itm, scope=scope),
        scores_mib,
    )
    return Case(on if whole else "stage2", weights, config)


CASES = {
    "vsc": case("vsc"),
    "vsc in chunks": case("vsc", scores_mib=THREE_ROWS_MIB),
    "vsc one by one": case("vsc", scores_mib=0.0),
    "itm hardest": case("itm", itm="hardest"),
    "itm sampled in chunks": case("itm", itm="sampled", scores_mib=THREE_ROWS_MIB),
    "itm random": case("itm", itm="random"),
    "wpg hardest": case("wpg", states="uni", wpg="hardest"),
    "wpg sampled": case("wpg", states="cross", wpg="sampled"),
    "wpg random one by one": case("wpg", states="uni", wpg="random", scores_mib=0.0),
    "wpg_cross": case("wpg_cross", itm="sampled"),
    "stage 2": case("stage2"),
    "joint": case("joint", scores_mib=THREE_ROWS_MIB),
}
LOCAL = {"stage 2, local": case("stage2", scope="local"), "joint, local": case("joint", scope="local")}


def build(which: Case) -> PretrainingLosses:
    task = PretrainingLosses(
        tiny_model(),
        STAGES[which.stage],
        which.weights,
        which.config,
        max_text_slots=TEXT_SLOTS,
        max_steps=NUM_BATCHES,
        seed=5,
    )
    return task.double()


def part(number: int, rank: int, num_ranks: int) -> Batch:
    """A rank's share of a global batch.

    Phrases and masked slots are everywhere, in the first half, in the second, nowhere; captions of one image lie on
    different ranks, and in the last batch all but one are of one image.
    """
    images = [0, 1, 2, 0, 3, 4, 2, 0] if number < NUM_BATCHES - 1 else [1] * (NUM_SAMPLES - 1) + [0]
    has = [(True, place < 4, place >= 4, False)[number] for place in range(NUM_SAMPLES)]
    samples = [
        sample(
            100 * number + place,
            images[place],
            tokens=2 + place % 4,
            phrases=1 + place % 2 if has[place] else 0,
            tags=1 + place % 3,
            regions=1 + (3 * place) % 6,
            masked=has[place],
        )
        for place in range(NUM_SAMPLES)
    ]
    share = NUM_SAMPLES // num_ranks
    return collate(samples[rank * share : (rank + 1) * share])
