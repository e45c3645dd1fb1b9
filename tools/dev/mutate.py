#!/usr/bin/env python3
"""Breaks one feature after another in a copy of the project, and asks whether the tests notice.

python tools/dev/mutate.py                        # every mutant of mutants.yaml; some minutes
python tools/dev/mutate.py --only dropout reading # those whose name holds one of these words
python tools/dev/mutate.py --list                 # what each of them breaks

A mutant replaces one text of one file; its tests must then fail. It is "killed" when they do, and has "survived" when
they pass: then a broken feature would go unnoticed, and a test is missing. "unclear" is one whose tests did not run to
their end: it does not import, it names a test that is not there, or it took longer than --limit. Without a mutant all
the tests must pass; that is tried first. The checkout itself is never written to.
"""

from __future__ import annotations

import argparse
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import yaml

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path

REPO = Path(__file__).resolve().parents[2]
MUTANTS_FILE = Path(__file__).with_name("mutants.yaml")
LEFT_OUT = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "runs", "shared")
KILLED, SURVIVED, UNCLEAR = "killed", "survived", "unclear"
PYTEST_PASSED, PYTEST_FAILED = 0, 1


class MutantError(ValueError):
    """A mutant cannot be tried; the message says which and why."""


@dataclass(frozen=True)
class Mutant:
    """One text of one file that is replaced, and the tests that must notice."""

    name: str
    breaks: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def apply(self, tree: Path) -> str:
        """Returns the text of the file with the mutant in it.

        Raises:
            MutantError: what it replaces does not stand there exactly once.
        """
        text = (tree / self.file).read_text(encoding="utf-8")
        if text.count(self.old) != 1 or self.old == self.new:
            raise MutantError(f"{self.name}: {self.old!r} stands {text.count(self.old)} times in {self.file}, not once")
        return text.replace(self.old, self.new)


@dataclass(frozen=True)
class Outcome:
    """What became of a mutant."""

    mutant: Mutant
    result: str
    seconds: float
    detail: str = ""


def load_mutants(path: Path = MUTANTS_FILE) -> list[Mutant]:
    """Returns the mutants of a YAML file, a mapping of names.

    Raises:
        MutantError: an entry lacks a key or has another one.
    """
    mutants = []
    for name, entry in yaml.safe_load(path.read_text(encoding="utf-8")).items():
        try:
            mutants.append(Mutant(name, **{**entry, "tests": tuple(entry["tests"])}))
        except (TypeError, KeyError) as error:
            raise MutantError(f"{path}, {name}: {error}; it needs breaks, file, old, new, tests") from error
    return mutants


def run_tests(tree: Path, tests: Sequence[str], limit_s: float) -> tuple[int | None, str]:
    """pytest's exit code (None: not done in time), and the last line that it wrote."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
    # no bytecode: within a second, a file of the same size would be taken for the one before
    environment = {**os.environ, "PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.Popen(
        command, cwd=tree, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return None, f"still ran after {limit_s:.0f} s"
    finally:  # tests that were cut off may have started ranks
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()
    lines = [line.strip("= ") for line in output.splitlines() if line.strip()]
    return process.returncode, lines[-1] if lines else ""


def try_mutant(mutant: Mutant, tree: Path, limit_s: float) -> Outcome:
    """Runs the mutant's tests with it in the tree, which is then as it was."""
    path, started_s = tree / mutant.file, time.monotonic()
    before, text = path.read_bytes(), mutant.apply(tree)
    path.write_text(text, encoding="utf-8")
    try:
        code, said = run_tests(tree, mutant.tests, limit_s)
    finally:
        path.write_bytes(before)
    result = {PYTEST_PASSED: SURVIVED, PYTEST_FAILED: KILLED}.get(-1 if code is None else code, UNCLEAR)
    return Outcome(mutant, result, time.monotonic() - started_s, said if result == UNCLEAR else "")


def try_all(mutants: Sequence[Mutant], source: Path, limit_s: float) -> list[Outcome]:
    """Tries every mutant in a copy of `source`, one after the other.

    Raises:
        MutantError: one cannot be applied; or the tests fail without any.
    """
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder:
        tree = Path(folder) / "tree"
        shutil.copytree(source, tree, ignore=LEFT_OUT)
        for mutant in mutants:
            mutant.apply(tree)
        tests = list(dict.fromkeys(test for mutant in mutants for test in mutant.tests))
        logging.info("the %d tests without a mutant", len(tests))
        code, said = run_tests(tree, tests, limit_s * len(mutants))
        if code != PYTEST_PASSED:
            raise MutantError(f"the tests do not pass without a mutant ({said}): pytest {' '.join(tests)}")
        outcomes = []
        for number, mutant in enumerate(mutants, start=1):
            outcomes.append(try_mutant(mutant, tree, limit_s))
            last = outcomes[-1]
            logging.info("%d of %d: %s %s, %.0f s", number, len(mutants), mutant.name, last.result, last.seconds)
    return outcomes


def table(outcomes: Sequence[Outcome]) -> str:
    """Returns a line a mutant, and how many there are of each kind."""
    width = max(len(outcome.mutant.name) for outcome in outcomes)
    lines = [f"{'mutant':<{width}}  {'result':<8}  {'s':>4}  what it breaks"]
    for outcome in outcomes:
        rest = outcome.mutant.breaks + (f" ({outcome.detail})" if outcome.detail else "")
        lines.append(f"{outcome.mutant.name:<{width}}  {outcome.result:<8}  {outcome.seconds:>4.0f}  {rest}")
    counts = {kind: sum(outcome.result == kind for outcome in outcomes) for kind in (KILLED, SURVIVED, UNCLEAR)}
    return "\n".join([*lines, ", ".join(f"{num} {kind}" for kind, num in counts.items())])


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Exit code: 0 when all are killed, 1 when one is not, 2 when they cannot be tried.",
    )
    parser.add_argument("--only", nargs="+", default=[], metavar="WORD", help="mutants whose name holds one of these")
    parser.add_argument("--list", action="store_true", help="print the mutants and what they break, and try none")
    parser.add_argument("--limit", type=float, default=300.0, metavar="S", help="seconds for each mutant (%(default)s)")
    parser.add_argument(
        "--mutants", type=user_path, default=MUTANTS_FILE, metavar="FILE", help="the list (mutants.yaml)"
    )
    parser.add_argument(
        "--tree", type=user_path, default=REPO, metavar="DIR", help="the project to copy (this checkout)"
    )
    return parser.parse_args()


def main() -> int:
    accept_any_text()
    arguments = parse_arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    try:
        mutants = load_mutants(arguments.mutants)
        words = "|".join(map(re.escape, arguments.only))
        chosen = [mutant for mutant in mutants if re.search(words, mutant.name)]
        if not chosen:
            raise MutantError(f"no mutant's name holds {' or '.join(arguments.only)}; --list shows them")
        if arguments.list:
            sys.stdout.write("".join(f"{mutant.name}: {mutant.breaks} ({mutant.file})\n" for mutant in chosen))
            return 0
        outcomes = try_all(chosen, arguments.tree.resolve(), arguments.limit)
    except (MutantError, OSError, yaml.YAMLError) as error:
        sys.stderr.write(f"error: {error}\n")
        return 2
    sys.stdout.write(table(outcomes) + "\n")
    return 0 if all(outcome.result == KILLED for outcome in outcomes) else 1


if __name__ == "__main__":
    sys.exit(main())
