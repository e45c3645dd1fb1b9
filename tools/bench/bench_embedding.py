#!/usr/bin/env python3
"""Measures the gradient of the base model's embedding table: written once, or once for each use. Forward + backward.

python tools/bench/bench_embedding.py     # less than a minute on two cores
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as bench_step.py

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch
import torch.nn.functional as F
from bench_models import make_batch
from bench_step import measured
from torch import Tensor

from mvptr_ds.model import kernels
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.packed import Packed
from mvptr_ds.user_io.terminal import accept_any_text

CONFIG = MvptrConfig()
DIM = CONFIG.hidden_size


def compare(title: str, ways: dict[str, Callable[[], Tensor]], rounds: int) -> None:
    """The best of some rounds of each way, in turns; each is called once before."""
    best = dict.fromkeys(ways, float("inf"))
    for number in range(rounds + 1):
        for name, way in ways.items():
            _, took = measured(_both_ways, way)
            if number:
                best[name] = min(best[name], took["cpu_s"])
    sys.stdout.write(f"{title}\n" + "".join(f"  {1e3 * best[name]:7.1f} CPU-ms  {name}\n" for name in ways))


def _both_ways(forward: Callable[[], Tensor]) -> None:
    forward().sum().backward()


def embedding_gradient(batch: int, rounds: int) -> None:
    made = make_batch(batch, 0, CONFIG)
    text, tags = (
        Packed.of_padded(ids, lengths).rows
        for ids, lengths in ((made.text_ids_BT, made.text_lengths), (made.tag_ids_BG, made.tag_lengths))
    )
    table = torch.nn.Parameter(torch.randn(CONFIG.num_rows, DIM))
    hidden_KD = torch.randn(40, DIM)  # picked slots of a head

    def heads(first_WD: Tensor, second_WD: Tensor, *rows: Tensor) -> Tensor:
        table.grad = None
        return torch.stack([x.sum() for x in (*rows, F.linear(hidden_KD, first_WD), F.linear(hidden_KD, second_WD))])

    def apart() -> Tensor:
        words = CONFIG.num_words
        return heads(table[:words], table[:words], F.embedding(text, table), F.embedding(tags, table))

    def together() -> Tensor:
        rows, words_WD = kernels.TableLookup.apply(table, torch.cat([text, tags]), CONFIG.num_words)
        return heads(words_WD, words_WD, rows)

    title = f"two look-ups and two tied heads of {len(hidden_KD)} rows, a table of {tuple(table.shape)}"
    compare(title, {"a gradient of the table each": apart, "one gradient of the table": together}, rounds)


def main() -> int:
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=16, help="samples")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    embedding_gradient(arguments.batch, arguments.rounds)
    return 0


if __name__ == "__main__":
    sys.exit(main())
