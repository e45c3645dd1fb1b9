"""What a step executes on a GPU, counted without one: no more than today, and the counter itself on known functions."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvptr_ds.benchmarks.gpu_step import custom_kernels, report
from mvptr_ds.benchmarks.gpu_step.custom_kernels import register_kernel
from mvptr_ds.benchmarks.gpu_step.engine_step import count_engine
from mvptr_ds.benchmarks.gpu_step.fake_cuda import FakeCuda
from mvptr_ds.benchmarks.gpu_step.own_kernels import register_own_kernels
from mvptr_ds.benchmarks.gpu_step.recording import ATTENTION, BACKWARD, COPY, FORWARD, OTHER, PRODUCT
from mvptr_ds.benchmarks.gpu_step.roofline import H200, KERNEL_S, PRODUCT_FLOPS_PER_S
from mvptr_ds.benchmarks.gpu_step.step import PACKAGED, StepCounts, config_of, count_step
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.model import picked_classes
from mvptr_ds.model.attention_tiles import AttentionTiles
from mvptr_ds.tasks import TASKS
from tests.support.tools import run_tool

NUM = 16  # samples

# The most that a step of 16 samples may count today (bf16, the packaged configuration of each, one rank, Triton's
# kernels). Who lowers a count lowers its ceiling. In order: operations, waits, copies to the device, those from
# pageable memory, GB outside products and attention, and the share of the products' FLOPs with rows that are no
# multiple of 16 bytes.
CEILINGS = {
    "stage1": (549, 0, 1, 0, 4.0, 1e-6),
    "stage2": (1_306, 1, 2, 0, 2.4, 0.001),
    "joint": (1_047, 1, 2, 0, 1.9, 0.001),
    "retrieval": (806, 1, 2, 0, 1.5, 1e-6),
    "vqa": (597, 0, 2, 0, 1.2, 0.001),
    "entailment": (596, 0, 2, 0, 1.2, 1e-6),
    "referring": (626, 0, 2, 0, 1.3, 1e-6),
}
# The same of DeepSpeed with z2.json: operations in its hooks, behind them, and waits.
ENGINE_CEILINGS = {"stage2": (6, 26, 0), "vqa": (8, 35, 0)}
# monitoring/flops.py leaves out grounding's products and the similarities that choose negatives, and counts a gradient
# of the regions that nobody needs.
FLOPS_TOLERANCE = 0.02
WITH_TRITON = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def counted(function: Callable[[FakeCuda], Any]) -> FakeCuda:
    """Runs a function on the device, with what it puts there before it begins not counted."""
    with FakeCuda() as device:
        function(device)
    return device


def operations_of(function: Callable[[FakeCuda], Any]) -> list[str]:
    return [operation.name for operation in counted(function).recording.operations]


# --- the step


def test_every_stage_and_task_has_a_ceiling() -> None:
    assert set(CEILINGS) == set(PACKAGED) == set(TASKS)


@WITH_TRITON
@pytest.mark.parametrize("stage", CEILINGS)
def test_a_step_executes_no_more_than_today(stage: str) -> None:
    recording = count_step(config_of(stage), stage, NUM).recording
    found = (
        len(recording.operations),
        len(recording.waits),
        len(recording.copies),
        recording.num_pageable,
        recording.bytes_outside / 1e9,
        recording.odd_fraction,
    )
    assert all(f <= most for f, most in zip(found, CEILINGS[stage], strict=True)), (found, CEILINGS[stage])


@pytest.mark.parametrize("stage", ENGINE_CEILINGS)
def test_the_engine_executes_no_more_than_today(stage: str) -> None:
    engine = count_engine(config_of(stage), stage, load_ds_config("z2"))
    found = engine.hooks, engine.step, engine.waits.total()
    assert all(f <= most for f, most in zip(found, ENGINE_CEILINGS[stage], strict=True)), (found, engine)


def test_the_hooks_of_every_gradient_would_be_seen() -> None:
    """Where DeepSpeed rounds gradients on their way, a single rank keeps its hooks (zero_flat_gradients.py)."""
    engine = count_engine(config_of("vqa"), "vqa", {**load_ds_config("z2"), "communication_data_type": "fp32"})
    assert engine.hooks >= engine.num_tensors > 200


@pytest.fixture(scope="module")
def stage2() -> StepCounts:
    """A small step whose word heads compute nothing twice."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picked_classes, "_LOGITS_AT_ONCE", 2**40)
        return count_step(config_of("stage2", None, ("model.attention_dropout=0",)), "stage2", 4)


@pytest.mark.parametrize("stage", ["stage1", "entailment"])
def test_products_are_those_of_the_formula(stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picked_classes, "_LOGITS_AT_ONCE", 2**40)
    _compare_products(count_step(config_of(stage), stage, NUM))


def test_products_of_an_aligned_stage_are_those_of_the_formula(stage2: StepCounts) -> None:
    _compare_products(stage2)


def _compare_products(counts: StepCounts) -> None:
    products = sum(product.flops for product in counts.recording.of(kind=PRODUCT))
    assert products == pytest.approx(counts.product_flops, rel=FLOPS_TOLERANCE)


def test_attention_is_that_of_the_formula(stage2: StepCounts) -> None:
    """The mismatched pairs have other lengths than the matched ones, as which the formula counts them."""
    flops = sum(operation.flops for operation in stage2.recording.of(kind=ATTENTION))
    assert flops == pytest.approx(stage2.flops - stage2.product_flops, rel=0.1)
    text = sum(operation.flops for operation in stage2.recording.of(kind=ATTENTION, part="text encoder"))
    assert text == 3 * 6 * 4 * 768 * stage2.lengths.text_pairs


@pytest.mark.parametrize("part", ["text encoder", "visual encoder", "cross encoder"])
def test_the_backward_pass_of_a_part_is_counted_as_its_own(stage2: StepCounts, part: str) -> None:
    """Each product has two in the backward pass."""
    forward, backward = (
        sum(product.flops for product in stage2.recording.of(phase, part, PRODUCT)) for phase in (FORWARD, BACKWARD)
    )
    assert forward > 0 and backward == 2 * forward


@WITH_TRITON
def test_what_a_checkpoint_computes_again_counts_twice() -> None:
    plain, again = (
        count_step(config_of("stage1", None, (f"model.activation_checkpointing={given}",)), "stage1", 2).recording
        for given in ("false", "true")
    )
    for part in ("text encoder", "visual encoder"):
        forward = sum(product.flops for product in plain.of(FORWARD, part, PRODUCT))
        assert sum(product.flops for product in again.of(FORWARD, part, PRODUCT)) == forward
        assert 2.7 * forward < sum(product.flops for product in again.of(BACKWARD, part, PRODUCT)) <= 3 * forward
    names = again.count(lambda operation: operation.name)
    once = plain.count(lambda operation: operation.name)
    assert names["residual_norm_forward"] > once["residual_norm_forward"] > 0


def test_pixels_go_through_a_backbone() -> None:
    """Convolutions are products, and their gradients two of them."""
    overrides = ("data.word_vocab=null", "data.phrase_vocab=null")
    recording = count_step(config_of("stage2", "demo", overrides), "stage2", 4).recording
    convolutions = [product for product in recording.of(kind=PRODUCT) if product.name == "convolution"]
    assert len(convolutions) >= 3 and all(convolution.flops > 0 for convolution in convolutions)
    assert any(product.name == "convolution_backward" for product in recording.of(BACKWARD, kind=PRODUCT))


# --- waits

DEVICE = "cuda"


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, device=DEVICE)


WAITING: dict[str, Callable[[FakeCuda], Any]] = {
    "item": lambda _: ones(3).sum().item(),
    "float": lambda _: float(ones(1)),
    "tolist": lambda _: ones(3).tolist(),
    "cpu": lambda _: ones(3).cpu(),
    "nonzero": lambda _: (ones(3) > 0).nonzero(),
    "a mask as an index": lambda _: ones(3)[ones(3) > 0],
    "a copy that blocks": lambda _: torch.zeros(3).to(DEVICE),
    "a pinned copy that blocks": lambda _: torch.zeros(3).pin_memory().to(DEVICE),
    "a tensor made from numbers": lambda _: torch.tensor([1, 2], device=DEVICE),
    "indices of the host": lambda _: ones(3)[torch.tensor([0, 2])],
    "a copy into pageable memory": lambda _: torch.zeros(3).copy_(ones(3), non_blocking=True),
    "the whole device": lambda _: torch.cuda.synchronize(),
    "an event": lambda _: torch.cuda.Event().synchronize(),
}
NOT_WAITING: dict[str, Callable[[FakeCuda], Any]] = {
    "arithmetic": lambda _: (ones(3) + 1).sum(),
    "a mask that is filled": lambda _: ones(3).masked_fill_(ones(3) > 0, 0.0),
    "a copy that does not block": lambda _: torch.zeros(3).to(DEVICE, non_blocking=True),
    "indices of the device": lambda _: ones(3)[torch.arange(2, device=DEVICE)],
    "a copy to the host that does not block": lambda _: ones(3).to("cpu", non_blocking=True),
    "a copy into pinned memory": lambda _: torch.zeros(3).pin_memory().copy_(ones(3), non_blocking=True),
    "a tensor made on the host": lambda _: torch.zeros_like(ones(3), device="cpu"),
    "an order of streams": lambda _: torch.cuda.current_stream().wait_stream(torch.cuda.Stream()),
}


@pytest.mark.parametrize("name", WAITING)
def test_this_waits_for_the_device(name: str) -> None:
    assert len(counted(WAITING[name]).recording.waits) >= 1
    with pytest.raises(RuntimeError, match="the host waits"), FakeCuda(fail_on_wait=True) as device:
        WAITING[name](device)


@pytest.mark.parametrize("name", NOT_WAITING)
def test_this_waits_for_nothing(name: str) -> None:
    assert counted(NOT_WAITING[name]).recording.waits == []


# --- copies


def test_copies_are_told_apart_by_the_memory_that_they_come_from() -> None:
    def copy(_: FakeCuda) -> None:
        pageable = torch.zeros(8, 4, dtype=torch.float16)
        pinned = pageable.pin_memory()
        for source in (pageable, pinned, pinned[2:4], torch.empty(3, pin_memory=True), pinned.float()):
            source.to(DEVICE, non_blocking=True)

    copies = counted(copy).recording.copies
    assert [(c.bytes, c.is_pinned) for c in copies] == [(64, False), (64, True), (16, True), (12, True), (128, False)]


def test_whole_numbers_keep_their_values() -> None:
    def add(_: FakeCuda) -> None:
        numbers = torch.tensor([3, 4]).to(DEVICE) + 1
        assert numbers.device.type == DEVICE and numbers.is_cuda
        numbers[0] = 7
        assert numbers.tolist() == [7, 5]

    counted(add)


# --- operations, bytes and FLOPs


def test_views_and_memory_alone_are_no_operations() -> None:
    assert operations_of(lambda _: torch.empty(4, 4, device=DEVICE).T[1:].unsqueeze(0).detach()) == []


def one(function: Callable[[Tensor], Any], *shape: int, dtype: torch.dtype = torch.bfloat16) -> Any:
    """The one operation of a function of a tensor that is on the device."""
    with FakeCuda() as device:
        given = device.put(torch.empty(*shape, dtype=dtype, device="meta"))
        device.recording.clear()
        function(given)
    (operation,) = device.recording.operations
    return operation


@pytest.mark.parametrize(
    ("function", "num_bytes"),
    [
        (lambda x: x + x, 2 * 200),  # read once, written once
        (lambda x: x.mul_(2.0), 2 * 200),
        (lambda x: x + x[:1].expand(10, 10), 2 * 200 + 20),  # one row, however often it is read
        (lambda x: x.zero_(), 200),
        (lambda x: x.float(), 200 + 400),
        (lambda x: torch.zeros_like(x), 200),
    ],
    ids=["add", "in place", "expanded", "fill", "cast", "made"],
)
def test_bytes_of_an_operation(function: Callable[[Tensor], Any], num_bytes: int) -> None:
    operation = one(function, 10, 10)
    assert (operation.kind, operation.bytes, operation.launches) == (OTHER, num_bytes, 1)


def test_bytes_of_rows_that_are_picked_or_added_to() -> None:
    with FakeCuda() as device:
        table, index = device.put(torch.empty(1000, 8, device="meta")), device.put(torch.tensor([5, 6, 7]))
        rows = device.put(torch.empty(3, 8, device="meta"))
        device.recording.clear()
        table.index_select(0, index)
        table.index_add_(0, index, rows)
    assert [o.bytes for o in device.recording.operations] == [2 * 96 + 24, 24 + 96 + 2 * 96]


@pytest.mark.parametrize(("inner", "outer", "is_odd"), [(2056, 768, False), (2054, 768, True), (768, 30522, True)])
def test_products_with_odd_rows(inner: int, outer: int, is_odd: bool) -> None:
    """A number of rows that is no multiple of 8 does no harm."""
    layer = nn.Linear(inner, outer, device="meta", dtype=torch.bfloat16)
    with FakeCuda() as device:
        device.put_weights(layer)
        given = device.put(torch.empty(37, inner, dtype=torch.bfloat16, device="meta")).requires_grad_()
        loss = layer(given).square().sum()
        device.phase = BACKWARD
        loss.backward()
    products = list(device.recording.of(kind=PRODUCT))
    assert [p.flops for p in products] == [2 * 37 * inner * outer] * 3
    assert [p.is_odd for p in products] == [is_odd] * 3
    assert device.recording.odd_fraction == float(is_odd)


def test_dropout_and_attention_are_the_kernels_of_cuda() -> None:
    def attend(device: FakeCuda) -> None:
        query = device.put(torch.empty(2, 4, 5, 8, dtype=torch.bfloat16, device="meta"))
        mask = torch.ones(2, 1, 1, 5, dtype=torch.bool, device=DEVICE)
        F.dropout(F.scaled_dot_product_attention(query, query, query, attn_mask=mask, dropout_p=0.1), 0.1)

    names = operations_of(attend)
    assert [n for n in names if "attention" in n] == ["_scaled_dot_product_efficient_attention"]
    assert names.count("native_dropout") == 1 and not {"bernoulli_", "bmm", "_softmax"} & set(names)


def test_a_tensor_of_the_host_in_an_operation_of_the_device_is_an_error() -> None:
    with pytest.raises(RuntimeError, match="others on the host"):
        counted(lambda _: ones(3) + torch.zeros(3))
    counted(lambda _: ones(3) + torch.tensor(1.0))  # one number goes along with the kernel


def test_what_stands_in_for_cuda_is_gone_behind_it() -> None:
    before = torch.cuda.synchronize, torch.cuda.Stream, torch.cuda.CUDAGraph
    kept: list[Tensor] = []
    counted(lambda device: kept.append(ones(2)))
    assert (torch.cuda.synchronize, torch.cuda.Stream, torch.cuda.CUDAGraph) == before
    with pytest.raises(RuntimeError, match="which is over"):
        kept[0] + 1


# --- kernels of our own, and graphs


@pytest.fixture
def no_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(custom_kernels, "_KERNELS", {})


@torch.library.custom_op("test_gpu_counts::double", mutates_args=())
def double(given: Tensor) -> Tensor:
    return 2 * given


@double.register_fake
def _(given: Tensor) -> Tensor:
    return torch.empty_like(given)


def test_an_operation_of_our_own_is_one_operation(no_kernels: None) -> None:
    operation = one(double, 10, 10)
    assert (operation.name, operation.kind, operation.bytes) == ("test_gpu_counts::double", OTHER, 400)
    register_kernel("test_gpu_counts::double", kind=ATTENTION, launches=3, count_bytes=lambda tensors: 7)
    operation = one(double, 10, 10)
    assert (operation.kind, operation.bytes, operation.launches) == (ATTENTION, 7, 3)


def test_a_launch_of_triton_is_one_operation(no_kernels: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from tests.support.triton_kernel import add_one

    def launch(given: Tensor) -> None:
        add_one[(4,)](given, torch.empty_like(given), given.numel(), BLOCK=32)

    operation = one(launch, 10, 10)
    assert (operation.name, operation.bytes, operation.launches) == ("add_one", 400, 1)
    register_kernel("add_one", launches=2, count_bytes=lambda tensors: len(tensors))
    operation = one(launch, 10, 10)
    assert (operation.bytes, operation.launches) == (2, 2)


@WITH_TRITON
def test_attention_of_ours_counts_the_sequences_of_each_tile(no_kernels: None) -> None:
    """Of 48 rows 8 are in the small tile; each has queries, keys, values, an output (bf16) and a sum (float32)."""
    from mvptr_ds.model.triton_kernels.short_attention import short_attention

    register_own_kernels()
    lengths, (num_heads, size) = (3, 40, 0, 5), (2, 8)

    def attend(device: FakeCuda) -> None:
        shape = sum(lengths), 3, num_heads, size
        qkv = device.put(torch.empty(shape, dtype=torch.bfloat16, device="meta")).requires_grad_()
        tiles, seed_1 = AttentionTiles.of(lengths, torch.device(DEVICE)), torch.empty(1, device=DEVICE).long()
        short_attention(qkv, tiles, seed_1, 0, 0.1).backward(torch.empty_like(qkv[:, 0]))

    found = [o for o in counted(attend).recording.operations if o.name.startswith("short_attention")]
    row_bytes = num_heads * (4 * size * 2 + 4)
    assert [(o.kind, o.bytes) for o in found[:2]] == [(ATTENTION, 8 * row_bytes), (ATTENTION, 40 * row_bytes)]
    pairs = [3**2 + 5**2, 40**2]
    assert [o.flops for o in found] == [2 * products * n * num_heads * size for products in (2, 4) for n in pairs]


@WITH_TRITON
def test_logits_that_become_their_gradient_are_read_and_written(no_kernels: None) -> None:
    from mvptr_ds.model.triton_kernels.word_log_p import word_nll

    register_own_kernels()

    def backward(device: FakeCuda) -> None:
        logits = device.put(torch.empty(4, 4096, dtype=torch.bfloat16, device="meta")).requires_grad_()
        word_nll(logits, torch.zeros(4, dtype=torch.int64, device=DEVICE), 4000).backward(ones(4))

    found = {o.name: o.bytes for o in counted(backward).recording.operations}
    small = 4 * 4 + 5 * 8 + 4 * 8 + 4 * 4  # sums, starts, words, log probabilities
    assert found["word_log_p_forward"] == 4 * 4096 * 2 + small
    assert found["word_log_p_backward"] == 2 * 4 * 4096 * 2 + small


def test_a_graph_is_one_operation_with_all_its_kernels() -> None:
    def capture_and_replay(device: FakeCuda) -> None:
        given, graph = device.put(torch.empty(10, 10, device="meta")), torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(5):
                given.add_(1.0)
        assert device.recording.operations == []
        graph.replay()
        graph.replay()

    found = counted(capture_and_replay).recording.operations
    assert [(o.name, o.launches, o.bytes) for o in found] == [("graph", 5, 5 * 800)] * 2


# --- time by the model


def test_the_model_of_time_knows_its_limits() -> None:
    assert one(lambda x: x + 1, 4, 4).model_s == KERNEL_S
    large = H200.product_seconds(132 * 128, 256 * 40, 4096)
    assert 0.8 < 2 * 132 * 128 * 256 * 40 * 4096 / large / PRODUCT_FLOPS_PER_S < 1.0
    assert (
        H200.product_seconds(4627, 768, 768)
        < H200.product_seconds(4627, 776, 768)
        < H200.product_seconds(4627, 1536, 768)
    )
    assert one(lambda x: x.float(), 4096, 4096).model_s == pytest.approx(4096**2 * 6 / 3.7e12)


# --- the command


def test_the_command_ends_with_json(stage2: StepCounts) -> None:
    done = run_tool("bench/count_gpu_step.py", "referring", "--batch", 4, "--no-engine")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and any(line.startswith("cross encoder") for line in lines), done
    found = json.loads(lines[-1])
    assert list(found) == list(report.as_json(stage2, None))
    assert found["ops"] > found["copies_to_device"] > found["pageable_copies"] == 0 and found["engine_ops"] is None


def test_the_command_names_what_is_wrong() -> None:
    done = run_tool("bench/count_gpu_step.py", "stage2", "--batch", 4, "model.hidden_sise=64")
    assert done.returncode == 1 and "hidden_size" in done.stderr
    done = run_tool("bench/count_gpu_step.py", "retrieval", "--batch", 4, "--no-engine", "--fail-on-wait")
    assert done.returncode == 1 and "gather_rows.py" in done.stderr


def test_copies_are_operations_too() -> None:
    recording = counted(lambda _: torch.zeros(3).to(DEVICE, non_blocking=True)).recording
    assert [(o.name, o.kind) for o in recording.operations] == [("copy", COPY)]
    assert recording.bytes_outside == 12
