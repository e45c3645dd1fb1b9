"""The list of answers: which are chosen, in which order, how far they reach, and the published list."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.corpus.answer_list import Coverage, Questions, choose_answers, measure_coverage
from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.errors import DataError
from tests.support.tools import run_tool

DOG = {"answers": {"dog": 1.0, "puppy": 0.3}, "answer": "a dog", "kind": "other"}
YES = {"answers": {"yes": 1.0}, "answer": "Yes", "kind": "yes/no"}
PUPPY = {"answers": {"puppy": 0.9, "dog": 0.6}, "kind": "other"}  # one's own: the best one is the main one
CAT = {"answers": {"cat": 1.0, "kitten": 1.0}, "answer": "cat"}
TEST: dict[str, Any] = {"question_id": 1}


def write(folder: Path, *labels: dict[str, Any]) -> Path:
    items = []
    for number, first in enumerate(range(0, len(labels), 2)):
        captions = tuple(Caption(f"Question {number}?", (), own) for own in labels[first : first + 2])
        items.append((f"{number:03d}", Record(f"{number:03d}", 4, 4, captions), {"jpg": b"picture"}))
    write_shards(folder, items, 2)
    return folder


def test_answers_come_in_order_of_first_appearance(tmp_path: Path) -> None:
    train = write(tmp_path / "train", YES, DOG, PUPPY, DOG, DOG, TEST)
    val = write(tmp_path / "val", CAT, YES, CAT)
    out = tmp_path / "answers.json"
    done = run_tool("build_answers.py", train, val, "--out", out, "--min-count", 2)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text(encoding="utf-8")) == ["yes", "dog", "cat"]
    # other: dog 3 x 1, and .6 of the best answer in the list; yes/no 2 x 1; without a kind 2 x 1
    assert [" ".join(line.split()) for line in done.stdout.splitlines()] == [
        "kind questions answerable % best score %",
        "other 4 100.00 90.00",
        "without a kind 2 100.00 100.00",
        "yes/no 2 100.00 100.00",
        "all questions 8 100.00 95.00",
        "left out: 1 questions without answers",
        f"{out}: 3 answers",
    ]
    other = run_tool("build_answers.py", val, train, "--out", tmp_path / "other.json", "--min-count", 2)
    assert other.returncode == 0
    assert json.loads((tmp_path / "other.json").read_text(encoding="utf-8")) == ["cat", "yes", "dog"]


def test_coverage_by_hand() -> None:
    questions = Questions()
    for labels in (DOG, YES, PUPPY, CAT, TEST):
        questions.add(labels)
    nothing = Questions()
    for labels in (DOG, {"answers": {}, "annotations": ["the"] * 10, "answer": "the"}):
        nothing.add(labels)
    assert measure_coverage(nothing, ["dog"])["all questions"] == Coverage(2, 0.5, 0.5)
    assert choose_answers(nothing, 1) == ["dog"]
    assert measure_coverage(questions, ["dog", "unknown"]) == {
        "other": Coverage(2, 1.0, pytest.approx(0.8)),
        "without a kind": Coverage(1, 0.0, 0.0),
        "yes/no": Coverage(1, 0.0, 0.0),
        "all questions": Coverage(4, 0.5, pytest.approx(0.4)),
    }
    assert questions.num_without_answers == 1
    assert choose_answers(questions, 1) == ["dog", "yes", "puppy", "cat"]


def test_the_same_command_again_and_a_file_of_something_else(tmp_path: Path) -> None:
    train, out = write(tmp_path / "train", YES, YES), tmp_path / "answers.json"
    arguments = ["build_answers.py", train, "--out", out, "--min-count", 2]
    assert run_tool(*arguments).returncode == 0 and run_tool(*arguments).returncode == 0  # type: ignore[arg-type]
    out.write_text("[]", encoding="utf-8")
    done = run_tool(*arguments)  # type: ignore[arg-type]
    assert done.returncode == 1 and "is there and holds something else" in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["answers.json", "train"]


def test_too_few_say_which_is_the_most_frequent(tmp_path: Path) -> None:
    train = write(tmp_path / "train", YES, YES, DOG)
    done = run_tool("build_answers.py", train, "--out", tmp_path / "answers.json")
    assert done.returncode == 1
    assert "error: no answer comes 9 times: the most frequent, 'yes', 2 times; give a lower --min-count" in done.stderr
    assert not (tmp_path / "answers.json").exists()


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([TEST], "holds no question with answers; give a split with answers, made by tools/build_shards.py"),
        ([{"answers": ["dog"]}], "key '000': answers are ['dog'], expected texts with scores such as"),
        ([{"answers": {"dog": 2}}], "key '000': answers are {'dog': 2}, expected texts with scores"),
    ],
)
def test_shards_that_are_no_questions(tmp_path: Path, labels: list[dict[str, Any]], message: str) -> None:
    done = run_tool("build_answers.py", write(tmp_path / "train", *labels), "--out", tmp_path / "answers.json")
    assert done.returncode == 1 and message in done.stderr


def test_the_published_list_keeps_its_order(tmp_path: Path) -> None:
    published = tmp_path / "trainval_label2ans.pkl"
    published.write_bytes(pickle.dumps(["net", "dog", "café"], 3))
    val, out = write(tmp_path / "val", DOG, YES), tmp_path / "answers.json"
    done = run_tool("build_answers.py", "--from-pickle", published, val, "--out", out)
    assert done.returncode == 0, done.stderr
    assert json.loads(out.read_text(encoding="utf-8")) == ["net", "dog", "café"]
    assert "all questions          2         50.00         50.00" in done.stdout
    done = run_tool("build_answers.py", "--from-pickle", published, "--out", out)
    assert done.returncode == 0 and done.stdout == f"{out}: 3 answers\n"


class _Trap:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.getcwd, ()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"net": 0}, "holds {'net': 0}, not a list of answers; give label2ans, not ans2label"),
        (["net", 3], "not a list of answers"),
        ([], "not a list of answers"),
        (["net", "dog", "net"], "names the answer 'net' 2 times"),
        ([_Trap()], "is no pickle of plain data"),
    ],
)
def test_pickles_that_are_no_list_of_answers(tmp_path: Path, content: Any, message: str) -> None:
    path = tmp_path / "label2ans.pkl"
    path.write_bytes(pickle.dumps(content))
    done = run_tool("build_answers.py", "--from-pickle", path, "--out", tmp_path / "answers.json")
    assert done.returncode == 1 and message in done.stderr


def test_something_must_be_given(tmp_path: Path) -> None:
    done = run_tool("build_answers.py", "--out", tmp_path / "answers.json")
    assert done.returncode == 2 and "give SHARDS, or --from-pickle FILE" in done.stderr


def test_answers_must_be_there() -> None:
    with pytest.raises(DataError, match="no answer comes 1 times: there is no answer"):
        choose_answers(Questions(), 1)
