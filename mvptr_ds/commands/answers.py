"""Builds the list of answers that a model of questions may give, and says how many questions it can answer."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from mvptr_ds.corpus.answer_list import (
    ALL_KINDS,
    Coverage,
    choose_answers,
    measure_coverage,
    read_answer_pickle,
    read_questions,
)
from mvptr_ds.corpus.resumable_jobs import put_in_place
from mvptr_ds.errors import USER_ERRORS
from mvptr_ds.user_io.atomic import partial_path
from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

EPILOG = """\
examples:
  %(prog)s shards/vqa/train shards/vqa/val --out answers.json
  %(prog)s shards/mine/train --out answers.json --min-count 2
  %(prog)s --from-pickle trainval_label2ans.pkl shards/vqa/val --out answers.json     (the published list and order)

An answer is in the list where it is the most common one of at least N questions, after it was normalised as the
official evaluation of VQA v2 does. The list stands in order of first appearance: give the same folders in the same
order for the same list. FILE is a JSON list of texts. What stands there and is something else is not replaced.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    args = _parse_arguments(argv)
    try:
        questions = read_questions(args.shards) if args.shards else None
        if args.from_pickle is not None:
            answers = read_answer_pickle(args.from_pickle)
        else:
            assert questions is not None  # the parser has seen to it
            answers = choose_answers(questions, args.min_count)
        _write(args.out, answers)
        lines = [] if questions is None else coverage_lines(measure_coverage(questions, answers))
        if questions is not None and questions.num_without_answers:
            lines.append(f"left out: {questions.num_without_answers:,} questions without answers")
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join([*lines, f"{args.out}: {len(answers):,} answers"]))
    return 0


def coverage_lines(coverage: dict[str, Coverage]) -> list[str]:
    """Returns a table of the questions, the share that the list can answer, and the best score it can reach."""
    width = max(map(len, [*coverage, "kind"]))
    lines = [f"{'kind':<{width}}  questions  answerable %  best score %"]
    for kind in [*(kind for kind in coverage if kind != ALL_KINDS), ALL_KINDS]:
        num, answerable, best = coverage[kind]
        lines.append(f"{kind:<{width}}  {num:>9,}  {100 * answerable:>12.2f}  {100 * best:>12.2f}")
    return lines


def _write(out: Path, answers: list[str]) -> None:
    partial = partial_path(out)
    partial.write_text(json.dumps(answers, ensure_ascii=False, indent=0) + "\n", encoding="utf-8")
    put_in_place(partial, out)


def _parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG, formatter_class=raw)
    add = parser.add_argument
    add("shards", type=user_path, nargs="*", metavar="SHARDS", help="folders of questions with answers")
    add("--out", type=user_path, required=True, metavar="FILE", help="list to write, such as answers.json")
    add(
        "--min-count",
        type=whole_number(1),
        default=9,
        metavar="N",
        help="questions whose most common answer it must be (%(default)s)",
    )
    add("--from-pickle", type=user_path, metavar="FILE", help="take the answers of a published label2ans pickle")
    args = parser.parse_args(argv)
    if not args.shards and args.from_pickle is None:
        parser.error("give SHARDS, or --from-pickle FILE")
    return args
