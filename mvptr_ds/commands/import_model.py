"""Turns a checkpoint of the published code, pre-trained or fine-tuned, into a model folder."""

from __future__ import annotations

import argparse
import sys

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

TASKS = ("pretraining", "retrieval", "vqa", "entailment", "referring")
EPILOG = """\
CHECKPOINT_FOLDER holds config.json beside pytorch_model.bin or model.safetensors, and vocab.txt where the words are not
those of bert-base-uncased. Nothing of a pickle is run. What the checkpoint lacks starts fresh, and is listed.

examples:
  %(prog)s checkpoints/base --task pretraining --id2phrase id2phrase.json --out models/base
  %(prog)s checkpoints/vqa --task vqa --answers answers.json --id2phrase id2phrase.json --out models/vqa
  %(prog)s checkpoints/re --task referring --id2phrase id2phrase.json --out models/re referring.score=region

A run starts from the folder with run.init_from=MODEL_FOLDER and --config MODEL_FOLDER/mvptr.yaml.
eval.py MODEL_FOLDER data.held_out=SHARDS evaluates it. docs/export.md says what stands where.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    args = _parse_arguments(argv)
    # torch and transformers take seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.commands.importing import import_published
    from mvptr_ds.errors import USER_ERRORS

    try:
        lines = import_published(args.checkpoint, args.task, args.out, args.answers, args.id2phrase, args.overrides)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, f"{args.out}: a model folder of {args.task}"]))
    return 0


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("checkpoint", type=user_path, metavar="CHECKPOINT_FOLDER", help="folder of the published checkpoint")
    add("--task", choices=TASKS, required=True, help="what it was trained for")
    add("--out", type=user_path, required=True, metavar="MODEL_FOLDER", help="new folder to write")
    add("--answers", type=user_path, metavar="FILE", help="of vqa: JSON list of its answers, in the order of its rows")
    add("--id2phrase", type=user_path, metavar="FILE", help="its phrase list; without it the phrases' rows are lost")
    add("overrides", nargs="*", metavar="section.key=value", help="overrides of the configuration in the folder")
    return parser.parse_intermixed_args(argv)
