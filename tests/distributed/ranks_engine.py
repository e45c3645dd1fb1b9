"""Run by every rank: what the engine does with a NaN gradient, with a logit scale at its cap, and when it is destroyed.

Each rank writes FOLDER/found-rank*.json.
"""

from __future__ import annotations

import gc
import json
import sys
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config, load_ds_config
from mvptr_ds.engine import Engine
from mvptr_ds.objectives.module import TaskOutput
from mvptr_ds.objectives.pretraining import PretrainingLosses
from tests.conftest import REPO
from tests.distributed.steps import OPTIM, TRAIN, batch_of, build_task

MAX_SCALE = 20.0  # of its logarithm, bf16's nearest number lies above
BELOW = 2.994  # where the logit scale begins: a step takes it down, the next one up beyond the cap
RATE = 0.05
PUSH = 1e4
LAST = 4
BF16 = {"bf16": {"enabled": True}}
WHOLE = {"stage3_param_persistence_threshold": 16}  # small parameters are cut, too
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "z1": ("z1.json", {}, {}),
    "z1 bf16": ("z1.json", BF16, {}),
    "z1 bf16 summed in float32": ("z1.json", BF16 | {"data_types": {"grad_accum_dtype": "fp32"}}, {}),
    "z2": ("z2.json", {}, {}),
    "z2 bf16": ("z2.json", BF16, {}),
    "z2_offload bf16": ("z2_offload.json", BF16, {}),
    "z3": ("z3.json", {}, {"reduce_bucket_size": 100_000}),
    "z3 bf16 cut": ("z3.json", BF16, {"reduce_bucket_size": 100_000, **WHOLE}),
}


def pushed_forward(task: PretrainingLosses, *arguments: Any) -> TaskOutput:
    """The task's loss, and one that pushes the logit scale up (below 0) or down."""
    output = PretrainingLosses.forward(task, *arguments)
    return output._replace(loss=output.loss + task.push * task.scale().log().sum())  # type: ignore[operator]


def build(name: str) -> Engine:
    file, changes, zero_changes = CASES[name]
    content = {"fp16": {}, "bf16": {}} | load_ds_config(REPO / "ds_configs" / file) | changes
    content["zero_optimization"] = content["zero_optimization"] | zero_changes
    filled = fill_ds_config(content, TRAIN, OPTIM, collectives.num_ranks(), bf16_supported=False, fp16_supported=False)
    task = build_task("stage2")
    task.max_scale = MAX_SCALE
    task.model.logit_scale.data.fill_(BELOW)
    task.push = 0.0  # type: ignore[assignment]
    task.forward = pushed_forward.__get__(task)  # type: ignore[method-assign]
    return Engine(task, filled, OPTIM, RATE, torch.device("cpu"))


def step(engine: Engine, number: int, spoilt: bool = False) -> bool:
    """Whether it was applied."""
    rank, num = collectives.rank(), collectives.num_ranks()
    for accumulation in range(TRAIN.accumulation_steps):
        output = engine.forward(batch_of("stage2", number, accumulation, rank, num), number, accumulation)
        engine.backward(output.loss * (float("nan") if spoilt and rank == num - 1 and accumulation == 0 else 1.0))
        engine.step()
    return engine.was_step_applied()


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


def log_scales(engine: Engine) -> tuple[float, float]:
    """Of the float32 weights (rank 0's alone) and of those that are computed with."""
    stored = engine.weights().get("logit_scale", torch.zeros(1))
    with deepspeed.zero.GatheredParameters([engine.model.logit_scale]):
        return stored.item(), engine.model.logit_scale.item()


def run(folder: Path, name: str) -> dict[str, Any]:
    """A step, one that is spoilt, one that pushes the scale above its cap, two that push it down."""
    engine = build(name)
    applied = [step(engine, 0)]
    before = engine.weights()
    applied.append(step(engine, 1, spoilt=True))
    out: dict[str, Any] = {"applied": applied, "unchanged": same(before, engine.weights())}
    scales = [log_scales(engine)]
    for number, push in enumerate((-PUSH, PUSH, PUSH), start=2):
        engine.task.push = push
        if number == LAST:
            engine.save(folder / name / "engine")
            collectives.barrier()
        applied.append(step(engine, number))
        scales.append(log_scales(engine))
    weights = engine.weights()
    engine.destroy()
    finite = all(bool(weight.isfinite().all()) for weight in weights.values())
    return out | {"scales": scales, "finite": finite, "resumes": same(weights, resumed(folder, name))}


def resumed(folder: Path, name: str) -> dict[str, torch.Tensor]:
    engine = build(name)
    engine.load(folder / name / "engine", universal_steps=None)
    engine.task.push = PUSH
    step(engine, LAST)
    weights = engine.weights()
    engine.destroy()
    return weights


def live_bytes() -> int:
    """Of all storages that tensors of this process hold."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # asking some deprecated objects for their class warns
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def main() -> None:
    folder = Path(sys.argv[1])
    collectives.init()
    gc.freeze()  # what was imported needs no look, which takes half of the time
    found: dict[str, Any] = {}
    for name in CASES:
        before = live_bytes()
        found[name] = run(folder, name)
        found[name]["left_bytes"] = live_bytes() - before
    path = folder / f"found-rank{collectives.rank()}.json"
    path.write_text(json.dumps(found), encoding="utf-8")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
