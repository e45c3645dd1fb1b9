"""Run by every rank: a small model by LAMB on each ZeRO stage; rank 0 writes FOLDER/ranks.pt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from torch import Tensor, nn

from mvptr_ds.config import OptimConfig, TrainConfig
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import fill_ds_config, load_ds_config
from mvptr_ds.optim.lamb import Lamb
from mvptr_ds.optim.optimizer import build_optimizer, parameter_groups
from tests.conftest import REPO
from tests.support.lamb_reference import BETA1, BETA2, DECAY, EPS

NUM_STEPS, BATCH, CLIP_NORM, RATE = 5, 8, 0.5, 0.02
OPTIM = OptimConfig(name="lamb", beta1=BETA1, beta2=BETA2, eps=EPS, weight_decay=DECAY, clip_norm=CLIP_NORM)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "z1": ("z1.json", {}),
    "z2": ("z2.json", {}),
    "z2_offload": ("z2_offload.json", {}),
    "z1 bf16": ("z1.json", {"bf16": {"enabled": True}}),
    "z1 bf16 summed in float32": (
        "z1.json",
        {"bf16": {"enabled": True}, "data_types": {"grad_accum_dtype": "fp32"}},
    ),
    "z2 bf16": ("z2.json", {"bf16": {"enabled": True}}),
}


class Small(nn.Module):
    """Odd sizes: the border between two ranks lies within a matrix; the last is a quarter of all."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.table = nn.Embedding(13, 9)
        self.first, self.norm, self.second = nn.Linear(9, 11), nn.LayerNorm(11), nn.Linear(11, 7)
        self.last = nn.Linear(7, 13, bias=False)

    def forward(self, ids_B: Tensor, labels_B: Tensor) -> Tensor:
        states = self.norm(self.first(self.table(ids_B))).relu()
        return nn.functional.cross_entropy(self.last(self.second(states)).float(), labels_B)


def batch_at(step: int) -> tuple[Tensor, Tensor]:
    ids, labels = torch.randint(13, (2, BATCH), generator=torch.Generator().manual_seed(step))
    return ids, labels


def train(case: str) -> dict[str, Any]:
    """Per step the gradients that reached it, and the float32 weights after it."""
    file, changes = CASES[case]
    content = load_ds_config(REPO / "ds_configs" / file)
    for key, value in changes.items():
        content[key] = content.get(key, {}) | value
    rank, num = collectives.rank(), collectives.num_ranks()
    filled = fill_ds_config(
        content, TrainConfig(batch_size=BATCH), OPTIM, num, bf16_supported=False, fp16_supported=False
    )
    model = Small()
    named = list(model.named_parameters())
    begun = {name: p.detach().clone() for name, p in named}
    optimizer = build_optimizer(parameter_groups(named, DECAY), OPTIM, RATE)
    assert isinstance(optimizer, Lamb)
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=filled)
    optimizer.follow_zero(collectives.all_reduce_sum)
    share = slice(rank * BATCH // num, (rank + 1) * BATCH // num)
    gradients, weights = [], []
    for step in range(NUM_STEPS):
        ids, labels = batch_at(step)
        engine.backward(engine(ids[share], labels[share]))
        gradients.append({name: safe_get_full_grad(p).float().clone() for name, p in named})
        engine.step()
        weights.append({name: safe_get_full_fp32_param(p).detach().clone() for name, p in named})
    held = sorted(piece.number for pieces in optimizer._pieces.values() for piece in pieces)
    engine.destroy()
    return {"begun": begun, "gradients": gradients, "weights": weights, "held": collectives.gather_objects(held)}


def main() -> None:
    collectives.init()
    results = {case: train(case) for case in CASES}
    if collectives.is_main():
        torch.save(results, Path(sys.argv[1]) / "ranks.pt")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
