"""Builds the demo's shards in the working folder, trains both stages, and evaluates on held-out scenes."""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
from types import FrameType

from mvptr_ds.commands.train import launch
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import whole_number

CONFIGS = {"shapes": "demo", "stamps": "demo_stamps"}
EPILOG = """\
examples:
  %(prog)s
  %(prog)s --source stamps
  %(prog)s --ranks 1 run.dir=runs/short stage1.max_steps=50 stage2.max_steps=50

A demo that was trained before is set aside, and trained anew.
Exit status: that of the training, or of the evaluation."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: of the training if that failed or was stopped, else of the evaluation."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add(
        "--source",
        choices=tuple(CONFIGS),
        default="shapes",
        help="shapes: drawn shapes, no download. stamps: photo cut-outs, which need the extra mvptr_ds[stamps] and "
        "Debian's tuxpaint-stamps-default (default: %(default)s)",
    )
    add("--ranks", "--num_gpus", type=whole_number(1), metavar="N", help="processes (default: one a GPU, or 2 on CPUs)")
    add("--deepspeed", default="z2", metavar="JSON", help="DeepSpeed JSON or the name of a packaged one (%(default)s)")
    add("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration")
    args = parser.parse_intermixed_args(argv)
    # torch takes seconds to import, which --help and wrong usage need not wait for
    import torch

    from mvptr_ds import eval as evaluation
    from mvptr_ds.config import load_config
    from mvptr_ds.errors import USER_ERRORS, exit_code

    try:
        config = load_config(CONFIGS[args.source], args.overrides)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return exit_code(error)
    arguments = ["--deepspeed", args.deepspeed, "--config", CONFIGS[args.source], *args.overrides, "train.resume=never"]
    code = _run(launch(args.ranks or torch.cuda.device_count() or 2, arguments))
    return code or evaluation.main([config.run.dir])


def _run(command: list[str]) -> int:
    """Returns the exit status of a command. While it runs, signals are its own: it may have to save first."""
    process = subprocess.Popen(command)

    def hand_on(number: int, frame: FrameType | None) -> None:
        if number != signal.SIGINT:  # which a terminal has sent to it, too
            process.send_signal(number)

    before = {number: signal.signal(number, hand_on) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        code = process.wait()
        return code if code >= 0 else 128 - code  # ended by a signal: as a shell reports it
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
