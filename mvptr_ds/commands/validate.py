"""Validates a folder of shards or sidecar tars; writes its index, or a folder of what is sound in it.

Every tar is read to its end, also behind damage. Every record is read and its image decoded. All that is wrong is
counted, with examples that name shard, byte and key.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys

from mvptr_ds.corpus.validating.record_checks import IMG2DATASET
from mvptr_ds.corpus.validating.validation import Result, validate
from mvptr_ds.data.shards.index_builder import use_build_shards
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

EPILOG = """examples:
  %(prog)s shards/train                         writes the index if nothing is wrong
  %(prog)s shards/train --repair shards/sound   copies what is sound into another folder
  %(prog)s /mnt/shards --out indices/train      the index elsewhere: data.train=indices/train
  %(prog)s shards/train --no-decode             quicker: reads only the headers of images

After an interruption, the same command resumes where it stopped if the tars are the same.
Exit status: 0 the index or the repaired folder is written, 1 something is wrong, 2 wrong usage.
"""


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=user_path, metavar="FOLDER", help="folder that holds the .tar files")
    target = parser.add_mutually_exclusive_group()
    target.add_argument(
        "--out", type=user_path, metavar="DIR", help="write the index there, for a FOLDER that is read-only"
    )
    target.add_argument(
        "--repair",
        type=user_path,
        metavar="OUT",
        help="write the sound records and their index there, members unchanged",
    )
    parser.add_argument(
        "--decode",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="decode every image to its end (%(default)s)",
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=os.cpu_count() or 1,
        metavar="P",
        help="processes, each reads a tar at a time (%(default)s)",
    )
    parser.add_argument(
        "--max-examples",
        type=int,
        default=5,
        metavar="N",
        help="examples of each reason, at most 5 of a shard (%(default)s)",
    )
    return parser.parse_args(argv)


def report(result: Result) -> None:
    for name, number in result.summary.counts.items():
        print(f"{name}: {number:,}")
    for reason, number in sorted(result.summary.dropped.items(), key=lambda item: (-item[1], item[0])):
        print(f"wrong {number:,}: {reason}")
        for case in result.examples.get(reason, ()):
            print(f"    {case}")
    for warning in result.warnings:
        print(f"note: {warning}")
    if result.index is not None:
        index = result.index
        print(f"index of {index.folder}: {index.num_shards} shards, {index.num_records} records, {len(index)} samples")


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    arguments = parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        result = validate(
            arguments.folder,
            arguments.out,
            arguments.repair,
            arguments.decode,
            arguments.processes,
            arguments.max_examples,
        )
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    report(result)
    if result.index is None:
        num_wrong = sum(result.summary.dropped.values())
        remedy = ""
        if result.summary.dropped[IMG2DATASET]:
            remedy = f"; {use_build_shards(arguments.folder)}"
        elif not arguments.repair and result.summary.counts["records sound"]:
            remedy = "; --repair OUT writes what is sound"
        print(f"error: {arguments.folder}: {num_wrong} things are wrong, no index was written{remedy}", file=sys.stderr)
        return 1
    if arguments.repair and result.summary.dropped:
        print(
            f"note: {arguments.repair} holds other samples than {arguments.folder}: a run that has begun goes on with "
            "the folder that it began with, whose bad samples it replaces; to train on this one, start with another "
            "run.dir and run.init_from=RUN"
        )
    return 0
