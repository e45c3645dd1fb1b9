"""Reads one's own data of a downstream task: JSON lines, a JSON array, or a table (.csv, .tsv) with a heading.

    {"image": "cat.jpg", "question": "What sleeps?", "answer": "a cat"}                 --task vqa
    {"image": "cat.jpg", "question": "What sleeps?", "answers": ["cat", "kitten"]}
    {"image": "cat.jpg", "statement": "A cat sleeps.", "label": "entailment"}           --task entailment
    {"image": "cat.jpg", "expression": "the left cat", "box": [10, 20, 50, 80]}         --task referring

The text may also stand in a column `text`. Optional are `split`, `kind` (a word by which scores are broken down),
`image_id` (a number gets twelve digits, as in COCO's names), and an id of the text: `question_id`, `pair_id` or `id`. A
cell of a table holds a list as JSON.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.boxes import BoxError, check_box, picture_size
from mvptr_ds.corpus.sources.csv_rows import CsvRows
from mvptr_ds.corpus.sources.entailment_labels import entailment_label
from mvptr_ds.corpus.sources.rows import UNREADABLE, Labels, Row, number_or_name, whole
from mvptr_ds.corpus.sources.tables import find_columns, iter_objects, list_in
from mvptr_ds.data.vqa_answers import soft_scores
from mvptr_ds.errors import DataError

NO_LABEL = "row: no label, box or agreement on it"
_SPLIT = re.compile(r"[A-Za-z0-9_-]+")
_ANNOTATED = 4  # answers from which they are many people's, and an accuracy can be counted among them


class _Text(NamedTuple):
    """A row of the file, as far as all tasks read it."""

    entry: Mapping[str, Any]
    image: str
    text_id: int | str


class TaskTable(NamedTuple):
    """What is to be read: the task, where its pictures are named and lie, and the classes that numbers mean."""

    task: str  # vqa | entailment | referring
    image_column: str = "image"
    images: Path | None = None
    label_order: tuple[str, ...] | None = None


def read_task_tables(sources: Sequence[Path], table: TaskTable, summary: Summary) -> Iterator[Row]:
    """Yields a row for each text, with its labels. A text without an id gets the picture's name and a number.

    Questions without answers are kept, as those of a test split. Statements without a label and expressions without a
    box are counted and left out.

    Raises:
        DataError: a column is missing or there twice, or labels are numbers without `label_order`.
    """
    numbers: Counter[str] = Counter()  # texts of each picture so far
    for source in sources:
        text_column = ""
        for where, entry in _entries(source, table.image_column, summary):
            text_column = text_column or _text_column(source, entry, table)
            try:
                row = _row(entry, text_column, table, numbers, summary)
            except DataError as error:
                raise DataError(f"{where}: {error}") from error
            except BoxError as error:
                summary.drop(error.reason, f"{where}: {error.detail}")
            except (TypeError, ValueError) as error:
                summary.drop(UNREADABLE, f"{where}: {error}")
            else:
                if row is None:
                    summary.drop(NO_LABEL, where)
                else:
                    yield row


def _entries(source: Path, image_column: str, summary: Summary) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields place and fields of each row; of a table all columns, None where a cell is empty."""
    if source.suffix.lower() not in (".csv", ".tsv"):
        yield from iter_objects(source, summary)
        return
    rows = CsvRows(source, summary)
    (column,) = find_columns(source, rows.heading, (image_column,), "name it with --image-column")
    rows.image_at = rows.heading.index(column)
    names = [name.strip() for name in rows.heading]
    for number, cells in rows:
        values = [list_in(cell) if cell.strip() else None for cell in cells]
        yield f"{source.name}, line {number}", dict(zip(names, values, strict=True))


def _text_column(source: Path, entry: Mapping[str, Any], table: TaskTable) -> str:
    own = TASK_TABLES[table.task].text_column
    name = own if own in entry or "text" not in entry else "text"
    remedy = f"the texts of --task {table.task} stand in {own!r} or 'text', the pictures in --image-column"
    find_columns(source, entry, (table.image_column, name), remedy)
    return name


def _row(
    entry: Mapping[str, Any], text_column: str, table: TaskTable, numbers: Counter[str], summary: Summary
) -> Row | None:
    image, text, split = entry.get(table.image_column), entry.get(text_column), entry.get("split")
    if not isinstance(image, str) or not image.strip() or not isinstance(text, str):
        raise TypeError(
            f"{table.image_column} is {image!r:.80}, {text_column} {text!r:.80}; expected a path and a text"
        )
    if split is not None and (not isinstance(split, str) or not _SPLIT.fullmatch(split)):
        raise ValueError(f"split is {split!r:.80}, expected a name of letters, digits, _ and -")
    kind = TASK_TABLES[table.task]
    text_id = whole(entry.get(kind.id_column))
    if text_id is None:
        text_id = f"{image}#{numbers[image]}"
        numbers[image] += 1
    if isinstance(text_id, bool) or not isinstance(text_id, (int, str)):
        raise TypeError(f"{kind.id_column} is {text_id!r:.80}, expected a number or a text")
    labels = kind.labels(_Text(entry, image, text_id), table, summary)
    if labels is None:
        return None
    if (word := entry.get("kind")) is not None:
        if not isinstance(word, str):
            raise TypeError(f"kind is {word!r:.80}, expected a word")
        labels["kind"] = word
    return Row(_image_id(entry, image), (text,), image, split=split, labels=(labels,))


def _image_id(entry: Mapping[str, Any], image: str) -> str:
    image_id = whole(entry.get("image_id"))
    if image_id is None:
        return image
    return number_or_name(int(image_id) if isinstance(image_id, str) and image_id.isdecimal() else image_id)


def _vqa_labels(text: _Text, table: TaskTable, summary: Summary) -> Labels | None:
    answer, answers = text.entry.get("answer"), text.entry.get("answers")
    labels: Labels = {"question_id": text.text_id}
    if answer is None and answers is None:
        summary.counts["questions without an answer"] += 1
        return labels
    given = [answer] if answers is None else answers if isinstance(answers, list) else [answers]
    raw = [_answer(value) for value in given]
    labels["answers"] = soft_scores(raw)
    if not labels["answers"]:
        raise ValueError(f"the answers {raw!r:.80} say nothing; write a word, or leave them out")
    if len(raw) >= _ANNOTATED:
        labels["annotations"] = raw
    if answer is not None:
        labels["answer"] = _answer(answer)
    return labels


def _answer(value: Any) -> str:
    value = whole(value)
    if isinstance(value, bool) or not isinstance(value, (str, int)):
        raise TypeError(f"an answer is {value!r:.80}, expected a text such as 'yes', or a list of texts in 'answers'")
    return str(value)


def _entailment_labels(text: _Text, table: TaskTable, summary: Summary) -> Labels | None:
    label = entailment_label(text.entry.get("label"), table.label_order)
    return None if label is None else {"label": label, "pair_id": str(text.text_id)}


def _referring_labels(text: _Text, table: TaskTable, summary: Summary) -> Labels | None:
    box = text.entry.get("box")
    if box is None:
        return None
    return {"box": check_box(box, picture_size(table.images, text.image), summary), "id": text.text_id}


class _Kind(NamedTuple):
    """What is particular to a task: its columns, and what makes the labels of a text (None: it has none)."""

    text_column: str
    id_column: str
    labels: Callable[[_Text, TaskTable, Summary], Labels | None]


TASK_TABLES = {
    "vqa": _Kind("question", "question_id", _vqa_labels),
    "entailment": _Kind("statement", "pair_id", _entailment_labels),
    "referring": _Kind("expression", "id", _referring_labels),
}
