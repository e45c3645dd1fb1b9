"""Predictions for VQA's server: complete, or refused with what is wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mvptr_ds.errors import DataError
from mvptr_ds.tasks.submission import check_complete, read_question_ids


def questions(path: Path, *ids: int) -> Path:
    path.write_text(json.dumps({"info": {}, "questions": [{"question_id": name, "question": "?"} for name in ids]}))
    return path


def test_each_question_has_one_answer(tmp_path: Path) -> None:
    files = [questions(tmp_path / "a.json", 1, 2), questions(tmp_path / "b.json", 3)]
    written = [{"question_id": name, "answer": "yes"} for name in (3, 1, 2)]
    wanted, names = read_question_ids(files), "a.json, b.json"
    assert wanted == {1, 2, 3}
    check_complete(written, wanted, names)
    with pytest.raises(DataError, match=r"of the 3 questions of a\.json, b\.json, 1 have no answer \(the first: 2\)"):
        check_complete(written[:2], wanted, names)
    with pytest.raises(DataError, match=r"1 are answered, but not asked \(the first: 9\); 1 are answered more"):
        check_complete([*written, written[0], {"question_id": 9, "answer": "no"}], wanted, names)


def test_a_file_that_holds_no_questions(tmp_path: Path) -> None:
    path = tmp_path / "annotations.json"
    path.write_text('{"annotations": []}')
    with pytest.raises(DataError, match="holds no questions with ids"):
        read_question_ids([path])
