"""Whether two batches are the same, bit by bit."""

from __future__ import annotations

import dataclasses

import torch

from mvptr_ds.data.collate import Batch


def assert_equal_batches(first: Batch, second: Batch) -> None:
    for field in dataclasses.fields(Batch):
        a, b = getattr(first, field.name), getattr(second, field.name)
        if isinstance(a, torch.Tensor):
            assert a.dtype == b.dtype and torch.equal(a, b), field.name
        else:
            assert a == b, field.name
