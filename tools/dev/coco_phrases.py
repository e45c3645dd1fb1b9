#!/usr/bin/env python3
"""COCO's captions -> shards, phrase sidecars, phrase vocabulary and its figures, from the two annotation files.

Writes OUT/shards, OUT/phrases (the sidecars), OUT/phrase_vocab.json of all captions, and
OUT/phrase_vocab_train2014.json, whose coverage of the captions of val2014 is measured."""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

EPILOG = """\
example:
  %(prog)s annotations --out coco

Each step is one of the other tools, shown as it is run. Interrupted, the same command goes on where it stopped.
Exit status: 0 done, 1 a step failed (its error is the last line), 2 wrong usage."""
TOOLS = Path(__file__).resolve().parents[1]
SPLITS = ("train2014", "val2014")


def main() -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "annotations", type=user_path, help="folder of captions_train2014.json and captions_val2014.json"
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder of all that is written")
    parser.add_argument("--min-count", type=int, default=50, metavar="N", help="captions of a phrase (%(default)s)")
    cores = os.cpu_count() or 1
    parser.add_argument("--processes", type=int, default=cores, metavar="P", help="(%(default)s, the cores here)")
    args = parser.parse_args()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda received, frame: sys.exit(128 + received))
    return next((1 for command in _steps(args) if not _run(command, args.processes)), 0)


def _steps(args: argparse.Namespace) -> list[list[object]]:
    shards, phrases = args.out / "shards", args.out / "phrases"
    both = [phrases / split for split in SPLITS]
    count: list[object] = ["--min-count", args.min_count]
    steps: list[list[object]] = []
    for split, sidecar in zip(SPLITS, both, strict=True):
        source = args.annotations / f"captions_{split}.json"
        steps.append(["build_shards.py", "coco", source, "--images", "none", "--out", shards / split])
        steps.append(["extract_phrases.py", shards / split / "train", sidecar])
    steps.append(["build_vocab.py", *both, "--out", args.out / "phrase_vocab.json", "--stats", *count])
    of_train = args.out / "phrase_vocab_train2014.json"
    steps.append(["build_vocab.py", both[0], "--out", of_train, "--held-out", both[1], *count])
    return steps


def _run(step: list[object], num_processes: int) -> bool:
    """Runs a step and prints what it cost, its processes included; whether it succeeded."""
    command = [*map(str, step), "--processes", str(num_processes)]
    print("\n$ " + " ".join(command), flush=True)
    start_s = time.monotonic()
    process = subprocess.Popen([sys.executable, str(TOOLS / command[0]), *command[1:]])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except SystemExit:
        process.terminate()
        process.wait()
        raise
    cpu_s = usage.ru_utime + usage.ru_stime
    peak_mib = usage.ru_maxrss / 1024
    wall_s = time.monotonic() - start_s
    print(f"[{wall_s:.0f} s, {cpu_s:.0f} s of CPU, at most {peak_mib:.0f} MiB a process]", flush=True)
    return os.waitstatus_to_exitcode(status) == 0


if __name__ == "__main__":
    sys.exit(main())
