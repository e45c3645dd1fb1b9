"""Negatives: never of the own image, drawn as said, the same whatever the number of ranks.

Legend: B samples of this rank, N samples of all ranks, T text slots.
"""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvptr_ds.objectives.hard_negatives import MODES, RandomDraws, choose, has_negative

NUM_DRAWS = 20_000


def evenly(num: int) -> Tensor:
    """Draws that cover [0, 1) evenly: frequencies are then exact to one in `num`."""
    return (torch.arange(num, dtype=torch.float64) + 0.5) / num


@settings(max_examples=60, deadline=None, derandomize=True)
@given(seed=st.integers(0, 2**31), num=st.integers(1, 12), num_images=st.integers(1, 6), mode=st.sampled_from(MODES))
def test_never_the_own_image_nor_another_caption_of_it(seed: int, num: int, num_images: int, mode: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    image = torch.randint(0, num_images, (num,), generator=generator)
    same = image[:, None] == image[None, :]
    sim = torch.randn(num, num, generator=generator) + 3.0 * same  # its own image is the most similar
    edge = torch.tensor([0.0, 1.0 - 2**-53], dtype=torch.float64)
    for draw in (torch.rand(num, generator=generator, dtype=torch.float64), *(e.expand(num) for e in edge)):
        found = choose(mode, sim, same, draw, scale=30.0)
        assert found.dtype == torch.int64 and ((found >= 0) & (found < num)).all()
        rows = has_negative(image, image)
        assert rows.tolist() == [bool((image != i).any()) for i in image]
        assert not same[torch.arange(num), found][rows].any()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_similarity_that_is_not_finite_fails_no_choice(mode: str, bad: float) -> None:
    sim, same = torch.full((3, 4), bad), torch.tensor([[True, False, True, False]]).expand(3, 4)
    for scale in (1.0, 100.0):
        found = choose(mode, sim, same, torch.tensor([0.0, 0.5, 1.0 - 2**-53], dtype=torch.float64), scale)
        assert set(found.tolist()) <= {1, 3}


def test_hardest_is_the_most_similar_other_image() -> None:
    sim = torch.tensor([[0.9, 0.8, 0.1, 0.5], [0.9, 0.99, 0.2, 0.3]])
    same = torch.tensor([[True, True, False, False], [False, True, False, False]])
    assert choose("hardest", sim, same, torch.zeros(2)).tolist() == [3, 0]


def test_random_is_uniform() -> None:
    same = torch.tensor([[True, False, False, True, False, False]]).expand(NUM_DRAWS, 6)
    found = choose("random", torch.randn(NUM_DRAWS, 6), same, evenly(NUM_DRAWS))
    counts = torch.bincount(found, minlength=6) / NUM_DRAWS
    torch.testing.assert_close(counts, torch.tensor([0, 0.25, 0.25, 0, 0.25, 0.25]), rtol=0, atol=2 / NUM_DRAWS)


@pytest.mark.parametrize("scale", [1.0, 8.0, 100.0])
def test_sampled_follows_the_softmax(scale: float) -> None:
    sim = torch.tensor([[0.9, 0.3, -0.2, 0.25, 0.9, 0.1]])
    same = torch.tensor([[True, False, False, False, True, False]])
    found = choose("sampled", sim.expand(NUM_DRAWS, -1), same.expand(NUM_DRAWS, -1), evenly(NUM_DRAWS), scale)
    wanted = (scale * sim.double()).masked_fill(same, float("-inf")).softmax(-1)[0]
    counts = torch.bincount(found, minlength=6).double() / NUM_DRAWS
    torch.testing.assert_close(counts, wanted, rtol=0, atol=1e-4)  # one draw is 5e-5; the floor moves less


def test_however_sharp_the_softmax_every_other_image_is_within_reach() -> None:
    sim, same = torch.tensor([[1.0, 0.9, 0.5, 1.0]]), torch.tensor([[False, False, False, True]])
    uniform = [0.5, 1.0 - 1.5e-6, 1.0 - 5e-7]  # two of a weight of 1e-6 each stand behind the most similar one
    found = [choose("sampled", sim, same, torch.tensor([u], dtype=torch.float64), 1000.0).item() for u in uniform]
    assert found == [0, 1, 2]


def test_keyed_draws_are_uniform_and_independent_of_each_other() -> None:
    same = torch.eye(5, dtype=torch.bool)
    counts = torch.zeros(5, 5)
    for step in range(2000):
        draws = RandomDraws.keyed(0, step, 0, 5, 3)
        counts[torch.arange(5), choose("random", same.float(), same, draws.itm_N)] += 1
    expected = 2000 / 4
    others = counts[~same]
    chi2 = float(((others - expected) ** 2 / expected).sum())
    assert (counts.diagonal() == 0).all()
    assert chi2 < 38.0  # 15 degrees of freedom: exceeded once in 1,000 seeds; this seed is fixed
    names = [field.name for field in fields(RandomDraws) if field.name != "itm_takes_image_N"]
    uniforms = torch.stack([getattr(draws, name).flatten()[:5] for name in names])
    assert len({tuple(row.tolist()) for row in uniforms}) == len(uniforms)


@pytest.mark.parametrize("num", [1, 2, 7, 64])
def test_half_of_the_batch_takes_another_image(num: int) -> None:
    takes = [RandomDraws.keyed(0, step, 0, num, 1).itm_takes_image_N for step in range(20)]
    assert all(t.dtype == torch.bool and int(t.sum()) == num // 2 for t in takes)
    assert num < 3 or any(not torch.equal(takes[0], t) for t in takes)


def test_draws_are_keyed() -> None:
    base = RandomDraws.keyed(0, 5, 0, 8, 4)
    assert torch.equal(base.wpg_own_NT, RandomDraws.keyed(0, 5, 0, 8, 4).wpg_own_NT)
    for other in (RandomDraws.keyed(1, 5, 0, 8, 4), RandomDraws.keyed(0, 6, 0, 8, 4), RandomDraws.keyed(0, 5, 1, 8, 4)):
        for field in fields(RandomDraws):
            if field.name != "itm_takes_image_N":  # one of 70 splits: may coincide
                assert not torch.equal(getattr(base, field.name), getattr(other, field.name)), field.name


@pytest.mark.parametrize("num_ranks", [1, 2, 4, 8])
def test_rows_of_all_ranks_are_the_draws_of_one(num_ranks: int) -> None:
    whole = RandomDraws.keyed(3, 7, 1, 8, 4)
    share = 8 // num_ranks
    parts = [whole.rows(rank * share, share) for rank in range(num_ranks)]
    for field in fields(RandomDraws):
        joined = torch.cat([getattr(part, field.name) for part in parts])
        assert torch.equal(joined, getattr(whole, field.name)), field.name


def test_choices_of_a_rank_are_those_of_one_process() -> None:
    generator = torch.Generator().manual_seed(1)
    sim = torch.randn(8, 8, generator=generator)
    same = torch.eye(8, dtype=torch.bool)
    draws = RandomDraws.keyed(0, 0, 0, 8, 1)
    for mode in MODES:
        whole = choose(mode, sim, same, draws.itm_N, 10.0)
        parts = [choose(mode, sim[r : r + 2], same[r : r + 2], draws.rows(r, 2).itm_N, 10.0) for r in range(0, 8, 2)]
        assert torch.equal(whole, torch.cat(parts)), mode


def test_no_gradient_and_unknown_mode() -> None:
    sim = torch.randn(2, 2, requires_grad=True)
    same = torch.eye(2, dtype=torch.bool)
    assert not choose("sampled", sim, same, torch.rand(2)).requires_grad
    with pytest.raises(ValueError, match=r"'hard'.*hardest, sampled, random"):
        choose("hard", sim, same, torch.rand(2))
