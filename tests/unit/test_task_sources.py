"""Readers of the downstream tasks: official files of a few entries to rows with labels, and what they refuse."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.boxes import BOXES_CUT, BoxError, check_box, corners
from mvptr_ds.corpus.sources.entailment_labels import entailment_label, parse_label_order
from mvptr_ds.corpus.sources.refcoco import NO_BOX, read_refcoco
from mvptr_ds.corpus.sources.rows import Row
from mvptr_ds.corpus.sources.snli_ve import NO_LABEL, read_snli_ve
from mvptr_ds.corpus.sources.task_tables import TaskTable, read_task_tables
from mvptr_ds.corpus.sources.vqa import read_vqa
from mvptr_ds.errors import DataError
from tests.conftest import REPO

UNREADABLE = "row: cannot be read"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def lines(path: Path, entries: list[Any]) -> Path:
    return write(path, "".join(json.dumps(entry) + "\n" for entry in entries))


def read(reader: Callable[..., Iterator[Row]], *arguments: Any) -> tuple[list[Row], Summary]:
    summary = Summary()
    return list(reader(*arguments, summary)), summary


# ----------------------------------------------------------------------------------------------------------- VQA v2


def questions(subset: str, *entries: tuple[int, int, str]) -> dict[str, Any]:
    listed = [{"image_id": image, "question": text, "question_id": number} for number, image, text in entries]
    return {"info": {"version": "2.0"}, "task_type": "Open-Ended", "data_subtype": subset, "questions": listed}


def annotation(question_id: int, image_id: int, answers: list[str], main: str, kind: str = "other") -> dict[str, Any]:
    given = [{"answer": text, "answer_confidence": "yes", "answer_id": n} for n, text in enumerate(answers, 1)]
    return {
        "question_id": question_id, "image_id": image_id, "question_type": "what is", "answer_type": kind,
        "multiple_choice_answer": main, "answers": given,
    }  # fmt: skip


def annotations(subset: str, *entries: dict[str, Any]) -> dict[str, Any]:
    return {"info": {}, "license": {}, "data_subtype": subset, "annotations": list(entries), "data_type": "mscoco"}


TEN = ["a dog"] * 4 + ["puppy"] * 3 + ["Cat"] * 2 + ["rat"]


def test_questions_and_annotations_are_joined_by_id(tmp_path: Path) -> None:
    (tmp_path / "coco/val2014").mkdir(parents=True)
    sources = [
        write(tmp_path / "a_val.json", annotations("val2014", annotation(25000, 25, ["yes"] * 10, "yes", "yes/no"))),
        write(tmp_path / "q_train.json", questions("train2014", (9001, 9, "Why?"), (9000, 9, "What is it?"))),
        write(tmp_path / "q_val.json", questions("val2014", (25000, 25, "Is it?"))),
        write(
            tmp_path / "a_train.json",
            annotations("train2014", annotation(9000, 9, TEN, "dog"), annotation(9001, 9, ["fun"] * 10, "fun")),
        ),
    ]
    rows, summary = read(read_vqa, sources, tmp_path / "coco")
    labels = {
        "question_id": 9000,
        "answers": {"dog": 1.0, "puppy": 0.9, "cat": 0.6, "rat": 0.3},
        "annotations": TEN,
        "answer": "dog",
        "kind": "other",
        "question_type": "what is",
    }
    picture = "COCO_train2014_000000000009.jpg"
    assert rows[0] == Row("000000000009", ("What is it?",), picture, split="train", labels=(labels,))
    assert [(row.split, row.image, row.captions, row.labels[0]["question_id"]) for row in rows[1:]] == [  # type: ignore[index]
        ("train", picture, ("Why?",), 9001),
        ("val", "val2014/COCO_val2014_000000000025.jpg", ("Is it?",), 25000),  # its folder is there
    ]
    assert rows[2].labels[0]["answers"] == {"yes": 1.0} and not summary.dropped  # type: ignore[index]


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_test_dev_is_flagged_and_comes_once(tmp_path: Path, order: tuple[int, int]) -> None:
    sources = [
        write(tmp_path / "v2_test2015.json", questions("test2015", (1, 1, "One?"), (2, 1, "Two?"))),
        write(tmp_path / "v2_test-dev2015.json", questions("test-dev2015", (2, 1, "Two?"))),
    ]
    rows, summary = read(read_vqa, [sources[n] for n in order], None)
    assert [row.labels[0] for row in rows] == [{"question_id": 1}, {"question_id": 2, "in_test_dev": True}]
    assert {(row.split, row.image) for row in rows} == {("test", "COCO_test2015_000000000001.jpg")}
    assert not summary.dropped


def test_the_name_says_the_split_where_the_file_does_not(tmp_path: Path) -> None:
    content = questions("", (1, 7, "One?"))
    del content["data_subtype"]
    rows, _ = read(read_vqa, [write(tmp_path / "v2_OpenEnded_mscoco_val2014_questions.json", content)], None)
    assert [row.split for row in rows] == ["val"]


def test_what_does_not_join_is_counted_and_named(tmp_path: Path) -> None:
    entries = [(1, 9, "One?"), (1, 9, "Other?"), (2, 9, "Two?"), (2, 9, "Two?"), (3, 9, "Three?"), (4, 9, "Four?")]
    asked = questions("train2014", *entries)
    asked["questions"] += [{"image_id": 9, "question_id": 5}, {"image_id": True, "question": "?", "question_id": 6}, 7]
    answered = annotations(
        "train2014",
        annotation(1, 9, TEN, "dog"), annotation(1, 9, TEN, "dog"), annotation(2, 8, TEN, "dog"),
        annotation(99, 9, TEN, "dog"), annotation(4, 9, [], "dog"), {"question_id": 3, "answers": 5},
    )  # fmt: skip
    rows, summary = read(read_vqa, [write(tmp_path / "q.json", asked), write(tmp_path / "a.json", answered)], None)
    assert [row.captions for row in rows] == [("One?",)]
    assert summary.dropped == {
        "row: a question id that another question has": 1,
        "row: a question that was there before": 1,
        "row: a second annotation of a question": 1,
        "row: an annotation of another image than its question": 1,
        "row: an annotation without its question": 1,
        "row: a question without an annotation": 3,
        UNREADABLE: 5,
    }
    assert summary.examples["row: a question without an annotation"][0] == "train, question 2"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"a.json": annotations("train2014")}, "split train has no file of questions .a.json."),
        ({"q.json": questions("abstract_v002")}, "has data_subtype 'abstract_v002', which names none of train2014"),
        ({"q.json": {"questions": []}}, "has no data_subtype, which names none"),
        ({"q.json": {"images": [], "info": {}}}, "neither the field 'questions' nor 'annotations', only .'images'"),
        ({"q.json": questions("train2014"), "r.json": questions("train2017")}, "is of train2014 and train2017"),
        ({"q.json": '{"data_subtype": "train2014", "questions": [{"a": 1}'}, "is the file whole and JSON"),
    ],
)
def test_files_that_cannot_be_vqa(tmp_path: Path, files: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        read(read_vqa, [write(tmp_path / name, content) for name, content in files.items()], None)


# ---------------------------------------------------------------------------------------------------------- SNLI-VE


def pair(image: Any = "4705552913", label: Any = "neutral", **other: Any) -> dict[str, Any]:
    return {
        "Flickr30K_ID": image, "sentence1": "Not used.", "sentence2": "A dog sleeps.", "gold_label": label,
        "pairID": "4705552913.jpg#2r1n", **other,
    }  # fmt: skip


def test_statements_of_snli_ve(tmp_path: Path) -> None:
    entries = [pair(), pair(36979, "entailment"), pair(label="contradiction"), pair(label="-"), pair(label=-1)]
    source = lines(tmp_path / "snli_ve_dev.jsonl", [*entries, pair(label="maybe"), pair(image=None), 5])
    rows, summary = read(read_snli_ve, source, None)
    label = {"label": "neutral", "pair_id": "4705552913.jpg#2r1n"}
    assert rows[0] == Row("4705552913.jpg", ("A dog sleeps.",), "4705552913.jpg", split="dev", labels=(label,))
    assert [(row.image, row.labels[0]["label"]) for row in rows[1:]] == [  # type: ignore[index]
        ("36979.jpg", "entailment"),
        ("4705552913.jpg", "contradiction"),
    ]
    assert summary.dropped == {NO_LABEL: 2, UNREADABLE: 3}
    assert "label is 'maybe', expected contradiction, neutral, entailment or -" in summary.examples[UNREADABLE][0]


@pytest.mark.parametrize(
    ("name", "split"),
    [("snli_ve_train.jsonl", "train"), ("SNLI-VE-Test.jsonl", "test"), ("ve.val.2.jsonl", "val")],
)
def test_the_name_says_the_split(tmp_path: Path, name: str, split: str) -> None:
    assert read(read_snli_ve, lines(tmp_path / name, [pair()]), None)[0][0].split == split


def test_numbers_are_classes_only_where_their_order_is_known(tmp_path: Path) -> None:
    source = lines(tmp_path / "train.jsonl", [pair(label=2), pair(label="0"), pair(label=1.0), pair(label=-1)])
    with pytest.raises(DataError, match=r"train.jsonl, line 1: label is the number 2, .* with --label-order"):
        read(read_snli_ve, source, None)
    for order in ("entailment,neutral,contradiction", "contradiction, neutral, Entailment"):
        classes = parse_label_order(order)
        rows, _ = read(read_snli_ve, source, classes)
        assert [row.labels[0]["label"] for row in rows] == [classes[2], classes[0], "neutral"]  # type: ignore[index]


def test_what_is_no_label() -> None:
    assert entailment_label(" Entailment ", None) == "entailment" and entailment_label(None, None) is None
    for value in (True, 3, 1.5, ["neutral"]):
        with pytest.raises(ValueError, match="label is "):
            entailment_label(value, ("contradiction", "neutral", "entailment"))
    with pytest.raises(ValueError, match="is not an order of contradiction, neutral, entailment"):
        parse_label_order("yes,no,maybe")


def test_files_that_cannot_be_snli_ve(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="none of train, dev, val and test"):
        read(read_snli_ve, lines(tmp_path / "strained.jsonl", [pair()]), None)
    with pytest.raises(DataError, match=r"no field \['gold_label', 'pairID'\], only"):
        read(read_snli_ve, lines(tmp_path / "test.jsonl", [{"Flickr30K_ID": 1, "sentence2": "x"}]), None)


# ---------------------------------------------------------------------------------------------------------- RefCOCO

INSTANCES = {
    "info": {},
    "images": [
        {"id": 581857, "file_name": "COCO_train2014_000000581857.jpg", "width": 640, "height": 427},
        {"id": 9, "file_name": "COCO_train2014_000000000009.jpg", "width": 100, "height": 50},
    ],
    "annotations": [
        {"id": 1, "image_id": 581857, "bbox": [103.93, 299.99, 134.22, 126.08], "category_id": 1},
        {"id": 2, "image_id": 9, "bbox": [90, 40, 20, 9.5]},  # ten pixels beyond the right edge
        {"id": 3, "image_id": 9, "bbox": [10, 10, 0, 5]},
        {"id": 4, "image_id": 9, "bbox": [200, 10, 5, 5]},
        {"id": 5, "image_id": 9, "bbox": [1, 2, 3]},
        {"id": 6, "image_id": 9, "bbox": [99, 0, 1.5, 50]},  # half a pixel beyond: rounding
    ],
}


def ref(ref_id: int, ann_id: int, image_id: int, split: str, *texts: str) -> dict[str, Any]:
    sentences = [{"sent_id": 10 * ref_id + n, "sent": t, "raw": t.upper(), "tokens": []} for n, t in enumerate(texts)]
    name = f"COCO_train2014_{image_id:012d}_{ann_id}.jpg"
    return {
        "ref_id": ref_id, "ann_id": ann_id, "image_id": image_id, "split": split, "file_name": name,
        "sentences": sentences, "category_id": 1, "sent_ids": [],
    }  # fmt: skip


REFS = [
    ref(1, 1, 581857, "train", "navy shirt", "woman back"),
    ref(2, 2, 9, "testA", "right thing"),
    ref(3, 3, 9, "val", "no area"),
    ref(4, 4, 9, "testB", "outside"),
    ref(5, 5, 9, "val", "no box"),
    ref(6, 6, 9, "testB", "edge"),
    ref(7, 1, 9, "val", "box of another picture", "twice"),
    ref(8, 6, 9, "minival", "of no split"),
]


def as_pickle(path: Path) -> Path:
    path.write_bytes(pickle.dumps(REFS, 2))
    return path


@pytest.mark.parametrize("form", ["p", "json"])
def test_refs_and_instances(tmp_path: Path, form: str) -> None:
    (tmp_path / "coco/train2014").mkdir(parents=True)
    refs = as_pickle(tmp_path / "refs(unc).p") if form == "p" else write(tmp_path / "refs.json", REFS)
    sources = [refs, write(tmp_path / "instances.json", INSTANCES)]
    rows, summary = read(read_refcoco, sources, tmp_path / "coco")
    box = [103.93, 299.99, 238.15, 426.07]  # x + w, y + h
    labels = ({"box": box, "id": 10}, {"box": box, "id": 11})
    name = "train2014/COCO_train2014_000000581857.jpg"
    assert rows[0] == Row("000000581857", ("navy shirt", "woman back"), name, 640, 427, "train", labels)
    assert [(row.split, row.captions, row.labels) for row in rows[1:]] == [
        ("testA", ("right thing",), ({"box": [90.0, 40.0, 100.0, 49.5], "id": 20},)),
        ("testB", ("edge",), ({"box": [99.0, 0.0, 100.0, 50.0], "id": 60},)),
    ]
    assert summary.counts == {BOXES_CUT: 1}
    assert summary.dropped == {
        "row: a box without an area": 1,
        "row: a box outside its picture": 1,
        "row: its box or picture is not in instances.json": 1,
        "row: its box is of another picture": 2,
        UNREADABLE: 2,  # an annotation of three numbers, and a ref of no split
    }
    assert rows == read(read_refcoco, sources[::-1], tmp_path / "coco")[0]


def test_lists_by_split_as_they_are_published(tmp_path: Path) -> None:
    images = tmp_path / "coco"
    images.mkdir()
    Image.new("RGB", (60, 40)).save(images / "COCO_train2014_000000000009.jpg")
    entry = {"id": 7, "image_id": 9, "sentence": "the left one", "bbox": [50, 5, 30, 10]}
    content = {"train": [entry, {"id": 8}], "testB": [{**entry, "id": 9, "image_id": "000000000009"}]}
    rows, summary = read(read_refcoco, [write(tmp_path / "ve_splits.json", content)], images)
    assert [(row.image_id, row.image, row.split, row.labels) for row in rows] == [  # cut, for the picture says its size
        (
            "000000000009",
            "COCO_train2014_000000000009.jpg",
            split,
            ({"box": [50.0, 5.0, 60.0, 15.0], "id": number},),
        )
        for split, number in (("train", 7), ("testB", 9))
    ]
    assert summary.counts == {BOXES_CUT: 2} and summary.dropped == {NO_BOX: 1}


def test_lists_of_other_projects(tmp_path: Path) -> None:
    entry = {"image": "train2014/COCO_train2014_000000000009.jpg", "text": "the left one", "ref_id": 2}
    boxed = write(tmp_path / "refcoco+_val.json", [{**entry, "bbox": [1, 2, 3, 4]}, {**entry, "bbox": [1, 2, 3, 4]}])
    rows, _ = read(read_refcoco, [boxed], None)
    assert [(row.image_id, row.image, row.split, row.labels) for row in rows] == [
        ("000000000009", entry["image"], "val", ({"box": [1.0, 2.0, 4.0, 6.0], "id": f"refcoco+_val-{n}"},))
        for n in range(2)
    ]
    plain = write(tmp_path / "refcoco+_test.json", [entry])
    rows, summary = read(read_refcoco, [plain], None)
    assert rows == [] and summary.dropped == {NO_BOX: 1}
    sources = [plain, as_pickle(tmp_path / "refs(unc).p"), write(tmp_path / "instances.json", INSTANCES)]
    rows, _ = read(read_refcoco, sources, None)
    assert [(row.split, row.captions, row.labels[0]["box"]) for row in rows] == [  # type: ignore[index]
        ("testA", ("the left one",), [90.0, 40.0, 100.0, 49.5])  # split and box of ref 2; the refs' own texts stay out
    ]


def test_files_that_cannot_be_refcoco(tmp_path: Path) -> None:
    refs, instances = as_pickle(tmp_path / "refs(unc).p"), write(tmp_path / "instances.json", INSTANCES)
    with pytest.raises(DataError, match=r"refs\(unc\)\.p has no boxes; give the instances.json"):
        read(read_refcoco, [refs], None)
    with pytest.raises(DataError, match="there are boxes only; give"):
        read(read_refcoco, [instances], None)
    with pytest.raises(
        DataError, match=r"is no file of refs, instances or expressions: it has the fields .'questions'"
    ):
        read(read_refcoco, [write(tmp_path / "q.json", {"questions": []})], None)
    with pytest.raises(DataError, match="has the split None; name one of train, val, testA, testB, test in the"):
        read(read_refcoco, [write(tmp_path / "list.json", [{"image_id": 1, "text": "x", "bbox": [1, 2, 3, 4]}])], None)
    refs.write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(DataError, match="holds a dict, not the list of refs"):
        read(read_refcoco, [refs, instances], None)


# ------------------------------------------------------------------------------------------------------------ boxes


def test_boxes_by_hand() -> None:
    summary = Summary()
    assert corners([1, 2.5, 3, 4]) == [1, 2.5, 4, 6.5]
    assert check_box([1, 2, 3, 4], (0, 0), summary) == [1.0, 2.0, 3.0, 4.0]
    assert check_box([-1, 2, 11, 4], (10, 10), summary) == [0.0, 2.0, 10.0, 4.0]
    assert not summary.counts  # a pixel is rounding
    assert check_box([-1.5, 2, 3, 4], (10, 10), summary) == [0.0, 2.0, 3.0, 4.0]
    assert summary.counts == {BOXES_CUT: 1}


@pytest.mark.parametrize(
    ("box", "reason"),
    [
        ([3, 2, 3, 4], "without an area"),
        ([3, 2, 1, 4], "without an area"),
        ([10, 2, 12, 4], "outside its picture"),
        ([1, 2, 3], "not four numbers"),
        ("1 2 3 4", "not four numbers"),
        ([1, 2, 3, float("nan")], "not four numbers"),
        ([1, 2, 3, float("inf")], "not four numbers"),
        ([1, 2, 3, 10**400], "not four numbers"),
        ([True, 2, 3, 4], "not four numbers"),
        (None, "not four numbers"),
    ],
)
def test_boxes_that_cannot_be_used(box: Any, reason: str) -> None:
    with pytest.raises(BoxError, match=reason):
        check_box(box, (10, 10), Summary())


# -------------------------------------------------------------------------------------------------- one's own tables


def test_questions_of_ones_own(tmp_path: Path) -> None:
    many = ["red"] * 3 + ["Blue"]
    source = lines(
        tmp_path / "mine.jsonl",
        [
            {"image": "a.jpg", "question": "What?", "answer": "A cat.", "kind": "animal", "split": "dev"},
            {"image": "a.jpg", "question": "Which?", "answers": ["cat", "kitten"], "question_id": 7},
            {"image": "b/000009.jpg", "question": "Colour?", "answers": many, "answer": "red", "image_id": 9},
            {"image": "a.jpg", "question": "Unknown?"},
            {"image": "a.jpg", "question": "How many?", "answer": 2},
        ],
    )
    rows, summary = read(read_task_tables, [source], TaskTable("vqa"))
    assert [(row.image_id, row.image, row.split, row.labels) for row in rows] == [
        (
            "a.jpg", "a.jpg", "dev",
            ({"question_id": "a.jpg#0", "answers": {"cat": 1.0}, "answer": "A cat.", "kind": "animal"},),
        ),
        ("a.jpg", "a.jpg", None, ({"question_id": 7, "answers": {"cat": 1.0, "kitten": 1.0}},)),
        (
            "000000000009", "b/000009.jpg", None,
            (
                {"question_id": "b/000009.jpg#0", "answers": {"red": 0.75, "blue": 0.25}, "annotations": many,
                 "answer": "red"},
            ),
        ),
        ("a.jpg", "a.jpg", None, ({"question_id": "a.jpg#1"},)),
        ("a.jpg", "a.jpg", None, ({"question_id": "a.jpg#2", "answers": {"2": 1.0}, "answer": "2"},)),
    ]  # fmt: skip
    assert summary.counts == {"questions without an answer": 1} and not summary.dropped


def test_a_table_of_questions(tmp_path: Path) -> None:
    table = 'image, question ,answers,question_id\na.jpg,"What, then?","[""cat"", ""kitten""]",3\nb.jpg,Who?,dog,\n'
    rows, _ = read(read_task_tables, [write(tmp_path / "mine.csv", table)], TaskTable("vqa"))
    assert [(row.captions, row.labels) for row in rows] == [
        (("What, then?",), ({"question_id": "3", "answers": {"cat": 1.0, "kitten": 1.0}},)),
        (("Who?",), ({"question_id": "b.jpg#0", "answers": {"dog": 1.0}},)),
    ]


def test_statements_of_ones_own(tmp_path: Path) -> None:
    table = "path\ttext\tlabel\tpair_id\na.jpg\tIt is.\tEntailment\tp1\na.jpg\tIs it?\t-\t\na.jpg\tNo.\t0\t\n"
    source = write(tmp_path / "mine.tsv", table)
    order = ("contradiction", "neutral", "entailment")
    rows, summary = read(read_task_tables, [source], TaskTable("entailment", "path", None, order))
    assert [row.labels for row in rows] == [
        ({"label": "entailment", "pair_id": "p1"},),
        ({"label": "contradiction", "pair_id": "a.jpg#1"},),
    ]
    assert summary.dropped == {"row: no label, box or agreement on it": 1}
    with pytest.raises(DataError, match=r"mine\.tsv, line 4: label is the number 0"):
        read(read_task_tables, [source], TaskTable("entailment", "path"))


def test_expressions_of_ones_own(tmp_path: Path) -> None:
    Image.new("RGB", (60, 40)).save(tmp_path / "a.png")
    source = lines(
        tmp_path / "mine.jsonl",
        [
            {"image": "a.png", "expression": "left", "box": [0, 0, 10, 10], "id": 5},
            {"image": "a.png", "expression": "right", "box": [50, 0, 70, 10]},
            {"image": "a.png", "expression": "outside", "box": [60, 0, 70, 10]},
            {"image": "a.png", "expression": "none"},
        ],
    )
    rows, summary = read(read_task_tables, [source], TaskTable("referring", images=tmp_path))
    assert [row.labels for row in rows] == [
        ({"box": [0.0, 0.0, 10.0, 10.0], "id": 5},),
        ({"box": [50.0, 0.0, 60.0, 10.0], "id": "a.png#0"},),
    ]
    assert summary.dropped == {"row: a box outside its picture": 1, "row: no label, box or agreement on it": 1}


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"answer": True}, "an answer is True, expected a text"),
        ({"answers": ["x", {}]}, "an answer is {}, expected a text"),
        ({"answer": "the"}, "say nothing; write a word"),
        ({"answers": []}, "say nothing; write a word"),
        ({"question": 5}, "question 5; expected a path and a text"),
        ({"image": " "}, "image is ' '"),
        ({"kind": 5}, "kind is 5, expected a word"),
        ({"split": "../x"}, "split is '../x', expected a name of letters"),
        ({"question_id": [1]}, "question_id is [1], expected a number or a text"),
        ({"image_id": [1]}, "image id is '[1]'"),
    ],
)
def test_rows_that_cannot_be_read_are_counted_with_the_reason(
    tmp_path: Path, entry: dict[str, Any], message: str
) -> None:
    usual = {"image": "a.jpg", "question": "What?", "answer": "cat"}
    usual = {name: value for name, value in usual.items() if name != "answer" or "answers" not in entry}
    rows, summary = read(read_task_tables, [lines(tmp_path / "m.jsonl", [usual | entry])], TaskTable("vqa"))
    assert rows == [] and message in summary.examples[UNREADABLE][0]


def test_a_missing_column_is_named(tmp_path: Path) -> None:
    source = lines(tmp_path / "m.jsonl", [{"image": "a.jpg", "caption": "x"}])
    with pytest.raises(DataError, match=r"no column \['statement'\], only .*--task entailment stand in 'statement' or"):
        read(read_task_tables, [source], TaskTable("entailment"))
    with pytest.raises(DataError, match=r"no column \['picture'\], only .*name it with --image-column"):
        read(read_task_tables, [write(tmp_path / "m.csv", "image,text\na.jpg,x\n")], TaskTable("vqa", "picture"))


def test_no_reader_of_pickles_but_the_closed_one() -> None:
    for path in (REPO / "mvptr_ds/corpus").rglob("*.py"):
        assert "pickle.load" not in path.read_text(encoding="utf-8").replace("`pickle.load`", ""), path
