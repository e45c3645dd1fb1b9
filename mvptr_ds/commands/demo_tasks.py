"""Fine-tunes a trained demo for four tasks, each from several starts, and shows what pre-training is worth.

scratch        fresh weights of the same shape, the same features
stage2_alone   stage 2 without stage 1, as many steps as both
pretrained     the demo run: stage 1, then stage 2
text_alone     the demo run, fine-tuned and tested with the pictures exchanged: must stay at each kind's prior
permuted       the model of `pretrained`, tested with the pictures exchanged: must fall to the prior
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
from pathlib import Path

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

EPILOG = """\
examples:
  %(prog)s
  %(prog)s --demo runs/demo-stamps --steps 300 --batch-size 64 --held-out-scenes 500 --seeds 0 1 2
  %(prog)s --tasks entailment --arms scratch pretrained --steps 1000 --out runs/demo-tasks-1000
  %(prog)s --tasks referring --set referring.probe=true --out runs/demo-probe     # the head alone is trained

The demo run is made by `make demo`, or `mvptr demo`. Items are drawn from its scenes, so that a text that is right of
one picture is wrong of another. Scores are of held-out scenes, without any object tags, in percent.
An interrupted call goes on when it is typed again: what is done stays. OUT/report.json holds the table as
{TASK: {ARM: {"score", "by_kind"}}}. Exit status: 0 done, 1 a run failed (its log is named), 2 wrong usage."""
TASKS = ("retrieval", "vqa", "entailment", "referring")
ARMS = ("scratch", "stage2_alone", "pretrained", "text_alone")


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    arguments = _parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # torch takes seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.errors import USER_ERRORS, exit_code
    from mvptr_ds.transfer.arms import Plan, jobs_of
    from mvptr_ds.transfer.runs import run_all
    from mvptr_ds.transfer.table import gather, table

    try:
        sizes = {name: getattr(arguments, name) for name in ("steps", "scenes", "held_out_scenes", "batch_size")}
        plan = Plan.of(arguments.demo, arguments.out, arguments.set, **sizes)
        jobs = jobs_of(plan, arguments.tasks, arguments.seeds, arguments.arms)
        run_all(jobs, arguments.processes)
        report = gather(jobs)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    (arguments.out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    print(table(report))
    print(f"written: {arguments.out / 'report.json'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, number = parser.add_argument, whole_number(1)
    add("--demo", type=user_path, default=Path("runs/demo"), metavar="RUN", help="the demo run (default: %(default)s)")
    add("--out", type=user_path, default=Path("runs/demo-tasks"), metavar="DIR", help="where to write (%(default)s)")
    add("--tasks", nargs="+", choices=TASKS, default=TASKS, metavar="TASK", help=f"of {', '.join(TASKS)} (all)")
    add("--arms", nargs="+", choices=ARMS, default=ARMS, metavar="ARM", help=f"of {', '.join(ARMS)} (all)")
    add("--steps", type=number, default=40, metavar="N", help="steps of fine-tuning (%(default)s)")
    add("--scenes", type=number, default=1500, metavar="N", help="scenes to fine-tune on (%(default)s)")
    add("--held-out-scenes", type=number, default=150, metavar="N", help="at most so many to test on (%(default)s)")
    add("--batch-size", type=number, default=32, metavar="N", help="texts of a step (%(default)s)")
    add("--seeds", nargs="+", type=int, default=[0], metavar="N", help="a run each; the table has their mean (0)")
    add("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of every run, as of train.py")
    add("--processes", type=number, default=os.cpu_count() or 1, metavar="N", help="runs at a time (%(default)s)")
    return parser
