"""Rows that `reading` does not list come back as zeros, which an objective would train on unnoticed: here as NaN."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations

import pytest
import torch

from mvptr_ds.config import Config, TaskConfig, WpgConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.model.encoder import Encoder
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.objectives.table import objectives_of
from tests.support.tiny_models import TEXT_SLOTS, tiny_model, whole_batch

BATCH = whole_batch()
DRAWS = RandomDraws.keyed(0, 0, 0, len(BATCH), TEXT_SLOTS)
run_encoder = Encoder.forward


@pytest.fixture(autouse=True)
def unread_rows_are_nan(monkeypatch: pytest.MonkeyPatch) -> None:
    def forward(
        encoder: Encoder, packed: Packed, needed_K: torch.Tensor | None = None, num_layers: int | None = None
    ) -> Packed:
        states = run_encoder(encoder, packed, needed_K, num_layers)
        if needed_K is None:
            return states
        unread_N1 = torch.ones(len(states.rows), 1, dtype=torch.bool).index_fill(0, needed_K, False)
        return states.like(states.rows.masked_fill(unread_N1, float("nan")))

    monkeypatch.setattr(Encoder, "forward", forward)


def tasks(stage: str, states: str, every: tuple[WeightsConfig, ...]) -> Iterator[PretrainingLosses]:
    model, config = tiny_model(), TaskConfig(wpg=WpgConfig(states=states))
    for weights in every:
        yield PretrainingLosses(model, STAGES[stage], weights, config, max_text_slots=TEXT_SLOTS, max_steps=10, seed=0)


@torch.no_grad()
def not_finite(task: PretrainingLosses) -> list[str]:
    """Objectives whose sum is not a finite number above zero."""
    parts = task.sums(BATCH, DRAWS)
    assert parts.keys() == task.weights.keys()
    return [name for name, part in parts.items() if not (part.sum.isfinite() and part.sum > 0)]


def subsets(names: tuple[str, ...]) -> tuple[WeightsConfig, ...]:
    """All but the empty one."""
    chosen = (some for num in range(1, len(names) + 1) for some in combinations(names, num))
    return tuple(WeightsConfig(**dict.fromkeys(some, 1.0)) for some in chosen)


@pytest.mark.parametrize(
    ("stage", "states", "every"),
    [
        ("stage1", "auto", subsets(objectives_of(aligned=False))),
        ("stage2", "uni", subsets(objectives_of(aligned=True))),
        ("stage2", "cross", tuple(weights for weights in subsets(objectives_of(aligned=True)) if weights.wpg)),
        ("joint", "auto", (Config().joint.weights, *subsets(objectives_of(aligned=True))[:7])),
    ],
)
def test_no_objective_reads_a_row_that_is_not_listed(stage: str, states: str, every: tuple[WeightsConfig, ...]) -> None:
    found = {"+".join(task.weights): not_finite(task) for task in tasks(stage, states, every)}
    assert len(found) == len(every)
    assert {names: wrong for names, wrong in found.items() if wrong} == {}


@pytest.mark.parametrize(
    ("stage", "names"), [("stage1", objectives_of(aligned=False)), ("stage2", objectives_of(aligned=True))]
)
def test_a_kind_that_is_not_listed_is_noticed(stage: str, names: tuple[str, ...]) -> None:
    (task,) = tasks(stage, "uni", (WeightsConfig(**dict.fromkeys(names, 1.0)),))
    listed = task.output_rows
    kinds = [(encoder, kind) for encoder, kinds in listed.items() for kind in sorted(kinds)]
    assert len(kinds) == {"stage1": 4, "stage2": 9}[stage] and not_finite(task) == []
    for encoder, kind in kinds:
        task.output_rows = {**listed, encoder: listed[encoder] - {kind}}
        assert not_finite(task) != [], (encoder, kind)
