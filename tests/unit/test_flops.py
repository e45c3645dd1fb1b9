"""Model FLOPs against torch's own counter on the padded model."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from mvptr_ds.config import Config
from mvptr_ds.data.collate import Batch, collate
from mvptr_ds.model import kernels
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.monitoring.flops import StepFlops, backbone_flops, forward_flops
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.objectives.table import Chosen
from tests.support.tiny_models import sample, tiny_model

# Proportions as in the base model (FFN 4 x hidden, many words): what the formulas leave out is as small as there
SIZES = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_text_layers": 2,
    "num_words": 1000,
}
# Left out: grounding's products and the similarities that choose negatives (counted by torch), the gradient of the
# region projection's input (counted by the formula, though nothing needs it)
TOLERANCE = 0.03


def build_task(stage: str, **sizes: object) -> PretrainingLosses:
    weights = Config().stage(stage).weights
    model = tiny_model(**{**SIZES, "num_rows": 1006, "region_feature_dim": 5, **sizes})
    model.set_phrase_rows(torch.arange(1000, 1006))
    task = PretrainingLosses(model, STAGES[stage], weights, Config().task, max_text_slots=12, max_steps=4, seed=0)
    trained = set(model.parameters_of(task.trained_parts()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return task


def same_lengths(num: int = 4, padding: bool = False) -> Batch:
    """Nothing to pad, unless one long sample is asked for beside the others."""
    samples = [sample(i, i, tokens=6, phrases=2, tags=4, regions=6) for i in range(num)]
    if padding:
        samples += [sample(num + i, num + i, tokens=2, phrases=1, tags=1, regions=2) for i in range(num)]
    return collate(samples)


@contextmanager
def _counted() -> Iterator[FlopCounterMode]:
    """The CPU's fused attention and oneDNN's products are not in torch's counter, its plain products are."""
    with pytest.MonkeyPatch.context() as patch, sdpa_kernel(SDPBackend.MATH):
        patch.setattr(kernels, "_LARGE_PRODUCT", float("inf"))
        patch.setattr(kernels, "fills_buckets", lambda device: False)  # added rows are no work that a batch needs
        with FlopCounterMode(display=False) as counter:
            yield counter


@pytest.mark.parametrize("stage", ["stage1", "stage2", "joint"])
def test_the_formula_counts_what_torch_counts(stage: str) -> None:
    task, batch = build_task(stage), same_lengths()
    with _counted() as counter:
        task(batch, step=0).loss.backward()
    counted = counter.get_total_flops()
    assert StepFlops(task, num_ranks=1).of(batch) == pytest.approx(counted, rel=TOLERANCE)


@pytest.mark.parametrize("stage", ["stage2", "joint"])
def test_each_encoder_by_itself(stage: str) -> None:
    task, batch = build_task(stage), same_lengths()
    with _counted() as counter:
        task(batch, step=0)
    counted = {name.split(".")[-1]: sum(ops.values()) for name, ops in counter.get_flop_counts().items()}
    step = StepFlops(task, 1)
    ours = forward_flops(Lengths.of(batch), step.model, step.objectives, 4)
    for ours_name, name in (("text", "text_encoder"), ("visual", "visual_encoder"), ("cross", "cross_encoder")):
        assert ours[ours_name] == pytest.approx(counted[name], rel=1e-6), name
    assert ours["regions"] == counted["region_embedding"]
    assert ours["mlm"] == counted["token_head"]
    assert ours["mcr_tags"] + ours.get("mcr_regions", 0.0) == counted["tag_head"]


def test_padding_asks_for_nothing() -> None:
    """Two halves of different lengths, in one batch or each in its own: the same FLOPs but for contrast."""
    step = StepFlops(build_task("stage1"), 1)
    short = collate([sample(4 + i, 4 + i, tokens=2, phrases=1, tags=1, regions=2) for i in range(4)])
    assert step.of(same_lengths(padding=True)) == pytest.approx(step.of(same_lengths()) + step.of(short), rel=1e-12)


def test_the_base_model_by_hand() -> None:
    """18 layers of 14.2 MFLOP a position, a word head of 48 MFLOP a slot."""
    lengths = Lengths(
        samples=1, text=20, text_pairs=400, visual=50, visual_pairs=2500, cross=55, cross_pairs=3025, regions=35,
        picked_tokens=2,
    )  # fmt: skip
    chosen = Chosen.of(("mlm", "vsc"), aligned=True, wpg_states="uni")
    out = forward_flops(lengths, MvptrConfig(), chosen, 1024)
    assert out["text"] == pytest.approx(6 * (20 * 14.155776e6 + 400 * 3072))
    # the last layer of the cross encoder goes on behind its attention at the two masked words alone
    qkv, rest = 2 * 3 * 768**2, 2 * (768**2 + 2 * 768 * 3072)
    assert out["cross"] == pytest.approx(6 * (55 * qkv + 3025 * 3072) + (5 * 55 + 2) * rest)
    assert out["mlm"] == pytest.approx(2 * 2 * (768 * 768 + 768 * 30522))


def test_a_backbone_is_counted_without_memory() -> None:
    settings = {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
    image = {"visual_source": "image", "backbone_config": settings, "image_size": 32}
    model = tiny_model(**image)
    backbone = model.region_embedding.backbone
    assert backbone is not None
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        backbone(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))
    assert backbone_flops(model) == counter.get_total_flops() > 0
    assert backbone_flops(tiny_model()) == 0.0
