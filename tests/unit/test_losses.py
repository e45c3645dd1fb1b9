"""Each objective against a slow computation with plain loops, in float64; and what must stay finite.

Legend: B samples, N samples of all ranks, R regions, T text slots, G tag slots, W word rows, D hidden, K picked slots.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from mvptr_ds.objectives import losses
from mvptr_ds.objectives.losses import IGNORE, LossSum

EXACT: dict[str, Any] = {"rtol": 1e-10, "atol": 1e-12}  # both sides are float64; only the order of sums differs
FEW = settings(max_examples=40, deadline=None, derandomize=True)
SEEDS = st.integers(0, 2**31)
SIZES = st.integers(1, 5)


def rand(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator, dtype=torch.float64).requires_grad_()


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def check(found: LossSum, total: float, count: float, *inputs: Tensor) -> None:
    """Sum and count are right, the gradient of every input exists and is finite."""
    torch.testing.assert_close(found.sum, torch.tensor(total, dtype=found.sum.dtype), **EXACT)
    assert float(found.count) == count
    assert not found.count.requires_grad
    for grad in torch.autograd.grad(found.sum, inputs, allow_unused=True):
        assert grad is None or torch.isfinite(grad).all()


def neg_log_softmax(row: list[float], wanted: int) -> float:
    return math.log(sum(math.exp(v - row[wanted]) for v in row))


@FEW
@given(seed=SEEDS, samples=SIZES, regions=SIZES, tags=SIZES, words=st.integers(2, 8))
def test_mcr_regions(seed: int, samples: int, regions: int, tags: int, words: int) -> None:
    generator = seeded(seed)
    logits = rand(generator, samples, regions, words)
    mask = torch.rand(samples, regions, generator=generator) < 0.6
    mask[:, 0] = True
    labels = torch.randint(0, words, (samples, tags), generator=generator)
    labels[torch.rand(samples, tags, generator=generator) < 0.5] = IGNORE
    total, count = 0.0, 0
    for b in range(samples):
        for label in labels[b].tolist():
            if label == IGNORE:
                continue
            rows = [row for row, real in zip(logits[b].tolist(), mask[b].tolist(), strict=True) if real]
            total += max(0.0, -math.log(sum(math.exp(-neg_log_softmax(row, label)) for row in rows)))
            count += 1
    sample_K, labels_K = (labels != IGNORE).nonzero()[:, 0], labels[labels != IGNORE]
    log_p_KR = logits.log_softmax(-1)[sample_K, :, labels_K]
    check(losses.mcr_regions(log_p_KR, mask[sample_K]), total, count, logits)


def test_mcr_regions_is_zero_once_two_regions_are_sure() -> None:
    found = losses.mcr_regions(torch.zeros(1, 2), torch.ones(1, 2, dtype=torch.bool))
    assert float(found.sum) == 0.0 and float(found.count) == 1


@pytest.mark.parametrize("tags", [0, 2])
def test_mcr_regions_without_a_tag_or_a_region(tags: int) -> None:
    log_p = torch.zeros(tags, 1, requires_grad=True)
    found = losses.mcr_regions(log_p, torch.zeros(tags, 1, dtype=torch.bool))
    assert found.sum.item() == 0.0 and float(found.count) == 0
    assert torch.autograd.grad(found.sum, log_p)[0].tolist() == [[0.0]] * tags


def test_a_tag_whose_image_has_no_region_does_not_count_and_spoils_no_gradient() -> None:
    log_p = torch.full((2, 2), -1.0, requires_grad=True)
    found = losses.mcr_regions(log_p, torch.tensor([[True, False], [False, False]]))
    assert found.sum.item() == 1.0 and float(found.count) == 1
    assert torch.autograd.grad(found.sum, log_p)[0].tolist() == [[-1.0, 0.0], [0.0, 0.0]]


def slow_vsc(text: Tensor, image: Tensor, scale: float, images: list[int]) -> list[float]:
    """Of every sample of one process that holds the whole batch."""
    sim = (text @ image.T * scale).tolist()
    out = []
    for b in range(len(sim)):
        kept = [n for n in range(len(sim)) if n == b or images[n] != images[b]]
        own = kept.index(b)
        rows = [sim[b][n] for n in kept], [sim[n][b] for n in kept]
        out.append(0.5 * sum(neg_log_softmax(row, own) for row in rows))
    return out


@FEW
@given(seed=SEEDS, ranks=st.integers(1, 3), per_rank=st.integers(1, 3), num_images=st.integers(1, 4))
def test_vsc_of_every_rank_adds_up_to_one_process(seed: int, ranks: int, per_rank: int, num_images: int) -> None:
    generator = seeded(seed)
    num = ranks * per_rank
    text, image = (F.normalize(rand(generator, num, 4), dim=-1) for _ in range(2))
    scale = torch.tensor([5.0], dtype=torch.float64, requires_grad=True)
    number = torch.randint(0, num_images, (num,), generator=generator)
    wanted = slow_vsc(text, image, scale.item(), number.tolist())
    for rank in range(ranks):
        rows = slice(rank * per_rank, (rank + 1) * per_rank)
        own, first = (text[rows], image[rows]), rank * per_rank
        for rows_at_once in (1, 2, num):
            found = losses.vsc(own, (text, image), scale, number[rows], number, first, rows_at_once)
            check(found, sum(wanted[rows]), per_rank, text, image, scale)


@pytest.mark.parametrize("rows_at_once", [1, 2, 3, 100])
def test_vsc_has_the_gradient_of_autograd(rows_at_once: int) -> None:
    """Of a rank's own states, of all ranks' and of the scale, each row of another weight."""
    generator = seeded(5)
    states = [rand(generator, num, 4) for num in (3, 3, 6, 6)]
    scale = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
    image_N = torch.tensor([0, 1, 2, 1, 3, 0])  # the rank's are 2..4

    def at_once(text: Tensor, image: Tensor, all_text: Tensor, all_image: Tensor, scale: Tensor) -> Tensor:
        own, everyone = (text, image), (all_text, all_image)
        return losses.vsc(own, everyone, scale, image_N[2:5], image_N, 2, rows_at_once).sum

    def plainly(text: Tensor, image: Tensor, all_text: Tensor, all_image: Tensor, scale: Tensor) -> Tensor:
        left_out = (image_N[2:5, None] == image_N) & (torch.arange(6) != torch.arange(2, 5)[:, None])
        logits = [(q @ k.T * scale).masked_fill(left_out, -math.inf) for q, k in ((text, all_image), (image, all_text))]
        return sum(0.5 * F.cross_entropy(row, torch.arange(2, 5), reduction="sum") for row in logits)

    found, wanted = (torch.autograd.grad(f(*states, scale), [*states, scale]) for f in (at_once, plainly))
    torch.testing.assert_close(found, wanted, **EXACT)
    assert all((grad != 0).any() for grad in found)


@pytest.mark.parametrize("num", [1, 4])
def test_vsc_of_the_same_image_throughout_is_zero_with_zero_gradient(num: int) -> None:
    text, image = rand(seeded(0), num, 4), rand(seeded(1), num, 4)
    number, both = torch.zeros(num, dtype=torch.long), (text, image)
    found = losses.vsc(both, both, torch.tensor([100.0], dtype=torch.float64), number, number, 0, rows_at_once=3)
    assert found.sum.item() == 0.0 and float(found.count) == num
    assert all((grad == 0).all() for grad in torch.autograd.grad(found.sum, (text, image)))


@FEW
@given(seed=SEEDS, num=SIZES)
def test_itm(seed: int, num: int) -> None:
    generator = seeded(seed)
    matched, mismatched = rand(generator, num, 2), rand(generator, num, 2)
    has_negative = torch.rand(num, generator=generator) < 0.5
    total = sum(neg_log_softmax(row, 0) for row in matched.tolist())
    pairs = zip(mismatched.tolist(), has_negative.tolist(), strict=True)
    total += sum(neg_log_softmax(row, 1) for row, counts in pairs if counts)
    found = losses.itm(matched, mismatched, has_negative)
    check(found, total, num + int(has_negative.sum()), matched, mismatched)
    grad = torch.autograd.grad(losses.itm(matched, mismatched, has_negative).sum, mismatched)[0]
    assert (grad[~has_negative] == 0).all()


@FEW
@given(seed=SEEDS, samples=SIZES, slots=SIZES, regions=SIZES, top_k=st.integers(1, 4))
def test_phrase_region_score(seed: int, samples: int, slots: int, regions: int, top_k: int) -> None:
    generator = seeded(seed)
    text, image = rand(generator, samples, slots, 6), rand(generator, samples, regions, 6)
    is_phrase = torch.rand(samples, slots, generator=generator) < 0.5
    mask = torch.rand(samples, regions, generator=generator) < 0.6
    mask[:, 0] = True
    draw = torch.rand(samples, slots, generator=generator, dtype=torch.float64)
    found = losses.phrase_region_score(text, is_phrase, image, mask, draw, top_k)
    for b in range(samples):
        taken = []
        for t in torch.nonzero(is_phrase[b]).flatten().tolist():
            cosines = [F.cosine_similarity(text[b, t], image[b, r], dim=0).item() for r in range(regions) if mask[b, r]]
            highest = sorted(cosines, reverse=True)[:top_k]
            taken.append(highest[int(float(draw[b, t]) * len(highest))])
        wanted = sum(taken) / len(taken) if taken else 0.0
        assert found[b].item() == pytest.approx(wanted, rel=1e-10, abs=1e-12)
    for grad in torch.autograd.grad(found.sum(), (text, image)):
        assert torch.isfinite(grad).all()


def test_the_score_is_one_graph_for_sizes_that_change() -> None:
    """What torch.compile makes of it: no break, and no other graph for another batch."""
    counting = CompileCounter()
    compiled = torch.compile(losses.phrase_region_score, dynamic=True, fullgraph=True, backend=counting)
    for samples, slots, regions in ((2, 3, 5), (4, 6, 7), (3, 8, 4)):
        text, image = rand(seeded(0), samples, slots, 8), rand(seeded(1), samples, regions, 8)
        is_phrase = torch.rand(samples, slots, generator=seeded(2)) < 0.5
        mask = torch.rand(samples, regions, generator=seeded(3)) < 0.8
        draw = torch.rand(samples, slots, generator=seeded(4), dtype=torch.float64)
        scores = [f(text, is_phrase, image, mask, draw, 3) for f in (compiled, losses.phrase_region_score)]
        torch.testing.assert_close(*scores, **EXACT)
        torch.testing.assert_close(*(torch.autograd.grad(score.sum(), (text, image)) for score in scores), **EXACT)
    assert counting.frame_count == 1


def test_each_of_the_top_k_is_drawn_equally_often() -> None:
    region = torch.tensor([[[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [-1.0, 0.0]]])
    slots = 3000
    text = torch.tensor([1.0, 0.0]).expand(1, slots, 2)
    counts = dict.fromkeys((1.0, 0.8, 0.6), 0)
    one, every = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
    for draw in torch.rand(slots, 1, 1, generator=seeded(3), dtype=torch.float64):
        score = losses.phrase_region_score(text[:, :1], one, region, every, draw, 3)
        counts[round(float(score), 3)] += 1
    # 5 standard deviations of a binomial(3000, 1/3) are 129
    assert all(abs(count - slots / 3) < 129 for count in counts.values()), counts


def test_an_image_of_one_region_grounds_every_phrase_in_it() -> None:
    text, image = rand(seeded(0), 2, 3, 4), rand(seeded(1), 2, 5, 4)
    mask = torch.zeros(2, 5, dtype=torch.bool)
    mask[:, 0] = True
    everything = torch.ones(2, 3, dtype=torch.bool)
    found = losses.phrase_region_score(text, everything, image, mask, torch.full((2, 3), 0.999), 3)
    wanted = F.cosine_similarity(text, image[:, :1], dim=-1).mean(-1)
    torch.testing.assert_close(found, wanted, **EXACT)


def test_zero_vectors_in_padding_give_finite_gradients() -> None:
    text = torch.zeros(1, 2, 4, dtype=torch.float64, requires_grad=True)
    image = torch.zeros(1, 3, 4, dtype=torch.float64, requires_grad=True)
    mask = torch.tensor([[True, False, False]])
    found = losses.phrase_region_score(text, torch.tensor([[False, True]]), image, mask, torch.zeros(1, 2), 3)
    assert all(torch.isfinite(grad).all() for grad in torch.autograd.grad(found.sum(), (text, image)))


@FEW
@given(seed=SEEDS, num=SIZES, margin=st.floats(0.0, 1.0))
def test_wpg(seed: int, num: int, margin: float) -> None:
    generator = seeded(seed)
    pos, neg = rand(generator, num), rand(generator, num)
    counts = torch.rand(num, generator=generator) < 0.5
    rows = zip(pos.tolist(), neg.tolist(), counts.tolist(), strict=True)
    total = sum(max(0.0, n + margin - p) for p, n, real in rows if real)
    check(losses.wpg(pos, neg, counts, margin), total, int(counts.sum()), pos, neg)


def test_what_does_not_count_may_be_infinite() -> None:
    values = torch.tensor([1.0, float("inf"), float("nan")], requires_grad=True)
    found = LossSum.of(values * 2.0, torch.tensor([True, False, False]))
    assert float(found.sum) == 2.0 and float(found.count) == 1.0
    assert torch.autograd.grad(found.sum, values)[0].tolist() == [2.0, 0.0, 0.0]
