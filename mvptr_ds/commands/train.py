"""Trains as `mvptr_ds/train.py` does, in this process or, with `--ranks`, through DeepSpeed's launcher."""

from __future__ import annotations

import argparse
import os
import sys

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import whole_number


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status of the training; with `--ranks`, the launcher takes this process's place."""
    accept_any_text()
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--ranks", "--num_gpus", type=whole_number(1), metavar="N", help="processes, one a GPU")
    own, others = parser.parse_known_args(argv)
    if own.ranks is not None and not {"-h", "--help"} & set(others):
        sys.stdout.flush()
        os.execv(sys.executable, launch(own.ranks, others))  # signals then reach the launcher as if it had been typed
    from mvptr_ds import train  # brings torch, which the launcher need not wait for

    return train.main(others)


def launch(num_ranks: int, arguments: list[str]) -> list[str]:
    """Returns the command that trains on `num_ranks` ranks of this machine, which meet at MASTER_PORT if it is set."""
    port = os.environ.get("MASTER_PORT")  # which DeepSpeed's launcher does not heed
    ports = [] if port is None else ["--master_port", port]
    launcher = [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(num_ranks), *ports]
    return [*launcher, "--module", "mvptr_ds.train", *arguments]
