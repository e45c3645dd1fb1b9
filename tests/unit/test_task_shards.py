"""Shards of the downstream formats: labels stay with their captions into the index, the join and the phrases."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mvptr_ds.corpus.building.group_by_image import GatherOptions, PlannedRecord, gather, read_plan
from mvptr_ds.corpus.phrases.phrase_sidecar import extract_phrases
from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.rows import Row
from mvptr_ds.data.schema import Caption
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.shared_keys import shared_keys
from mvptr_ds.data.shards.sidecar_join import DROP, JoinedIndex, ensure_join
from tests.support.tools import run_tool
from tests.unit.test_task_sources import INSTANCES, TEN, annotation, annotations, lines, pair, questions, ref, write


def picture(path: Path, number: int, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)


def build(*arguments: object) -> str:
    done = run_tool("build_shards.py", *arguments, "--processes", 1)
    assert done.returncode == 0, done.stderr
    return done.stdout


def captions_of(folder: Path) -> dict[str, tuple[Caption, ...]]:
    """The captions of every record, by the record's key."""
    index = Index.open(folder)
    places = [index.place(number) for number in range(index.num_records)]
    return {index.key_of(place): index.read(place)[0].captions for place in places}


@pytest.fixture
def vqa(tmp_path: Path) -> list[object]:
    """Three pictures of train with five questions, one of val; arguments of the command."""
    for number in (1, 2, 3):
        picture(tmp_path / f"coco/train2014/COCO_train2014_{number:012d}.jpg", number)
    picture(tmp_path / "coco/val2014/COCO_val2014_000000000042.jpg", 42)
    asked = [(10, 1, "What is it?"), (11, 1, "What is it?"), (20, 2, "Is it?"), (21, 2, "Why?"), (30, 3, "Who?")]
    found = [
        annotation(n, image, TEN if n != 20 else ["yes"] * 10, "dog" if n != 20 else "yes") for n, image, _ in asked
    ]
    return [
        "vqa",
        write(tmp_path / "v2_q_train2014.json", questions("train2014", *asked)),
        write(tmp_path / "v2_q_val2014.json", questions("val2014", (420, 42, "Where?"))),
        write(tmp_path / "v2_a_train2014.json", annotations("train2014", *found)),
        write(tmp_path / "v2_a_val2014.json", annotations("val2014", annotation(420, 42, TEN, "dog"))),
        "--images", tmp_path / "coco",
    ]  # fmt: skip


def test_vqa(vqa: list[object], tmp_path: Path) -> None:
    said = build(*vqa, "--out", tmp_path / "shards")
    assert "train: 1 shards, 3 records, 5 samples" in said and "val: 1 shards, 1 records, 1 samples" in said
    assert "train and val: 0 pictures in both" in said
    found = captions_of(tmp_path / "shards/train")
    assert set(found) == {"000000000001", "000000000002", "000000000003"}
    same = found["000000000001"]  # the same question of two people is two samples
    assert [caption.text for caption in same] == ["What is it?"] * 2
    assert [caption.labels["question_id"] for caption in same if caption.labels] == [10, 11]
    assert found["000000000002"][0].labels == {
        "question_id": 20, "answers": {"yes": 1.0}, "annotations": ["yes"] * 10, "answer": "yes", "kind": "other",
        "question_type": "what is",
    }  # fmt: skip


def test_a_build_gives_the_same_bytes_again_and_of_sources_in_another_order(vqa: list[object], tmp_path: Path) -> None:
    other = [vqa[0], *vqa[4:0:-1], *vqa[5:]]
    for name, arguments in (("one", vqa), ("two", vqa), ("three", other)):
        build(*arguments, "--out", tmp_path / name, "--records-per-shard", 2)
    tars = [sorted((tmp_path / name).glob("*/*.tar")) for name in ("one", "two", "three")]
    assert len(tars[0]) == 3
    for others in tars[1:]:
        assert [path.read_bytes() for path in others] == [path.read_bytes() for path in tars[0]]


def test_a_finished_build_is_told_so_and_shared_pictures_are_counted_again(vqa: list[object], tmp_path: Path) -> None:
    first = build(*vqa, "--out", tmp_path / "shards")
    again = build(*vqa, "--out", tmp_path / "shards", "--pretraining", tmp_path / "shards/train")
    assert f"train and {tmp_path / 'shards/train'}: 3 pictures in both (" in again
    assert again.startswith(first.splitlines()[0])


def test_phrases_keep_the_labels(vqa: list[object], tmp_path: Path) -> None:
    """A sidecar's captions take the place of the record's, but for the labels, which the sidecar does not repeat."""
    build(*vqa, "--out", tmp_path / "shards")
    extract_phrases(tmp_path / "shards/train", tmp_path / "phrases", "default", 1)
    main, sidecar = Index.open(tmp_path / "shards/train"), Index.open(tmp_path / "phrases")
    ensure_join(main, [sidecar], DROP, False, tmp_path / "joins")
    joined = JoinedIndex(main, [sidecar], DROP, tmp_path / "joins")
    for number in range(len(main)):
        (alone,), (with_phrases,) = (index.read_sample(index.locate(number))[0].captions for index in (main, joined))
        assert with_phrases.labels == alone.labels and alone.labels is not None
        assert with_phrases.text == alone.text


def test_snli_ve(tmp_path: Path) -> None:
    picture(tmp_path / "flickr/4705552913.jpg", 1)
    sources = [
        lines(
            tmp_path / "snli_ve_train.jsonl", [pair(), pair(label="entailment", sentence2="A dog."), pair(label="-")]
        ),
        lines(tmp_path / "snli_ve_test.jsonl", [pair(label="contradiction", sentence2="A cat.")]),
    ]
    said = build("snli_ve", *sources, "--images", tmp_path / "flickr", "--out", tmp_path / "shards")
    assert "dropped 1: row: no label, for the annotators did not agree" in said
    # an official split would not share a picture: here each has its record, and the command says so
    assert "test and train: 1 pictures in both (4705552913)" in said
    found = captions_of(tmp_path / "shards/train")["4705552913"]
    assert [(c.text, (c.labels or {})["label"]) for c in found] == [
        ("A dog sleeps.", "neutral"),
        ("A dog.", "entailment"),
    ]
    assert [c.text for c in captions_of(tmp_path / "shards/test")["4705552913"]] == ["A cat."]


def test_refcoco(tmp_path: Path) -> None:
    picture(tmp_path / "coco/COCO_train2014_000000000009.jpg", 9, (100, 50))
    refs = [ref(2, 2, 9, "train", "right thing", "far right"), ref(6, 6, 9, "testA", "edge")]
    (tmp_path / "refs(unc).p").write_bytes(pickle.dumps(refs, 0))
    write(tmp_path / "instances.json", INSTANCES)
    sources = [tmp_path / "refs(unc).p", tmp_path / "instances.json"]
    said = build("refcoco", *sources, "--images", tmp_path / "coco", "--out", tmp_path / "shards")
    assert "boxes cut at the edge of their picture: 1" in said
    found = captions_of(tmp_path / "shards/train")["000000000009"]
    box = [90.0, 40.0, 100.0, 49.5]
    assert [(c.text, c.labels) for c in found] == [
        ("right thing", {"box": box, "id": 20}),
        ("far right", {"box": box, "id": 21}),
    ]
    assert set(captions_of(tmp_path / "shards/testA")) == {"000000000009"}


def test_ones_own(tmp_path: Path) -> None:
    picture(tmp_path / "photos/a.jpg", 1)
    source = lines(tmp_path / "mine.jsonl", [{"image": "a.jpg", "text": "left", "box": [0, 0, 5, 5], "split": "val"}])
    arguments = ["jsonl-tasks", source, "--images", tmp_path / "photos", "--task", "referring"]
    build(*arguments, "--out", tmp_path / "shards")
    assert captions_of(tmp_path / "shards/val")["a"][0].labels == {"box": [0.0, 0.0, 5.0, 5.0], "id": "a.jpg#0"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--task", "referring", "--reencode", "90"], "boxes are pixels of the pictures as they are; drop it"),
        (["--task", "vqa", "--keys", "number", "--pretraining", "x"], "--pretraining compares keys, and numbers name"),
        (["--task", "entailment", "--label-order", "yes,no"], "is not an order of contradiction, neutral, entailment"),
        ([], "the following arguments are required: --task"),
    ],
)
def test_wrong_usage(tmp_path: Path, arguments: list[str], message: str) -> None:
    given = ["jsonl-tasks", "a.jsonl", "--images", "none", "--out", tmp_path / "out", *arguments]
    done = run_tool("build_shards.py", *given)
    assert done.returncode == 2 and message in done.stderr


def test_a_folder_of_pretraining_is_opened_before_the_work(vqa: list[object], tmp_path: Path) -> None:
    done = run_tool("build_shards.py", *vqa, "--out", tmp_path / "shards", "--pretraining", tmp_path / "nowhere")
    assert done.returncode == 1 and "cannot open the index of" in done.stderr
    assert not (tmp_path / "shards").exists()


def test_shared_keys(tmp_path: Path) -> None:
    for name, numbers in (("one", range(12)), ("two", range(4, 30)), ("three", range(50, 51))):
        entries = [{"image": f"{n:03d}.jpg", "caption": f"Picture {n}."} for n in numbers]
        source = lines(tmp_path / f"{name}.jsonl", entries)
        build("jsonl", source, "--images", "none", "--out", tmp_path / name)
    one, two, three = (Index.open(tmp_path / name / "train") for name in ("one", "two", "three"))
    shared = shared_keys(one, two)
    keys = [one.key_of(one.place(n)) for n in range(12)]
    both = [key for key in keys if int(key) >= 4]
    assert shared.num == len(both) == 8 and list(shared.first) == both[:5]
    assert str(shared) == f"{', '.join(both[:5])}, ..."
    assert shared_keys(two, one).num == 8
    assert shared_keys(one, three) == (0, ()) and str(shared_keys(three, three)) == "050"


# ---------------------------------------------------------------------------------------------------------- the plan


def planned(folder: Path, rows: list[Row], apart: bool) -> tuple[dict[str, list[PlannedRecord]], Summary, str]:
    summary = Summary()
    options = GatherOptions("image-id", 100, 0, 1000, False, None, apart)
    shards, digest = gather(rows, folder / "plan", lambda row: row.split or "train", options, summary)
    plans = {shard.split: list(read_plan(shard.plan, shard.offset, shard.num_records)) for shard in shards}
    return plans, summary, digest


def test_an_image_stands_in_several_splits_where_these_are_apart(tmp_path: Path) -> None:
    rows = [Row("a", ("one",), split="train"), Row("a", ("two",), split="val"), Row("a", ("three",), split="train")]
    plans, summary, _ = planned(tmp_path, rows, apart=True)
    assert {split: [record.captions for record in plan] for split, plan in plans.items()} == {
        "train": [["one", "three"]],
        "val": [["two"]],
    }
    assert not summary.dropped
    plans, summary, _ = planned(tmp_path, rows, apart=False)
    assert set(plans) == {"train"} and summary.dropped == {"caption: of an image that is in another split, too": 1}


def test_a_text_with_other_labels_is_another_caption(tmp_path: Path) -> None:
    labels: list[dict[str, Any] | None] = [{"id": 1}, {"id": 2}, {"id": 1}, None, None, {"a": "\udcff"}]
    rows = [Row("a", ("one",), labels=(label,)) for label in labels]
    plans, summary, _ = planned(tmp_path, rows, apart=True)
    assert plans["train"][0].captions == ["one"] * 3 and plans["train"][0].labels == [{"id": 1}, {"id": 2}, None]
    assert summary.dropped == {"caption: repeated in its record": 2, "caption: not valid Unicode": 1}


def test_the_plan_of_captions_without_labels_says_no_word_of_them(tmp_path: Path) -> None:
    """So that a build of before resumes, whose progress names the plan's digest."""
    _, _, digest = planned(tmp_path, [Row("a", ("one", "two"), "a.jpg", 3, 4)], apart=False)
    assert (tmp_path / "plan/train.jsonl").read_text(encoding="utf-8") == '["a","a.jpg",3,4,["one","two"]]\n'
    assert len(digest) == 64
    planned(tmp_path, [Row("a", ("one",), labels=({"id": 1},))], apart=False)
    assert json.loads((tmp_path / "plan/train.jsonl").read_text(encoding="utf-8")) == [
        "a",
        None,
        0,
        0,
        ["one"],
        [{"id": 1}],
    ]
