"""Losses and choices of the downstream tasks against numbers that the published code computed, of its logits alone."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvptr_ds.config_stages import ReferringConfig, VqaConfig
from mvptr_ds.objectives import losses
from mvptr_ds.tasks.entailment import EntailmentModule
from mvptr_ds.tasks.referring import PADDING, ReferringModule
from mvptr_ds.tasks.vqa import VqaModule
from tests.support.golden_heads import GOLDEN
from tests.support.tiny_models import tiny_model

RECORDED: dict[str, Any] = json.loads(GOLDEN.read_text("utf-8"))
TOLERANCE = 1e-6  # numbers were rounded to seven digits


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def mean(loss: losses.LossSum) -> float:
    return (loss.sum / loss.count).item()


def test_entailment() -> None:
    recorded = RECORDED["entailment"]
    module = EntailmentModule(tiny_model(hidden_size=32), seed=0)
    assert module.head is not None
    module.head.load_state_dict({name: tensor(recorded[name]) for name in ("weight", "bias")})
    logits_BC = module.head.double()(tensor(recorded["pooled"]))
    torch.testing.assert_close(logits_BC, tensor(recorded["logits"]), atol=TOLERANCE, rtol=0)
    labels = [{"class": number} for number in recorded["labels"]]
    assert mean(module.loss(logits_BC, labels)) == pytest.approx(recorded["loss"], abs=TOLERANCE)


def test_vqa() -> None:
    recorded = RECORDED["vqa"]
    module = VqaModule(tiny_model(), VqaConfig(), [str(n) for n in range(len(recorded["labels"][0]))], seed=0)
    labels = [{"targets": [(n, score) for n, score in enumerate(row) if score]} for row in recorded["labels"]]
    assert [] in [of_sample["targets"] for of_sample in labels]  # a question without an answer of the list counts
    # rounding errors of 37 answers add up
    assert mean(module.loss(tensor(recorded["logits"]), labels)) == pytest.approx(recorded["loss"], abs=1e-5)


@pytest.mark.parametrize(("mode", "score"), [(1, "cosine"), (2, "dot"), (3, "region")])
def test_referring(mode: int, score: Any) -> None:
    recorded = RECORDED["referring"]
    of_mode, nums = recorded[f"mode{mode}"], recorded["num_regions"]
    module = ReferringModule(tiny_model(), ReferringConfig(score=score), seed=0)
    logits_N = tensor(of_mode["logits"])
    if mode == 2:  # sigmoids were recorded
        logits_N = logits_N.logit()
    parts = logits_N.split(nums)
    logits_BR = torch.stack([F.pad(part, (0, max(nums) - len(part)), value=PADDING) for part in parts])
    overlaps = [part.numpy() for part in tensor(recorded["overlaps"]).split(nums)]
    labels = [{"overlaps": of_sample} for of_sample in overlaps]
    assert mean(module.loss(logits_BR, labels)) == pytest.approx(of_mode["loss"], abs=TOLERANCE)
    chosen = [of[row.argmax()] for of, row in zip(overlaps, logits_BR.numpy(), strict=True)]
    np.testing.assert_allclose(chosen, of_mode["chosen_iou"], atol=TOLERANCE)


def test_retrieval() -> None:
    recorded = RECORDED["retrieval"]
    text_BD, image_BD = tensor(recorded["global_txt"]), tensor(recorded["global_img"])
    index_B = torch.arange(len(text_BD))
    both = (text_BD, image_BD)
    vsc = losses.vsc(both, both, tensor([recorded["scale"]]), index_B, index_B, 0, len(text_BD))
    assert mean(vsc) == pytest.approx(recorded["loss_vsc"], abs=1e-5)  # the scale multiplies rounding errors
    matched, mismatched = tensor(recorded["logits_itm"]).flip(-1).chunk(2)  # class 1 is a match there
    itm = losses.itm(matched, mismatched, torch.ones(len(matched), dtype=torch.bool))
    assert mean(itm) == pytest.approx(recorded["loss_itm"], abs=TOLERANCE)
