"""Run by every rank: the bytes of the tensors that the engine keeps; each rank writes FOLDER/bytes-rank*.json."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import deepspeed
import torch

from mvptr_ds.config import Config, OptimConfig, TrainConfig
from mvptr_ds.data.collate import collate
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config, load_ds_config
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.optim.optimizer import build_optimizer, parameter_groups
from mvptr_ds.planning.memory import Zero, state_bytes
from mvptr_ds.planning.plan import groups_of
from tests.conftest import REPO
from tests.support.tiny_models import NUM_PHRASES, TEXT_SLOTS, sample, tiny_model

NUM_WORDS = 2000  # the embedding table is a third of the model, as in the base model
CASES = {
    "z2-bf16": ("z2.json", True),
    "z2-float32": ("z2.json", False),
    "z1-bf16": ("z1.json", True),
}


def build_task() -> PretrainingLosses:
    rows = NUM_WORDS + NUM_PHRASES
    model = tiny_model(hidden_size=64, intermediate_size=256, num_words=NUM_WORDS, num_rows=rows, num_text_layers=2)
    model.set_phrase_rows(torch.arange(NUM_WORDS, rows))
    config = Config()
    task = PretrainingLosses(
        model, STAGES["stage2"], config.stage2.weights, config.task, max_text_slots=TEXT_SLOTS, max_steps=9, seed=0
    )
    trained = set(model.parameters_of(task.trained_parts()))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)
    return task


def unique_bytes(tensors: Iterable[torch.Tensor | None]) -> int:
    """Of the storages behind them, each once."""
    storages = (t.untyped_storage() for t in tensors if t is not None)
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def measure(name: str) -> dict[str, Any]:
    """Before the second optimiser step: Adam's moments exist, and so do the gradients."""
    file, bf16 = CASES[name]
    rank, num = collectives.rank(), collectives.num_ranks()
    task, optim = build_task(), OptimConfig()
    groups, frozen = groups_of(task, optim.weight_decay)
    named = [(n, p) for n, p in task.model.named_parameters() if p.requires_grad]
    optimizer = build_optimizer(parameter_groups(named, optim.weight_decay), optim, 1e-3)
    content = load_ds_config(REPO / "ds_configs" / file) | {"bf16": {"enabled": bf16}}
    content["zero_optimization"]["reduce_bucket_size"] = 20_000
    train = TrainConfig(batch_size=4 * num)
    filled = fill_ds_config(content, train, optim, num, bf16_supported=True, fp16_supported=False)
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=filled)
    for step in range(2):
        numbers = range(100 * step + 4 * rank, 100 * step + 4 * rank + 4)
        engine.backward(engine(collate([sample(n, n) for n in numbers]), step, 0).loss)
        gradients = unique_bytes(g for group in engine.optimizer.averaged_gradients.values() for g in group or ())
        if step == 0:
            engine.step()
    moments = [t for state in engine.optimizer.optimizer.state.values() for t in state.values()]
    master = engine.optimizer.single_partition_of_fp32_groups
    found = {
        "parameters": unique_bytes(task.model.parameters()),
        "gradients": gradients,
        "optimizer": unique_bytes([*master, *moments]),
    }
    engine.destroy()
    planned = state_bytes(groups, frozen, 2 if bf16 else 4, Zero.of(filled), num, rank)
    return {"found": found, "planned": {key: getattr(planned, key) for key in found}}


def main() -> None:
    collectives.init()
    every = {name: measure(name) for name in CASES if (REPO / "ds_configs" / CASES[name][0]).is_file()}
    path = Path(sys.argv[1]) / f"bytes-rank{collectives.rank()}.json"
    path.write_text(json.dumps(every), encoding="utf-8")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
