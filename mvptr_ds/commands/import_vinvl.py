"""Turns region features and predictions of VinVL or Oscar (.tsv files) into a sidecar of boxes, tags and KEY.npy."""

from __future__ import annotations

import argparse
import sys

from mvptr_ds.corpus.regions.vinvl import FEATURE_DIM, KeyRule, import_vinvl
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

EPILOG = """\
Training joins the sidecar to image shards by key (data.sidecars), so give --keys the value that build_shards.py had.
COCO's keys have twelve digits, but these files write 391895: give --key-width 12.

  %(prog)s --features coco/features.tsv --predictions coco/predictions.tsv --key-width 12 \\
      --version x152c4 --out sidecars/coco_vinvl
  %(prog)s --predictions gqa/predictions.tsv --version x152c4 --out sidecars/gqa_tags    # boxes and tags only

.lineidx files and imageid2idx.json beside the .tsv files are optional; they are used and checked where they exist.
After an interruption, the same command resumes with what is missing. docs/regions.md says what is dropped and why.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--predictions", type=user_path, required=True, metavar="TSV", help="predictions.tsv or label.tsv"
    )
    parser.add_argument(
        "--features", type=user_path, metavar="TSV", help="features.tsv; without it, boxes and tags only"
    )
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder of the sidecar")
    parser.add_argument("--version", required=True, help="version of the extractor vinvl, such as x152c4")
    parser.add_argument(
        "--feature-dim",
        type=whole_number(7),
        default=FEATURE_DIM,
        metavar="N",
        help="numbers of a box in features.tsv, with the 6 of its geometry (%(default)s)",
    )
    parser.add_argument(
        "--keys", choices=("image-id", "hash"), default="image-id", help="--keys of build_shards.py (%(default)s)"
    )
    parser.add_argument(
        "--key-width",
        type=whole_number(0),
        default=0,
        metavar="N",
        help="digits of a key (%(default)s: as the files write it; COCO: 12)",
    )
    parser.add_argument(
        "--max-regions", type=whole_number(1), default=50, metavar="N", help="regions of an image (%(default)s)"
    )
    parser.add_argument(
        "--records-per-shard",
        type=whole_number(1),
        default=10_000,
        metavar="N",
        help="records of a shard (%(default)s)",
    )
    parser.add_argument("--processes", type=whole_number(1), default=1, metavar="N", help="processes (%(default)s)")
    args = parser.parse_args(argv)
    try:
        summary = import_vinvl(
            args.predictions,
            args.features,
            args.out,
            args.version,
            KeyRule(args.keys, args.key_width),
            feature_dim=args.feature_dim,
            records_per_shard=args.records_per_shard,
            max_regions=args.max_regions,
            num_processes=args.processes,
        )
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([f"{args.out}:", *summary.lines()]))
    if not summary.counts["records"]:
        print("error: no image could be used; the reasons stand above", file=sys.stderr)
        return 1
    return 0
