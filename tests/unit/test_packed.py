"""Packed sequences, and the packed execution against the padded one: same losses, states and gradients."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mvptr_ds.config import TaskConfig, WpgConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import IGNORE, Batch, Sample, collate
from mvptr_ds.model.attention import PaddedAttention, SegmentAttention
from mvptr_ds.model.gather import pick_rows, place_rows, split_rows
from mvptr_ds.model.packed import Packed, concat, join, unjoin
from mvptr_ds.objectives import output_rows
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from tests.support.tiny_models import TEXT_SLOTS, sample, tiny_model

LENGTHS = st.lists(st.integers(0, 5), min_size=1, max_size=6)
WEIGHTS = {
    "stage1": WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mcr_phrases=1.0, mlm=1.0),
    "stage2": WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mlm=1.0, vsc=1.0, wpg=1.0, wpg_cross=1.0, itm=1.0),
    "joint": WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0),
}


def numbered(lengths: list[int], first: int = 0) -> Packed:
    return Packed(torch.arange(first, first + sum(lengths))[:, None], tuple(lengths))


def lists(packed: Packed) -> list[list[int]]:
    return [rows.flatten().tolist() for rows in packed.rows.split(packed.lengths)]


@given(lengths=LENGTHS, data=st.data())
def test_packed_sequences_are_lists_of_rows(lengths: list[int], data: Any) -> None:
    packed = numbered(lengths)
    padded, mask = packed.padded(fill=-1), packed.mask()
    assert [row[real].flatten().tolist() for row, real in zip(padded, mask, strict=True)] == lists(packed)
    assert (padded[~mask] == -1).all() and padded.shape[1] == max(1, *lengths)
    assert lists(Packed.of_padded(padded, lengths)) == lists(packed)
    assert packed.positions().tolist() == [i for num in lengths for i in range(num)]
    assert packed.owners().tolist() == [b for b, num in enumerate(lengths) for _ in range(num)]
    wanted = data.draw(st.lists(st.integers(0, len(lengths) - 1), max_size=5))
    assert lists(packed.take(wanted)) == [lists(packed)[i] for i in wanted]
    num = data.draw(st.integers(0, len(lengths)))
    assert [part for half in packed.split(num) for part in lists(half)] == lists(packed)
    assert lists(concat([packed, packed])) == lists(packed) * 2


@given(first=LENGTHS, second=LENGTHS, data=st.data())
def test_pairs_are_joined_by_index(first: list[int], second: list[int], data: Any) -> None:
    a, b = numbered(first), numbered(second, first=1000)
    numbers = st.tuples(st.integers(0, len(first) - 1), st.integers(0, len(second) - 1))
    pairs = data.draw(st.lists(numbers, max_size=6))
    joined = join(a, b, pairs)
    assert lists(joined) == [lists(a)[i] + lists(b)[j] for i, j in pairs]
    left, right = unjoin(joined, [first[i] for i, _ in pairs])
    assert lists(left) == [lists(a)[i] for i, _ in pairs] and lists(right) == [lists(b)[j] for _, j in pairs]


@pytest.mark.parametrize("reads", [(0,), (1,), (0, 1)])
def test_rows_go_to_their_places_and_gradients_come_back(reads: tuple[int, ...]) -> None:
    """Placing, splitting and picking against indexing, also where only one part is read again."""
    places = torch.tensor([3, 0, 4]), torch.tensor([1, 2])
    parts = [torch.randn(len(p), 2, generator=torch.Generator().manual_seed(len(p))).double() for p in places]

    def run(place: Any, split: Any, pick: Any) -> list[Tensor]:
        given = [part.clone().requires_grad_() for part in parts]
        whole = place(given)
        again = split(whole.sin())
        picked = pick(whole, torch.tensor([4, 1]))
        total = torch.stack([(again[number] * parts[number]).sum() for number in reads]).sum() + picked.cos().sum()
        return [whole, *again, picked, *torch.autograd.grad(total, given)]

    order = torch.cat(places).argsort()
    wanted = run(
        lambda given: torch.cat(given)[order], lambda whole: [whole[p] for p in places], lambda whole, i: whole[i]
    )
    found = run(lambda given: place_rows(given, places), lambda whole: split_rows(whole, places), pick_rows)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)


def test_wrong_lengths_are_refused() -> None:
    with pytest.raises(ValueError, match="3 rows for sequences of 4 together"):
        Packed(torch.zeros(3, 2), (2, 2))
    with pytest.raises(ValueError, match=r"lengths \[2, 4\] for slots of shape \(2, 3\)"):
        Packed.of_padded(torch.zeros(2, 3), [2, 4])


@given(lengths=LENGTHS, seed=st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_kernels_of_attention_agree_in_states_and_gradients(lengths: list[int], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(sum(lengths), 3, 2, 4, generator=generator, dtype=torch.float64)
    packed, weights = Packed(rows, tuple(lengths)), torch.randn(rows[:, 0].shape, generator=generator).double()
    segments = SegmentAttention(packed.index, rows.device)

    def run(attend: Any) -> list[Tensor]:
        given = rows.clone().requires_grad_()
        out = attend(given)
        return [out, torch.autograd.grad((out * weights).sum(), given)[0]]

    def padded(given: Tensor) -> Tensor:
        out_BLHE = PaddedAttention(packed.mask())(packed.like(given).padded(), 0.0)
        return Packed.of_padded(out_BLHE, packed.lengths).rows

    wanted = run(padded)
    for attend in (segments, *([segments.each, segments.padded] if sum(lengths) else [])):
        found = run((lambda given, a=attend: a(given, 0.0)))
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)  # float64 rounding


def batch_of(shapes: list[tuple[int, int, int, int]], stage: str) -> Batch:
    """Samples of so many tokens, phrases, tags and regions; without regions only where texts stand alone (stage 1)."""
    samples: list[Sample] = []
    for i, (tokens, phrases, tags, regions) in enumerate(shapes):
        if stage != "stage1":
            regions = max(1, regions)
        made = sample(i, i // 2, max(1, tokens), phrases, tags if regions else 0, regions)
        if not tokens:  # an empty caption: [CLS] [SEP]
            two = slice(0, 2)
            made = replace(
                made,
                text_ids_T=made.text_ids_T[[0, -1]],
                phrase_mask_T=made.phrase_mask_T[two] & False,
                mlm_labels_T=made.mlm_labels_T[two] * 0 + IGNORE,
                phrase_labels_T=made.phrase_labels_T[two] * 0 + IGNORE,
            )
        samples.append(made)
    return collate(samples)


def losses_and_gradients(
    stage: str,
    batch: Batch,
    dtype: torch.dtype,
    on: Collection[str] | None = None,
    config: TaskConfig | None = None,
    **execution: Any,
) -> dict[str, Tensor]:
    model = tiny_model(num_text_layers=2, num_cross_layers=2).to(dtype)
    model.set_execution(**{"execution": "packed"} | execution)
    weights = WEIGHTS[stage] if on is None else WeightsConfig(**dict.fromkeys(on, 1.0))
    task = PretrainingLosses(
        model, STAGES[stage], weights, config or TaskConfig(), max_text_slots=TEXT_SLOTS, max_steps=10, seed=0
    )
    if batch.region_features_BRF is not None:
        batch = replace(batch, region_features_BRF=batch.region_features_BRF.to(dtype))
    parts = task.sums(batch, RandomDraws.keyed(0, 0, 0, len(batch), TEXT_SLOTS))
    torch.stack([part.sum for part in parts.values()]).sum().backward()
    out = {f"{name} {kind}": getattr(part, kind) for name, part in parts.items() for kind in ("sum", "count")}
    return out | {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


SHAPES = st.lists(
    st.tuples(st.integers(0, 5), st.integers(0, 3), st.integers(0, 4), st.integers(0, 5)), min_size=1, max_size=5
)


@pytest.mark.parametrize("stage", ["stage1", "stage2", "joint"])
@given(shapes=SHAPES)
@settings(max_examples=25, deadline=None)
def test_packed_and_padded_give_the_same_losses_and_gradients(stage: str, shapes: Any) -> None:
    batch = batch_of(shapes, stage)
    for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5)):
        packed = losses_and_gradients(stage, batch, dtype, execution="packed")
        padded = losses_and_gradients(stage, batch, dtype, execution="padded")
        torch.testing.assert_close(packed, padded, rtol=tolerance, atol=tolerance)
        assert all(value.isfinite().all() for value in packed.values())


@given(lengths=LENGTHS, data=st.data())
@settings(max_examples=25, deadline=None)
def test_an_encoder_computes_the_rows_that_are_read(lengths: list[int], data: Any) -> None:
    """Packed, padded and recomputed: the states of all rows where they are read, zeros elsewhere; same gradients."""
    marks = data.draw(st.lists(st.booleans(), min_size=sum(lengths), max_size=sum(lengths)))
    read = Packed(torch.tensor(marks, dtype=torch.bool), tuple(lengths))
    generator = torch.Generator().manual_seed(len(marks))
    rows = torch.randn(len(marks), 16, generator=generator, dtype=torch.float64)
    weights = torch.randn(len(marks), 16, generator=generator, dtype=torch.float64)
    encoder = tiny_model(num_text_layers=2).double().text_encoder

    def run(execution: str, needed: Packed | None, checkpointing: bool = False) -> list[Tensor]:
        encoder.execution, encoder.activation_checkpointing = execution, checkpointing
        given = rows.clone().requires_grad_()
        needed_K = None if needed is None else needed.rows.nonzero().flatten()
        states = encoder(Packed(given, tuple(lengths)), needed_K).rows
        wanted = (states * weights)[torch.tensor(marks, dtype=torch.bool)].sum()
        return [states, *torch.autograd.grad(wanted, [given, *encoder.parameters()], materialize_grads=True)]

    whole = run("padded", None)
    whole[0] = whole[0] * read.rows[:, None]
    for found in (run("padded", read), run("packed", read), run("packed", read, checkpointing=True)):
        torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)  # float64 rounding


@pytest.mark.parametrize("stage", ["stage1", "stage2", "joint"])
@given(shapes=SHAPES, data=st.data())
@settings(max_examples=15, deadline=None)
def test_objectives_read_no_row_that_is_not_computed(stage: str, shapes: Any, data: Any) -> None:
    """With any of the objectives, and WPG on either states: as if all rows were computed."""
    on = data.draw(
        st.sets(st.sampled_from([name for name, weight in vars(WEIGHTS[stage]).items() if weight]), min_size=1)
    )
    config = TaskConfig(wpg=WpgConfig(states=data.draw(st.sampled_from(["uni", "cross"]))))
    batch = batch_of(shapes, stage)
    found = losses_and_gradients(stage, batch, torch.float64, on, config)
    with pytest.MonkeyPatch.context() as patch:
        some_rows = output_rows.some_rows
        patch.setattr(output_rows, "some_rows", lambda lengths, *_: some_rows(lengths, True, False))
        whole = losses_and_gradients(stage, batch, torch.float64, on, config)
    torch.testing.assert_close(found, whole, rtol=1e-11, atol=1e-11)  # float64 rounding


@pytest.mark.parametrize("execution", ["packed", "padded"])
def test_recomputed_activations_change_nothing(execution: str) -> None:
    batch = batch_of([(4, 2, 3, 4), (2, 1, 2, 1), (5, 0, 0, 3)], "stage2")
    kept = losses_and_gradients("stage2", batch, torch.float64, execution=execution)
    again = losses_and_gradients("stage2", batch, torch.float64, execution=execution, activation_checkpointing=True)
    assert len(kept) > 20
    torch.testing.assert_close(again, kept, rtol=0, atol=1e-14)


def test_attention_drops_out_the_same_share_in_both_executions() -> None:
    rows = torch.randn(2000, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    packed = Packed(rows, (5,) * 400)
    segments, padded = SegmentAttention(packed.index, rows.device), PaddedAttention(packed.mask())
    kept = segments(rows, 0.0)
    torch.manual_seed(0)
    noise = segments(rows, 0.5) - kept, padded(packed.padded(), 0.5).flatten(0, 1) - kept
    assert not torch.equal(*noise)
    for values in noise:  # as much comes on top as is left out
        assert values.mean().item() == pytest.approx(0.0, abs=0.02)
    assert noise[0].std().item() == pytest.approx(noise[1].std().item(), rel=0.05)
