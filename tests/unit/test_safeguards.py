"""Signals to loader processes, the guard against hanging, skipped steps, bad samples."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mvptr_ds.data.dataset import ShardDataset
from mvptr_ds.data.loader import make_loader
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.errors import DataError, TrainingError
from mvptr_ds.guards import LossScale, SkippedSteps, Watchdog, any_rank, collectives_timeout_s
from mvptr_ds.monitoring.bad_samples import BadSamples
from tests.conftest import REPO
from tests.support.tiny_models import sample


def test_agreeing_is_any(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert any_rank([True, False], cpu) == [True, False]
    monkeypatch.setattr("mvptr_ds.distributed.collectives.num_ranks", lambda: 2)
    monkeypatch.setattr("mvptr_ds.distributed.collectives.all_reduce_sum", lambda t: t + torch.tensor([2.0, 0.0, 1.0]))
    assert any_rank([False, False, True], cpu) == [True, False, True]


HANGING = """
import sys, time
from pathlib import Path
from mvptr_ds.guards import Watchdog
with Watchdog(Path(sys.argv[1]), 4.0) as guard:  # long, for a machine that is busy with other things
    for _ in range(50):
        time.sleep(0.1)
        guard.alive()
    print("alive", flush=True)
    def wait_for_a_rank_that_never_comes(): time.sleep(600)
    wait_for_a_rank_that_never_comes()
"""


def test_a_process_that_hangs_ends_with_its_stacks(tmp_path: Path) -> None:
    path = tmp_path / "deep/stacks.txt"
    done = subprocess.run(
        [sys.executable, "-c", HANGING, str(path)], cwd=REPO, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 1 and "alive" in done.stdout  # not ended while it was told that all is well
    assert "Timeout" in path.read_text(encoding="utf-8")
    assert "wait_for_a_rank_that_never_comes" in path.read_text(encoding="utf-8")


@pytest.mark.parametrize("timeout_s", [0.0, 30.0])
def test_a_guard_that_was_not_needed_leaves_nothing(tmp_path: Path, timeout_s: float) -> None:
    with Watchdog(tmp_path / "stacks.txt", timeout_s) as guard:
        guard.alive()
    assert list(tmp_path.iterdir()) == []


def test_the_stacks_of_earlier_starts_stay(tmp_path: Path) -> None:
    """A restart follows within the minute, before anybody has read them; the newest five do."""
    path = tmp_path / "stacks-rank0.txt"
    for start in range(8):
        with Watchdog(path, 30.0):
            assert path.read_text(encoding="utf-8") == ""
        path.write_text(f"stacks of start {start}", encoding="utf-8")
    with Watchdog(path, 30.0):
        pass
    found = {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()}
    assert found == {f"stacks-rank0.{n}.txt": f"stacks of start {8 - n}" for n in range(1, 6)}
    path.touch()  # of a start that was killed
    with Watchdog(path, 30.0):
        pass
    assert {file.name: file.read_text(encoding="utf-8") for file in tmp_path.iterdir()} == found


@pytest.mark.parametrize(("waited_s", "written"), [(20.0, False), (45.0, True)])
def test_a_rank_that_waited_for_one_that_hung_says_where(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, waited_s: float, written: bool
) -> None:
    """The time of the others is not up when the first one ends, and their collective fails."""
    clock = iter([100.0, 100.0 + waited_s])
    monkeypatch.setattr("mvptr_ds.guards.time", SimpleNamespace(monotonic=lambda: next(clock)))
    path = tmp_path / "stacks.txt"
    with pytest.raises(RuntimeError), Watchdog(path, 60.0):
        wait_in_a_collective()
    assert path.exists() == written
    assert not written or "wait_in_a_collective" in path.read_text(encoding="utf-8")


def wait_in_a_collective() -> None:
    raise RuntimeError("Connection closed by peer")


def test_the_search_for_a_loss_scale_is_counted_and_does_not_end_the_run(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DeepSpeed's own scaler: from 65,536, waits once (hysteresis), then halves; every time a step is left out."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # rank 0 prints each, and there are no ranks here
    from deepspeed.runtime.fp16.loss_scaler import CreateLossScaler

    arguments = {
        "init_scale": 2**16, "scale_window": 1000, "min_scale": 1, "delayed_shift": 2, "consecutive_hysteresis": False,
    }  # fmt: skip
    scaler = CreateLossScaler(torch.half, 0, True, arguments)
    skipped = SkippedSteps(max_in_row=3)
    for step in range(12):  # once without halving, then from 65,536 down to 32
        scaler.update_scale(True)
        skipped.count(step, applied=False, loss_scale=LossScale(scaler.cur_scale, scaler.min_scale))
    assert (skipped.total, skipped.in_row, scaler.cur_scale) == (12, 0, 32)
    assert "step 11 left out: fp16 overflow, loss scale now 32 (12 so far)" in caplog.text
    skipped.count(12, applied=True, loss_scale=LossScale(scaler.cur_scale, scaler.min_scale))
    with pytest.raises(TrainingError, match=r"step 17: fp16 overflows at every loss scale above the minimum 1;"):
        for step in range(13, 99):  # diverged: told before the engine raises an error of its own
            scaler.update_scale(True)
            skipped.count(step, applied=False, loss_scale=LossScale(scaler.cur_scale, scaler.min_scale))


def test_skipped_steps(caplog: pytest.LogCaptureFixture) -> None:
    skipped = SkippedSteps(max_in_row=3)
    for step, applied in enumerate([True, False, False, True, False, False], start=1):
        skipped.count(step, applied)
    assert (skipped.in_row, skipped.total) == (2, 4)
    assert "step 6 left out: its gradient is not finite (4 so far)" in caplog.text
    with pytest.raises(TrainingError, match=r"3 steps in a row .* step 7 \(train.max_skipped_in_row\)"):
        skipped.count(7, False)


def test_bad_samples_are_compared_with_what_was_read() -> None:
    bad = BadSamples(0.01, Path("run"))
    bad.count(10, 20)  # what 1,000 samples may have: too early to say more
    bad.check(pytest.fail)
    bad.count(10, 1980)  # 20 of 2,000
    bad.check(pytest.fail)
    bad.count(1, 0)
    wanted = r"21 samples could not be read among 2000, more than data.max_bad_fraction=0.01 allows \(20 of 2000\); "
    with pytest.raises(DataError, match=wanted + r".* saved at step 7\. It resumes there .*run.init_from=run$"):
        bad.check(lambda: 7)


def test_a_few_samples_can_have_too_many_bad_ones() -> None:
    """A run that is shorter than the samples that the fraction is taken of ends, too."""
    for fraction, num_bad, num_read in ((0.01, 11, 64), (0.0, 1, 8)):
        bad = BadSamples(fraction, Path("run"))
        bad.count(num_bad, num_read)
        with pytest.raises(DataError, match=f"{num_bad} samples .* among {num_read}, .* of 1000") as error:
            bad.check(lambda: 0)
        assert "saved" not in str(error.value)  # nothing could be written


class SlowDataset(ShardDataset):
    """Samples of two hundredths of a second each."""

    read_ahead_bytes = 0

    def __init__(self) -> None:
        pass

    def __getitems__(self, positions: list[int]) -> list:  # type: ignore[type-arg]
        time.sleep(0.1)
        return [sample(position, position) for position in positions]


def children() -> list[int]:
    listed = subprocess.run(["ps", "-o", "pid=", "--ppid", str(os.getpid())], capture_output=True, text=True)
    return [int(pid) for pid in listed.stdout.split()]


def test_a_signal_to_the_loader_processes_does_not_end_them() -> None:
    """launch.py, SLURM and a terminal signal the whole tree; the rank still needs batches until it has stopped.

    Every thread has to leave the signals alone, also those that libraries start: the system gives one to any.
    """
    left_alone = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    before = set(children())
    batches = iter(make_loader(SlowDataset(), Batches(4), 0, 8, num_workers=2, prefetch_batches=1))
    workers = [pid for pid in set(children()) - before if is_python(pid)]
    assert len(workers) == 2

    def send() -> None:  # from another process than the rank, as launch.py does
        kills = [f"kill -{number.value} {pid}" for number in left_alone for pid in workers]
        subprocess.run(["sh", "-c", "; ".join(kills)], check=True)

    send()  # before any code of ours has run there
    seen = [next(batches).position_B.tolist()]
    for worker in workers:
        masks = [blocked_signals(task / "status") for task in Path(f"/proc/{worker}/task").iterdir()]
        waits = {signal.SIGUSR1, signal.SIGINT}  # for SIGTERM, which the system takes out of its mask meanwhile
        open_to_some = [mask for mask in masks if not set(left_alone) <= mask]
        assert len(masks) >= 2 and len(open_to_some) <= 1 and all(waits <= mask for mask in open_to_some), masks
    for _ in range(5):
        send()
    seen += [batch.position_B.tolist() for batch in batches]
    assert np.concatenate(seen).tolist() == list(range(32))


def blocked_signals(status: Path) -> set[int]:
    """Of a thread."""
    line = next(line for line in status.read_text(encoding="utf-8").splitlines() if line.startswith("SigBlk:"))
    return {number + 1 for number in range(64) if int(line.split()[1], 16) >> number & 1}


def is_python(pid: int) -> bool:
    try:
        return "python" in Path(f"/proc/{pid}/cmdline").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False


CRASHING = """
from tests.unit.test_safeguards import Batches, SlowDataset, make_loader
dataset = SlowDataset()
batches = iter(make_loader(dataset, Batches(4), 0, 8, num_workers=1, prefetch_batches=1))
next(batches)
raise RuntimeError("a bug")
"""


def test_a_rank_that_crashes_does_not_wait_for_its_loader_processes() -> None:
    """The interpreter ends them with SIGTERM at exit and waits: that one they must heed."""
    done = subprocess.run([sys.executable, "-c", CRASHING], cwd=REPO, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1 and "a bug" in done.stderr


def test_a_collective_waits_longer_than_the_guard() -> None:
    assert collectives_timeout_s(1800.0, 60.0) == collectives_timeout_s(60.0, 1800.0) == 2400.0
    assert collectives_timeout_s(0.0, 1800.0) > 86_400  # 0 is no limit
