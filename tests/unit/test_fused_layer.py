"""The model with fused kernels against the model without: same losses, same gradients, same dropped elements.

On a CPU the kernels run in Triton's interpreter, program after program, so models and batches are tiny. What is random
is drawn from the same seeds by the kernels and by their functions in torch (triton_kernels/reference.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from mvptr_ds.config import TaskConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import Batch, collate
from mvptr_ds.model import kernels
from mvptr_ds.model.encoder import Encoder
from mvptr_ds.model.fused_layer import Fused, linear_beside
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.triton_kernels import reference
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.tasks.entailment import EntailmentModule
from tests.support.tiny_models import TEXT_SLOTS, sample, tiny_model

triton = pytest.importorskip("triton", reason="triton is not installed")
ON_CPU = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the interpreter is off where there is a GPU")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])]
pytestmark = pytest.mark.timeout(120)
WEIGHTS = {
    "stage1": WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mcr_phrases=1.0, mlm=1.0),
    "stage2": WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mlm=1.0, vsc=1.0, wpg=1.0, wpg_cross=1.0, itm=1.0),
    "joint": WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32


def by_triton() -> ModuleType:
    return kernels.triton_module("functions")


def use(patch: pytest.MonkeyPatch, functions: ModuleType | None) -> None:
    """Lets the model take these functions on any device; None: torch's separate kernels."""
    patch.setattr(kernels, "fused_functions", lambda device, dtype: functions)


def small_batch() -> Batch:
    """Three samples; a masked tag of the first two asks the regions of its own image."""
    labels = {"class": 1}
    made = [sample(0, 0, 2, 1, 2, 2), sample(1, 1, 1, 1, 1, 3), sample(2, 2, 3, 2, 0, 1)]
    return collate([replace(one, labels=labels) for one in made])


def losses_and_gradients(task: str, p: float, device: str = "cpu", **execution: Any) -> dict[str, Tensor]:
    """Sums of the losses, and gradients of all weights that they reach, on the CPU."""
    model = tiny_model(num_cross_layers=2, hidden_dropout=p, attention_dropout=p)
    model.set_execution("packed", **execution)
    module: Any
    if task == "entailment":
        module = EntailmentModule(model, seed=0).to(device).train()
    else:
        module = PretrainingLosses(
            model, STAGES[task], WEIGHTS[task], TaskConfig(), max_text_slots=TEXT_SLOTS, max_steps=10, seed=0
        )
        module = module.to(device).train()
    torch.manual_seed(7)  # whatever draws seeds or elements begins with it
    batch = small_batch()
    if task == "entailment":
        parts = module(batch, 0).parts
        loss = module(batch, 0).loss if p == 0 else module(batch, 1).loss
    else:
        parts = module.sums(batch, RandomDraws.keyed(0, 0, 0, len(batch), TEXT_SLOTS))
        loss = torch.stack([part.sum for part in parts.values()]).sum()
    loss.backward()
    found = {name: part.sum.detach() for name, part in parts.items()} | {"loss": loss.detach()}
    found |= {name: weight.grad for name, weight in module.named_weights() if weight.grad is not None}
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", [*STAGES, "entailment"])
def test_without_dropout_the_fused_model_is_the_model(
    task: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, None)
    wanted = losses_and_gradients(task, 0.0, device)
    use(monkeypatch, by_triton())
    found = losses_and_gradients(task, 0.0, device)
    assert len(found) > 20
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("task", [*STAGES, "entailment"])
def test_with_dropout_it_drops_what_the_reference_drops(
    task: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, reference)
    wanted = losses_and_gradients(task, 0.3, device)
    use(monkeypatch, by_triton())
    torch.testing.assert_close(losses_and_gradients(task, 0.3, device), wanted, **CLOSE)
