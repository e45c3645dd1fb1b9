"""Model + objectives of each stage on a tiny model: degenerate batches, what the engine gets, switches.

Legend: B samples, T text slots, G tag slots, R regions, P phrases.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mvptr_ds.config import Config, ItmConfig, TaskConfig, VscConfig, WpgConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import IGNORE, Batch, Sample, collate
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives import hard_negatives
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.objectives.table import objectives_of
from tests.support.tiny_models import TEXT_SLOTS, sample, tiny_model, whole_batch

BATCHES: dict[str, Callable[[], Batch]] = {
    "ordinary": whole_batch,
    "no phrase": lambda: collate([sample(i, i, phrases=0) for i in range(3)]),
    "no masked token": lambda: collate([sample(i, i, masked=False) for i in range(3)]),
    "one sample": lambda: collate([sample(0, 0)]),
    "images of one region": lambda: collate([sample(i, i, regions=1) for i in range(3)]),
    "one image of one region": lambda: collate([sample(0, 0, regions=1), sample(1, 1, regions=5)]),
    "the same image throughout": lambda: collate([sample(i, 0) for i in range(3)]),
    "no tag": lambda: collate([sample(i, i, tags=0) for i in range(3)]),
    "no region": lambda: collate([sample(i, i, regions=0) for i in range(3)]),
    "one image of no region": lambda: collate([sample(i, i, regions=3 * (i != 1)) for i in range(3)]),
    "neither tag nor region": lambda: collate([sample(i, i, tags=i, regions=0) for i in range(3)]),
    "neither phrase nor region": lambda: collate([sample(i, i, phrases=i, regions=2 - i) for i in range(3)]),
    "no token either": lambda: collate([sample(i, i, tokens=0, phrases=0, tags=0, regions=0) for i in range(2)]),
    "nothing at all": lambda: collate([sample(0, 0, tokens=1, phrases=0, tags=0, regions=1, masked=False)]),
}


def build(
    stage: str, weights: WeightsConfig | None = None, config: TaskConfig | None = None, model: Mvptr | None = None
) -> PretrainingLosses:
    return PretrainingLosses(
        model or tiny_model(),
        STAGES[stage],
        weights or Config().stage(stage).weights,
        config or TaskConfig(),
        max_text_slots=TEXT_SLOTS,
        max_steps=10,
        seed=0,
    )


def only(*names: str) -> WeightsConfig:
    return WeightsConfig(**dict.fromkeys(names, 1.0))


CHOICES = [("stage1", "auto", "auto"), ("stage2", "cross", "sampled"), ("joint", "uni", "random")]
CHOICES += [(stage, "auto", negatives) for stage in ("stage2", "joint") for negatives in ("auto", "sampled")]


@pytest.mark.parametrize("kind", list(BATCHES))
@pytest.mark.parametrize(("stage", "states", "negatives"), CHOICES)
def test_every_batch_gives_a_finite_loss_and_gradients(stage: str, kind: str, states: str, negatives: str) -> None:
    config = TaskConfig(wpg=WpgConfig(states=states), itm=ItmConfig(negatives=negatives))
    task = build(stage, config=config)
    for step in (0, 9):  # both halves of ITM's schedule
        task.zero_grad()
        out = task(BATCHES[kind](), step)
        assert out.loss.shape == () and torch.isfinite(out.loss) and out.loss >= 0
        out.loss.backward()
        trained = task.model.parameters_of(task.trained_parts())
        grads = {name: p.grad for name, p in task.model.named_parameters() if name in trained}
        # every rank must hand every trained parameter to the engine's buckets, also with nothing to predict
        assert [name for name, grad in grads.items() if grad is None] == []
        assert [name for name, grad in grads.items() if grad is not None and not torch.isfinite(grad).all()] == []


def text_only(i: int) -> Sample:
    return sample(i, i, tags=0, regions=0)


def image_only(i: int) -> Sample:
    nothing_T = np.full(2, IGNORE)
    return dataclasses.replace(sample(i, i, tokens=0, phrases=0), mlm_labels_T=nothing_T)


@pytest.mark.parametrize("source", ["features", "image"])
@pytest.mark.parametrize(
    ("kinds", "counts"),
    [
        ([text_only] * 3, {"mlm": 3, "mcr_phrases": 6, "mcr_tags": 0, "mcr_regions": 0}),
        ([image_only] * 3, {"mlm": 0, "mcr_phrases": 0, "mcr_tags": 9, "mcr_regions": 9}),
        ([text_only, image_only, text_only], {"mlm": 2, "mcr_phrases": 4, "mcr_tags": 3, "mcr_regions": 3}),
    ],
    ids=["text only", "image only", "both"],
)
def test_stage_1_trains_on_one_modality(
    kinds: list[Callable[[int], Sample]], counts: dict[str, float], source: str
) -> None:
    backbone = {"model_type": "convnext", "hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}
    model = tiny_model(visual_source="image", backbone_config=backbone) if source == "image" else tiny_model()
    samples = [kind(i) for i, kind in enumerate(kinds)]
    for one in samples if source == "image" else ():
        one.region_features_RF, one.image_3HW = None, np.zeros((3, 32, 32), dtype=np.uint8)
    task = build("stage1", model=model)
    out = task(collate(samples), 0)
    assert {name: float(part.count) for name, part in out.parts.items()} == counts
    assert torch.isfinite(out.loss) and out.loss > 0
    out.loss.backward()
    given = set(model.parameters_of(task.trained_parts()))
    grads = {name: p.grad for name, p in model.named_parameters() if name in given}
    assert [name for name, grad in grads.items() if grad is None or not torch.isfinite(grad).all()] == []
    text = [grad.abs().sum() > 0 for name, grad in grads.items() if grad is not None and "text_encoder" in name]
    visual = [grad.abs().sum() > 0 for name, grad in grads.items() if grad is not None and "visual_encoder" in name]
    assert any(text) == (counts["mlm"] > 0) and any(visual) == (counts["mcr_tags"] > 0)


def test_counts_say_what_was_predicted() -> None:
    out = build("stage2")(whole_batch(), 0)
    counts = {name: float(part.count) for name, part in out.parts.items()}
    assert counts == {"mcr_tags": 12, "mcr_regions": 12, "vsc": 4, "mlm": 4, "itm": 8, "wpg_cross": 4, "wpg": 4}
    blind = build("stage2")(BATCHES["one image of no region"](), 0)
    counts = {name: float(part.count) for name, part in blind.parts.items()}
    # one of three has no region: it does not count, nor does who is compared with it
    assert counts["wpg"] <= 2 and counts["wpg_cross"] <= 2 and counts["mcr_regions"] == 6
    counts = {n: float(part.count) for n, part in build("stage2")(BATCHES["no region"](), 0).parts.items()}
    assert counts["wpg"] == counts["wpg_cross"] == counts["mcr_regions"] == 0 and counts["mlm"] == 3
    none = build("stage2")(BATCHES["the same image throughout"](), 0)
    counts = {name: float(part.count) for name, part in none.parts.items()}
    assert counts["itm"] == 3  # matches still count, mismatches do not exist
    assert counts["wpg"] == counts["wpg_cross"] == 0
    assert none.parts["vsc"].sum == 0


def test_the_loss_is_the_weighted_sum_of_means() -> None:
    weights = WeightsConfig(mlm=2.0, vsc=0.5, itm=3.0)
    out = build("stage2", weights)(whole_batch(), 0)
    wanted = sum(getattr(weights, name) * float(p.sum) / float(p.count) for name, p in out.parts.items())
    assert set(out.parts) == {"mlm", "vsc", "itm"}
    assert out.loss.item() == pytest.approx(wanted, rel=1e-6)  # float32 sum of three terms
    assert not any(p.sum.requires_grad for p in out.parts.values())


def reached(task: PretrainingLosses, step: int) -> set[str]:
    task.zero_grad()
    task(whole_batch(), step).loss.backward()
    return {name for name, p in task.model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}


def subsets(stage: str) -> list[WeightsConfig]:
    """All objectives, all but one, and each alone."""
    known = objectives_of(aligned=False) if stage == "stage1" else objectives_of(aligned=True)
    return [only(*known), *(only(*(set(known) - {name})) for name in known), *(only(name) for name in known)]


CASES = [(stage, weights) for stage in STAGES for weights in subsets(stage)] + [("joint", Config().joint.weights)]


@pytest.mark.parametrize("states", ["uni", "cross"])
@pytest.mark.parametrize(
    ("stage", "weights"), CASES, ids=lambda v: v if isinstance(v, str) else "+".join(k for k, w in vars(v).items() if w)
)
def test_the_engine_gets_exactly_what_the_objectives_reach(stage: str, weights: WeightsConfig, states: str) -> None:
    """A parameter without gradient would still be decayed by AdamW; one that is left out would never learn."""
    task = build(stage, weights, TaskConfig(wpg=WpgConfig(states=states)), tiny_model(tie_word_heads=False))
    given = set(task.model.parameters_of(task.trained_parts()))
    found = reached(task, 0) | reached(task, 9)
    assert found ^ given == set()


def test_a_frozen_backbone_is_not_trained_and_a_live_one_is() -> None:
    backbone = {"model_type": "convnext", "hidden_sizes": [4, 8], "depths": [1, 1], "num_stages": 2}
    for freeze in (False, True):
        model = tiny_model(visual_source="image", backbone_config=backbone, freeze_backbone=freeze)
        task = build("stage2", model=model)
        trained = set(model.parameters_of(task.trained_parts()))
        assert any("backbone" in name for name in trained) is not freeze
        batch = whole_batch()
        generator = torch.Generator().manual_seed(0)
        batch.region_features_BRF = None
        batch.images_B3HW = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
        task(batch, 0).loss.backward()
        touched = {name for name, p in model.named_parameters() if p.grad is not None}
        assert {name for name in touched if "backbone" in name} == {name for name in trained if "backbone" in name}


@pytest.mark.parametrize(
    ("stage", "weights", "named"),
    [
        ("stage1", only("mlm", "vsc"), "vsc"),
        ("stage1", only("itm"), "itm"),
        ("stage2", only("mcr_phrases", "vsc"), "mcr_phrases"),
        ("joint", only("mcr_phrases"), "mcr_phrases"),
        ("stage2", WeightsConfig(), "nothing"),
    ],
)
def test_an_objective_that_the_stage_cannot_compute_is_refused(stage: str, weights: WeightsConfig, named: str) -> None:
    with pytest.raises(ValueError, match=rf"{stage}\.weights.*{named}"):
        build(stage, weights)


@pytest.mark.parametrize(
    ("stage", "negatives", "wanted"),
    [
        ("stage2", "auto", ["random"] * 6 + ["hardest"] * 4),
        ("stage2", "sampled", ["sampled"] * 10),
        ("joint", "auto", ["hardest"] * 10),
        ("joint", "schedule", ["random"] * 6 + ["hardest"] * 4),
    ],
)
def test_schedule_of_itm(monkeypatch: pytest.MonkeyPatch, stage: str, negatives: str, wanted: list[str]) -> None:
    modes: list[str] = []
    choose = hard_negatives.choose

    def spy(mode: str, *rest: Any) -> torch.Tensor:
        modes.append(mode)
        return choose(mode, *rest)

    monkeypatch.setattr(hard_negatives, "choose", spy)
    task = build(stage, only("itm"), TaskConfig(itm=ItmConfig(negatives=negatives, random_until=0.6)))
    for step in range(10):
        task(whole_batch(), step)
    assert modes[::2] == modes[1::2] == wanted  # for other images and for other texts


def test_states_of_wpg() -> None:
    def loss(stage: str, states: str) -> float:
        weights = only("wpg")
        return build(stage, weights, TaskConfig(wpg=WpgConfig(states=states)))(whole_batch(), 0).loss.item()

    assert loss("stage2", "uni") != loss("stage2", "cross")
    assert loss("stage2", "auto") == loss("stage2", "uni")
    assert loss("joint", "auto") == loss("joint", "cross")


def test_grounding_by_the_cross_encoder_compares_the_own_pair_with_the_mismatched_one() -> None:
    """Sample by sample, each pair by itself: the same hinge, with a mean over the phrases of the pair's own text."""
    task = build(
        "stage2", only("wpg_cross"), TaskConfig(wpg=WpgConfig(top_k=1), itm=ItmConfig(negatives="random"))
    ).double()
    model, batch = task.model, whole_batch()
    draws = RandomDraws.keyed(0, 0, 0, len(batch), TEXT_SLOTS)
    found = task.sums(batch, draws)["wpg_cross"]

    same = batch.image_index_B[:, None] == batch.image_index_B[None, :]
    others = hard_negatives.choose("random", same.double(), same, draws.itm_N).tolist()
    packed = PackedBatch.of(batch)
    texts = model.encode_text(packed.text_ids)
    _, images = model.encode_visual(packed.tag_ids, model.embed_regions(packed.features, None, packed.geometry))

    def score(text: int, image: int) -> float:
        words, regions = model.encode_cross(texts.take([text]), images.take([image]))
        phrases = F.normalize(words.rows[packed.phrase_mask.take([text]).rows], dim=-1)
        sims = phrases @ F.normalize(regions.rows, dim=-1).T
        return float(sims.max(-1).values.mean().detach())

    wanted = 0.0
    for i, (other, takes_image) in enumerate(zip(others, draws.itm_takes_image_N.tolist(), strict=True)):
        mismatched = score(i, other) if takes_image else score(other, i)
        wanted += max(0.0, mismatched + 0.2 - score(i, i))
    assert wanted > 0 and found.count == len(batch)
    assert found.sum.item() == pytest.approx(wanted, rel=1e-9)  # float64


def test_negatives_of_wpg() -> None:
    def loss(stage: str, negatives: str) -> float:
        config = TaskConfig(wpg=WpgConfig(negatives=negatives))
        return build(stage, only("wpg"), config)(whole_batch(), 2).loss.item()

    assert len({loss("stage2", mode) for mode in ("random", "hardest")}) == 2
    assert loss("stage2", "auto") == loss("stage2", "sampled")
    assert loss("joint", "auto") == loss("joint", "random")


def test_margin_and_top_k_and_temperature_are_used() -> None:
    def wpg(**settings: Any) -> float:
        return build("stage2", only("wpg"), TaskConfig(wpg=WpgConfig(**settings)))(whole_batch(), 0).loss.item()

    assert wpg(margin=1.2) == pytest.approx(wpg(margin=0.2) + 1.0, abs=0.2)
    assert wpg(top_k=1) != wpg(top_k=3)


@pytest.mark.parametrize("max_scale", [100.0, 20.0, 7.5, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_scale_is_capped_and_can_come_back(max_scale: float, dtype: torch.dtype) -> None:
    model = tiny_model(initial_temperature=0.001).to(dtype)  # type: ignore[arg-type]
    task = build("stage2", config=TaskConfig(vsc=VscConfig(max_scale=max_scale)), model=model)
    scale = task.scale()  # exp(logit_scale) would be 1000
    assert scale.item() == pytest.approx(max_scale, rel=1e-6)
    scale.backward()
    assert task.model.logit_scale.grad.item() == pytest.approx(max_scale, rel=0.01)
    task.cap_logit_scale()
    held = torch.tensor(math.log(max_scale), dtype=dtype)
    assert abs(task.model.logit_scale.item() - held.item()) <= torch.finfo(torch.float32).eps * 4
    if dtype == torch.float32:
        assert task.model.logit_scale.item() <= math.log(max_scale)


def test_below_the_cap_scale_and_gradient_are_those_of_the_exponential_to_the_bit() -> None:
    task = build("stage2")
    for temperature in (1.0, 0.3, 0.07, 0.0101):
        task.model.logit_scale.data.fill_(-math.log(temperature))
        before = task.model.logit_scale.detach().clone().requires_grad_()
        wanted = before.exp().clamp(max=100.0)
        ours = task.scale()
        task.model.logit_scale.grad = None
        wanted.backward()
        ours.backward()
        task.cap_logit_scale()
        assert ours.item() == wanted.item()
        assert torch.equal(task.model.logit_scale.grad, before.grad) and torch.equal(task.model.logit_scale, before)


def test_chance_is_keyed_by_seed_and_step() -> None:
    def losses(seed: int, step: int, accumulation: int = 0) -> float:
        task = build("stage2", only("wpg", "itm"))
        task.seed = seed
        return task(whole_batch(), step, accumulation).loss.item()

    assert losses(0, 1) == losses(0, 1)
    assert len({losses(0, 1), losses(0, 2), losses(1, 1), losses(0, 1, 1)}) == 4


def test_padding_changes_no_objective() -> None:
    """A sample counts the same beside longer ones: sums over a batch are sums of sums."""
    task = build("stage1").double()
    samples = [sample(i, i, tokens=2 + i, phrases=i, tags=1 + i, regions=1 + i) for i in range(4)]
    draws = RandomDraws.keyed(0, 0, 0, 4, TEXT_SLOTS)
    whole = task.sums(collate(samples), draws)
    alone = [task.sums(collate([s]), draws) for s in samples]
    for name, part in whole.items():
        # float64 of another order of sums
        torch.testing.assert_close(part.sum, torch.stack([a[name].sum for a in alone]).sum(), rtol=1e-9, atol=1e-9)
        assert part.count == sum(a[name].count for a in alone)
