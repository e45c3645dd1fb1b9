#!/usr/bin/env python3
"""Trains the models of the default phrase parser from captions, on trees that spaCy makes of them."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from dataclasses import fields
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[3]))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

from mvptr_ds.corpus.concepts.backends import MODELS
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path
from tools.dev.parser.make_models import Settings, make_models
from tools.dev.parser.training_trees import read_captions

EPILOG = """needs pip install -e '.[spacy]' lemminflect; equal captions, settings and versions give equal models.

examples:
  python tools/dev/parser/train_parser.py captions_train2014.json captions_val2014.json --exclude dev.jsonl
  python tools/dev/parser/train_parser.py captions.json --num-captions 4000 --num-parser-epochs 2 --out runs/models
"""


def main() -> int:
    """Returns the exit status: 0 done, 1 something is wrong with the files, 2 wrong usage."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("captions", type=user_path, nargs="+", metavar="FILE", help="COCO caption annotations (JSON)")
    parser.add_argument(
        "--exclude",
        type=user_path,
        metavar="FILE",
        help='JSON lines with a "caption": leave these captions out, and all others of their images',
    )
    parser.add_argument(
        "--out", type=user_path, default=MODELS, metavar="DIR", help="default: the package's own models"
    )
    for field in fields(Settings):
        name = "--" + field.name.replace("_", "-")
        parser.add_argument(name, type=type(field.default), default=field.default, metavar="N", help="%(default)s")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    settings = Settings(**{field.name: getattr(args, field.name) for field in fields(Settings)})
    try:
        about = make_models(read_captions(args.captions, args.exclude), args.out, settings)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(json.dumps(about, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
