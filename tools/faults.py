"""Kills a training run again and again, and compares what it ends with with a run that nobody disturbed.

python tools/faults.py --tries 50 --out runs/faults

Two ranks on tiny demo shards, both stages, dropout, accumulation and a checkpoint every second step, across the end of
an epoch. All ranks are killed at once (kill -9 of their process group) at drawn instants, a good share of them inside
a save; the run is started again until it is done. Weights, optimiser state and every logged number of every step
must be bit-identical with the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from mvptr_ds.checkpointing import CHECKSUMS
from mvptr_ds.demo.build import build_demo_shards

REPO = Path(__file__).resolve().parents[1]
STAGES = ("stage1", "stage2")
NUM_RANKS, NUM_STEPS = 2, 9
KINDS = {"start": 1, "step": 3, "save": 6}  # what a kill is aimed at, and how often
LAUNCH_LIMIT_S = 600.0
COMPARED = ("loss/", "grad_norm", "learning_rate", "scale", "skipped_steps", "data/bad", "data/oov", "data/padded")
SETTINGS = (
    f"stage1.max_steps={NUM_STEPS}", f"stage2.max_steps={NUM_STEPS}", "stage1.warmup_steps=4",
    "model.hidden_size=32", "model.intermediate_size=64", "model.num_attention_heads=2", "model.num_text_layers=1",
    "model.num_visual_layers=1", "model.num_cross_layers=1", "model.dropout=0.1", "model.attention_dropout=0.1",
    "visual.image_size=48", "train.batch_size=16", "train.accumulation_steps=2", "train.log_every_steps=1",
    "train.checkpoint_every_steps=2", "train.keep_checkpoints=2", "train.hang_timeout_s=120",
)  # fmt: skip


class FaultsError(RuntimeError):
    """The trial itself went wrong: a launch ended with an error, or never."""


@dataclass
class Counts:
    kills: int = 0
    kills_inside_a_save: int = 0
    kills_aimed_at: dict[str, int] = field(default_factory=lambda: dict.fromkeys(KINDS, 0))
    runs: int = 0
    differences: list[str] = field(default_factory=list)
    steps_lost: list[int] = field(default_factory=list)


def build_shards(out: Path) -> list[str]:
    """Tiny demo shards below `out`; the overrides of the demo configuration that train on them."""
    shards = out / "shards"
    build_demo_shards(shards, "shapes", num_train=48, num_held_out=4, seed=0, num_processes=1)
    files = {"word_vocab": "word_vocab.txt", "phrase_vocab": "phrase_vocab.json"}
    paths = {key: shards / files.get(key, key) for key in ("train", "held_out", *files)}
    return [*SETTINGS, *(f"data.{key}={path}" for key, path in paths.items()), "data.demo_source=null"]


def launch(run_dir: Path, overrides: list[str], num_ranks: int = NUM_RANKS) -> list[subprocess.Popen[bytes]]:
    """Starts the ranks in one process group, led by rank 0, without a launcher: that would be killed with them."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    ranks: list[subprocess.Popen[bytes]] = []
    common = {
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
        "CUDA_VISIBLE_DEVICES": "",  # two ranks on any machine
        "DS_ACCELERATOR": "cpu",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(REPO / "mvptr_ds/train.py"), f"run.dir={run_dir}", *overrides]
    run_dir.mkdir(parents=True, exist_ok=True)
    for rank in range(num_ranks):
        group = ranks[0].pid if ranks else 0
        with (run_dir / f"rank{rank}.log").open("ab") as log:
            environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            ranks.append(
                subprocess.Popen(
                    command,
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
    """Whether all ranks have ended well. Raises FaultsError where one has not."""
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
        """Whether a save has begun since the last call."""
        now_s, was_saving = time.monotonic(), self._saving_since_s is not None
        if not self.begun():
            if self._saving_since_s is not None:
                self.save_s.append(now_s - self._saving_since_s)
            self._saving_since_s = None
        elif not was_saving:
            self._saving_since_s = now_s
            return True
        return False

    def num_saved(self) -> int:
        """Steps of both stages that the newest complete checkpoints keep."""
        total = 0
        for stage in STAGES:
            complete = self.run_dir.glob(f"{stage}/checkpoints/step-*/{CHECKSUMS}")
            total += max((int(path.parent.name.removeprefix("step-")) for path in complete), default=0)
        return total


def wait_for_instant(
    kind: str, ranks: list[subprocess.Popen[bytes]], watch: Watch, rng: random.Random, save_s: float
) -> bool:
    """Waits for an instant of its kind; False when the run was done before.

    start: anywhere in the start-up. step: so many reports later, and a little. save: inside one of the next saves,
    which last about `save_s`. end: when the run is done.
    """
    started_s = time.monotonic()
    wanted, saves = watch.num_reports() + rng.randrange(1, NUM_STEPS), rng.randrange(1, 4)
    delay_s = rng.uniform(0.0, {"start": 12.0, "step": 0.3, "save": save_s, "end": 0.0}[kind])
    watch.saw_begin()  # remains of a killed save
    reached_s = started_s if kind == "start" else None
    while reached_s is None or time.monotonic() < reached_s + delay_s:
        if finished(ranks):
            return False
        if time.monotonic() > started_s + LAUNCH_LIMIT_S:
            raise FaultsError(f"a launch in {watch.run_dir} was not done after {LAUNCH_LIMIT_S:.0f} s")
        if reached_s is None:
            saves -= watch.saw_begin()
            if (kind == "save" and saves <= 0) or (kind == "step" and watch.num_reports() >= wanted):
                reached_s = time.monotonic()
        time.sleep(0.002)
    return True


def run_with_kills(
    watch: Watch, overrides: list[str], tries: int, rng: random.Random, counts: Counts, save_s: float, bar: Any
) -> None:
    """One run, started until it is done, killed while `tries` allows."""
    while True:
        kind = rng.choices(list(KINDS), list(KINDS.values()))[0] if counts.kills < tries else "end"
        remains = watch.begun()
        ranks = launch(watch.run_dir, overrides)
        try:
            if not wait_for_instant(kind, ranks, watch, rng, save_s):
                return
        finally:
            kill(ranks)
        counts.kills += 1
        counts.kills_aimed_at[kind] += 1
        counts.kills_inside_a_save += bool(watch.begun().items() - remains.items())
        counts.steps_lost.append(max(0, watch.num_reports() - watch.num_saved()))
        bar.update()


def differences(run_dir: Path, reference: Path) -> list[str]:
    """Where a run's last checkpoints and its logged numbers are not those of the undisturbed run."""
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


def _reports(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def run_trials(out: Path, tries: int, seed: int) -> Counts:
    """The undisturbed run, then as many disturbed ones as `tries` kills take."""
    overrides, rng, counts = build_shards(out), random.Random(seed), Counts()
    for stale in out.glob("run-*"):
        shutil.rmtree(stale)
    reference = out / "run-undisturbed"
    undisturbed = Watch(reference)
    run_with_kills(undisturbed, overrides, 0, rng, counts, 0.0, None)
    save_s = statistics.median(undisturbed.save_s)
    with tqdm(total=tries, desc="kills", unit="kill") as bar:
        while counts.kills < tries:
            run_dir = out / f"run-{counts.runs:03d}"
            before = counts.kills
            run_with_kills(Watch(run_dir), overrides, tries, rng, counts, save_s, bar)
            if counts.kills == before:
                continue  # it was done before the drawn instant: that is another undisturbed one
            counts.runs += 1
            found = differences(run_dir, reference)
            counts.differences += [f"{run_dir.name}: {difference}" for difference in found]
            if not found:
                shutil.rmtree(run_dir)
    return counts


def summary(counts: Counts, wall_s: float) -> dict[str, Any]:
    """The last line, as JSON."""
    content = asdict(counts)
    lost = content.pop("steps_lost")
    return content | {
        "bit_identical": not counts.differences,
        "steps_lost_mean": round(sum(lost) / max(1, len(lost)), 2),
        "steps_lost_max": max(lost, default=0),
        "wall_s": round(wall_s, 1),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=50, metavar="N", help="kills in all (%(default)s)")
    parser.add_argument("--out", default="runs/faults", help="folder of the shards and runs (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the instants (%(default)s)")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started_s = time.monotonic()
    try:
        counts = run_trials(Path(arguments.out).resolve(), arguments.tries, arguments.seed)
    except (FaultsError, ValueError, OSError) as error:
        logging.error("error: %s", error)
        return 2
    content = summary(counts, time.monotonic() - started_s)
    for name, value in content.items():
        print(f"{name:<20} {value}")
    print(json.dumps(content))
    return 0 if content["bit_identical"] else 1


if __name__ == "__main__":
    sys.exit(main())
