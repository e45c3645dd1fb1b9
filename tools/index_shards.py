#!/usr/bin/env python3
"""Validates a folder of tar shards and writes its manifest.json and index.npy."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from mvptr_ds.data.schema import DataError
from mvptr_ds.data.shards import build_index


def main() -> int:
    """Returns the exit status: 0 done, 1 something is wrong with the shards, 2 wrong usage."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog="Exit status 1 and one line that names shard, byte, key and remedy when something is wrong.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder that holds the .tar files")
    parser.add_argument(
        "--out", type=Path, metavar="DIR", help="write there instead, when FOLDER is read-only (then data.train=DIR)"
    )
    args = parser.parse_args()
    try:
        index = build_index(args.folder, args.out)
    except (DataError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(
        f"{args.folder}: {index.num_shards} shards, {index.num_records} records, {len(index)} samples, "
        f"{len(index.tags)} tags, {index.num_bytes / 2**20:.1f} MiB"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
