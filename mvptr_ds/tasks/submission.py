"""Checks predictions for VQA before they go to its server, which refuses a file that lacks questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from mvptr_ds.errors import DataError
from mvptr_ds.user_io.user_files import parse_json, read_text


def read_question_ids(questions: Sequence[Path]) -> set[int | str]:
    """Returns the ids of all questions of official files, such as v2_OpenEnded_mscoco_test2015_questions.json.

    Raises:
        DataError: a file cannot be read, or holds something else.
    """
    return {question_id for path in questions for question_id in _ids(path)}


def check_complete(written: Sequence[Mapping[str, Any]], wanted: Collection[int | str], names: str) -> None:
    """Raises DataError unless each wanted question has one answer, and there are no others.

    Args:
        written: objects with `question_id` and `answer`.
        wanted: different ids of questions.
        names: of the files that ask them, for the message.
    """
    given = Counter(prediction["question_id"] for prediction in written)
    problems = {
        "have no answer": sorted(set(wanted) - given.keys(), key=str),
        "are answered, but not asked": sorted(given.keys() - set(wanted), key=str),
        "are answered more than once": sorted((name for name, count in given.items() if count > 1), key=str),
    }
    found = [f"{len(ids)} {what} (the first: {ids[0]})" for what, ids in problems.items() if ids]
    if found:
        raise DataError(
            f"of the {len(wanted)} questions of {names}, {'; '.join(found)}: the server would refuse the "
            "predictions, so they were not written; build the split from the same files, with all pictures"
        )


def _ids(path: Path) -> list[Any]:
    try:
        return [question["question_id"] for question in parse_json(read_text(path), str(path))["questions"]]
    except (KeyError, TypeError) as error:
        raise DataError(f"{path} holds no questions with ids ({error!r}): give an official file") from error
