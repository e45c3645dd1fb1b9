from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.plan import Plan


@settings(max_examples=150, deadline=None, derandomize=True)
@given(
    num_samples=st.integers(1, 700),
    block=st.integers(1, 40),
    window=st.integers(1, 9),
    seed=st.integers(0, 2**40),
    epoch=st.integers(0, 5),
)
def test_every_epoch_visits_every_sample_once(num_samples: int, block: int, window: int, seed: int, epoch: int) -> None:
    plan = Plan(num_samples, seed, block, window)
    epochs, samples = plan.samples_at(np.arange(epoch * num_samples, (epoch + 1) * num_samples))
    assert (epochs == epoch).all()
    assert np.array_equal(np.sort(samples), np.arange(num_samples))


def test_single_and_vectorised_lookups_agree_across_epochs() -> None:
    plan = Plan(101, 3, block_samples=7, window_blocks=3)
    positions = np.random.default_rng(0).integers(0, 101 * 4, 300)
    epochs, samples = plan.samples_at(positions)
    other = pickle.loads(pickle.dumps(plan))
    assert [other.sample_at(int(p)) for p in positions] == list(zip(epochs.tolist(), samples.tolist(), strict=True))


def test_order_depends_on_seed_and_epoch_only() -> None:
    everything = np.arange(5_000)
    first = Plan(5_000, 1).samples_at(everything)[1]
    assert np.array_equal(first, Plan(5_000, 1).samples_at(everything)[1])
    for other in (Plan(5_000, 2).samples_at(everything)[1], Plan(5_000, 1).samples_at(everything + 5_000)[1]):
        assert (first == other).mean() < 0.01  # chance: 1 in 5,000


def test_the_order_itself_is_frozen() -> None:
    """A resume with a later version must go on in the order that the run began with."""
    samples = Plan(10, 7, block_samples=2, window_blocks=2).samples_at(np.arange(20))[1]
    assert samples.tolist() == [5, 8, 6, 7, 9, 3, 4, 0, 1, 2, 4, 3, 5, 2, 8, 7, 9, 6, 0, 1]


def test_samples_are_shuffled_and_read_in_runs() -> None:
    plan = Plan(40_000, 5, block_samples=64, window_blocks=16)
    samples = plan.samples_at(np.arange(40_000))[1]
    assert abs(np.corrcoef(samples, np.arange(40_000))[0, 1]) < 0.2  # blocks are permuted: 625 of them
    window = np.sort(samples[:1024])
    assert (np.diff(window) == 1).mean() > 0.95  # 16 runs of 64 neighbours
    assert (np.diff(samples[:1024]) == 1).mean() < 0.02  # but not in order


@pytest.mark.parametrize("num_ranks", [1, 2, 4])
@pytest.mark.parametrize("accumulation_steps", [1, 3])
def test_ranks_share_a_step_without_gap_or_overlap(num_ranks: int, accumulation_steps: int) -> None:
    batches = Batches(24)
    for step in (0, 1, 7):
        parts = [
            batches.positions(step, accumulation, rank, num_ranks, accumulation_steps)
            for accumulation in range(accumulation_steps)
            for rank in range(num_ranks)
        ]
        assert len({len(part) for part in parts}) == 1
        assert np.array_equal(np.concatenate(parts), np.arange(step * 24, (step + 1) * 24))


def test_indivisible_batch_names_values_and_valid_ranks() -> None:
    with pytest.raises(ValueError, match=r"batch of 12 .* 5 ranks x 2 .* use 1, 2, 3, 6 ranks"):
        Batches(12).positions(0, 0, 0, 5, 2)
    with pytest.raises(ValueError, match="accumulation_steps to a divisor"):
        Batches(12).positions(0, 0, 0, 1, 5)
    with pytest.raises(ValueError, match="out of range"):
        Batches(12).positions(0, 0, 2, 2, 1)
    with pytest.raises(ValueError, match="num_samples is 0"):
        Plan(0, 0)
    with pytest.raises(ValueError, match="batch_size is 0"):
        Batches(0)
