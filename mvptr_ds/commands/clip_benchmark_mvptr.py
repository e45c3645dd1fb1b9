"""Runs CLIP_benchmark on a trained model, and writes shards in the layout that it reads."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import expanded, user_path

EPILOG = """\
commands:
  shards    writes shards as wds/NAME of CLIP_benchmark, for retrieval or, with --label, for classification
  eval      clip_benchmark eval, by default with --model_type mvptr --num_workers 1; --pretrained names a run or an
            exported folder
  build     clip_benchmark build: a table of results

examples:
  %(prog)s shards shards/held_out benchmark/mine
  %(prog)s eval --pretrained runs/mine --dataset wds/mine --dataset_root benchmark/mine \\
    --task zeroshot_retrieval --recall_k 1 5 10 --no_amp --output retrieval.json

eval and build need clip_benchmark, in an environment of its own: docs/benchmarks.md.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=("shards", "eval", "build"), help="one of those below")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, metavar="...", help="its arguments")
    given = sys.argv[1:] if argv is None else argv
    command = parser.parse_args(given[:1]).command  # what follows is the command's, also --help
    run = _write_shards if command == "shards" else _run_theirs
    return run(f"{parser.prog} {command}" if command == "shards" else parser.prog, command, given[1:])


def _write_shards(prog: str, command: str, argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog=prog, description="Writes shards in the layout that CLIP_benchmark reads.")
    parser.add_argument("shards", type=expanded, metavar="SHARDS", help="folder or URL of shards")
    parser.add_argument("out", type=user_path, metavar="OUT", help="new folder to write")
    parser.add_argument("--split", default="test", metavar="NAME", help="folder of the tars in OUT (%(default)s)")
    parser.add_argument("--label", metavar="NAME", help="for classification: the label that holds the class")
    parser.add_argument("--class-names", type=user_path, metavar="FILE", help="for classification: a name a line")
    parser.add_argument("--templates", type=user_path, metavar="FILE", help="for classification: a template a line")
    args = parser.parse_args(argv)
    if args.label is None and (args.class_names or args.templates):
        parser.error("--class-names and --templates need --label")
    from mvptr_ds.benchmarks.labelled import read_class_names
    from mvptr_ds.benchmarks.webdataset_layout import write_classification, write_retrieval
    from mvptr_ds.benchmarks.zero_shot import TEMPLATES, read_templates
    from mvptr_ds.data.shards.index_builder import ensure_index
    from mvptr_ds.errors import USER_ERRORS

    try:
        _check_new(args.out)
        index = ensure_index(args.shards)
        if args.label is None:
            written = write_retrieval(index, args.out, args.split)
        else:
            templates = TEMPLATES if args.templates is None else read_templates(args.templates)
            names = None if args.class_names is None else read_class_names(args.class_names)
            written = write_classification(index, args.out, args.label, names, templates, args.split)
        captions = f" with {written.num_captions} captions" if written.num_captions else ""
        left_out = f", {written.num_left_out} records left out" if written.num_left_out else ""
        print(f"{args.out}: {written.num_pictures} pictures{captions}{left_out}")
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _check_new(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} holds something; name a new folder")


def _run_theirs(prog: str, command: str, argv: list[str]) -> int:
    """Runs a command of CLIP_benchmark, whose faults keep their traceback."""
    try:
        from clip_benchmark import cli, models
    except ImportError as error:
        remedy = "install clip_benchmark in an environment of its own (docs/benchmarks.md)"
        print(f"error: clip_benchmark cannot be imported ({error}); {remedy}", file=sys.stderr)
        return 1
    from mvptr_ds.benchmarks.adapter import register
    from mvptr_ds.benchmarks.results import MODEL
    from mvptr_ds.errors import CheckpointError, DataError

    register(models)
    ours = []
    if command == "eval":  # what is given comes later, and counts; webdataset refuses more workers than there are tars
        ours = ["--model_type", MODEL, "--model", MODEL, "--num_workers", "1"]
    sys.argv = [prog, command, *ours, *argv]  # it reads no other arguments
    try:
        cli.main()
    except (CheckpointError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0
