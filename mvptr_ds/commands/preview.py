"""Writes an HTML page of a folder of shards: records with their boxes and phrases, and statistics."""

from __future__ import annotations

import argparse
import os
import sys

from mvptr_ds.corpus.preview.page import write_preview
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

_MAX_BAD_LINES = 5
EPILOG = """\
examples:
  %(prog)s shards/train --out preview.html
  %(prog)s shards/train --out preview.html --num 60 --seed 7 --stats-records 20000 --processes 4
  %(prog)s shards/train --out preview.html --sidecars shards/regions shards/phrases

The page is one file for any browser and needs no network; images are inside, scaled to 480 pixels.
A record or image that cannot be read is shown with the reason. With sidecars the page shows what training reads:
records that every sidecar has. A folder without an index gets one.

Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage.
"""


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="folder that holds the .tar files")
    parser.add_argument(
        "--out", type=user_path, required=True, metavar="FILE", help="the page to write, such as preview.html"
    )
    parser.add_argument(
        "--num", type=whole_number(0), default=24, metavar="N", help="records to show (default: %(default)s)"
    )
    parser.add_argument(
        "--seed", type=whole_number(0), default=0, help="seed of the records drawn (default: %(default)s)"
    )
    parser.add_argument(
        "--keys", nargs="+", default=[], metavar="KEY", help="show these records instead, such as those of a bad sample"
    )
    parser.add_argument(
        "--sidecars",
        type=user_path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="sidecar folders to join by key, as in training",
    )
    parser.add_argument(
        "--stats-records",
        type=whole_number(0),
        default=2000,
        metavar="N",
        help="records to draw for the statistics (default: %(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="processes that read them (default: %(default)s)",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 something is wrong, 2 wrong usage."""
    accept_any_text()
    args = _arguments(argv)
    try:
        preview = write_preview(
            args.folder, args.out, args.num, args.stats_records, args.seed, args.processes, args.sidecars, args.keys
        )
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    bad = preview.measures.bad
    print(
        f"{args.out}: {preview.num_shown} of {preview.num_records} records shown, "
        f"{preview.measures.records['read']} counted, {len(bad)} unreadable, "
        f"{os.path.getsize(args.out) / 2**20:.1f} MiB"
    )
    for line in bad[:_MAX_BAD_LINES]:
        print(f"  unreadable: {line}")
    return 0
