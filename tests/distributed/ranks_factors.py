"""Run by every rank: fine-tuning with factors of the learning rate, and without, for two steps; then its resume.

Each rank writes FOLDER/found-rank*.json.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mvptr_ds.config import OptimConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config, load_ds_config
from mvptr_ds.engine import Engine
from mvptr_ds.tasks.entailment import EntailmentModule
from tests.conftest import REPO
from tests.distributed.steps import OPTIM, TRAIN, batch_of
from tests.support.tiny_models import tiny_model

FACTORS = {"head": 10.0, "itm": 3.0, "pooler": 2.0, "text": 0.5}
RATE = 1e-3
WHOLE = {"stage3_param_persistence_threshold": 16}  # small parameters are cut, too
CASES: dict[str, tuple[str, dict[str, Any], OptimConfig]] = {
    "z1": ("z1.json", {}, OPTIM),
    "z1 lamb": ("z1.json", {}, dataclasses.replace(OPTIM, name="lamb")),
    "z2": ("z2.json", {}, OPTIM),
    "z2_offload": ("z2_offload.json", {}, OPTIM),
    "z3": ("z3.json", {"reduce_bucket_size": 100_000, **WHOLE}, OPTIM),
}
Weights = dict[str, torch.Tensor]


def build(name: str, factors: Mapping[str, float]) -> Engine:
    file, zero_changes, optim = CASES[name]
    content = {"fp16": {}, "bf16": {}} | load_ds_config(REPO / "ds_configs" / file)
    content["zero_optimization"] = content["zero_optimization"] | zero_changes
    filled = fill_ds_config(content, TRAIN, optim, collectives.num_ranks(), bf16_supported=False, fp16_supported=False)
    module = EntailmentModule(tiny_model(), seed=3)
    module.freeze_untrained()
    return Engine(module, filled, optim, RATE, torch.device("cpu"), factors)


def labelled(step: int, accumulation: int) -> Batch:
    batch = batch_of("stage2", step, accumulation, collectives.rank(), collectives.num_ranks())
    classes = tuple({"class": (number + accumulation) % 3} for number in range(len(batch)))
    return dataclasses.replace(batch, labels=classes)


def step(engine: Engine, number: int) -> Weights:
    """The whole weights after it, on rank 0 alone."""
    engine.set_learning_rate(RATE * (number + 1))
    for accumulation in range(TRAIN.accumulation_steps):
        engine.backward(engine.forward(labelled(number, accumulation), number, accumulation).loss)
        engine.step()
    return engine.weights()


def moved(engine: Engine) -> Weights:
    """How far the first step has moved each weight."""
    before, after = engine.weights(), step(engine, 0)
    return {name: after[name] - weight for name, weight in before.items()}


def groups(engine: Engine) -> list[tuple[float, float]]:
    """Learning rate and decay of each group, in their order."""
    return [(group["lr"], group["weight_decay"]) for group in engine._deepspeed.optimizer.param_groups]


def worst(with_factors: Weights, without: Weights) -> dict[str, float]:
    """By part, how far the way of a weight is from its factor times the way without factors, and the longest way."""
    factors = {"head.": 10.0, "pooler.": 2.0, "text_encoder.": 0.5}
    out = {"off": 0.0, "longest": 0.0}
    for name, way in without.items():
        factor = next((f for prefix, f in factors.items() if name.startswith(prefix)), 1.0)
        out["off"] = max(out["off"], float((with_factors[name] - factor * way).abs().max()))
        out["longest"] = max(out["longest"], float(way.abs().max()))
    return out


def run(folder: Path, name: str) -> dict[str, Any]:
    plain, engine = build(name, {}), build(name, FACTORS)
    found: dict[str, Any] = {**worst(moved(engine), moved(plain)), "plain": groups(plain), "groups": groups(engine)}
    engine.save(folder / name / "engine")
    collectives.barrier()
    wanted = step(engine, 1)
    resumed = build(name, FACTORS)
    resumed.load(folder / name / "engine", universal_steps=None)
    weights = step(resumed, 1)
    found["resumes"] = all(torch.equal(weights[n], wanted[n]) for n in wanted)
    found["groups of the resumed"] = groups(resumed)
    for one in (plain, engine, resumed):
        one.destroy()
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    collectives.init()
    found = {name: run(folder, name) for name in CASES}
    path = folder / f"found-rank{collectives.rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
