"""Finds the phrases of captions, (noun), (noun, attribute) and (subject, relation, object), with their spans."""

from __future__ import annotations

import argparse
import json
import logging
import os
import sys
import time
from pathlib import Path

from mvptr_ds.corpus.concepts.backends import BACKENDS
from mvptr_ds.corpus.concepts.caption_files import extract_file
from mvptr_ds.corpus.concepts.marking import mark
from mvptr_ds.corpus.concepts.parser import PhraseParser
from mvptr_ds.corpus.concepts.scoring import read_known, score
from mvptr_ds.corpus.concepts.spice import import_spice
from mvptr_ds.corpus.phrases.phrase_sidecar import extract_phrases
from mvptr_ds.data.schema import Phrase
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

EPILOG = """examples:
  %(prog)s shards/train sidecars/phrases/train
  %(prog)s captions.txt phrases.jsonl --processes 8
  %(prog)s captions.jsonl phrases.jsonl --parser spacy
  %(prog)s --show "Two dogs chase a ball on the beach."
  %(prog)s --score dev.jsonl
  %(prog)s spice_input.json phrases.jsonl --spice spice_output.json

The phrases of a folder of shards go to a sidecar, which training joins by key (data.sidecars=[OUT]).
A text file holds one caption a line. JSON lines hold "caption": text or "captions": [text, ...]; other fields are kept.
After an interruption, the same command resumes where it stopped. A file that holds something else is not replaced.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status: 0 done, 1 something is wrong with the files, 2 wrong usage."""
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "source", type=user_path, nargs="?", metavar="IN", help="captions: .txt, .jsonl or a folder of shards"
    )
    parser.add_argument("out", type=user_path, nargs="?", metavar="OUT", help="JSON lines or folder to write")
    parser.add_argument(
        "--parser", choices=sorted(BACKENDS), default="default", help="parser of the captions (%(default)s)"
    )
    parser.add_argument(
        "--processes",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        metavar="N",
        help="processes (%(default)s, the cores here)",
    )
    parser.add_argument(
        "--spice", type=user_path, metavar="FILE", help="use the tuples that SPICE wrote for its input IN"
    )
    parser.add_argument(
        "--show", action="append", metavar="TEXT", help="print a text with its phrases marked; may be repeated"
    )
    parser.add_argument(
        "--score",
        type=user_path,
        metavar="FILE",
        help='compare the phrases with JSON lines {"caption", "tuples"}; the last line printed is JSON',
    )
    parser.add_argument(
        "--examples",
        type=whole_number(0),
        default=20,
        metavar="N",
        help="captions with errors that --score prints (%(default)s)",
    )
    args = parser.parse_args(argv)
    modes = [args.show is not None, args.score is not None, args.source is not None]
    if sum(modes) != 1 or (args.source is None) != (args.out is None):
        parser.error("give IN and OUT, or --show TEXT, or --score FILE")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        if args.show is not None:
            show(args.show, args.parser)
        elif args.score is not None:
            show_score(args.score, args.parser, args.examples)
        else:
            if args.spice is not None:
                summary = import_spice(args.source, args.spice, args.out)
            elif args.source.is_dir():
                summary = extract_phrases(args.source, args.out, args.parser, args.processes)
            else:
                summary = extract_file(args.source, args.out, args.parser, args.processes)
            print("\n".join([str(args.out), *summary.lines()]))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def show(texts: list[str], backend: str) -> None:
    """Prints each text with its phrases marked."""
    for text, phrases in zip(texts, PhraseParser(backend).parse(texts), strict=True):
        print("\n".join(mark(text, phrases)))


def show_score(path: Path, backend: str, num_examples: int) -> None:
    """Prints the figures of each kind, captions with errors, and JSON as the last line."""
    known = read_known(path)
    parser = PhraseParser(backend)
    parser.parse(["A warm-up."])
    found: list[list[Phrase]] = []
    start_s = time.process_time()
    for first in progress_bar(range(0, len(known), 1024), desc="parse"):
        found += parser.parse([item.caption for item in known[first : first + 1024]])
    cpu_s = time.process_time() - start_s
    result = score(known, found)
    print(f"{len(known)} captions, parser {parser.version}")
    print("\n".join(result.lines(num_examples)))
    per_cpu_s = round(len(known) / max(cpu_s, 1e-9), 1)
    print(json.dumps({**result.to_json(), "captions_per_cpu_s": per_cpu_s}))
