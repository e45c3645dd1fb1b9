"""The benchmark on a GPU, tried without one: the reference in half precision, traces, products, and a whole run."""

from __future__ import annotations

import json
import sys
from typing import Any

import pytest
import torch

from mvptr_ds.objectives.hard_negatives import RandomDraws
from tests.conftest import REPO
from tests.support.tools import run_tool

sys.path.append(str(REPO / "tools/bench"))  # as `python tools/bench/bench_gpu.py` has it

import bench_gpu
import bench_models
import bench_step
import gpu_products
import gpu_trace

RUN = ("--device", "cpu", "--small", "--batch", 3, "--rounds", 1, "--steps", 1, "--warm-up", 1)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_reference_agrees_in_bf16_and_with_sdpa(attention: str) -> None:
    config = bench_step.model_config(small=True)
    batch = bench_models.make_batch(6, 0, config)
    task = bench_models.build_task(config, "packed")
    draws = RandomDraws.keyed(0, 0, 0, 6, bench_models.TEXT_SLOTS)
    ours = task.sums(batch, draws)
    for dtype, tolerance in ((torch.float32, 1e-4), (torch.bfloat16, 1e-2)):
        reference = bench_models.Reference(task.model, attention).to(dtype)
        theirs = reference.sums(bench_models.fixed_slots(batch), draws)
        for name, part in ours.items():
            assert theirs[name].sum.dtype == torch.float32
            mean, other = ((p.sum / p.count).item() for p in (part, theirs[name]))
            assert mean == pytest.approx(other, rel=tolerance, abs=tolerance), name


def test_the_reference_drops_out_where_ours_does() -> None:
    config = bench_step.model_config(small=True)
    config.hidden_dropout = config.attention_dropout = 0.5
    task = bench_models.build_task(config, "packed")
    ours, theirs = (
        sorted(m.p for m in module.modules() if isinstance(m, torch.nn.Dropout) and m.p)
        for module in (task.model, bench_models.Reference(task.model))
    )
    assert set(ours) == set(theirs) == {0.5}
    reference, batch = (
        bench_models.Reference(task.model),
        bench_models.fixed_slots(bench_models.make_batch(2, 0, config)),
    )
    same = reference.train().embed(batch.text_ids_BT, 0)
    assert 0.4 < (same == 0).float().mean() < 0.6


def event(name: str, category: str, start_us: float, duration_us: float) -> dict[str, Any]:
    return {"ph": "X", "name": name, "cat": category, "ts": start_us, "dur": duration_us}


def test_a_trace_is_summed_up() -> None:
    """Two steps of two kernels: 10 to 30 and 20 to 40 on two streams, a copy, a gap, and 90 to 110."""
    events = [
        {"ph": "M", "name": "process_name"},
        event("cudaLaunchKernel", "cuda_runtime", 0, 2),
        event("cuLaunchKernelEx", "cuda_driver", 3, 2),
        event("cudaLaunchKernelExC", "cuda_runtime", 6, 2),
        event("cudaMemcpyAsync", "cuda_runtime", 8, 1),
        event("cudaStreamSynchronize", "cuda_runtime", 50, 20),
        event("cudaEventSynchronize", "cuda_runtime", 71, 1),
        event("cudaDeviceSynchronize", "cuda_runtime", 80, 40),
        event("gemm", "kernel", 10, 20),
        event("gelu", "kernel", 20, 20),
        event("Memcpy HtoD (Pinned -> Device)", "gpu_memcpy", 45, 5),
        event("adam", "kernel", 90, 20),
        event("mvptr_ds/forward", "gpu_user_annotation", 0, 1000),
    ]
    found = gpu_trace.summary(events, 2, ending_waits=1)
    assert found.keys() == set(gpu_trace.KEYS)
    assert (found["launches"], found["kernels"], found["copies_to_device"], found["waits"]) == (1.5, 1.5, 0.5, 1.0)
    assert found["busy_ms"] == pytest.approx((30 + 5 + 20) / 1e3 / 2)
    assert found["idle_frac"] == pytest.approx(1 - 55 / 100)
    assert gpu_trace.summary([], 1)["idle_frac"] == 0.0


def test_products_have_the_model_s_shapes() -> None:
    """The unaligned sides stand beside their padded ones."""
    shapes = gpu_products.shapes_of(64, 2, 2**16)
    told: list[str] = []
    found = gpu_products.measure(shapes, torch.device("cpu"), torch.float32, told.append)
    products = found["tflops_forward_input_weight"]
    for name in ("layer 55x64->192", "words 41x64->30522", "words 41x64->30528", "regions 70x2054->64"):
        assert len(products[name]) == 3 and min(products[name]) > 0, name
    assert len(products) == len(set(shapes.rows)) * 4 + 3 + 3 and len(found["tflops_bias_aligned_and_not"]) == 2
    assert found["copy_tb_per_s"] > 0 and found["host_us_per_operation"] > 0 and len(told) > 5
    real = gpu_products.shapes_of(768, 256, 2**31)
    assert all(num % 128 == 0 for num in real.rows[1::2]) and all(num % 8 for num in real.rows[::2])


def test_losses_that_differ_are_named() -> None:
    wanted = {"mlm": 10.0, "itm": 0.7}
    assert bench_gpu.differences(wanted, {"mlm": 10.05, "itm": 0.71}, 1e-2) == ""
    assert bench_gpu.differences(wanted, {"mlm": 10.05, "itm": 0.73}, 1e-2) == "itm 0.73 instead of 0.7"
    assert "nan" in bench_gpu.differences(wanted, {"mlm": float("nan"), "itm": 0.7}, 1e-2)
    assert bench_gpu.differences(wanted, {"mlm": 10.0}, 1e-2) == "mlm instead of mlm, itm"


@pytest.mark.timeout(900)  # processes that import torch and DeepSpeed, on a machine that may be busy
def test_a_run_from_start_to_json() -> None:
    done = run_tool("bench/bench_gpu.py", *RUN, "--stages", "joint", "--ways", "packed", "flash", "published")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["gpu"] is None and report["overrides"] == list(bench_gpu.SMALL)
    packed, published, flash = report["results"]
    assert flash["way"] == "flash" and flash["left_out"] == "flash_attn is not installed"
    for result, way in ((packed, "packed"), (published, "published")):
        assert (result["way"], result["stage"], result["samples"], result["precision"]) == (way, "joint", 3, "bf16")
        assert result["ms_per_step"] > 0 and result["tflop_per_step"] > 0 and result["left_out"] is None
        assert {result[name] for name in ("mfu_frac", "peak_gib", "launches", "idle_frac")} == {None}
    assert packed["tflop_per_step"] == published["tflop_per_step"]
    assert "losses of published bf16 in float32" in done.stderr and "round 1 of 1, packed bf16" in done.stderr
    assert "left out: flash_attn is not installed" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "1"], "--batch is 1, must be at least 2"),
        (["--steps", "0"], "--steps is 0, must be at least 1"),
        (["--device", "cpu", "--dtype", "fp16"], "--dtype fp16 needs a GPU"),
    ],
)
def test_wrong_usage_is_told(arguments: list[str], message: str) -> None:
    done = run_tool("bench/bench_gpu.py", *arguments)
    assert done.returncode == 2 and message in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_it_says_so() -> None:
    done = run_tool("bench/bench_gpu.py")
    assert done.returncode == 1 and "finds no GPU; --device cpu tries the tool without one" in done.stderr
