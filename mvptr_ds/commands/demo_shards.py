"""Builds the demo shards: scenes of drawn shapes, or of photo cut-outs with region features.

%(prog)s --source shapes --out runs/demo/shards
"""

from __future__ import annotations

import argparse
import logging
import os
import time

from mvptr_ds.demo.build import SOURCES, build_demo_shards
from mvptr_ds.demo.marker import FolderTakenError
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--source",
        choices=SOURCES,
        default="shapes",
        help="shapes: drawn shapes, images only, no download. stamps: photo cut-outs of Debian's "
        "tuxpaint-stamps-default with region features, from MVPTR_STAMPS or /usr/share/tuxpaint/stamps, or downloaded "
        "into .cache/ (default: %(default)s)",
    )
    parser.add_argument("--out", type=user_path, required=True, help="folder of the shards; it must hold nothing else")
    parser.add_argument("--train", type=int, default=6000, metavar="N", help="training scenes (%(default)s)")
    parser.add_argument("--held-out", type=int, default=500, metavar="N", help="held-out scenes (%(default)s)")
    parser.add_argument("--seed", type=int, default=0, metavar="S", help="seed of every scene (%(default)s)")
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="P",
        help="processes that draw (%(default)s, the cores here)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start_s = time.monotonic()
    try:
        build_demo_shards(
            arguments.out,
            arguments.source,
            num_train=arguments.train,
            num_held_out=arguments.held_out,
            seed=arguments.seed,
            num_processes=arguments.processes,
        )
    except FolderTakenError as error:
        logging.error("error: %s: give those arguments, name another folder, or remove this one", error)
        return 1
    except USER_ERRORS as error:
        logging.error("error: %s", error)
        return 1
    num_bytes = sum(path.stat().st_size for path in arguments.out.rglob("*.tar"))
    logging.info("%.1f MiB of shards, %.1f s", num_bytes / 2**20, time.monotonic() - start_s)
    return 0
