"""Counts the answers of questions in shards, chooses those that a model may give, and says how far they reach."""

from __future__ import annotations

import sys
from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mvptr_ds.corpus.sources.closed_pickle import read_closed_pickle
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.vqa_answers import normalise
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.tool_names import tool

ALL_KINDS = "all questions"
_NO_KIND = "without a kind"


class Coverage(NamedTuple):
    """How far a list of answers reaches among some questions."""

    num_questions: int
    answerable: float  # share of the questions with an answer in the list
    best_score: float  # mean soft score where each question gets the best answer of the list; 0 where it has none


@dataclass
class Questions:
    """The answers of many questions in little memory: a question is a run of the two arrays of answers."""

    main_counts: Counter[str] = field(default_factory=Counter)  # main answer -> questions, in order of appearance
    num_without_answers: int = 0
    answer_ids: dict[str, int] = field(default_factory=dict)
    ids: array[int] = field(default_factory=lambda: array("I"))  # of every scored answer
    scores: array[float] = field(default_factory=lambda: array("d"))
    ends: array[int] = field(default_factory=lambda: array("Q"))  # where the run of each question ends
    kinds: list[str] = field(default_factory=list)  # of each question

    def add(self, labels: Mapping[str, Any]) -> None:
        """Adds the labels of one question; one that was not annotated is counted alone.

        Raises:
            DataError: its answers are not texts with scores.
        """
        answers = labels.get("answers")
        if answers is None:
            self.num_without_answers += 1
            return
        if answers == {}:  # its answers say nothing: it counts, and nobody can answer it
            answers = {"": 0.0}
        if not isinstance(answers, dict) or not all(
            isinstance(score, (int, float)) and 0 <= score <= 1 for score in answers.values()
        ):
            raise DataError(f'answers are {answers!r:.80}, expected texts with scores such as {{"dog": 1.0}}')
        if main := _main_answer(labels, answers):
            self.main_counts[main] += 1
        for answer, score in answers.items():
            self.ids.append(self.answer_ids.setdefault(answer, len(self.answer_ids)))
            self.scores.append(score)
        self.ends.append(len(self.ids))
        self.kinds.append(sys.intern(str(labels.get("kind", _NO_KIND))))


def _main_answer(labels: Mapping[str, Any], answers: Mapping[str, float]) -> str:
    """Returns the most common answer as the data names it, else the one of the highest score, the first of several."""
    if isinstance(labels.get("answer"), str):
        return normalise(labels["answer"])
    return max(answers, key=answers.__getitem__)


def read_questions(folders: Iterable[str | Path]) -> Questions:
    """Reads the labels of all captions in folders of shards, in their order.

    Raises:
        DataError: a folder has no index, holds no question with answers, or a record cannot be read.
    """
    questions = Questions()
    for folder in folders:
        index, before = Index.open(folder), len(questions.ends)
        for number in progress_bar(range(index.num_records), desc=f"answers of {folder}", unit="record", delay=2.0):
            place = index.place(number)
            try:
                record, _ = index.describe(place)
                for caption in record.captions:
                    questions.add(caption.labels or {})
            except DataError as error:
                raise DataError(f"{folder}, key {index.key_of(place)!r}: {error}") from error
        if len(questions.ends) == before:
            raise DataError(
                f"{folder} holds no question with answers; give a split with answers, made by {tool('shards')} with "
                "the format vqa or jsonl-tasks"
            )
    return questions


def choose_answers(questions: Questions, min_count: int) -> list[str]:
    """Returns the answers that are the main one of at least `min_count` questions, in order of first appearance.

    Raises:
        DataError: there is none.
    """
    chosen = [answer for answer, count in questions.main_counts.items() if count >= min_count]
    if not chosen:
        most = questions.main_counts.most_common(1)
        said = f"the most frequent, {most[0][0]!r}, {most[0][1]} times" if most else "there is no answer"
        raise DataError(f"no answer comes {min_count} times: {said}; give a lower --min-count")
    return chosen


def measure_coverage(questions: Questions, answers: Sequence[str]) -> dict[str, Coverage]:
    """Returns how far a list of answers reaches, by kind of question in alphabetical order, then for all of them."""
    in_list = set(answers)
    known_A = np.array([answer in in_list for answer in questions.answer_ids], dtype=bool)
    reached_S = np.where(known_A[np.asarray(questions.ids)], np.asarray(questions.scores), 0.0)
    # of each run its largest score; a run has one answer at least
    starts_Q = np.concatenate([[0], np.asarray(questions.ends, dtype=np.int64)[:-1]])
    best_Q = np.maximum.reduceat(reached_S, starts_Q)
    hit_Q = np.logical_or.reduceat(known_A[np.asarray(questions.ids)], starts_Q)
    kinds_Q = np.array(questions.kinds)

    def coverage(chosen_Q: np.ndarray) -> Coverage:
        return Coverage(int(chosen_Q.sum()), float(hit_Q[chosen_Q].mean()), float(best_Q[chosen_Q].mean()))

    by_kind = {kind: coverage(kinds_Q == kind) for kind in sorted(set(questions.kinds))}
    return {**by_kind, ALL_KINDS: coverage(np.ones(len(kinds_Q), dtype=bool))}


def read_answer_pickle(path: Path) -> list[str]:
    """Returns the answers of a published `trainval_label2ans.pkl`, in its order: the row of each in the model's head.

    Raises:
        DataError: it holds anything but a list of different texts.
    """
    answers = read_closed_pickle(path)
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        raise DataError(f"{path} holds {answers!r:.80}, not a list of answers; give label2ans, not ans2label")
    answer, count = Counter(answers).most_common(1)[0]
    if count > 1:
        raise DataError(f"{path} names the answer {answer!r} {count} times; each must have one place")
    return answers
