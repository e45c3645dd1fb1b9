"""Disturbs a training run again and again, and compares what it ends with with a run that nobody disturbed.

python tools/dev/faults.py --tries 24 --ranks 2 --out runs/faults

Small runs of both stages (small_runs.py) on gloo ranks. At drawn instants, a good share of them inside a save, in turn

    all     every rank is killed at once (kill -9 of their process group)
    kill    one rank is killed (kill -9)
    hang    one rank is stopped (SIGSTOP)
    nan     the loss of one rank is NaN in one step

In the last three the other ranks must end by themselves, within --limit (train.hang_timeout_s) where one hangs. Then
the run is started again, until it is done. Weights, optimiser state and every logged number of every step must be
bit-identical with the undisturbed run.
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import shutil
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
if __name__ == "__main__":
    sys.path[0] = str(REPO)
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path
from tools.dev.small_runs import (
    LAUNCH_LIMIT_S,
    NUM_STEPS,
    STAGES,
    FaultsError,
    Watch,
    build_shards,
    differences,
    finished,
    kill,
    launch,
    run_undisturbed,
    wrong_samples,
)

FAULTS = ("all", "kill", "hang", "nan")
INSTANTS = {"start": 1, "step": 3, "save": 6}  # what a fault is aimed at, and how often
IN_TRAINING = ("step", "save")
START_LIMIT_S = 240.0
BUSY_S = 60.0  # beyond the limit, for a machine that is busy with other things
EXIT_NAN = 2  # of every rank

Ranks = list[subprocess.Popen[bytes]]


@dataclass
class Fault:
    """One that was tried, and what it cost."""

    kind: str
    at_s: float  # since the epoch
    inside_a_save: bool
    steps_lost: int
    ended_s: float | None  # until the last of the other ranks had ended by itself; None where all were killed
    again_s: float | None = None  # until the first step was trained after it; None where no step was left to train
    survived: bool = False  # the run went on to the bits of the undisturbed one


@dataclass
class Trial:
    """The runs of one call, and what was found."""

    out: Path
    overrides: list[str]
    num_ranks: int
    tries: int
    limit_s: float
    rng: random.Random
    save_s: float = 0.0  # how long a save takes
    faults: list[Fault] = field(default_factory=list)
    num_runs: int = 0
    num_wrong_samples: int = 0
    differences: list[str] = field(default_factory=list)

    def next_kind(self) -> str | None:
        """Returns each kind in turn, and None when there were enough."""
        return FAULTS[len(self.faults) % len(FAULTS)] if len(self.faults) < self.tries else None


def wait_for_instant(ranks: Ranks, watch: Watch, trial: Trial, aims: Sequence[str]) -> bool:
    """Waits for a drawn instant; False when the run was done before.

    start: anywhere in the start-up. step: so many reports later, and a little. save: inside one of the next saves.
    """
    rng, started_s = trial.rng, time.monotonic()
    aim = rng.choices(aims, [INSTANTS[name] for name in aims])[0]
    wanted, saves = watch.num_reports() + rng.randrange(1, NUM_STEPS), rng.randrange(1, 4)
    delay_s = rng.uniform(0.0, {"start": 12.0, "step": 0.3, "save": trial.save_s}[aim])
    watch.saw_begin()  # remains of a killed save
    reached_s = started_s if aim == "start" else None
    while reached_s is None or time.monotonic() < reached_s + delay_s:
        if finished(ranks):
            return False
        if time.monotonic() > started_s + LAUNCH_LIMIT_S:
            raise FaultsError(f"a launch in {watch.run_dir} was not done after {LAUNCH_LIMIT_S:.0f} s")
        if reached_s is None:
            saves -= watch.saw_begin()
            if (aim == "save" and saves <= 0) or (aim == "step" and watch.num_reports() >= wanted):
                reached_s = time.monotonic()
        time.sleep(0.002)
    return True


def wait_for_end(ranks: Ranks, limit_s: float) -> set[int]:
    """Waits until ranks have ended by themselves; their exit codes. Raises FaultsError when one does not in time."""
    deadline_s = time.monotonic() + limit_s
    while None in (codes := [rank.poll() for rank in ranks]):
        if time.monotonic() > deadline_s:
            raise FaultsError(f"of the ranks that were not disturbed some still run after {limit_s:.0f} s: {codes}")
        time.sleep(0.01)
    return {code for code in codes if code is not None}


def disturb(kind: str, ranks: Ranks, watch: Watch, trial: Trial) -> tuple[float, float | None] | None:
    """Waits for the instant of the fault; when it was, and how long the others took to end. None: the run was done."""
    if kind == "nan":  # it was given to the rank when it was launched
        while all(rank.poll() is None for rank in ranks):
            time.sleep(0.01)
        at_s, codes = time.time(), wait_for_end(ranks, BUSY_S)
        if codes != {EXIT_NAN}:
            raise FaultsError(f"a loss that is NaN ended the ranks in {watch.run_dir} with the codes {sorted(codes)}")
        return at_s, time.time() - at_s
    if not wait_for_instant(ranks, watch, trial, list(INSTANTS) if kind == "all" else IN_TRAINING):
        return None
    at_s = time.time()
    if kind == "all":
        return at_s, None
    chosen = trial.rng.randrange(trial.num_ranks)
    ranks[chosen].send_signal(signal.SIGKILL if kind == "kill" else signal.SIGSTOP)
    others = [rank for number, rank in enumerate(ranks) if number != chosen]
    wait_for_end(others, max(trial.limit_s, START_LIMIT_S) + BUSY_S)  # stage 2 may just have been begun
    return at_s, time.time() - at_s


def run_disturbed(run_dir: Path, trial: Trial, bar: Any) -> list[Fault]:
    """Starts a run until it is done and disturbs it while the tries allow; returns the faults."""
    watch, suffered = Watch(run_dir), list[Fault]()
    while (kind := trial.next_kind()) is not None and watch.num_saved() < len(STAGES) * NUM_STEPS:
        poisoned, remains, launched_s = None, watch.begun(), time.time()
        if kind == "nan":
            step = min(watch.num_saved() + trial.rng.randrange(4), len(STAGES) * NUM_STEPS - 1)
            poisoned = trial.rng.randrange(trial.num_ranks), step
        ranks = launch(run_dir, trial.overrides, trial.num_ranks, poisoned)
        try:
            instant = disturb(kind, ranks, watch, trial)
        finally:
            kill(ranks)
        note_first_step(watch, launched_s, suffered)
        if instant is None:
            return suffered
        lost = max(0, watch.num_reports() - watch.num_saved())
        suffered.append(Fault(kind, instant[0], bool(watch.begun().items() - remains.items()), lost, instant[1]))
        trial.faults.append(suffered[-1])
        bar.update()
    launched_s = time.time()
    run_undisturbed(run_dir, trial.overrides, trial.num_ranks)
    note_first_step(watch, launched_s, suffered)
    return suffered


def note_first_step(watch: Watch, launched_s: float, faults: list[Fault]) -> None:
    """When the launch trained, the faults before it learn when training went on."""
    trained_s = watch.first_report_after(launched_s)
    for fault in faults:
        if fault.again_s is None and trained_s is not None:
            fault.again_s = trained_s - fault.at_s


def run_trial(trial: Trial) -> None:
    """The undisturbed run, then as many disturbed ones as the tries take."""
    for stale in trial.out.glob("run-*"):
        shutil.rmtree(stale)
    reference = trial.out / "run-undisturbed"
    trial.save_s = statistics.median(run_undisturbed(reference, trial.overrides, trial.num_ranks).save_s)
    with progress_bar(total=trial.tries, desc="faults", unit="fault") as bar:
        while len(trial.faults) < trial.tries:
            run_dir = trial.out / f"run-{trial.num_runs:03d}"
            suffered = run_disturbed(run_dir, trial, bar)
            trial.num_runs += 1
            found = differences(run_dir, reference)
            trial.differences += [f"{run_dir.name}: {difference}" for difference in found]
            trial.num_wrong_samples += wrong_samples(run_dir)
            for fault in suffered:
                fault.survived = not found
            if not found:
                shutil.rmtree(run_dir)


def row(faults: list[Fault]) -> dict[str, Any]:
    """Returns the means and maxima of some faults' numbers."""

    def mean_and_most(values: Sequence[float | None]) -> list[float]:
        known = [value for value in values if value is not None]
        return [round(statistics.mean(known), 1), round(max(known), 1)] if known else []

    return {
        "tried": len(faults),
        "survived": sum(fault.survived for fault in faults),
        "inside_a_save": sum(fault.inside_a_save for fault in faults),
        "steps_lost": mean_and_most([fault.steps_lost for fault in faults]),
        "others_ended_s": mean_and_most([fault.ended_s for fault in faults]),
        "again_s": mean_and_most([fault.again_s for fault in faults]),
    }


def summary(trial: Trial, wall_s: float) -> dict[str, Any]:
    """Returns the content of the last line, which is JSON."""
    kinds = {kind: [fault for fault in trial.faults if fault.kind == kind] for kind in FAULTS}
    return {
        "ranks": trial.num_ranks,
        "limit_s": trial.limit_s,
        **row(trial.faults),
        "samples_lost_or_repeated": trial.num_wrong_samples,
        "runs": trial.num_runs,
        "bit_identical": not trial.differences,
        "differences": trial.differences,
        "wall_s": round(wall_s, 1),
        "kinds": {kind: row(faults) for kind, faults in kinds.items() if faults},
    }


def table(content: dict[str, Any]) -> str:
    """Returns a line for each kind of fault, with seconds and steps as mean (most)."""
    columns = ("tried", "survived", "inside_a_save", "steps_lost", "others_ended_s", "again_s")
    lines = ["".join(f"{name:>17}" for name in ("fault", *columns))]
    for kind, values in {**content["kinds"], "together": content}.items():
        cells = [values[name] for name in columns]
        texts = [f"{c[0]} ({c[1]})" if isinstance(c, list) and c else "-" if c == [] else str(c) for c in cells]
        lines.append("".join(f"{text:>17}" for text in (kind, *texts)))
    return "\n".join(lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tries", type=int, default=24, metavar="N", help="faults in all (%(default)s)")
    parser.add_argument("--ranks", type=int, default=2, metavar="N", help="ranks of a run (%(default)s)")
    parser.add_argument("--limit", type=float, default=30.0, metavar="S", help="train.hang_timeout_s (%(default)s)")
    parser.add_argument(
        "--out", type=user_path, default="runs/faults", help="folder of the shards and runs (%(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="of the instants (%(default)s)")
    return parser.parse_args()


def main() -> int:
    accept_any_text()
    arguments = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    started_s, out = time.monotonic(), arguments.out.resolve()
    try:
        limits = [f"train.hang_timeout_s={arguments.limit}", f"train.start_timeout_s={START_LIMIT_S}"]
        overrides = [*build_shards(out), *limits]
        rng = random.Random(arguments.seed)
        trial = Trial(out, overrides, arguments.ranks, arguments.tries, arguments.limit, rng)
        run_trial(trial)
    except (FaultsError, ValueError, OSError) as error:
        logging.error("error: %s", error)
        return 2
    content = summary(trial, time.monotonic() - started_s)
    print(table(content), *trial.differences, json.dumps(content), sep="\n")
    return 0 if content["bit_identical"] and not trial.num_wrong_samples else 1


if __name__ == "__main__":
    sys.exit(main())
