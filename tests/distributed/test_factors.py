"""Factors of the learning rate on two ranks: the rates of the groups, how far each part moves, and a resume."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.ranks_factors import CASES, RATE
from tests.support.launch import run_ranks

pytestmark = pytest.mark.timeout(600)
Found = list[dict[str, Any]]  # by rank
DECAY = 0.01


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("factors")
    run_ranks("tests.distributed.ranks_factors", 2, folder, timeout_s=500)
    return [json.loads((folder / f"found-rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


def rates(step: int) -> list[list[float]]:
    """As the model has its parts: embeddings and regions, the text encoder (half), the pooler (twice), the head."""
    rate = RATE * (step + 1)
    return [[rate * factor, decay] for factor in (1.0, 0.5, 2.0, 10.0) for decay in (DECAY, 0.0)]


@pytest.mark.parametrize("case", CASES)
def test_each_group_has_its_rate(found: Found, case: str) -> None:
    for rank in found:
        assert rank[case]["groups"] == rates(0)
        assert rank[case]["plain"] == [[RATE, DECAY], [RATE, 0.0]]


@pytest.mark.parametrize("case", CASES)
def test_a_first_step_goes_as_far_as_the_factor_says(found: Found, case: str) -> None:
    """The head ten times as far: the direction of a first step is that without factors."""
    off, longest = found[0][case]["off"], found[0][case]["longest"]
    assert longest > 1e-4 and off < 2e-7, (off, longest)  # float32 weights below 4


@pytest.mark.parametrize("case", CASES)
def test_a_resume_with_factors_is_bit_identical(found: Found, case: str) -> None:
    for rank in found:
        assert rank[case]["resumes"] and rank[case]["groups of the resumed"] == rates(1)
