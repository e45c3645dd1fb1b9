"""The engine on two ranks: a NaN gradient is left out, the logit scale is capped, and nothing of it stays behind."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from tests.distributed.ranks_engine import BELOW, CASES, MAX_SCALE
from tests.support.launch import run_ranks

pytestmark = pytest.mark.timeout(600)
Found = list[dict[str, Any]]  # by rank


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("engine")
    run_ranks("tests.distributed.ranks_engine", 2, folder, timeout_s=500)
    return [json.loads((folder / f"found-rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_a_nan_gradient_of_one_rank_is_left_out_on_all(found: Found, case: str) -> None:
    for rank in found:
        assert rank[case]["applied"] == [True, False, True, True, True]
        assert rank[case]["unchanged"] and rank[case]["finite"]


@pytest.mark.parametrize("case", CASES)
def test_the_logit_scale_stops_at_its_cap_and_comes_back(found: Found, case: str) -> None:
    (start, _), (top, computed), (_, _), (end, _) = found[0][case]["scales"]
    cap = math.log(MAX_SCALE)
    assert abs(start - BELOW) < 0.06 and start < cap - 0.001  # another step has moved it
    assert cap - 1e-6 < top <= cap and end < cap - 0.001
    assert computed == pytest.approx(cap, rel=2**-8 if "bf16" in case else 1e-6)
    assert [one[1] for one in found[0][case]["scales"]] == [two[1] for two in found[1][case]["scales"]]


@pytest.mark.parametrize("case", CASES)
def test_a_resume_after_the_cap_is_bit_identical(found: Found, case: str) -> None:
    assert all(rank[case]["resumes"] for rank in found)


@pytest.mark.parametrize("case", CASES)
def test_a_destroyed_engine_leaves_no_tensor(found: Found, case: str) -> None:
    assert [rank[case]["left_bytes"] for rank in found] == [0, 0]
