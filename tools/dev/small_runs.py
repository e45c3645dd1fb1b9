"""Small two-stage runs on gloo ranks of this machine, which faults.py and the tests disturb and compare.

Tiny demo shards, dropout, accumulation and a checkpoint every second step, across the end of an epoch.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mvptr_ds.checkpoints.checkpoint import CHECKSUMS
from mvptr_ds.demo.build import build_demo_shards

REPO = Path(__file__).resolve().parents[2]
STAGES = ("stage1", "stage2")
NUM_RANKS, NUM_STEPS, BATCH_SIZE = 2, 9, 16
LAUNCH_LIMIT_S = 600.0
COMPARED = ("loss/", "grad_norm", "learning_rate", "scale", "skipped_steps", "data/bad", "data/oov", "data/padded")
SETTINGS = (
    f"stage1.max_steps={NUM_STEPS}", f"stage2.max_steps={NUM_STEPS}", "stage1.warmup_steps=4",
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_attention_heads=2", "model.num_text_layers=1",
    "model.num_visual_layers=1", "model.num_cross_layers=1", "model.dropout=0.1", "model.attention_dropout=0.1",
    "visual.image_size=48", f"train.batch_size={BATCH_SIZE}", "train.accumulation_steps=2", "train.log_every_steps=1",
    "train.checkpoint_every_steps=2", "train.keep_checkpoints=2", "train.hang_timeout_s=120",
    "train.max_skipped_in_row=1",
)  # fmt: skip


class FaultsError(RuntimeError):
    """The trial itself went wrong: a launch ended with an error, or never."""


def build_shards(out: Path) -> list[str]:
    """Tiny demo shards below `out`; the overrides of the demo configuration that train on them."""
    shards = out / "shards"
    build_demo_shards(shards, "shapes", num_train=48, num_held_out=4, seed=0, num_processes=1)
    files = {"word_vocab": "word_vocab.txt", "phrase_vocab": "phrase_vocab.json"}
    paths = {key: shards / files.get(key, key) for key in ("train", "held_out", *files)}
    return [*SETTINGS, *(f"data.{key}={path}" for key, path in paths.items()), "data.demo_source=null"]


def launch(
    run_dir: Path,
    overrides: Sequence[str],
    num_ranks: int = NUM_RANKS,
    poisoned: tuple[int, int] | None = None,
    entry: Path = REPO / "mvptr_ds/train.py",
) -> list[subprocess.Popen[bytes]]:
    """Starts the ranks in one process group, led by rank 0, without a launcher: that would be killed with them.

    Args:
        poisoned: a rank, and the step of both stages (counted from 0) in which its loss is NaN.
        entry: what the ranks run.
    """
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks: list[subprocess.Popen[bytes]] = []
    common = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "CUDA_VISIBLE_DEVICES": "",  # any number of ranks on any machine
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    run_dir.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        group = ranks[0].pid if ranks else 0
        script = [str(entry)]
        if poisoned is not None and poisoned[0] == rank:
            stage, step = divmod(poisoned[1], NUM_STEPS)
            script = [str(REPO / "tools/dev/train_with_nan.py"), "--stage", STAGES[stage], "--step", str(step)]
        with (run_dir / f"rank{rank}.log").open("ab") as log:
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    [sys.executable, *script, f"run.dir={run_dir}", *overrides],
                    env=environment,
                    cwd=REPO,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    preexec_fn=lambda group=group: os.setpgid(0, group),  # type: ignore[misc]
                )
            )
    return ranks


def kill(ranks: list[subprocess.Popen[bytes]]) -> None:
    """kill -9 of the whole group: ranks and their loader processes."""
    with suppress(ProcessLookupError):
        os.killpg(ranks[0].pid, signal.SIGKILL)
    for rank in ranks:
        rank.wait()


def finished(ranks: list[subprocess.Popen[bytes]]) -> bool:
    """Returns whether all ranks have ended well. Raises FaultsError where one has not."""
    codes = [rank.poll() for rank in ranks]
    if any(codes):
        raise FaultsError(f"the ranks ended with {codes}; their output is in the run's folder (rank0.log ...)")
    return None not in codes


class Watch:
    """What a run's folder shows: steps that were logged, checkpoints that are complete, a save that is going on."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.save_s: list[float] = []  # durations of the saves that were seen whole
        self._saving_since_s: float | None = None

    def num_reports(self) -> int:
        """Lines logged in both stages."""
        files = [self.run_dir / stage / "metrics.jsonl" for stage in STAGES]
        return sum(file.read_bytes().count(b"\n") for file in files if file.exists())

    def begun(self) -> dict[Path, int]:
        """Checkpoints that are not complete, with the time of their folders: one that is begun anew has another."""
        found = {}
        for path in self.run_dir.glob("*/checkpoints/step-*"):
            with suppress(FileNotFoundError):  # removed meanwhile
                if not (path / CHECKSUMS).exists():
                    found[path] = path.stat().st_mtime_ns
        return found

    def saw_begin(self) -> bool:
        """Returns whether a save has begun since the last call."""
        now_s, was_saving = time.monotonic(), self._saving_since_s is not None
        if not self.begun():
            if self._saving_since_s is not None:
                self.save_s.append(now_s - self._saving_since_s)
            self._saving_since_s = None
        elif not was_saving:
            self._saving_since_s = now_s
            return True
        return False

    def first_report_after(self, time_s: float) -> float | None:
        """When the first step since `time_s` (seconds since the epoch) was logged; None when none was."""
        files = [self.run_dir / stage / "metrics.jsonl" for stage in STAGES]
        times_s = [report["time"] for file in files if file.exists() for report in _reports(file)]
        return min((when_s for when_s in times_s if when_s > time_s), default=None)

    def num_saved(self) -> int:
        """Steps of both stages that the newest complete checkpoints keep."""
        total = 0
        for stage in STAGES:
            complete = self.run_dir.glob(f"{stage}/checkpoints/step-*/{CHECKSUMS}")
            total += max((int(path.parent.name.removeprefix("step-")) for path in complete), default=0)
        return total


def run_undisturbed(
    run_dir: Path, overrides: Sequence[str], num_ranks: int = NUM_RANKS, limit_s: float = LAUNCH_LIMIT_S
) -> Watch:
    """Trains until the run is done, from where it stands. Raises FaultsError when it ends badly, or not in time."""
    watch, deadline_s = Watch(run_dir), time.monotonic() + limit_s
    ranks = launch(run_dir, overrides, num_ranks)
    try:
        while not finished(ranks):
            if time.monotonic() > deadline_s:
                raise FaultsError(f"a launch in {run_dir} was not done after {limit_s:.0f} s")
            watch.saw_begin()
            time.sleep(0.002)
    finally:
        kill(ranks)
    return watch


def differences(run_dir: Path, reference: Path) -> list[str]:
    """Returns how a run's last checkpoints and logged numbers differ from those of the undisturbed run."""
    found = []
    for stage in STAGES:
        last = f"{stage}/checkpoints/step-{NUM_STEPS:08d}/{CHECKSUMS}"
        ours, theirs = (json.loads((folder / last).read_text(encoding="utf-8")) for folder in (run_dir, reference))
        # these two name the run's own folder, its kills and its time
        names = (ours.keys() | theirs.keys()) - {"state.json", "model/mvptr.yaml"}
        found += [f"{stage}: {name}" for name in sorted(names) if ours.get(name) != theirs.get(name)]
        lines = [_reports(folder / stage / "metrics.jsonl") for folder in (run_dir, reference)]
        if [line["step"] for line in lines[0]] != list(range(1, NUM_STEPS + 1)):
            found.append(f"{stage}: the reports are of the steps {[line['step'] for line in lines[0]]}")
        for our_line, their_line in zip(*lines, strict=False):
            found += [
                f"{stage}, step {our_line['step']}: {key}"
                for key, value in their_line.items()
                if key.startswith(COMPARED) and our_line.get(key) != value
            ]
    return found


def wrong_samples(run_dir: Path) -> int:
    """Returns how many samples more or fewer than the plan's were trained on, in the steps that the run is made of."""
    trained = [sum(line["data/samples"] for line in _reports(run_dir / s / "metrics.jsonl")) for s in STAGES]
    return sum(abs(int(samples) - NUM_STEPS * BATCH_SIZE) for samples in trained)


def _reports(path: Path) -> list[dict[str, Any]]:
    """Whole lines: a killed run may leave a part of one."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]
