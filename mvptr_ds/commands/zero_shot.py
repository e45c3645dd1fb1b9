"""Classifies pictures by the names of their classes, without training on them: zero-shot, top-1 and top-5."""

from __future__ import annotations

import argparse
import sys

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import expanded, user_path, whole_number

EPILOG = """\
examples:
  %(prog)s runs/mine pictures                     a folder of pictures for each class, pictures/dog/1.jpg
  %(prog)s runs/mine shards/animals --label kind  shards whose captions have "labels": {"kind": "dog"}
  %(prog)s runs/mine pictures --templates templates.txt --class-names names.txt --out zero_shot.json

A template is a line such as "a picture of a {}."; {c} stands for the name, too. Several are averaged.
The JSON has the form that CLIP_benchmark writes. docs/benchmarks.md says what the numbers mean.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=user_path, metavar="RUN", help="run, checkpoint, model folder or name on the hub")
    parser.add_argument("pictures", type=expanded, metavar="PICTURES", help="folder of class folders, or shards")
    parser.add_argument(
        "--label", default="class", metavar="NAME", help="label of the captions of shards (%(default)s)"
    )
    parser.add_argument(
        "--class-names", type=user_path, metavar="FILE", help="a name a line, in the order of the sorted folders"
    )
    parser.add_argument("--templates", type=user_path, metavar="FILE", help="a template a line (a picture of a {}.)")
    parser.add_argument("--detector", metavar="NAME", help="finds regions where there are none (a grid)")
    parser.add_argument(
        "--batch-size", type=whole_number(1), default=64, metavar="N", help="pictures or texts at once (%(default)s)"
    )
    parser.add_argument("--out", type=user_path, metavar="FILE", help="write the scores as JSON")
    args = parser.parse_args(argv)
    # torch and transformers take seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.benchmarks.labelled import open_labelled, read_class_names
    from mvptr_ds.benchmarks.results import CLASSIFICATION, result, write_result
    from mvptr_ds.benchmarks.zero_shot import TEMPLATES, classify, read_templates, table
    from mvptr_ds.errors import USER_ERRORS
    from mvptr_ds.inference.loading import load

    try:
        templates = TEMPLATES if args.templates is None else read_templates(args.templates)
        names = None if args.class_names is None else read_class_names(args.class_names)
        given = open_labelled(args.pictures, args.label, names)
        model = load(args.run, detector=args.detector)
        model.batch_size = args.batch_size
        scores = classify(model, given, templates)
        print(table(scores))
        if args.out is not None:
            content = result(args.pictures, str(args.run), CLASSIFICATION, scores.metrics)
            write_result(args.out, {**content, "details": scores.details})
            print(f"written: {args.out}")
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
