"""The candidates of a rank's samples: chunks change nothing but memory.

Legend: B samples, N candidates, D hidden.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from mvptr_ds.objectives.candidates import Candidates, Globals
from mvptr_ds.objectives.hard_negatives import MODES, choose

NUM, DIM = 24, 8
IMAGE_N = torch.arange(NUM) // 2 % 7
SCALE = torch.tensor([10.0], dtype=torch.float64)
CHUNKS = {rows: rows * NUM * 4 / 2**20 for rows in (1, 5, NUM)}  # samples at once: MiB


class Shapes(TorchDispatchMode):
    """Remembers the shape of every tensor that an operation makes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[tuple[int, ...]] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(out) if isinstance(leaf, Tensor)}
        return out


def pool(rows: int) -> Candidates:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(2, NUM, DIM, generator=generator, dtype=torch.float64)
    text_ND, image_ND = F.normalize(states, dim=-1)
    return Candidates(Globals(text_ND.requires_grad_(), image_ND.requires_grad_(), IMAGE_N), "global", CHUNKS[rows])


@pytest.mark.parametrize("rows", list(CHUNKS))
def test_no_more_than_a_chunk_of_similarities_is_there(rows: int) -> None:
    candidates = pool(rows)
    assert candidates.rows_at_once == rows
    with Shapes() as shapes:
        candidates.vsc(SCALE).sum.backward()
        for mode in MODES:
            for negatives, first in ((candidates.negative_images, 0), (candidates.negative_texts, 1)):
                negatives(mode, torch.rand(NUM, dtype=torch.float64), SCALE, torch.arange(first, NUM, 2))
    similarities = {shape for shape in shapes.seen if NUM in shape and DIM not in shape and len(shape) == 2}
    assert max(min(shape) if rows < NUM else max(shape) for shape in similarities) == rows


@pytest.mark.parametrize("mode", MODES)
def test_negatives_are_chosen_from_the_whole_matrix(mode: str) -> None:
    generator = torch.Generator().manual_seed(1)
    takes_image = torch.rand(NUM, generator=generator) < 0.5
    draw = torch.rand(NUM, generator=generator, dtype=torch.float64)
    own = pool(1).local
    sim = (own.text_ND @ own.image_ND.T).detach()
    sim = torch.where(takes_image[:, None], sim, sim.T)
    wanted = choose(mode, sim, IMAGE_N[:, None] == IMAGE_N, draw, SCALE)
    for rows in CHUNKS:
        candidates, found = pool(rows), torch.empty(NUM, dtype=torch.int64)
        for negatives, takes in ((candidates.negative_images, takes_image), (candidates.negative_texts, ~takes_image)):
            rows_K = takes.nonzero().flatten()
            found[rows_K] = negatives(mode, draw, SCALE, rows_K)
        assert torch.equal(pool(rows).negative_images(mode, draw, SCALE)[takes_image], wanted[takes_image])
        assert torch.equal(found, wanted)
        assert (IMAGE_N[found] != IMAGE_N).all()
    assert not torch.equal(wanted, choose(mode, sim.T, IMAGE_N[:, None] == IMAGE_N, draw, SCALE)) or mode == "random"


def test_a_chunk_holds_one_sample_at_least() -> None:
    assert Candidates(pool(1).local, "local", 0.0).rows_at_once == 1
