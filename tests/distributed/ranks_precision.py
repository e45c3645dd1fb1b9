"""Run by every rank: the same steps in float32 and in half precision; rank 0 writes FOLDER/runs.json."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config, load_ds_config
from mvptr_ds.guards import LossScale, SkippedSteps
from mvptr_ds.optim.optimizer import build_optimizer, parameter_groups
from mvptr_ds.optim.zero_grad_norm import patch_zero_grad_norm
from tests.conftest import REPO
from tests.distributed.steps import OPTIM, TRAIN, batch_of, build_task

NUM_STEPS, LEARNING_RATE = 12, 1e-3
HALF = {
    "bf16": {"bf16": {"enabled": True}},
    # far too high a scale to begin with: the search for one that fits is part of the test
    "fp16": {"fp16": {"enabled": True, "initial_scale_power": 30, "hysteresis": 1}},
}


def train(
    stage: str, precision: dict[str, Any], device: torch.device, num_steps: int, spoilt: int = -1, spare: bool = True
) -> dict[str, Any]:
    """Losses, and what tells of the precision. The gradient of step `spoilt` is made NaN on the last rank."""
    rank, num = collectives.rank(), collectives.num_ranks()
    task = build_task(stage)
    trained = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(parameter_groups(trained, OPTIM.weight_decay), OPTIM, LEARNING_RATE)
    content = load_ds_config(REPO / "ds_configs" / "z2.json") | {"bf16": {}, "fp16": {}} | precision
    filled = fill_ds_config(content, TRAIN, OPTIM, num, bf16_supported=True, fp16_supported=device.type == "cuda")
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=filled)
    if spare:
        patch_zero_grad_norm(engine.optimizer)
    losses, applied, norms, skipped = [], [], [], SkippedSteps(max_in_row=3)
    kinds: set[str] = set()
    for step in range(num_steps):
        for accumulation in range(TRAIN.accumulation_steps):
            output = engine(batch_of(stage, step, accumulation, rank, num), step, accumulation)
            engine.backward(output.loss * (float("nan") if step == spoilt and rank == num - 1 else 1.0))
            engine.step()
            kinds |= {str(part.sum.dtype) for part in output.parts.values()} | {str(output.loss.dtype)}
            losses.append(collectives.all_reduce_sum(output.loss).item() / num)
        applied.append(engine.was_step_applied())
        norms.append(float(engine.get_global_grad_norm()))
        scaler = engine.optimizer.loss_scaler
        skipped.count(step, applied[-1], LossScale(scaler.cur_scale, scaler.min_scale) if scaler.dynamic else None)
    states = [t for state in engine.optimizer.optimizer.state.values() for t in state.values() if t.ndim]
    weights = {name: p.detach().float() for name, p in task.model.named_parameters()}
    out = {
        "losses": losses,
        "applied": applied,
        "norms": norms,
        "skipped": skipped.total,
        "loss_dtypes": sorted(kinds),
        "weight_dtype": str(next(task.model.parameters()).dtype),
        "master_dtypes": sorted({str(p.dtype) for p in engine.optimizer.single_partition_of_fp32_groups}),
        "state_dtypes": sorted({str(t.dtype) for t in states}),
        "misaligned": [n for n, p in task.model.named_parameters() if p.numel() % 8 == 0 and p.data_ptr() % 16],
        "finite": all(bool(w.isfinite().all()) for w in weights.values()),
    }
    engine.destroy()
    return out


def main() -> None:
    device = collectives.init()
    runs: dict[str, Any] = {}
    for stage in ("stage1", "stage2"):
        runs[f"{stage}/float32"] = train(stage, {}, device, NUM_STEPS)
        runs[f"{stage}/bf16"] = train(stage, HALF["bf16"], device, NUM_STEPS)
    runs["spoilt"] = train("stage2", HALF["bf16"], device, 3, spoilt=1)
    for name, precision in ("float32", {}), ("bf16", HALF["bf16"]):
        runs[f"norm of deepspeed/{name}"] = train("stage2", precision, device, 3, spare=False)
    if device.type == "cuda":
        runs["stage2/fp16"] = train("stage2", HALF["fp16"], device, 3 * NUM_STEPS)
    if collectives.is_main():
        (Path(sys.argv[1]) / "runs.json").write_text(json.dumps(runs), encoding="utf-8")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
