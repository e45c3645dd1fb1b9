"""Phases, peaks, and the profiler's window."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
import torch

from mvptr_ds.config import Config
from mvptr_ds.distributed import collectives
from mvptr_ds.monitoring.flops import StepFlops
from mvptr_ds.monitoring.meters import Meters
from mvptr_ds.monitoring.timing import Peak, PhaseClock, ProfileWindow, device_peak, measured_tflops, vendor_tflops
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from tests.support.tiny_models import tiny_model, whole_batch

CPU = torch.device("cpu")


def test_phases_add_up_nest_and_are_read_once() -> None:
    clock = PhaseClock(CPU)
    for _ in range(2):
        with clock("forward"):
            time.sleep(0.01)
            with clock("communication"):
                time.sleep(0.01)
    seconds = clock.read()
    assert seconds["forward"] >= 0.04 and 0.02 <= seconds["communication"] < seconds["forward"]
    assert seconds["backward"] == 0.0 and clock.read()["forward"] == 0.0


def test_a_report_says_where_the_time_went() -> None:
    weights = Config().stage2.weights
    task = PretrainingLosses(
        tiny_model(), STAGES["stage2"], weights, Config().task, max_text_slots=12, max_steps=4, seed=0
    )
    flops = StepFlops(task, 1)
    meters = Meters(CPU, flops=flops, peak=Peak(2.0, "given"))
    started_s = time.perf_counter()
    meters.add_batch(whole_batch(), 0.0)
    with meters.clock("forward"):
        time.sleep(0.03)
    with meters.clock("step"):
        time.sleep(0.01)
    report = meters.report()
    elapsed_s = time.perf_counter() - started_s
    assert report["time/forward_frac"] * elapsed_s >= 0.03 and report["time/step_frac"] * elapsed_s >= 0.01
    assert report["time/backward_frac"] == 0.0
    assert report["time/forward_frac"] + report["time/step_frac"] <= 1.0
    batch = whole_batch()
    tokens = sum(int(m.sum()) for m in (batch.text_mask_BT, batch.tag_mask_BG, batch.region_mask_BR))
    assert report["tokens_per_s"] / report["samples_per_s"] == pytest.approx(tokens / len(batch))
    assert report["model_tflops_per_rank"] * elapsed_s >= 0.999 * flops.of(batch) / 1e12  # report's time ends earlier
    assert report["mfu_frac"] == pytest.approx(report["model_tflops_per_rank"] / 2.0)
    for plain, reported in ((Meters(CPU), set()), (Meters(CPU, flops=flops), {"model_tflops_per_rank"})):
        plain.add_batch(whole_batch(), 0.0)
        assert plain.report().keys() & {"model_tflops_per_rank", "mfu_frac"} == reported


def test_collectives_are_timed_where_a_timer_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two ranks, without the other one: what the collective itself does is torch's matter."""
    clock = PhaseClock(CPU)
    monkeypatch.setattr(collectives, "num_ranks", lambda: 2)
    monkeypatch.setattr(collectives.dist, "all_reduce", lambda _: time.sleep(0.01))
    try:
        collectives.time_collectives(lambda: clock("communication"))
        collectives.all_reduce_sum(torch.ones(1))
        assert clock.read()["communication"] >= 0.01
    finally:
        collectives.time_collectives()
    collectives.all_reduce_sum(torch.ones(1))
    assert clock.read()["communication"] == 0.0


@pytest.mark.parametrize(
    ("name", "half", "single"),
    [
        ("NVIDIA H100 80GB HBM3", 989.0, 67.0),
        ("NVIDIA H100 PCIe", 756.0, 51.0),
        ("NVIDIA A100-SXM4-80GB", 312.0, 19.5),
        ("Tesla V100-SXM2-32GB", 125.0, 15.7),
        ("NVIDIA L40S", 362.0, 91.6),
        ("NVIDIA GeForce RTX 4090", 165.2, 82.6),
        ("NVIDIA A10G", None, None),  # another card than the A10
        ("NVIDIA A1000", None, None),
    ],
)
def test_known_gpus(name: str, half: float | None, single: float | None) -> None:
    assert (vendor_tflops(name, torch.bfloat16), vendor_tflops(name, torch.float32)) == (half, single)


def test_an_unknown_gpu_is_measured_and_a_cpu_has_no_peak(monkeypatch: pytest.MonkeyPatch) -> None:
    """A product that another process slows down would make a training step look better than the processor."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Unknown 1")
    monkeypatch.setattr("mvptr_ds.monitoring.timing.measured_tflops", lambda device, dtype: 12.0)
    peak = device_peak(torch.device("cuda"), torch.float32)
    assert peak == Peak(12.0, "a float32 matrix product measured at start on Unknown 1")
    assert device_peak(CPU, torch.float32) is None


def test_measuring_leaves_the_random_state_alone() -> None:
    """It comes after a resumed run has got its own back: dropout would be another."""
    before = torch.get_rng_state()
    assert measured_tflops(CPU, torch.float32, size=256) > 1e-4
    assert torch.equal(torch.get_rng_state(), before)


def test_a_window_leaves_one_trace_with_the_phases(tmp_path: Path) -> None:
    clock, window = PhaseClock(CPU), ProfileWindow([2, 4], tmp_path / "profile")
    with window:
        for step in range(6):
            window.begin(step)
            with clock("forward"):
                torch.ones(4, 4) @ torch.ones(4, 4)
            window.end(step + 1)
    (trace,) = (tmp_path / "profile").iterdir()
    assert trace.name == "rank0-steps2-4.json"
    names = [event.get("name") for event in json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]]
    assert names.count("mvptr_ds/forward") == 2 and "aten::mm" in names


def test_a_run_stopped_within_the_window_leaves_what_it_traced(tmp_path: Path) -> None:
    with ProfileWindow([0, 9], tmp_path) as window:
        window.begin(0)
        torch.ones(4, 4) @ torch.ones(4, 4)
        window.end(1)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0-steps0-cut.json"]


def trace_a_step(folder: Path) -> None:
    with ProfileWindow([0, 1], folder) as window:
        window.begin(0)
        torch.ones(4, 4) @ torch.ones(4, 4)
        window.end(1)


def test_a_trace_that_cannot_be_written_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trace_a_step(tmp_path / "profile")
    path = tmp_path / "profile/rank0-steps0-1.json"
    content = path.read_bytes()
    (tmp_path / "file").touch()
    trace_a_step(tmp_path / "file")
    path.unlink()
    path.mkdir()
    trace_a_step(tmp_path / "profile")
    path.rmdir()
    for written in (None, content[:-40], b""):  # what torch leaves where space ends
        monkeypatch.setattr(
            torch.profiler.profile,
            "export_chrome_trace",
            lambda _, name, written=written: None if written is None else Path(name).write_bytes(written),
        )
        trace_a_step(tmp_path / "profile")
    reasons = ("File exists", "Is a directory", "No such file", "it is cut", "it is cut")
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for message, reason in zip(warnings, reasons, strict=True):
        assert "could not be written, training goes on without" in message and reason in message


@pytest.mark.parametrize("steps", [[3], [3, 3], [-1, 2], [1, 2, 3]])
def test_a_window_that_is_none(steps: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="profile_steps"):
        ProfileWindow(steps, tmp_path)
    ProfileWindow([], tmp_path).begin(0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_phases_last_as_long_as_the_device_takes() -> None:
    device = torch.device("cuda")
    matrix = torch.randn(8192, 8192, device=device)
    clock = PhaseClock(device)
    matrix @ matrix
    torch.cuda.synchronize()
    started_s = time.perf_counter()
    with clock("forward"):
        for _ in range(20):
            matrix @ matrix
    queued_s = time.perf_counter() - started_s
    torch.cuda.synchronize()
    done_s = time.perf_counter() - started_s
    assert queued_s < 0.5 * done_s  # recording did not wait
    assert clock.read()["forward"] == pytest.approx(done_s, rel=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_a_matrix_product_stays_below_the_vendors_figure() -> None:
    device = torch.device("cuda")
    measured = measured_tflops(device, torch.float16)
    vendor = vendor_tflops(torch.cuda.get_device_name(device), torch.float16)
    assert measured > 1.0 and (vendor is None or 0.3 * vendor < measured < 1.05 * vendor)
