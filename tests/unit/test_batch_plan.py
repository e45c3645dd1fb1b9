"""Batches packed ahead: the same losses, no index array left to make in a pass, one block of bytes for all tensors."""

from __future__ import annotations

import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from mvptr_ds.config import TaskConfig, WpgConfig
from mvptr_ds.data import one_block
from mvptr_ds.data.on_device import BatchesOnDevice
from mvptr_ds.data.sharing import SentBatch
from mvptr_ds.errors import DataError
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.sequence_index import JoinIndex, SequenceIndex, _Arrays
from mvptr_ds.objectives.batch_plan import ReadyBatch
from mvptr_ds.objectives.negatives import Negatives
from mvptr_ds.objectives.packed_batch import MaskedTargets, TagRegions
from tests.support.tiny_models import tiny_model, whole_batch
from tests.unit.test_task import BATCHES, build

CPU = torch.device("cpu")


def sent(ready: ReadyBatch) -> ReadyBatch:
    """As it arrives from a loader process."""
    arrived: ReadyBatch = pickle.loads(pickle.dumps(SentBatch(ready)))
    return arrived


@pytest.mark.parametrize("stage", ["stage1", "stage2", "joint"])
@pytest.mark.parametrize("kind", ["ordinary", "one image of no region", "no token either"])
def test_losses_of_a_batch_from_a_loader_process_are_the_same_to_the_bit(stage: str, kind: str) -> None:
    found = []
    for ahead in (False, True):
        task, batch = build(stage), BATCHES[kind]()
        given: Any = batch
        if ahead:
            ready = sent(task.batch_plan()(batch))
            task.complete(ready.packed, 9, 0)
            given = ready.packed
            assert torch.equal(ready.batch.text_ids_BT, batch.text_ids_BT)
        out = task(given, 9)
        out.loss.backward()
        grads = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        found.append({name: part.sum for name, part in out.parts.items()} | grads)
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize(("stage", "states"), [("stage1", "auto"), ("stage2", "auto"), ("stage2", "cross")])
def test_a_pass_makes_no_index_array_but_those_of_its_negatives(
    stage: str, states: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    ahead = [True]
    make_sequence, make_join, plan = SequenceIndex._make, JoinIndex._make, Negatives.plan

    def noting(make: Any) -> Any:
        def noted(index: _Arrays, name: str) -> np.ndarray:
            made.extend([] if ahead[0] else [name])
            array: np.ndarray = make(index, name)
            return array

        return noted

    def planned(negatives: Negatives) -> Any:
        ahead[0] = True
        try:
            return plan(negatives)
        finally:
            ahead[0] = False

    monkeypatch.setattr(SequenceIndex, "_make", noting(make_sequence))
    monkeypatch.setattr(JoinIndex, "_make", noting(make_join))
    monkeypatch.setattr(Negatives, "plan", planned)
    task = build(stage, config=TaskConfig(wpg=WpgConfig(states=states)))
    ready = task.batch_plan()(whole_batch())
    task.complete(ready.packed, 9, 0)
    ahead[0] = False
    task(ready.packed, 9)
    assert made == []
    ready.packed.geometry.index.arrays.clear()  # what is missing is made, and noted
    task(ready.packed, 9)
    assert made or stage == "stage1"


def test_regions_of_masked_tags() -> None:
    masked = MaskedTargets(torch.tensor([1, 2, 7]), torch.tensor([40, 41, 42]), (0, 0, 2))
    found = TagRegions.of(masked, SequenceIndex((2, 3, 1)))
    assert found.rows_M.tolist() == [0, 1, 5]  # the second image has no masked tag
    assert found.picked_P.tolist() == [0, 1, 0, 1, 2] and found.labels_P.tolist() == [40, 40, 41, 41, 42]
    assert found.of_tags.lengths == (2, 2, 1)


# --- blocks


def test_a_value_in_one_block_keeps_content_layout_and_what_it_shares() -> None:
    index = SequenceIndex((2, 1))
    index.prepare("starts", "mask")
    image = torch.arange(24, dtype=torch.uint8).reshape(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    value = {"a": Packed(torch.randn(3, 2), (2, 1), index), "b": [index, "text", None], "c": (image, torch.zeros(0, 4))}
    whole, with_parts = one_block.write(value, lambda size: torch.zeros(size, dtype=torch.uint8))
    assert len(whole) == one_block.num_bytes(value)
    found = one_block.read(pickle.loads(pickle.dumps(with_parts)), whole)
    assert torch.equal(found["a"].rows, value["a"].rows) and found["a"].lengths == (2, 1)
    assert found["a"].index is found["b"][0] and found["b"][1:] == ["text", None]
    assert torch.equal(found["a"].index.arrays["mask"], index.arrays["mask"])
    assert torch.equal(found["c"][0], image) and found["c"][0].stride() == image.stride()
    assert found["c"][1].shape == (0, 4)
    storages = {tensor.untyped_storage().data_ptr() for tensor in (found["a"].rows, *found["c"])}
    assert storages == {whole.untyped_storage().data_ptr()}


def test_a_block_is_copied_in_one_piece() -> None:
    """To a device that counts: `meta`, which keeps shapes and layouts, but no content."""
    ready = sent(build("stage2").batch_plan()(whole_batch()))
    copied = ready.packed.to(torch.device("meta"))
    assert copied.text_ids.rows.device.type == "meta" and copied.host is ready.packed
    assert copied.features is not None and ready.packed.features is not None
    assert copied.features.rows.shape == ready.packed.features.rows.shape
    starts = [part.rows.storage_offset() * part.rows.itemsize for part in (copied.text_ids, ready.packed.text_ids)]
    assert starts[0] == starts[1]  # views of one block, at the same places


def test_batches_and_what_is_read_of_them() -> None:
    def batches() -> Iterator[ReadyBatch]:
        plan = build("stage2").batch_plan()
        yield from (plan(whole_batch(num)) for num in (2, 3))
        raise DataError("no more")

    numbers = []

    def read_of(ready: ReadyBatch, number: int) -> Any:
        numbers.append(number)
        return ready.packed

    loaded = BatchesOnDevice(batches(), CPU, read_of)
    assert [len(read) for _, read in (next(loaded), next(loaded))] == [2, 3] and numbers == [0, 1]
    with pytest.raises(DataError, match="no more"):
        next(loaded)


def test_the_random_choices_are_those_of_the_step() -> None:
    task = build("stage2")
    packed = task.batch_plan().pack(whole_batch())
    assert packed.draws is not None
    task.complete(packed, 3, 0)
    first = packed.draws.itm_B.clone()
    task.complete(packed, 3, 1)
    assert not torch.equal(first, packed.draws.itm_B)
    task.complete(packed, 3, 0)
    assert torch.equal(first, packed.draws.itm_B)
    num = packed.draws.num_taking_image
    assert packed.draws.itm_takes_image_B[packed.draws.itm_rows_B[:num]].all()
    assert not packed.draws.itm_takes_image_B[packed.draws.itm_rows_B[num:]].any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_next_batch_is_copied_while_a_step_is_computed() -> None:
    device = torch.device("cuda", 0)
    task = build("stage2", model=tiny_model()).to(device)
    plan = task.batch_plan()
    readies = [one_block.pinned(plan(whole_batch(num))) for num in (2, 3, 4)]

    def read_of(ready: ReadyBatch, number: int) -> Any:
        task.complete(ready.packed, number, 0)
        return ready.packed

    losses = [
        task(read, step).loss.item() for step, (_, read) in enumerate(BatchesOnDevice(iter(readies), device, read_of))
    ]
    wanted = [build("stage2")(whole_batch(num), step).loss.item() for step, num in enumerate((2, 3, 4))]
    assert losses == pytest.approx(wanted, rel=1e-4)
    assert readies[0].packed.text_ids.rows.is_pinned()
