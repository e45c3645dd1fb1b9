"""tools/dev/mutate.py: its list does not rot, and it tells tests that notice from tests that do not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from tests.conftest import REPO
from tools.dev import mutate

MUTANTS = mutate.load_mutants()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_every_mutant_can_be_applied_and_names_tests_that_are_there(mutant: mutate.Mutant) -> None:
    compile(mutant.apply(REPO), mutant.file, "exec")
    assert mutant.breaks and mutant.tests
    for test in mutant.tests:
        path, _, name = test.partition("::")
        assert f"def {name or 'test_'}" in (REPO / path).read_text(encoding="utf-8"), test


CODE = """
def double(number: int) -> int:
    return number + number

def half(number: int) -> float:
    return number / 2
"""
TESTS = """
from code_of_tree import double, half

def test_double():
    assert double(3) == 6

def test_half():
    assert half(0) == 0  # too little
"""
OF_TREE = {
    "notices": {"old": "number + number", "new": "number", "tests": ["test_tree.py::test_double"]},
    "passes_over": {"old": "number / 2", "new": "number / 3", "tests": ["test_tree.py::test_half"]},
    "no_python": {"old": "return number / 2", "new": "return return", "tests": ["test_tree.py::test_half"]},
    "for_ever": {"old": "return number / 2", "new": "while True: pass", "tests": ["test_tree.py::test_half"]},
}


def mutate_tree(folder: Path, *arguments: str, **more: dict[str, object]) -> tuple[int, str]:
    """The tool on a tree of one file; what it prints."""
    tree = folder / "tree"
    tree.mkdir()
    (tree / "code_of_tree.py").write_text(CODE, encoding="utf-8")
    (tree / "test_tree.py").write_text(TESTS, encoding="utf-8")
    about = {"breaks": "a number", "file": "code_of_tree.py"}
    mutants = {name: {**about, **entry} for name, entry in {**OF_TREE, **more}.items()}
    (folder / "mutants.yaml").write_text(yaml.safe_dump(mutants, sort_keys=False), encoding="utf-8")
    command = [sys.executable, str(REPO / "tools/dev/mutate.py"), "--tree", str(tree), *arguments]
    command += ["--mutants", str(folder / "mutants.yaml")]
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}  # plugins take seconds to start
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert (tree / "code_of_tree.py").read_text(encoding="utf-8") == CODE
    return done.returncode, done.stdout + done.stderr


def test_killed_and_survived_and_unclear_ones_are_told_apart(tmp_path: Path) -> None:
    code, said = mutate_tree(tmp_path, "--only", "notices", "passes", "no_python")
    rows = {words[0]: words[1] for line in said.splitlines() if (words := line.split())[0] in OF_TREE}
    assert rows == {"notices": "killed", "passes_over": "survived", "no_python": "unclear"}
    assert "1 killed, 1 survived, 1 unclear" in said and code == 1


def test_tests_that_do_not_end_are_cut_off(tmp_path: Path) -> None:
    """Whatever a start of pytest takes: one that did not come to its end is not told from one that runs for ever."""
    (tmp_path / "code_of_tree.py").write_text(CODE, encoding="utf-8")
    (tmp_path / "test_tree.py").write_text(TESTS, encoding="utf-8")
    entry = {**OF_TREE["for_ever"], "tests": ("test_tree.py::test_half",)}
    mutant = mutate.Mutant("for_ever", "a number", "code_of_tree.py", **entry)
    outcome = mutate.try_mutant(mutant, tmp_path, limit_s=3.0)
    assert (outcome.result, outcome.detail) == (mutate.UNCLEAR, "still ran after 3 s")
    assert (tmp_path / "code_of_tree.py").read_text(encoding="utf-8") == CODE


def test_some_can_be_chosen(tmp_path: Path) -> None:
    code, said = mutate_tree(tmp_path, "--only", "notic")
    assert code == 0 and "1 of 1: notices killed" in said and "passes_over" not in said


def test_they_can_be_listed() -> None:
    command = [sys.executable, str(REPO / "tools/dev/mutate.py"), "--list"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert [line.partition(":")[0] for line in done.stdout.splitlines()] == [mutant.name for mutant in MUTANTS]


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"old": "number", "new": "1", "tests": ["test_tree.py"]}, "'number' stands 5 times in code_of_tree.py"),
        ({"old": "number * 2", "new": "1", "tests": ["test_tree.py"]}, "stands 0 times"),
        ({"old": "number / 2", "new": "1", "tests": ["test_gone.py"]}, "the tests do not pass without a mutant"),
        ({"old": "number / 2", "new": "1"}, "needs breaks, file, old, new, tests"),
    ],
)
def test_a_mutant_that_cannot_be_tried_is_said(tmp_path: Path, entry: dict[str, object], message: str) -> None:
    code, said = mutate_tree(tmp_path, "--only", "odd", odd=entry)
    assert code == 2 and "error: " in said and message in said, said
