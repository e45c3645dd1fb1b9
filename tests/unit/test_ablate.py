"""The arms of the ablation: each one fits the shipped configuration and differs from it as it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from mvptr_ds.config import load_config
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from tools.dev import ablate

ARMS = ablate.load_arms()
BASE = load_config("ablation_stamps")


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_is_a_run_of_as_many_steps(name: str) -> None:
    config = load_config("ablation_stamps", ablate.arm_overrides(ARMS[name], BASE))
    steps = sum(config.stage(stage).max_steps for stage in config.stage_names)
    assert steps == BASE.stage1.max_steps + BASE.stage2.max_steps
    changed = dataclasses.asdict(config)
    assert (changed == dataclasses.asdict(BASE)) == (name == "full")
    assert ARMS[name].shows


@pytest.mark.parametrize("name", list(ARMS))
def test_every_arm_is_a_task_of_each_of_its_stages(name: str) -> None:
    config = load_config("ablation_stamps", ablate.arm_overrides(ARMS[name], BASE))
    num_phrases = 10 if config.data.phrase_vocab else 0
    with torch.device("meta"):
        model = Mvptr(
            MvptrConfig(
                num_words=40, num_rows=50, num_phrases=num_phrases, hidden_size=8, num_attention_heads=2,
                intermediate_size=8, num_text_layers=1, num_visual_layers=1, num_cross_layers=1,
                visual_source="features", region_feature_dim=4,
            )
        )  # fmt: skip
    for stage in config.stage_names:
        section = config.pretraining(stage)
        assert section is not None
        weights = section.weights
        task = PretrainingLosses(model, STAGES[stage], weights, config.task, max_text_slots=4, max_steps=1, seed=0)
        assert task.weights == {key: value for key, value in vars(weights).items() if value}


def report(value: float, noun: float | None = 0.5) -> dict[str, Any]:
    part = {"noun": {"accuracy": noun}, "attribute_among_one_noun": {"accuracy": 0.5}}
    return {
        "retrieval": {"t2i_r1": 0.4},
        "mcr": {"accuracy": 0.1, "phrases": {"accuracy": None}},
        "without_tags": {
            "retrieval": {"t2i_r1": value},
            "rerank": {"t2i_r1": 0.25},
            "grounding": {"uni": part, "cross": part},
        },
    }


def test_the_table_says_mean_and_deviation_over_the_seeds() -> None:
    text = ablate.table({"full": [report(0.30), report(0.34)], "no_phrases": [report(0.2, noun=None)]}, ARMS)
    rows = {line.split("|")[1].strip(): [c.strip() for c in line.split("|")[2:-1]] for line in text.splitlines()[:4]}
    assert rows["arm"] == ["seeds", *ablate.COLUMNS]
    assert rows["full"][:3] == ["2", "32.0 ±2.8", "25.0 ±0.0"]
    assert rows["no_phrases"][:3] == ["1", "20.0", "25.0"]
    assert rows["no_phrases"][list(ablate.COLUMNS).index("noun, uni") + 1] == "-"
    assert rows["full"][-1] == "-"
    assert f"- full: {ARMS['full'].shows}" in text


TUNING_ARMS = ablate.load_arms(ablate.TUNING_ARMS_FILE)


@pytest.mark.parametrize("name", list(TUNING_ARMS))
@pytest.mark.parametrize("packaged", ["demo_ve", "demo_vqa", "demo_refs", "demo_retrieval"])
def test_the_arms_of_fine_tuning_fit_every_task(name: str, packaged: str) -> None:
    base = load_config(packaged)
    assert ablate.arms_file(base) == ablate.TUNING_ARMS_FILE and ablate.arms_file(BASE) == ablate.ARMS_FILE
    config = load_config(packaged, ablate.arm_overrides(TUNING_ARMS[name], base))
    (task,) = base.stage_names
    assert config.stage_names == [task] and TUNING_ARMS[name].shows
    section = config.finetuning(task)
    assert section is not None and section.probe == (name == "probe")
    assert (config.run.init_from is None) == (name == "scratch")
    assert (config == base) == (name == "tuned")
    assert ablate.prepare_data(config, Path("nowhere"), 1) == []


def test_the_table_of_a_task_has_its_kinds() -> None:
    def scored(score: float, **kinds: float) -> dict[str, Any]:
        by_kind = {kind: {"score": of_kind, "n": 4} for kind, of_kind in kinds.items()}
        return {"task": "vqa", "score": score, "by_kind": by_kind, "blind": {"score": 0.3}}

    reports = {"tuned": [scored(0.5, number=0.25, other=0.7), scored(0.54, number=0.25)], "scratch": [scored(0.4)]}
    text = ablate.table(reports, TUNING_ARMS)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines()[:4]]
    assert rows[0] == ["arm", "seeds", "score", "number", "other"]
    assert rows[2] == ["tuned", "2", "52.0 ±2.8", "25.0 ±0.0", "70.0"]
    assert rows[3] == ["scratch", "1", "40.0", "-", "-"]
