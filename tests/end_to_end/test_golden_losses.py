"""The losses of both stages are those of tests/golden/losses.json: a change of numbers is seen, and meant.

Where it is meant, `python -m tests.support.golden_losses` writes the file anew, and the commit says why.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.support import golden_losses

# SSE4 in place of AVX-512, in torch, oneDNN and MKL, changed no number by more than 1e-6 of it; a wrong draw, factor or
# weight shows at 1e-3 and more
TOLERANCE = 1e-4


@pytest.mark.timeout(400)
def test_losses_and_gradients_are_the_recorded_ones(tmp_path: Path) -> None:
    found = golden_losses.train(tmp_path)
    wanted = json.loads(golden_losses.PATH.read_text(encoding="utf-8"))
    assert found.keys() == wanted.keys()
    for stage, steps in wanted.items():
        for step, (ours, theirs) in enumerate(zip(found[stage], steps, strict=True), 1):
            numbers = {key: value for key, value in theirs.items() if value is not None}
            assert {key: value for key, value in ours.items() if value is not None} == pytest.approx(
                numbers, rel=TOLERANCE
            ), f"{stage}, step {step}"
            assert ours.keys() == theirs.keys()
