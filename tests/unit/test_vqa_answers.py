"""Answers of VQA v2: normalised, scored and judged as the official evaluation does, by recorded numbers and by hand."""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import pytest

from mvptr_ds.data.vqa_answers import normalise, official_accuracy, soft_scores
from tests.conftest import REPO

GOLDEN = json.loads((REPO / "tests/golden/vqa_answers.json").read_text(encoding="utf-8"))
RECORDED = REPO.parent / "shared/downstream/vqa_accuracy.json"


@pytest.mark.parametrize(("answer", "wanted"), GOLDEN["normalised"].items())
def test_recorded_answers_are_normalised_alike(answer: str, wanted: str) -> None:
    assert normalise(answer) == wanted


@pytest.mark.parametrize(("prediction", "annotations", "percent"), GOLDEN["cases"])
def test_recorded_accuracies(prediction: str, annotations: list[str], percent: float) -> None:
    assert round(100 * official_accuracy(prediction, annotations), 2) == percent


def compare(path: Path) -> int:
    """Compares every recorded number; returns how many answers and cases there were."""
    recorded = json.loads(path.read_text(encoding="utf-8"))
    assert {answer: normalise(answer) for answer in recorded["normalised"]} == recorded["normalised"]
    groups: dict[tuple[str, str], list[float]] = defaultdict(list)
    for case in recorded["cases"]:
        accuracy = official_accuracy(case["prediction"], case["answers"])
        assert round(100 * accuracy, 2) == case["accuracy"], case
        for group in (("all", ""), ("type", case["answer_type"]), ("question", case["question_type"])):
            groups[group].append(accuracy)
    means = {group: round(100 * sum(found) / len(found), 2) for group, found in groups.items()}
    assert means.pop(("all", "")) == recorded["overall"]
    assert {name: mean for (kind, name), mean in means.items() if kind == "type"} == recorded["by_answer_type"]
    assert {name: mean for (kind, name), mean in means.items() if kind == "question"} == recorded["by_question_type"]
    return len(recorded["normalised"]) + len(recorded["cases"])


def test_all_recorded_numbers() -> None:
    if not RECORDED.is_file():
        pytest.skip("the recorded reference numbers are not here (shared/ beside the checkout)")
    assert compare(RECORDED) >= 180


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("Couldnt've", "couldn't've"),  # of two apostrophes, either may be missing
        ("couldn'tve", "couldn't've"),
        ("couldntve", "couldntve"),  # but not both
        ("yall'd've", "y'all'd've"),
        ("y'all'dve", "y'all'd've"),
        ("ow's'at", "'ow's'at"),
        ("somebody'd", "somebodyd"),  # a slip of the official list, kept
        ("somebodyd've", "somebody'd've"),
        ("its ive were hell shed", "its ive were hell shed"),  # not in the list
        ("twas ten oclock", "'twas 10 o'clock"),
        ("none of the nine", "0 of 9"),
        ("one-way", "1 way"),
        ("red ,white", "red white"),  # a space beside it: the comma goes
        ("1,000-2,000", "10002000"),  # a comma within a number: all punctuation goes
        ("no.1 no. 1.", "no.1 no 1"),
        ("." * 33 + "x", ".x"),  # the official code removes 32 periods
        ("a.b", "ab"),
        ("The", ""),
    ],
)
def test_by_hand(answer: str, wanted: str) -> None:
    assert normalise(answer) == wanted


def test_soft_scores_of_ten_answers() -> None:
    answers = ["a dog", "The dog", "Dog.", "dog", "puppy", "puppy", "puppy", "cat", "cat", "the"]
    assert soft_scores(answers) == {"dog": 1.0, "puppy": 0.9, "cat": 0.6}
    assert soft_scores([*"abcdefghij"])["j"] == 0.3
    assert list(soft_scores(["dog", "cat", "dog"] * 3 + ["bee"])) == ["dog", "cat", "bee"]  # as they come


def test_soft_scores_of_fewer_answers() -> None:
    assert soft_scores(["dog", "puppy", "Dog"]) == {"dog": 1.0, "puppy": 1.0}
    assert soft_scores(["the"]) == {}
    assert soft_scores([]) == {}
    # three of four: three sets leave one of them out, with 2 of 3 needed, and one set has all three
    assert soft_scores(["dog", "dog", "dog", "cat"]) == {"dog": pytest.approx(0.75), "cat": pytest.approx(0.25)}
    assert soft_scores(["dog"] * 4) == {"dog": 1.0}


def test_annotators_lose_their_punctuation_alone() -> None:
    assert official_accuracy("dog", ["The dog"] * 9 + ["cat"]) == 0
    assert official_accuracy("the dog", ["dog, "] * 9 + ["cat"]) == 0  # "dog ": the space stays
    assert official_accuracy("the dog", ["dog ,"] * 9 + ["cat"]) == 0
    assert official_accuracy("it's a dog", ["it's dog."] * 9 + ["cat"]) == 1
    assert official_accuracy("w/o", ["w/o"] * 10) == 0  # unanimous: compared as it stands
    assert official_accuracy("tennis-racket", ["tennis racket"] * 10) == 1
    assert official_accuracy("cat", ["dog"] * 9 + ["cat"]) == pytest.approx(0.3)


def test_a_question_without_annotations_is_an_error() -> None:
    with pytest.raises(ValueError, match="has no annotations"):
        official_accuracy("dog", [])
