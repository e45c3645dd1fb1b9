"""Encoders compute numbers of rows that come again, and nothing that anybody reads follows from the added rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvptr_ds.data import one_block
from mvptr_ds.model import kernels
from mvptr_ds.model.encoder import EncoderLayer
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.row_buckets import bucket_of, filled_up
from mvptr_ds.model.sequence_index import SequenceIndex
from tests.support.tiny_models import tiny_model, whole_batch
from tests.unit.test_task import build

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=9)


@given(num=st.integers(0, 10**6))
def test_a_bucket_costs_little_and_is_its_own(num: int) -> None:
    bucket = bucket_of(num)
    assert num <= bucket <= max(num + num // 32, num + 15 if num else 0)
    assert bucket_of(bucket) == bucket
    assert bucket <= bucket_of(num + 1)


def test_buckets_come_again() -> None:
    assert [bucket_of(num) for num in (0, 1, 16, 17, 511, 512, 1023, 1025, 27_309)] == [
        0, 16, 16, 32, 512, 512, 1024, 1056, 27_648,
    ]  # fmt: skip
    assert len({bucket_of(num) for num in range(256, 32_768)}) < 32 * 7


@given(lengths=LENGTHS)
def test_added_sequences_fill_the_bucket_and_none_is_longer_than_the_longest(lengths: list[int]) -> None:
    filled = filled_up(lengths)
    added = filled[len(lengths) :]
    assert filled[: len(lengths)] == tuple(lengths) and sum(filled) == bucket_of(sum(lengths))
    assert all(1 <= length <= max(lengths) for length in added)


def test_an_index_in_its_bucket_is_copied_with_the_batch() -> None:
    """A full bucket's index is itself; an index that held itself could not be copied."""
    for lengths, filled in (((5, 3, 8), (5, 3, 8)), ((5, 9, 7), (5, 9, 7, 9, 2))):
        index = SequenceIndex(lengths)
        index.prepare_attention(buckets=True)
        whole, with_parts = one_block.write(index, lambda size: torch.zeros(size, dtype=torch.uint8))
        found: SequenceIndex = one_block.read(with_parts, whole).in_bucket
        assert found.lengths == filled
        assert found.arrays["offsets"].tolist()[-1] == sum(filled)
        assert set(found.arrays) == {"offsets", "slots", "mask"}


@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=20, deadline=None)
def test_states_and_gradients_do_not_depend_on_what_fills_a_bucket(lengths: list[int], data: Any) -> None:
    marks = data.draw(st.none() | st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    needed_K = None if marks is None else torch.tensor(marks, dtype=torch.bool).nonzero().flatten()
    generator = torch.Generator().manual_seed(len(lengths))
    rows, weights = (torch.randn(sum(lengths), 16, generator=generator, dtype=torch.float64) for _ in range(2))
    encoder = tiny_model(num_text_layers=2).double().text_encoder

    def run() -> list[Tensor]:
        taken = rows.clone().requires_grad_()
        states = encoder(Packed(taken, tuple(lengths)), needed_K).rows
        wanted = [taken, *encoder.parameters()]
        return [states, *torch.autograd.grad((states * weights).sum(), wanted, materialize_grads=True)]

    def filled_with_sevens(rows_Nx: Tensor) -> Tensor:
        fill = 7.0 if rows_Nx.is_floating_point() else 0
        missing = bucket_of(len(rows_Nx)) - len(rows_Nx)
        return F.pad(rows_Nx, (0, 0) * (rows_Nx.ndim - 1) + (0, missing), value=fill)

    found = run()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "fill_bucket", filled_with_sevens)
        torch.testing.assert_close(run(), found, rtol=1e-11, atol=1e-11)  # float64 rounding
        patch.setattr(kernels, "fills_buckets", lambda device: False)
        torch.testing.assert_close(run(), found, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_all_layers_and_the_projection_of_regions_compute_buckets(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    after_attention, linear = EncoderLayer.after_attention, kernels.linear

    def noting(layer: EncoderLayer, states_xD: Tensor, attended_xD: Tensor) -> Tensor:
        seen.extend((len(states_xD), len(attended_xD)))
        return after_attention(layer, states_xD, attended_xD)

    def noting_regions(input_xI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
        if weight_OI is task.model.region_embedding.projection.weight:
            seen.append(len(input_xI))
        return linear(input_xI, weight_OI, bias_O)

    task = build(stage)
    monkeypatch.setattr(EncoderLayer, "after_attention", noting)
    monkeypatch.setattr(kernels, "linear", noting_regions)
    task(whole_batch(), 9)
    assert len(seen) == {"stage1": 5, "stage2": 7}[stage]
    assert all(num == bucket_of(num) > 0 for num in seen)


def test_only_cpus_fill_buckets() -> None:
    assert kernels.fills_buckets(torch.device("cpu")) and not kernels.fills_buckets(torch.device("cuda"))
    rows = torch.ones(3, 2, device="meta")
    assert kernels.fill_bucket(rows) is rows and kernels.fill_bucket(torch.ones(16, 2)).shape == (16, 2)
    assert kernels.fill_bucket(torch.ones(3, 2)).tolist()[2:4] == [[1.0, 1.0], [0.0, 0.0]]
    assert kernels.without_fill(rows, 3) is rows and kernels.without_fill(torch.ones(16, 2), 3).shape == (3, 2)
