"""The objectives and their gradients in single and half precision against float64, on the CPU and on a GPU."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor

from mvptr_ds.config import ItmConfig, TaskConfig, WpgConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from tests.support.tiny_models import TEXT_SLOTS, tiny_model, whole_batch

no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, no_gpu])]


def losses_and_gradients(execution: str, dtype: torch.dtype, device: str, **options: Any) -> dict[str, Tensor]:
    sizes = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128, "num_cross_layers": 2}
    # states that differ from sample to sample: at 0.02 a gradient of ITM's is a small difference of nearly equal terms
    model = tiny_model(**sizes, initializer_range=0.1).to(device, dtype)
    model.set_execution(execution, **options)
    weights = WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mlm=1.0, vsc=1.0, wpg=1.0, wpg_cross=1.0, itm=1.0)
    # rounding must not choose another negative
    config = TaskConfig(itm=ItmConfig(negatives="random"), wpg=WpgConfig(negatives="random", top_k=1))
    task = PretrainingLosses(model, STAGES["stage2"], weights, config, max_text_slots=TEXT_SLOTS, max_steps=10, seed=0)
    batch = whole_batch()
    assert batch.region_features_BRF is not None
    batch = dataclasses.replace(batch, region_features_BRF=batch.region_features_BRF.to(dtype))
    parts = task.sums(batch, RandomDraws.keyed(0, 0, 0, len(batch), TEXT_SLOTS))
    torch.stack([part.sum.double() for part in parts.values()]).sum().backward()
    out = {name: part.sum for name, part in parts.items()}
    out |= {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach().double().cpu() for name, value in out.items()}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("execution", ["packed", "padded"])
def test_losses_and_gradients_are_those_of_float64(execution: str, dtype: torch.dtype, device: str) -> None:
    """On the CPU, padded: the largest difference of each tensor, as a share of its largest value."""
    wanted = losses_and_gradients("padded", torch.float64, "cpu")
    found = losses_and_gradients(execution, dtype, device)
    assert found.keys() == wanted.keys() and len(found) > 40
    share = {
        name: ((found[name] - value).abs().max() / value.abs().max().clamp(min=1e-3)).item()
        for name, value in wanted.items()
    }
    bound = 1e-4 if dtype == torch.float32 else 0.15  # bfloat16 keeps 8 bits, through four layers and back
    assert {name: value for name, value in share.items() if not value <= bound} == {}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_recomputed_activations_change_nothing(dtype: torch.dtype, device: str) -> None:
    kept = losses_and_gradients("packed", dtype, device)
    again = losses_and_gradients("packed", dtype, device, activation_checkpointing=True)
    loose = 1e-5 if dtype == torch.float32 else 2e-2  # sums of atomic additions come in another order
    torch.testing.assert_close(again, kept, rtol=loose, atol=loose)
