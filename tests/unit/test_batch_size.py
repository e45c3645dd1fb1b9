"""The batch arithmetic: micro-batches, batches that are rounded, and other numbers of ranks."""

from __future__ import annotations

import logging

import pytest

from mvptr_ds.batch_size import BatchSplit, fit_batch_to_ranks, micro_batch_size, rounded_batch_size
from mvptr_ds.config import TrainConfig
from mvptr_ds.errors import CheckpointError


@pytest.mark.parametrize(("batch", "accumulation", "ranks", "micro"), [(1024, 1, 8, 128), (64, 4, 2, 8), (1, 1, 1, 1)])
def test_micro_batch(batch: int, accumulation: int, ranks: int, micro: int) -> None:
    assert micro_batch_size(TrainConfig(batch_size=batch, accumulation_steps=accumulation), ranks) == micro


@pytest.mark.parametrize(
    ("batch", "accumulation", "ranks"), [(64, 1, 3), (64, 4, 5), (2, 1, 4), (3, 2, 1), (100, 3, 7)]
)
def test_a_batch_that_does_not_divide_names_numbers_that_do(batch: int, accumulation: int, ranks: int) -> None:
    with pytest.raises(ValueError) as error:
        micro_batch_size(TrainConfig(batch_size=batch, accumulation_steps=accumulation), ranks)
    text = str(error.value)
    assert f"train.batch_size={batch}" in text and f"{ranks} ranks" in text
    named_ranks, named_batches = text.split("; use ")[1].split(" ranks, or a batch of ")
    for number in named_batches.split(" or "):
        assert micro_batch_size(TrainConfig(batch_size=int(number), accumulation_steps=accumulation), ranks) > 0
    for number in [] if named_ranks == "no" else named_ranks.split(", "):
        assert micro_batch_size(TrainConfig(batch_size=batch, accumulation_steps=accumulation), int(number)) > 0


@pytest.mark.parametrize(("batch", "accumulation"), [(0, 1), (-8, 1), (8, 0)])
def test_sizes_below_one_are_refused(batch: int, accumulation: int) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        micro_batch_size(TrainConfig(batch_size=batch, accumulation_steps=accumulation), 1)


@pytest.mark.parametrize(
    ("num_ranks", "accumulation", "expected"), [(1, 1, 64), (3, 1, 63), (7, 1, 63), (100, 1, 100), (3, 5, 60)]
)
def test_the_demo_batch_fits_any_number_of_ranks(num_ranks: int, accumulation: int, expected: int) -> None:
    size = rounded_batch_size(TrainConfig(batch_size=64, accumulation_steps=accumulation), num_ranks)
    train = TrainConfig(batch_size=size, accumulation_steps=accumulation)
    assert size == expected
    assert micro_batch_size(train, num_ranks) * num_ranks * accumulation == expected


@pytest.mark.parametrize(
    ("before", "asked", "num_ranks", "wanted"),
    [
        (BatchSplit(16, 2, 2), 2, 1, 2),  # it divides: what the configuration says holds
        (BatchSplit(16, 2, 2), 2, 4, 2),
        (BatchSplit(16, 2, 2), 4, 1, 4),
        (BatchSplit(12, 2, 2), 2, 4, 1),  # micro-batches of 3 before, of 3 now
        (BatchSplit(12, 2, 2), 2, 12, 1),
        (BatchSplit(64, 8, 4), 4, 32, 1),  # of 2 before, of 2 now
        (BatchSplit(24, 6, 1), 5, 2, 3),  # of 4 before, of 4 now
    ],
)
def test_the_global_batch_stays_and_the_micro_batch_does_not_grow(
    before: BatchSplit, asked: int, num_ranks: int, wanted: int
) -> None:
    given = TrainConfig(batch_size=before.batch_size, accumulation_steps=asked)
    train = fit_batch_to_ranks(given, before, num_ranks)
    assert (train.batch_size, train.accumulation_steps) == (before.batch_size, wanted)
    assert train.batch_size % (num_ranks * train.accumulation_steps) == 0
    assert given.accumulation_steps == asked  # a new configuration; the given one stays
    if wanted != asked:
        assert BatchSplit(before.batch_size, num_ranks, wanted).micro_batch_size <= before.micro_batch_size


def test_a_change_is_said_with_what_it_does_to_the_negatives(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="mvptr_ds"):
        fit_batch_to_ranks(TrainConfig(batch_size=12, accumulation_steps=2), BatchSplit(12, 2, 2), 12)
    assert "train.accumulation_steps=1 instead of 2" in caplog.text
    assert "12 ranks x 1 accumulation steps x 1 samples (before: 2 x 2 x 3)" in caplog.text
    assert "negatives come from 12 samples (before: 6)" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="mvptr_ds"):
        fit_batch_to_ranks(TrainConfig(batch_size=12, accumulation_steps=2), BatchSplit(12, 2, 2), 2)
    assert caplog.text == ""


def test_ranks_that_cannot_share_the_batch_are_refused_with_those_that_can() -> None:
    with pytest.raises(CheckpointError, match="which 5 ranks cannot share: go on with 1, 2, 3, 4, 6, 12 ranks"):
        fit_batch_to_ranks(TrainConfig(batch_size=12), BatchSplit(12, 2, 2), 5)


def test_a_rounded_batch_is_that_of_the_run() -> None:
    """64 rounds to 63 on three ranks; the run resumes with 63 on one, and again on one."""
    for ranks_before in (3, 1):
        train = TrainConfig(batch_size=64, round_batch_size=True)
        assert fit_batch_to_ranks(train, BatchSplit(63, ranks_before, 1), 1).batch_size == 63
    assert fit_batch_to_ranks(TrainConfig(batch_size=64, round_batch_size=True), None, 3).batch_size == 63
