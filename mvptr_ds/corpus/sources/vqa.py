"""Reads VQA v2: files of questions and of annotations, given together in any order and joined by the question's id.

    {"data_subtype": "train2014", "questions": [{"image_id": 9, "question": "Is it?", "question_id": 9000}]}
    {"data_subtype": "train2014", "annotations": [{"question_id": 9000, "image_id": 9, "question_type": "is it",
     "answer_type": "yes/no", "multiple_choice_answer": "yes", "answers": [{"answer": "yes", ...}, ... ten of them]}]}

The pictures of train2014 make the split train, those of val2014 val, those of test2015 test. The questions of
test-dev2015 are among those of test2015: they come once, with the label `in_test_dev`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.coco_names import coco_picture
from mvptr_ds.corpus.sources.rows import UNREADABLE, Labels, Row, iter_array, iter_fields, number_or_name, whole
from mvptr_ds.data.vqa_answers import soft_scores
from mvptr_ds.errors import DataError

_WRONG = (KeyError, TypeError, ValueError, AttributeError, IndexError)  # what an entry of another layout gives
_SUBSET = re.compile(r"(train|val|test-dev|test)(20\d\d)")
_TEST_DEV = "test-dev"


class _File(NamedTuple):
    path: Path
    kind: str  # questions | annotations
    split: str  # train | val | test | test-dev
    pictures: str  # train2014, as the names of the pictures say it


class _Question(NamedTuple):
    image_id: int
    text: str


def read_vqa(sources: Sequence[Path], images: Path | None, summary: Summary) -> Iterator[Row]:
    """Yields a row for each question, with its answers as labels where a file of annotations has them.

    A split at a time, so that memory holds the questions of one split, and of the annotations one at a time. Where a
    split has annotations, a question without one is counted and left out.

    Raises:
        DataError: a file is not JSON, neither questions nor annotations, of an unknown split, or without its questions.
    """
    files = [_file_of(path) for path in sources]
    for split in sorted({_split(file) for file in files}):
        own = [file for file in files if _split(file) == split]
        yield from _read_split(split, own, images, summary)


def _split(file: _File) -> str:
    return "test" if file.split == _TEST_DEV else file.split


def _file_of(path: Path) -> _File:
    """Says what a file holds by its fields, and of which split by `data_subtype`, else by its name."""
    kind, subset, fields = "", None, []
    for name, value in iter_fields(path):
        fields.append(name)
        kind = name if name in ("questions", "annotations") else kind
        subset = value if name == "data_subtype" else subset
        if kind and subset is not None:
            break
    if not kind:
        raise DataError(
            f"{path} has neither the field 'questions' nor 'annotations', only {fields[:20]}; give the official files, "
            'or one\'s own with the format "jsonl-tasks"'
        )
    found = _SUBSET.search(subset if isinstance(subset, str) else path.name)
    if found is None:
        said = f"data_subtype {subset!r}" if subset is not None else "no data_subtype"
        raise DataError(
            f"{path} has {said}, which names none of train2014, val2014, test2015 and test-dev2015; name it in "
            "data_subtype or in the file's name"
        )
    split, year = found.groups()
    return _File(path, kind, split, f"{'test' if split == _TEST_DEV else split}{year}")


def _read_split(split: str, files: Sequence[_File], images: Path | None, summary: Summary) -> Iterator[Row]:
    in_test_dev: set[int | str] = set()
    for file in files:
        if file.kind == "questions" and file.split == _TEST_DEV:
            in_test_dev.update(number for number, _ in _questions(file.path, Summary()))  # what is wrong counts below
    questions: dict[int | str, _Question] = {}
    pictures = {file.pictures for file in files if file.kind == "questions"}
    if len(pictures) != 1:
        given = ", ".join(file.path.name for file in files)
        missing = "has no file of questions" if not pictures else f"is of {' and '.join(sorted(pictures))}"
        raise DataError(f"the split {split} {missing} ({given}); give the questions of one year beside its annotations")
    for file in sorted(files, key=lambda file: file.split):  # test before test-dev
        if file.kind == "questions":
            _add_questions(questions, file, in_test_dev, summary)
    picture_of = coco_picture(images, *pictures)
    answered: set[int | str] = set()
    annotations = [file for file in files if file.kind == "annotations"]
    for file in annotations:
        for question_id, labels in _annotations(file.path, questions, answered, summary):
            yield _row(question_id, questions[question_id], labels, split, picture_of)
    for question_id, question in questions.items():
        if not annotations:
            flag = {"in_test_dev": True} if question_id in in_test_dev else {}
            yield _row(question_id, question, flag, split, picture_of)
        elif question_id not in answered:
            summary.drop("row: a question without an annotation", f"{split}, question {question_id}")


def _row(
    question_id: int | str, question: _Question, labels: Labels, split: str, picture_of: Callable[[int], str]
) -> Row:
    labels = {"question_id": question_id, **labels}
    image_id = question.image_id
    return Row(number_or_name(image_id), (question.text,), picture_of(image_id), split=split, labels=(labels,))


def _questions(path: Path, summary: Summary) -> Iterator[tuple[int | str, _Question]]:
    for number, entry in enumerate(iter_array(path, "questions")):
        try:
            question_id, image_id, text = _id(entry["question_id"]), whole(entry["image_id"]), entry["question"]
            if isinstance(image_id, bool) or not isinstance(image_id, int) or not isinstance(text, str):
                raise TypeError(f"image_id is {image_id!r}, question {text!r:.80}; expected a number and a text")
        except _WRONG as error:
            summary.drop(UNREADABLE, f"{path.name}, questions[{number}]: {error!r}")
            continue
        yield question_id, _Question(image_id, text)


def _id(value: Any) -> int | str:
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f"question_id is {value!r:.80}, expected a number or a text")
    return value


def _add_questions(
    questions: dict[int | str, _Question], file: _File, in_test_dev: set[int | str], summary: Summary
) -> None:
    """Adds the questions of a file by id; those of test-dev may be there already."""
    for question_id, question in _questions(file.path, summary):
        known = questions.setdefault(question_id, question)
        if known != question:
            summary.drop("row: a question id that another question has", f"{file.path.name}, question {question_id}")
        elif known is not question and question_id not in in_test_dev:
            summary.drop("row: a question that was there before", f"{file.path.name}, question {question_id}")


def _annotations(
    path: Path, questions: dict[int | str, _Question], answered: set[int | str], summary: Summary
) -> Iterator[tuple[int | str, Labels]]:
    """Yields the labels of each question that a file answers, and adds its id to `answered`."""
    for number, entry in enumerate(iter_array(path, "annotations")):
        try:
            question_id = _id(entry["question_id"])
            where = f"{path.name}, question {question_id}"
            if question_id not in questions:
                summary.drop("row: an annotation without its question", where)
                continue
            if question_id in answered:
                summary.drop("row: a second annotation of a question", where)
                continue
            if whole(entry.get("image_id", questions[question_id].image_id)) != questions[question_id].image_id:
                summary.drop("row: an annotation of another image than its question", where)
                continue
            labels = _labels(entry)
        except _WRONG as error:
            summary.drop(UNREADABLE, f"{path.name}, annotations[{number}]: {error!r}")
            continue
        answered.add(question_id)
        yield question_id, labels


def _labels(entry: dict[str, Any]) -> Labels:
    raw = [answer["answer"] for answer in entry["answers"]]
    labels = {
        "answers": soft_scores(raw),
        "annotations": raw,
        "answer": entry["multiple_choice_answer"],
        "kind": entry["answer_type"],
        "question_type": entry["question_type"],
    }
    texts = [*raw, *(labels[name] for name in ("answer", "kind", "question_type"))]
    if not raw or not all(isinstance(text, str) for text in texts):
        raise TypeError(f"answers are {raw!r:.80}; expected texts, ten as a rule, with their most common one and kinds")
    return labels
