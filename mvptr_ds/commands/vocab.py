"""Builds the phrase vocabulary: the frequent phrases, each with its row of the embedding table."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

from mvptr_ds.corpus.phrases.id2phrase import read_id2phrase, write_id2phrase
from mvptr_ds.corpus.phrases.phrase_counts import count_corpus
from mvptr_ds.corpus.phrases.phrase_coverage import coverage_lines, measure_coverage, most_frequent_lines
from mvptr_ds.corpus.resumable_jobs import put_in_place
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

EPILOG = """\
INPUT is a folder of shards whose captions have phrases, or a sidecar folder or .jsonl file of extract_phrases.py.
Several may be given. Each caption must come once: give the shards or their sidecar, not both.

examples:
  %(prog)s sidecars/phrases/train --out phrase_vocab.json
  %(prog)s sidecars/coco sidecars/sbu cc3m.jsonl --out phrase_vocab.json --min-count 50 --max-phrases 60000
  %(prog)s sidecars/phrases/train --out phrase_vocab.json --stats --held-out sidecars/phrases/held_out
  %(prog)s --from-id2phrase id2phrase_new.json --out phrase_vocab.json    (the published list keeps its rows)
  %(prog)s --merge phrase_vocab.json other.json --out merged.json         (phrases of the first keep their rows)
  %(prog)s --merge phrase_vocab.json --out copy.json --export-id2phrase id2phrase.json

Counts are exact. Memory holds the vocabulary and 200,000 phrases a process; OUT.parts on disk holds the rest.
After an interruption, the same command resumes where it stopped. A FILE that holds something else is not replaced.
docs/measurements/vocabulary.md has the figures of COCO.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    args = _parse_arguments(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start_s = time.monotonic()
    parts = args.out.with_name(args.out.name + ".parts")
    try:
        words = WordPiece(args.word_vocab)
        vocab, lines = _make_vocab(args, words, parts)
        _write(args.out, vocab.save)
        if args.export_id2phrase is not None:
            _write(args.export_id2phrase, lambda path: write_id2phrase(vocab, path))
        if args.stats:
            lines += [
                "most frequent, with the number of their captions",
                *most_frequent_lines(vocab, args.most_frequent),
            ]
            coverage = measure_coverage(args.inputs, args.out, words, parts / "stats", args.processes)
            lines += coverage_lines("these inputs", coverage)
        if args.held_out:
            coverage = measure_coverage(args.held_out, args.out, words, parts / "held_out", args.processes)
            lines += coverage_lines("held out", coverage)
        shutil.rmtree(parts, ignore_errors=True)
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, _resources(start_s)]))
    print(f"{args.out}: {len(vocab)} phrases, {vocab.num_rows} rows with the {vocab.num_words} of the words")
    return 0


def _write(out: Path, write: Callable[[Path], None]) -> None:
    """Writes `out`, or raises DataError where it holds something else; the counts are kept for another try."""
    finished = out.with_name(out.name + ".new")
    write(finished)
    put_in_place(finished, out)


def _make_vocab(args: argparse.Namespace, words: WordPiece, parts: Path) -> tuple[PhraseVocab, list[str]]:
    if args.from_id2phrase is not None:
        vocab, summary = read_id2phrase(args.from_id2phrase, words)
        return vocab, summary.lines()
    if args.merge is not None:
        vocabs = [PhraseVocab.load(path, words) for path in args.merge]
        merged = PhraseVocab.merge(vocabs, words)
        return merged, [f"{path}: {len(vocab)} phrases" for path, vocab in zip(args.merge, vocabs, strict=True)]
    counts, summary = count_corpus(args.inputs, parts / "counts", args.min_count, args.max_phrases, args.processes)
    return PhraseVocab.build(counts, words, min_count=1), summary.lines()


def _resources(start_s: float) -> str:
    """Returns the time and memory so far, of this process and those it started."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu_s = sum(usage.ru_utime + usage.ru_stime for usage in usages)
    peak_mib = max(usage.ru_maxrss for usage in usages) / 1024
    wall_s = time.monotonic() - start_s
    return f"{wall_s:.0f} s, {cpu_s:.0f} s of CPU, at most {peak_mib:.0f} MiB a process, {os.cpu_count()} CPU cores"


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=raw)
    add = parser.add_argument
    add("inputs", type=user_path, nargs="*", metavar="INPUT", help="shards, sidecars or .jsonl files with phrases")
    add("--out", type=user_path, required=True, metavar="FILE", help="vocabulary to write (data.phrase_vocab)")
    add(
        "--min-count",
        type=whole_number(1),
        metavar="N",
        default=50,
        help="keep phrases in at least N captions (%(default)s)",
    )
    add("--max-phrases", type=whole_number(1), metavar="N", help="keep at most the N most frequent phrases (no limit)")
    add("--merge", type=user_path, nargs="+", metavar="FILE", help="instead of INPUT: vocabularies to merge")
    add(
        "--from-id2phrase",
        type=user_path,
        metavar="FILE",
        help="instead of INPUT: a phrase list in the published layout",
    )
    add("--export-id2phrase", type=user_path, metavar="FILE", help="also write the vocabulary in the published layout")
    add("--word-vocab", type=user_path, metavar="FILE", help="wordpieces, as data.word_vocab (bert-base-uncased)")
    add("--stats", action="store_true", help="print the most frequent phrases and the coverage of the inputs")
    add(
        "--most-frequent",
        type=whole_number(1),
        metavar="N",
        default=20,
        help="phrases of each kind that --stats prints (%(default)s)",
    )
    add(
        "--held-out",
        type=user_path,
        nargs="+",
        default=(),
        metavar="INPUT",
        help="print the coverage of other captions",
    )
    add(
        "--processes",
        type=whole_number(1),
        default=os.cpu_count() or 1,
        metavar="P",
        help="processes (%(default)s, the cores here)",
    )
    args = parser.parse_args(argv)
    if [bool(args.inputs), args.merge is not None, args.from_id2phrase is not None].count(True) != 1:
        parser.error("give one of INPUT..., --merge and --from-id2phrase")
    if args.stats and not args.inputs:
        parser.error("--stats needs INPUT; --held-out measures what is made otherwise")
    return args
