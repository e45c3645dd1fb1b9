"""Runs an object detector over image shards and writes a sidecar of boxes, tags, scores and, if asked, features."""

from __future__ import annotations

import argparse
import sys

from mvptr_ds.corpus.regions.detection import RegionChoice
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import expanded, user_path, whole_number

EPILOG = """\
MODEL is a local folder (config.json, preprocessor_config.json, weights) or a name on the Hugging Face hub. A local
folder needs no network. Training joins the sidecar to the shards by key (data.sidecars=[DIR]).

  %(prog)s shards/train --model PekingU/rtdetr_r50vd_coco_o365 --out sidecars/train_rtdetr --features
  %(prog)s shards/train --model models/detr --out try --limit 100    # to see what it costs

After an interruption, the same command resumes with the missing shards. docs/regions.md names models, and says what is
dropped.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        choice = RegionChoice(args.score_threshold, args.nms_iou, args.max_regions)
    except ValueError as error:
        parser.error(str(error))
    # torch and transformers take seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.corpus.regions.extraction import extract_regions

    try:
        summary = extract_regions(
            args.shards,
            args.model,
            args.out,
            choice,
            revision=args.revision,
            features=args.features,
            batch_size=args.batch_size,
            device=args.device,
            precision=args.precision,
            num_processes=args.processes,
            limit=args.limit,
        )
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([f"{args.out}:", *summary.lines()]))
    if not summary.counts["records"]:
        print("error: no picture could be used; the reasons stand above", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("shards", type=user_path, metavar="SHARDS", help="folder of image shards")
    parser.add_argument("--model", type=expanded, required=True, help="detector: folder or hub name")
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub model")
    parser.add_argument("--out", type=user_path, required=True, metavar="DIR", help="folder of the sidecar")
    parser.add_argument(
        "--features", action="store_true", help="also write KEY.npy, the last decoder state of each region"
    )
    parser.add_argument(
        "--score-threshold", type=float, default=0.3, metavar="X", help="drop boxes with a lower score (%(default)s)"
    )
    parser.add_argument(
        "--nms-iou",
        type=float,
        default=0.5,
        metavar="X",
        help="of two boxes of one tag with a higher overlap, keep the better (%(default)s; 1 keeps all)",
    )
    parser.add_argument("--max-regions", type=int, default=50, metavar="N", help="regions of an image (%(default)s)")
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=8, metavar="N", help="images of a batch (%(default)s)"
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: cuda if there is a GPU"
    )
    parser.add_argument(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="auto: bfloat16 on a GPU that supports it, else float32",
    )
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        default=1,
        metavar="N",
        help="processes, each with a copy of the model (1); 2 to 4 keep a GPU busy while images are decoded",
    )
    parser.add_argument("--limit", type=whole_number(1), metavar="N", help="read the first N records only")
    return parser
