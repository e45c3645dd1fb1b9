"""What the engine spares a single rank: the same bits without DeepSpeed's hooks, the same steps without a wait."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.distributed.ranks_spared import CASES, NUM_STEPS, SPOILT
from tests.support.launch import run_ranks

pytestmark = pytest.mark.timeout(600)
ON_DEVICE = [case for case in CASES if "lamb" not in case]
APPLIED = [number != SPOILT for number in range(NUM_STEPS)]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("spared")
    run_ranks("tests.distributed.ranks_spared", 1, folder, timeout_s=500)
    results: dict[str, Any] = json.loads((folder / "found.json").read_text(encoding="utf-8"))
    return results


@pytest.mark.parametrize("case", CASES)
def test_flat_gradients_give_the_bits_of_the_hooks(found: dict[str, Any], case: str) -> None:
    """Two micro-batches a step, gradients that are clipped."""
    ours, hooked = found["cases"][case]["hooks"]
    assert ours == 0 < hooked
    assert found["cases"][case]["as hooked"]


@pytest.mark.parametrize("case", CASES)
def test_a_resume_gives_the_same_bits(found: dict[str, Any], case: str) -> None:
    assert found["cases"][case]["resumes"]


@pytest.mark.parametrize("case", CASES)
def test_steps_are_those_of_deepspeed(found: dict[str, Any], case: str) -> None:
    """AdamW divides by what DeepSpeed multiplies with the reciprocal of: float32's last bits, in 4 steps of 1e-2.

    AdamW takes large steps also for a gradient that is little but rounding: 3e-5 were seen.
    """
    of_case = found["cases"][case]
    ours, theirs = of_case["norms"]
    assert ours == pytest.approx(theirs, rel=1e-5) and min(theirs) > 1.0  # of OPTIM.clip_norm: it did clip
    assert of_case["from waiting"] < 1e-4 and of_case["from waiting, spoilt"] < 1e-4


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_that_is_not_finite_is_left_out_as_by_deepspeed(found: dict[str, Any], case: str) -> None:
    """Weights, moments and the count of updates stay; both tell of it alike, and so does the norm."""
    ours, theirs = found["cases"][case]["spoilt"], found["cases"][case]["waiting, spoilt"]
    assert ours["applied"] == theirs["applied"] == APPLIED
    assert ours["counted"] == theirs["counted"] == 1
    assert ours["left_alone"] and theirs["left_alone"]
    assert ours["norms"][SPOILT] == theirs["norms"][SPOILT] == float("inf")
    assert found["cases"][case]["spoilt moved"] > 1e-3  # the comparison sees whether a step was taken


@pytest.mark.parametrize("case", CASES)
def test_only_what_the_device_decides_is_told_a_step_later(found: dict[str, Any], case: str) -> None:
    assert found["cases"][case]["spoilt"]["late"] == (1 if case in ON_DEVICE else 0)
    assert found["cases"][case]["waiting, spoilt"]["late"] == 0


def test_the_engine_adds_few_operations_and_no_wait(found: dict[str, Any]) -> None:
    """Two micro-batches. DeepSpeed alone takes 4 a tensor, three waits of its step, and four of its timer."""
    for case, counts in found["counts"].items():
        assert counts["tensors"] >= 60, case
        assert counts["operations"] <= 50, f"{case}: {counts}"
        assert counts["waits"] == counts["synchronised"] == 0, case
