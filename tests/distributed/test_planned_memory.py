"""The planned bytes of weights, gradients and optimiser against those of the tensors of a real engine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support.launch import run_ranks

TOLERANCE = 0.02  # the issue's


@pytest.mark.timeout(400)
@pytest.mark.parametrize("num_ranks", [1, 2, 4])
def test_every_rank_holds_what_was_planned(num_ranks: int, tmp_path: Path) -> None:
    run_ranks("tests.distributed.ranks_memory", num_ranks, tmp_path, timeout_s=350)
    for rank in range(num_ranks):
        every = json.loads((tmp_path / f"bytes-rank{rank}.json").read_text(encoding="utf-8"))
        assert {"z2-bf16", "z2-float32"} <= every.keys()
        for name, case in every.items():
            found, planned = case["found"], case["planned"]
            assert min(found.values()) > 0
            assert planned == pytest.approx(found, rel=TOLERANCE), f"{name}, rank {rank}"
            assert sum(planned.values()) == pytest.approx(sum(found.values()), rel=TOLERANCE)
