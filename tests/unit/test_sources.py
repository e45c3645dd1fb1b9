"""Readers of annotation formats, pictures, keys, splits, and the plan of the shards made from them."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mvptr_ds.corpus.building.build import parse_shares, split_by_hash
from mvptr_ds.corpus.building.group_by_image import GatherOptions, PlannedRecord, gather, read_plan
from mvptr_ds.corpus.building.source_images import ImageError, ImageOptions, check_image, read_image
from mvptr_ds.corpus.record_keys import make_key
from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources import rows as rows_module
from mvptr_ds.corpus.sources.annotations import read_coco, read_flickr30k, read_karpathy, read_visual_genome
from mvptr_ds.corpus.sources.img2dataset import list_tars, read_caption, scan_tar
from mvptr_ds.corpus.sources.plain import read_image_folder, read_text
from mvptr_ds.corpus.sources.rows import Row, clean_caption, iter_array
from mvptr_ds.corpus.sources.tables import read_csv, read_jsonl, read_parquet
from mvptr_ds.data.images import decode_image
from mvptr_ds.errors import DataError
from tests.support.rights import as_ordinary_user

UNREADABLE = "row: cannot be read"


def write(path: Path, content: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, (str, bytes)) else json.dumps(content)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def read(reader: Callable[..., Iterator[Row]], *arguments: Any) -> tuple[list[Row], dict[str, int]]:
    summary = Summary()
    return list(reader(*arguments, summary)), dict(summary.dropped)


@pytest.mark.parametrize("chunk", [1, 2, 7, 1 << 20])
def test_arrays_are_read_element_by_element(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    monkeypatch.setattr(rows_module, "_CHUNK_CHARS", chunk)
    content = {"year": 12.5, "info": {"a": [1]}, "other": [1, 2], "empty": [], "list": [{"é": '\\"'}, 10, -1.5e3, "x"]}
    path = write(tmp_path / "a.json", json.dumps(content, indent=1))
    assert list(iter_array(path, "list")) == content["list"]
    assert list(iter_array(path, "empty")) == []
    assert list(iter_array(write(tmp_path / "b.json", [[], {}, None]))) == [[], {}, None]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"images": [{"id": 1}', "the value is cut; is the file whole"),
        ('{"images": [{"id": 1', "is the file whole"),
        ('{"images": [1 2]}', "expected ','"),
        ('{"images": 3}', r"expected '\['"),
        ('{"annotations": []}', r"no field 'images', only \['annotations'\]"),
        ("", "expected '{', found ''"),
        ("[" * 100_000, "is a JSON array, not an object with the field 'images'.*the format \"jsonl\""),
        ('{"a": ' + "[" * 100_000, "character"),
        ('{"images": [' + "9" * 5000 + "]}", "character 12"),
    ],
)
def test_what_is_no_such_array_is_an_error_with_its_place(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message):
        list(iter_array(write(tmp_path / "a.json", text), "images"))


def test_an_array_that_is_followed_by_more_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"expected the end of the file, found '\{'"):
        list(iter_array(write(tmp_path / "a.json", '[1, 2]\n{"image": "a.jpg"}\n')))


def test_a_missing_annotation_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none\.json is not a file"):
        read(read_coco, tmp_path / "none.json")


COCO = {
    "info": {"description": "COCO 2014 Dataset", "year": 2014},
    "images": [
        {"license": 5, "file_name": "COCO_train2014_000000057870.jpg", "height": 48, "width": 64, "id": 57870},
        {"license": 2, "file_name": "COCO_train2014_000000000009.jpg", "height": 30, "width": 40, "id": 9},
        {"license": 2, "file_name": "COCO_train2014_000000000025.jpg", "height": 30, "width": 40, "id": 25},
    ],
    "licenses": [{"id": 1, "name": "a"}],
    "annotations": [
        {"image_id": 9, "id": 661611, "caption": "Closeup of bins of food."},
        {"image_id": 57870, "id": 787980, "caption": "A restaurant has modern wooden tables and chairs."},
        {"image_id": 9, "id": 661977, "caption": "A meal in bins.\n"},
        {"image_id": 1234, "id": 3, "caption": "of no image"},
        {"image_id": 9, "id": 4},
        {"image_id": 9, "id": 5, "caption": 5},
        {"image_id": [9], "id": 5, "caption": "x"},
        "not an object",
    ],
}


def test_coco(tmp_path: Path) -> None:
    rows, dropped = read(read_coco, write(tmp_path / "captions_train2014.json", COCO))
    assert rows == [
        Row("000000000009", ("Closeup of bins of food.",), "COCO_train2014_000000000009.jpg", 40, 30),
        Row("000000057870", (COCO["annotations"][1]["caption"],), "COCO_train2014_000000057870.jpg", 64, 48),  # type: ignore[index]
        Row("000000000009", ("A meal in bins.\n",), "COCO_train2014_000000000009.jpg", 40, 30),
    ]
    assert dropped == {
        "row: of an image that the file does not list": 1,
        UNREADABLE: 4,
        "image: listed without a caption": 1,
    }


def one_caption_each(*images: tuple[Any, str, str]) -> dict[str, Any]:
    """COCO's layout of (id, file, caption)."""
    return {
        "images": [{"id": image_id, "file_name": name} for image_id, name, _ in images],
        "annotations": [{"image_id": image_id, "caption": text} for image_id, _, text in images],
    }


@pytest.mark.parametrize("scheme", ["image-id", "number", "hash"])
@pytest.mark.parametrize("num_files", [1, 2])
def test_an_id_of_two_pictures_is_no_record(tmp_path: Path, scheme: str, num_files: int) -> None:
    """Which picture the captions of a merged file are of cannot be told; those of other ids stay."""
    pairs = [(1, "a.jpg", "red"), (2, "c.jpg", "green"), (1, "b.jpg", "blue")]
    files = [pairs] if num_files == 1 else [pairs[:2], pairs[2:]]
    sources = [write(tmp_path / f"{n}.json", one_caption_each(*part)) for n, part in enumerate(files)]
    rows = [row for source in sources for row in read(read_coco, source)[0]]
    records, summary = planned(tmp_path / "plan", rows, GatherOptions(scheme, 4, 0, 30, False))
    assert [(record.image_id, record.captions) for record in records] == [("000000000002", ["green"])]
    assert summary.dropped == {"caption: its image id names several pictures": 2}
    assert summary.counts["source_captions"] == 3
    assert summary.examples["caption: its image id names several pictures"] == ["000000000001: a.jpg, b.jpg"]


def test_an_id_of_two_pictures_in_karpathys_files(tmp_path: Path) -> None:
    def source(number: int, name: str, split: str) -> Path:
        image = {"filename": name, "cocoid": 1, "split": split, "sentences": [{"raw": f"one {name}"}]}
        other = {**image, "filename": "c.jpg", "cocoid": 2, "split": "train"}
        return write(tmp_path / f"{number}.json", {"images": [image, other]})

    for split, dropped in {
        "train": {"caption: its image id names several pictures": 2},
        "test": {
            "caption: its image id names several pictures": 1,
            "caption: of an image that is in another split, too": 1,
        },
    }.items():
        sources = [source(1, "a.jpg", "train"), source(2, "b.jpg", split)]
        rows = [row for path in sources for row in read(read_karpathy, path, True)[0]]
        records, summary = planned(tmp_path / "plan", rows)
        assert [record.image for record in records] == ["c.jpg"] and summary.dropped == dropped


def test_one_picture_however_its_path_is_spelled(tmp_path: Path) -> None:
    spellings = ["a.jpg", "./a.jpg", "x/../a.jpg", ".//a.jpg", str(tmp_path / "a.jpg"), f"{tmp_path}/./x/../a.jpg"]
    lines = [json.dumps({"image": name, "caption": f"caption {n}"}) for n, name in enumerate(spellings)]
    tables = read(read_jsonl, write(tmp_path / "a.jsonl", "\n".join(lines)), "image", "caption")[0]
    options = GatherOptions("image-id", 4, 0, 30, False, str(tmp_path))
    records, summary = planned(tmp_path / "plan", tables, options)
    assert [(r.image_id, r.image) for r in records] == [("a.jpg", "a.jpg")] and not summary.dropped
    assert records[0].captions == [f"caption {n}" for n in range(6)]
    coco = one_caption_each(*((1, name, f"caption {n}") for n, name in enumerate(spellings)))
    rows = read(read_coco, write(tmp_path / "c.json", coco))[0]
    records, summary = planned(tmp_path / "plan", rows, options)
    assert [(r.image_id, r.image) for r in records] == [("000000000001", "a.jpg")] and not summary.dropped
    assert len(records[0].captions) == 6
    outside = [Row("../a.jpg", ("x",), "../a.jpg"), Row("/b.jpg", ("x",), "/b.jpg")]
    assert {r.image for r in planned(tmp_path / "plan", outside, options)[0]} == {"../a.jpg", "/b.jpg"}


def test_coco_ids_that_a_table_program_made_floats_of(tmp_path: Path) -> None:
    images = [{"id": 4.0, "file_name": "a.jpg", "width": 1, "height": 1}]
    annotations = [{"image_id": 4.0, "caption": "one"}, {"image_id": 4, "caption": "two"}]
    annotations += [{"image_id": True, "caption": "x"}, {"image_id": 4.5, "caption": "x"}]
    source = write(tmp_path / "a.json", {"images": images, "annotations": annotations})
    rows, dropped = read(read_coco, source)
    assert [(row.image_id, row.captions) for row in rows] == [("000000000004", ("one",)), ("000000000004", ("two",))]
    assert sum(dropped.values()) == 2


def test_rows_that_would_lose_text_are_dropped(tmp_path: Path) -> None:
    text = "file,text\na.jpg,A dog, brown and big, runs\nb.jpg,a cat\n"
    rows, dropped = read(read_csv, write(tmp_path / "a.csv", text), "file", "text")
    assert [row.captions for row in rows] == [("a cat",)] and dropped == {"row: more cells than the heading": 1}


def test_a_stray_quote_swallows_no_rows(tmp_path: Path) -> None:
    text = 'file\ttext\na.jpg\t"unclosed\nb.jpg\ta "big" cat\nc.jpg\t"she said ""no"" twice"\n'
    rows, dropped = read(read_csv, write(tmp_path / "a.tsv", text), "file", "text")
    assert [row.captions[0] for row in rows] == ['"unclosed', 'a "big" cat', 'she said "no" twice'] and not dropped


def csv_of(tmp_path: Path, *lines: str, heading: str = "file,text", end: str = "\n") -> tuple[list[Row], int]:
    """Rows, and how many lines were dropped."""
    source = write(tmp_path / "a.csv", end.join([heading, *lines]) + end)
    rows, dropped = read(read_csv, source, "file", "text")
    assert set(dropped) <= {UNREADABLE}
    return rows, dropped.get(UNREADABLE, 0)


@pytest.mark.parametrize("end", ["\n", "\r\n"], ids=["unix", "windows"])
@pytest.mark.parametrize(
    ("last", "caption"),
    [
        ("9.jpg,no quote", "no quote"),
        ('9.jpg,"a red, blue thing"', "a red, blue thing"),
        ('9.jpg,a wheel of 20"', 'a wheel of 20"'),
        ('9.jpg,"unclosed', '"unclosed'),
        ('"9.jpg",said', "said"),
    ],
    ids=range(5),
)
def test_a_quote_that_is_never_closed_costs_no_line(tmp_path: Path, end: str, last: str, caption: str) -> None:
    lines = [f"{n}.jpg,caption {n}" for n in range(9)]
    lines[3] = '3.jpg,"begins with a quote'
    rows, num_dropped = csv_of(tmp_path, *lines, last, end=end)
    assert [row.image for row in rows] == [f"{n}.jpg" for n in range(10)] and not num_dropped
    assert rows[3].captions == ('"begins with a quote',) and rows[9].captions == (caption,)
    assert all(rows[n].captions == (f"caption {n}",) for n in (0, 1, 2, 4, 5, 6, 7, 8))


def test_a_stray_quote_in_a_large_table(tmp_path: Path) -> None:
    """Behind the limit of a cell, too (128 KiB): each line is a row or counted."""
    lines = [f"{n}.jpg,{'long ' * 50}{n}" for n in range(2000)]
    lines[500] = '500.jpg,"stray, with a comma'
    lines[1500] = '1500.jpg,"stray'
    rows, num_dropped = csv_of(tmp_path, *lines)
    assert len(rows) == 1999 and num_dropped == 1
    # ids that do not look like pictures' names, but like each other
    rows, num_dropped = csv_of(tmp_path, *(line.replace(".jpg", "") for line in lines))
    assert len(rows) == 1999 and num_dropped == 1
    # and like nothing
    words = [f"{'abcdefghij'[n % 10]},{'long ' * 50}" for n in range(2000)]
    words[500], words[900] = 'x,"stray', 'y,a wheel of 20"'
    rows, num_dropped = csv_of(tmp_path, *words)
    assert len(rows) == 2000 and not num_dropped
    # what cannot be read again is counted by lines
    words[700] = "a line of its own"
    rows, num_dropped = csv_of(tmp_path, *words[:900])
    assert len(rows) + num_dropped == 900 and num_dropped == 400


def test_captions_of_several_lines_stay_whole(tmp_path: Path) -> None:
    cells = ["two\nlines", 'a "quoted", word\n\nand a third, line', "1, 2\n3, go", "Look at this.jpg, please"]
    text = io.StringIO()
    csv.writer(text).writerows(
        [("file", "text"), *((f"{n}.jpg", cell) for n, cell in enumerate(cells)), ("a 1.png", "x")]
    )
    rows, dropped = read(read_csv, write(tmp_path / "a.csv", text.getvalue()), "file", "text")
    assert not dropped
    assert [[clean_caption(text) for text in row.captions] for row in rows] == [
        ["two lines"], ['a "quoted", word and a third, line'], ["1, 2 3, go"], ["Look at this.jpg, please"], ["x"],
    ]  # fmt: skip


def test_broken_quotes_within_a_caption(tmp_path: Path) -> None:
    lines = [
        '1.jpg,"a "big" cat"',
        '2.jpg,"a "big", fat cat"',
        '3.jpg,5" pipe',
        '4.jpg,"one',
        'two" three',
        "5.jpg,end",
    ]
    rows, num_dropped = csv_of(tmp_path, *lines, "6.jpg,nul\0", '7.jpg,"last')
    assert [(row.image, row.captions[0]) for row in rows] == [
        ("1.jpg", '"a "big" cat"'), ("3.jpg", '5" pipe'), ("5.jpg", "end"), ("6.jpg", "nul\0"), ("7.jpg", '"last'),
    ]  # fmt: skip
    assert num_dropped == 3  # a row whose quotes cannot be told from commas, and one of two lines


@pytest.mark.parametrize("heading", ["file,text,text", "file, text,text ", "file,url,text,url"])
def test_a_column_that_comes_twice_is_an_error(tmp_path: Path, heading: str) -> None:
    for name, mark in (("a.csv", ","), ("a.tsv", "\t")):
        with pytest.raises(DataError, match=r"has the column '(text|url)' twice; rename one, or take it out"):
            read(read_csv, write(tmp_path / name, heading.replace(",", mark) + "\n"), "file", "text")
    names = heading.split(",")
    table = pyarrow.Table.from_arrays([pyarrow.array(["a.jpg"])] * len(names), names=names)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"has the column '(text|url)' twice"):
        read(read_parquet, tmp_path / "a.parquet", "file", "text")
    # spaces around a name are none of it, and columns without names may be many
    rows, _ = read(read_csv, write(tmp_path / "a.csv", " file , text,,\na.jpg,one,,\n"), "file", "text")
    assert rows == [Row("a.jpg", ("one",), "a.jpg")]


def test_karpathy(tmp_path: Path) -> None:
    def entry(number: int, split: str, **more: Any) -> dict[str, Any]:
        sentences = [
            {"tokens": ["a"], "raw": f"Sentence {number}.{s}", "imgid": number, "sentid": 5 * number + s}
            for s in (0, 1)
        ]
        name = {"filename": f"COCO_val2014_{number:012d}.jpg", "imgid": number, "sentids": [1, 2]}
        return {**name, "split": split, "sentences": sentences, **more}

    images = [
        entry(391895, "test", filepath="val2014", cocoid=391895),
        entry(60623, "restval", filepath="val2014", cocoid=60623),
        entry(7, "train"),  # Flickr30k: no folder, no cocoid
        entry(8, "../../escape"),
        {"filename": "x.jpg"},
    ]
    source = write(tmp_path / "dataset_coco.json", {"images": images, "dataset": "coco"})
    rows, dropped = read(read_karpathy, source, True)
    assert rows == [
        Row(
            "000000391895",
            ("Sentence 391895.0", "Sentence 391895.1"),
            "val2014/COCO_val2014_000000391895.jpg",
            split="test",
        ),
        Row(
            "000000060623",
            ("Sentence 60623.0", "Sentence 60623.1"),
            "val2014/COCO_val2014_000000060623.jpg",
            split="train",
        ),
        Row(
            "COCO_val2014_000000000007.jpg",
            ("Sentence 7.0", "Sentence 7.1"),
            "COCO_val2014_000000000007.jpg",
            split="train",
        ),
    ]
    assert dropped == {UNREADABLE: 2}
    rows, dropped = read(read_karpathy, source, False)
    assert [row.split for row in rows] == ["test", "train"]
    assert dropped == {UNREADABLE: 2, "image: of the split restval (--no-restval)": 1}


def test_flickr30k_token_file_and_table(tmp_path: Path) -> None:
    token = "1000092795.jpg#0\tTwo young guys .\n1000092795.jpg#1\tTwo | men .\n\n10002456.jpg#0\tSeveral men .\n"
    rows, dropped = read(read_flickr30k, write(tmp_path / "results_20130124.token", token))
    expected = [
        ("1000092795.jpg", "Two young guys ."),
        ("1000092795.jpg", "Two | men ."),
        ("10002456.jpg", "Several men ."),
    ]
    assert [(row.image_id, *row.captions) for row in rows] == expected and dropped == {UNREADABLE: 1}
    assert {row.image for row in rows} == {"1000092795.jpg", "10002456.jpg"}
    # the published table has one row without its second bar
    table = (
        "image_name| comment_number| comment\r\n"
        "1000092795.jpg| 0| Two young guys .\r\n1000092795.jpg| 1| Two | men .\r\n"
        "2199200615.jpg| 4   A dog runs across the grass .\r\n10002456.jpg| 0| Several men .\r\n"
    )
    rows, dropped = read(read_flickr30k, write(tmp_path / "results.csv", table))
    assert [(row.image_id, *row.captions) for row in rows] == expected and dropped == {UNREADABLE: 1}


def test_visual_genome(tmp_path: Path) -> None:
    def region(image_id: int, phrase: str) -> dict[str, Any]:
        return {"region_id": 1, "width": 8, "height": 9, "image_id": image_id, "phrase": phrase, "y": 4, "x": 2}

    descriptions = [
        {"regions": [region(1, "the clock is green"), region(1, "shade")], "id": 1},
        {"regions": [region(2, "a man")], "id": 2},
        {"regions": [region(3, "a dog")]},
        {"regions": [{"x": 1}], "id": 4},
    ]
    source = write(tmp_path / "region_descriptions.json", descriptions)
    url = "https://cs.stanford.edu/people/rak248/{}/{}.jpg"
    data = [
        {
            "width": 80,
            "url": url.format("VG_100K_2", 1),
            "height": 60,
            "image_id": 1,
            "coco_id": None,
            "flickr_id": None,
        },
        {"width": 90, "url": url.format("VG_100K", 2), "height": 60, "image_id": 2, "coco_id": None, "flickr_id": None},
    ]
    rows, dropped = read(read_visual_genome, source, write(tmp_path / "image_data.json", data), None)
    assert rows[:2] == [
        Row("1", ("the clock is green", "shade"), "VG_100K_2/1.jpg", 80, 60),
        Row("2", ("a man",), "VG_100K/2.jpg", 90, 60),
    ]
    assert rows[2].image_id == "3" and dropped == {UNREADABLE: 1}
    for place in ("VG_100K/1.jpg", "VG_100K_2/2.jpg", "3.jpg"):
        write(tmp_path / "images" / place, b"x")
    rows, _ = read(read_visual_genome, source, None, tmp_path / "images")
    assert [row.image for row in rows] == ["VG_100K/1.jpg", "VG_100K_2/2.jpg", "3.jpg"]
    with pytest.raises(DataError, match=r"image_data\.json"):
        read(read_visual_genome, source, write(tmp_path / "image_data.json", [{"id": 3}]), None)
    as_text = [{**entry, "image_id": f"{entry['image_id']}", "width": 80.0} for entry in data]
    descriptions[0]["id"], descriptions[1]["id"] = "1", 2.0
    descriptions[1]["regions"][0]["image_id"] = "2"
    descriptions[2]["regions"].append(region(1, "of another picture"))
    rows, dropped = read(
        read_visual_genome,
        write(tmp_path / "text.json", descriptions),
        write(tmp_path / "image_data.json", as_text),
        None,
    )
    assert rows == [
        Row("1", ("the clock is green", "shade"), "VG_100K_2/1.jpg", 80, 60),
        Row("2", ("a man",), "VG_100K/2.jpg", 80, 60),
    ]
    assert dropped == {UNREADABLE: 1, "row: a region of another image than its entry": 2}
    with pytest.raises(DataError, match=r"image 1 is \('VG_100K_2', 90, 60\), and was \('VG_100K_2', 80, 60\) before"):
        read(
            read_visual_genome,
            source,
            write(tmp_path / "image_data.json", [data[0], {**data[0], "width": 90}]),
            None,
        )


TABLE = [("a/1.jpg", "one"), ("2.png", ["two", "zwei"]), ("a/1.jpg", "uno")]
TABLE_ROWS = [
    Row("a/1.jpg", ("one",), "a/1.jpg"),
    Row("2.png", ("two", "zwei"), "2.png"),
    Row("a/1.jpg", ("uno",), "a/1.jpg"),
]


def test_jsonl(tmp_path: Path) -> None:
    lines = [json.dumps({"file": image, "text": text, "more": 1}) for image, text in TABLE]
    bad = ["{broken", "[1]", "[" * 5000, '{"file": "3.jpg", "text": 3}', '{"file": 3, "text": "x"}', '{"text": "x"}']
    rows, dropped = read(read_jsonl, write(tmp_path / "a.jsonl", "\n".join([*lines, "", *bad])), "file", "text")
    assert rows == TABLE_ROWS and dropped == {UNREADABLE: len(bad)}
    with pytest.raises(
        DataError, match=r"no column \['image', 'caption'\], only \['file', 'text', 'more'\].*--image-column"
    ):
        read(read_jsonl, tmp_path / "a.jsonl", "image", "caption")


def test_a_json_array_is_read_like_lines(tmp_path: Path) -> None:
    """ALBEF's and BLIP's annotations: a caption is a text or a list of texts."""
    entries = [{"image": image, "caption": text, "image_id": f"coco_{n}"} for n, (image, text) in enumerate(TABLE)]
    for text in (json.dumps(entries), "\ufeff\n " + json.dumps(entries, indent=1) + "\n"):
        assert read(read_jsonl, write(tmp_path / "a.json", text), "image", "caption") == (TABLE_ROWS, {})
    odd = [*entries, 3, {"image": "a.jpg", "caption": {"text": "x"}}, {"caption": "x"}]
    rows, dropped = read(read_jsonl, write(tmp_path / "a.json", odd), "image", "caption")
    assert rows == TABLE_ROWS and dropped == {UNREADABLE: 3}
    assert read(read_jsonl, write(tmp_path / "a.json", "[]"), "image", "caption") == ([], {})
    for text, message in {"[{]": "character 1", json.dumps(entries)[:-9]: "Unterminated string"}.items():
        with pytest.raises(DataError, match=message):
            read(read_jsonl, write(tmp_path / "a.json", text), "image", "caption")
    with pytest.raises(DataError, match=r"no column \['caption'\], only \['image', 'conversations'\]"):
        read(read_jsonl, write(tmp_path / "a.json", [{"image": "a.jpg", "conversations": []}]), "image", "caption")


@pytest.mark.parametrize("mark", ["\ufeff", "\ufeff\ufeff"], ids=["one", "two"])
def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path, mark: str) -> None:
    lines = {
        read_text: "A dog.",
        read_flickr30k: "A dog.jpg#0\tA dog.",
        read_jsonl: '{"image": "A dog.jpg", "caption": "A dog."}',
        read_csv: "image,caption\nA dog.jpg,A dog.",
    }
    for reader, line in lines.items():
        columns = ("image", "caption") if reader in (read_jsonl, read_csv) else ()
        rows, dropped = read(reader, write(tmp_path / "a", f"{mark}{line}\n".replace("\n", "\r\n")), *columns)
        assert [row.captions for row in rows] == [("A dog.",)] and not dropped
        assert all(row.image in (None, "A dog.jpg") for row in rows)
        with pytest.raises(DataError, match=r"is UTF-16; write it as UTF-8: iconv"):
            read(reader, write(tmp_path / "a", line.encode("utf-16")), *columns)
    rows, _ = read(read_text, write(tmp_path / "a", "\ufeffOne.\n\ufeffTwo.\n"))  # two files put together
    assert [row.captions for row in rows] == [("One.",), ("Two.",)]


def test_overlong_lines_are_dropped_and_reading_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows_module, "_MAX_LINE_CHARS", 20)
    rows, dropped = read(read_text, write(tmp_path / "a.txt", "x" * 95 + "\nshort\n" + "y" * 19 + "\nlast"))
    assert [row.captions[0][:5] for row in rows] == ["short", "yyyyy", "last"] and dropped == {UNREADABLE: 1}


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("a.tsv", "\t")])
def test_csv(tmp_path: Path, name: str, mark: str) -> None:
    cells = [
        ("file", "text"),
        ("a/1.jpg", "one"),
        ("2.png", '"[""two"", ""zwei""]"'),
        ("a/1.jpg", "uno"),
        ("3.jpg", "[sic"),
    ]
    text = (
        "\ufeff"
        + "".join(mark.join(row) + "\r\n" for row in cells)
        + f"{mark}no image\r\n4.jpg\r\n5.jpg{mark}"
        + "x" * 140_000
    )
    rows, dropped = read(read_csv, write(tmp_path / name, text), "file", "text")
    assert rows == [*TABLE_ROWS, Row("3.jpg", ("[sic",), "3.jpg"), Row("4.jpg", ("",), "4.jpg")]
    assert dropped == {UNREADABLE: 2}
    with pytest.raises(DataError, match="no column"):
        read(read_csv, tmp_path / name, "image", "text")
    with pytest.raises(DataError, match="no column"):
        read(read_csv, write(tmp_path / name, ""), "image", "text")


def test_parquet(tmp_path: Path) -> None:
    source = tmp_path / "a.parquet"
    images, texts = [image for image, _ in TABLE], [[t] if isinstance(t, str) else t for _, t in TABLE]
    pyarrow.parquet.write_table(pyarrow.table({"file": images, "text": texts, "n": [1, 2, 3]}), source)
    assert read(read_parquet, source, "file", "text") == (TABLE_ROWS, {})
    pyarrow.parquet.write_table(pyarrow.table({"file": [b"\xff\xd8", None], "text": ["x", "y"]}), source)
    assert read(read_parquet, source, "file", "text") == ([], {UNREADABLE: 2})
    with pytest.raises(DataError, match="no column"):
        read(read_parquet, source, "image", "text")
    for content in (b"", b"PAR1 no", source.read_bytes()[:-20]):
        with pytest.raises(DataError, match="cannot be read as Parquet"):
            read(read_parquet, write(source, content), "file", "text")


def test_parquet_without_pyarrow_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(DataError, match=r"pip install 'mvptr_ds\[parquet\]'"):
        read(read_parquet, tmp_path / "a.parquet", "file", "text")


def test_text_ids_are_those_of_the_sentence(tmp_path: Path) -> None:
    rows, _ = read(read_text, write(tmp_path / "a.txt", b"One dog.\r\n  One   dog. \nTwo dogs.\n\xff\xfe\n"))
    assert [row.captions[0] for row in rows] == ["One dog.", "  One   dog. ", "Two dogs.", "\udcff\udcfe"]
    assert rows[0].image_id == rows[1].image_id != rows[2].image_id
    assert all(row.image is None for row in rows)


def test_image_folder_follows_links_once(tmp_path: Path) -> None:
    source = tmp_path / "pictures"
    for name in ("pictures/z/x.jpg", "elsewhere/deep/y.jpg", "elsewhere/w.png"):
        write(tmp_path / name, b"x")
    (source / "a").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    (source / "b").symlink_to(tmp_path / "elsewhere" / "deep")  # reached by `a` already
    (source / "c").symlink_to(source / "z")  # a real folder keeps its own name
    (source / "up").symlink_to("..")
    (source / "z/self").symlink_to(".")
    (tmp_path / "elsewhere/back").symlink_to(source)
    (source / "broken").symlink_to("nowhere")
    (source / "v.jpg").symlink_to(tmp_path / "elsewhere/w.png")
    rows, dropped = read(read_image_folder, source)
    assert sorted(row.image_id for row in rows) == ["a/deep/y.jpg", "a/w.png", "v.jpg", "z/x.jpg"]
    assert dropped == {"folder: reached in several ways, read once": 6, "file: no picture by its name": 1}


def test_image_folder_counts_what_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("pictures/a.jpg", "pictures/locked/b.jpg", "pictures/open/c.jpg"):
        write(tmp_path / name, b"x")
    (tmp_path / "pictures/locked").chmod(0)
    tmp_path.chmod(0o755)
    monkeypatch.chdir(tmp_path)  # so that no folder above needs to be open to others
    with as_ordinary_user():
        rows, dropped = read(read_image_folder, Path("pictures"))
    (tmp_path / "pictures/locked").chmod(0o700)
    assert [row.image_id for row in rows] == ["a.jpg", "open/c.jpg"]
    assert dropped == {"folder: cannot be read": 1}


def test_image_folder(tmp_path: Path) -> None:
    for name in ("b.JPG", "a/x.png", "a/c/y.webp", "a/notes.txt"):
        write(tmp_path / "pictures" / name, b"x")
    rows, dropped = read(read_image_folder, tmp_path / "pictures")
    assert [(row.image_id, row.image, row.captions) for row in rows] == [
        (name, name, ()) for name in ("b.JPG", "a/x.png", "a/c/y.webp")
    ]
    assert dropped == {"file: no picture by its name": 1}
    with pytest.raises(DataError, match="not a folder"):
        read(read_image_folder, tmp_path / "none")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" A dog \t runs.\n", "A dog runs."),
        ("A\x00dog\x07", "A dog"),
        ("", ""),
        ("\u00a0\u3000 \r\n", ""),
        ("\x00\x1f\x85", ""),
        ("\u200b\ufeff\u00ad", ""),
        ("犬が\u3000走る", "犬が 走る"),
        (".", "."),
    ],
)
def test_clean_captions(text: str, expected: str) -> None:
    assert clean_caption(text) == expected


def tar_of(path: Path, members: list[tuple[str, bytes]]) -> Path:
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def scan(tar: Path) -> tuple[dict[str, str], dict[str, int]]:
    summary = Summary()
    with open(tar, "rb") as file:
        return {k: read_caption(file, m) for k, m in scan_tar(tar, file, summary).items()}, dict(summary.dropped)


def test_img2dataset_records_up_to_a_damage(tmp_path: Path) -> None:
    members = [
        (f"{n:09d}.{extension}", content)
        for n in range(4)
        for extension, content in (
            ("jpg", b"j" * 700),
            ("json", b'{"caption": "json"}'),
            ("txt", f"caption {n}".encode()),
        )
    ]
    captions = {f"{n:09d}": f"caption {n}" for n in range(4)}
    assert scan(tar_of(tmp_path / "00000.tar", members)) == (captions, {})
    content = (tmp_path / "00000.tar").read_bytes()
    record = 512 * 7  # three headers, 700 bytes in two blocks, two small members in one each
    damaged = {
        "cut at a member": content[: 2 * record],
        "cut in a header": content[: 2 * record + 100],
        "zero block": content[: 2 * record] + bytes(512) + content[2 * record + 512 :],
        "garbage": content[: 2 * record] + b"\xaa" * 512 + content[2 * record + 512 :],
    }
    for name, bad in damaged.items():
        kept, dropped = scan(write_tar_bytes(tmp_path / "bad.tar", bad))
        assert list(kept) == [f"{0:09d}"], name  # record 1 ends at the damage: whether it is whole cannot be known
        assert dropped == {"tar: damaged, skipped from there on": 1}, name


def write_tar_bytes(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


def test_img2dataset_captions_and_odd_members(tmp_path: Path) -> None:
    members = [
        ("a.jpg", b"1"), ("a.json", b'{"caption": "from json"}'),
        ("b.jpg", b"1"), ("b.json", b'{"caption": null}'),
        ("a.txt", b"late"), ("b.jpg", b"2"), ("c.d.jpg", b"3"), ("e.txt", b"\xff"),
    ]  # fmt: skip
    kept, dropped = scan(tar_of(tmp_path / "00000.tar", members))
    assert kept == {"a": "from json", "e": "\udcff"}
    assert dropped == {
        "member: its key was seen before in the tar": 1,
        "member: name is not KEY.extension": 1,
        "row: several pictures or captions under one key": 2,
    }


@pytest.mark.parametrize(
    ("extensions", "number"),
    [("jpg jpg txt", 2), ("jpg txt txt", 2), ("jpg txt jpg txt", 2), ("jpg png txt", 1), ("jpg jpeg json", 1)],
)
def test_img2dataset_key_of_two_pictures_is_no_record(tmp_path: Path, extensions: str, number: int) -> None:
    members = [(f"a.{extension}", str(n).encode()) for n, extension in enumerate(extensions.split())]
    kept, dropped = scan(tar_of(tmp_path / "00000.tar", [*members, ("b.jpg", b"1"), ("b.txt", b"one")]))
    assert kept == {"b": "one"} and dropped == {"row: several pictures or captions under one key": number}


def test_img2dataset_lists_tars(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir(), (tmp_path / "b").mkdir()
    tars = [tar_of(tmp_path / "a" / name, []) for name in ("00001.tar", "00000.tar")]
    assert list_tars([tmp_path / "a"]) == tars[::-1]
    with pytest.raises(DataError, match=r"holds no \.tar"):
        list_tars([tmp_path / "b"])
    tar_of(tmp_path / "b" / "00000.tar", [])
    with pytest.raises(DataError, match=r"two tars are named 00000\.tar"):
        list_tars([tmp_path / "a", tmp_path / "b"])


def picture(picture_format: str, size: tuple[int, int] = (40, 24), mode: str = "RGB", **options: Any) -> bytes:
    noise = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noise).convert(mode).save(buffer, picture_format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("picture_format", "mode", "extension"),
    [
        ("JPEG", "RGB", "jpg"),
        ("JPEG", "L", "jpg"),
        ("JPEG", "CMYK", "jpg"),
        ("PNG", "RGBA", "png"),
        ("PNG", "I;16", "png"),
        ("WEBP", "RGB", "webp"),
    ],
)
def test_pictures_pass_through(picture_format: str, mode: str, extension: str) -> None:
    content = picture(picture_format, mode=mode)
    assert check_image(content, ImageOptions()) == (extension, content, 40, 24)
    decode_image({extension: content}, 32)


@pytest.mark.parametrize(("picture_format", "mode"), [("GIF", "P"), ("BMP", "RGB"), ("TIFF", "RGBA")])
def test_other_formats_become_jpeg(picture_format: str, mode: str) -> None:
    extension, content, width, height = check_image(picture(picture_format, mode=mode), ImageOptions())
    assert (extension, width, height) == ("jpg", 40, 24)
    assert Image.open(io.BytesIO(content)).format == "JPEG"


def test_exif_is_kept_by_passing_through_and_applied_by_encoding() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    content = picture("JPEG", exif=exif)
    # as the training reader decodes it, which looks at no EXIF
    assert check_image(content, ImageOptions()) == ("jpg", content, 40, 24)
    stored = check_image(content, ImageOptions(reencode=90))
    assert (stored.width, stored.height) == (24, 40) == Image.open(io.BytesIO(stored.content)).size
    assert not Image.open(io.BytesIO(stored.content)).getexif()
    damaged = content.replace(b"Exif\0\0MM", b"Exif\0\0ZZ").replace(b"Exif\0\0II", b"Exif\0\0ZZ")
    assert damaged != content and check_image(damaged, ImageOptions(reencode=90))[2:] == (40, 24)


def test_encoding_again_shrinks_but_never_enlarges() -> None:
    options = ImageOptions(reencode=50, max_side=20)
    assert check_image(picture("PNG"), options)[::2] == ("jpg", 20)
    assert check_image(picture("PNG", (10, 8)), options)[2:] == (10, 8)


def big_png(side: int) -> bytes:
    header = b"IHDR" + side.to_bytes(4, "big") * 2 + b"\x08\x02\0\0\0"
    small = picture("PNG", (1, 1))
    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "cannot be decoded"),
        (b"GIF89a", "cannot be decoded"),
        (b"%PDF-1.4 no picture", "cannot be decoded"),
        (picture("JPEG", (200, 200))[:-2000], "cannot be decoded"),
        (picture("PNG", (200, 200))[:-2000], "cannot be decoded"),
        (picture("WEBP", (200, 200))[:-2000], "cannot be decoded"),
        (picture("GIF", (200, 200), "P")[:-9000], "cannot be decoded"),
        (big_png(9500), "over 89 megapixels"),
        (big_png(30000), "over 89 megapixels"),
        (picture("JPEG", (40, 9)), "below 10 pixels"),
    ],
    ids=range(10),
)
def test_pictures_that_cannot_be_used(content: bytes, reason: str) -> None:
    with pytest.raises(ImageError) as error:
        check_image(content, ImageOptions(min_side=10))
    assert error.value.reason == f"picture: {reason}" and " at 0x" not in error.value.detail


def test_a_picture_that_training_would_refuse_is_dropped_or_made_smaller() -> None:
    buffer = io.BytesIO()
    Image.new("1", (8200, 8200)).save(buffer, "PNG")
    with pytest.raises(ImageError, match="64 megapixels that training reads"):
        check_image(buffer.getvalue(), ImageOptions())
    assert check_image(buffer.getvalue(), ImageOptions(reencode=50, max_side=100))[2:] == (100, 100)


def test_pictures_are_read_below_their_folder_only(tmp_path: Path) -> None:
    write(tmp_path / "images" / "a" / "1.jpg", b"one"), write(tmp_path / "secret.jpg", b"secret")
    folder = tmp_path / "images"
    assert read_image(folder, "a/1.jpg") == read_image(folder, "./a/../a/1.jpg") == b"one"
    assert read_image(folder, str(folder / "a" / "1.jpg")) == b"one"
    os.mkfifo(folder / "pipe")
    for name, reason in {
        "../secret.jpg": "its path leads out of --images",
        str(tmp_path / "secret.jpg"): "its path leads out of --images",
        "a/2.jpg": "file is missing",
        "a": "no plain file",
        "pipe": "no plain file",
        "a\0b": "file cannot be read",
        "n" * 5000: "file cannot be read",
    }.items():
        with pytest.raises(ImageError) as error:
            read_image(folder, name)
        assert error.value.reason == f"picture: {reason}", name


def test_keys() -> None:
    assert make_key("image-id", "000000391895", 3) == "000000391895"
    assert make_key("image-id", "a b/ü.x.JPEG", 3) == "a_b___x"
    assert make_key("number", "x", 3) == "000000003"
    assert make_key("hash", "a.jpg", 3) != make_key("hash", "a.png", 3)
    assert len(make_key("hash", "x" * 1000, 3)) == 32


def test_splits_are_a_function_of_the_id() -> None:
    shares = parse_shares("train=0.9,held_out=.1")
    splits = [split_by_hash(f"image {n}", shares) for n in range(4000)]
    assert 320 < splits.count("held_out") < 480  # 4 standard deviations about 400
    # a smaller share of the first takes from it only: what was held out stays so
    smaller = [split_by_hash(f"image {n}", parse_shares("train=0.8,held_out=0.2")) for n in range(4000)]
    assert all(now == "held_out" for before, now in zip(splits, smaller, strict=True) if before == "held_out")
    assert split_by_hash("x", ()) == "train"


@pytest.mark.parametrize(
    "text", ["", "train", "train=0.5", "a=0.5,a=0.5", "a=1.5,b=-0.5", "a=nan", "a=0,b=1", "../x=1", "a b=1", "a=1,"]
)
def test_wrong_shares(text: str) -> None:
    with pytest.raises(ValueError, match=r"train=0\.98"):
        parse_shares(text)


OPTIONS = GatherOptions("image-id", records_per_shard=4, seed=0, max_caption_chars=30, image_only=False)


def planned(folder: Path, rows: list[Row], options: GatherOptions = OPTIONS) -> tuple[list[PlannedRecord], Summary]:
    summary = Summary()
    shards, _ = gather(rows, folder, lambda row: row.split or "train", options, summary)
    assert all(1 <= shard.num_records <= options.records_per_shard for shard in shards)
    assert [shard.first_record for shard in shards] == list(np.cumsum([0, *(s.num_records for s in shards)]))[:-1]
    return [record for shard in shards for record in read_plan(shard.plan, shard.offset, shard.num_records)], summary


def test_rows_of_one_image_become_one_record_in_an_order_of_its_own(tmp_path: Path) -> None:
    rows = [Row(f"{n % 30}.jpg", (f"caption {n}",), f"{n % 30}.jpg", 5, 4) for n in range(60)]
    records, summary = planned(tmp_path, rows)
    assert {r.image_id: r.captions for r in records} == {
        f"{n}.jpg": [f"caption {n}", f"caption {n + 30}"] for n in range(30)
    }
    assert records[0][1:4] == (records[0].image_id, 5, 4)
    order = [int(record.image_id[:-4]) for record in records]
    assert order != sorted(order)
    # another order of the source changes the order of an image's captions only, more images not that of the others
    shuffled = random.Random(0).sample(rows, len(rows))
    assert [r.image_id for r in planned(tmp_path, shuffled)[0]] == [r.image_id for r in records]
    more = [r.image_id for r in planned(tmp_path, [Row("new", ("x",)), *rows])[0] if r.image_id != "new"]
    assert more == [r.image_id for r in records]
    other = GatherOptions("image-id", 4, 1, 30, False)
    assert [r.image_id for r in planned(tmp_path, rows, other)[0]] != [r.image_id for r in records]
    assert (summary.counts["source_images"], summary.counts["source_captions"], summary.dropped) == (30, 60, {})


def test_captions_that_cannot_be_used_are_counted(tmp_path: Path) -> None:
    rows = [
        Row("a", (" A  dog.", "", "x" * 31, "A dog.\n", "\x00", "bad \ud800", "A dog")),
        Row("b", ("\u200b",)),
        Row("c\udcff", ("lost",)),
        Row("d", ("x" * 30,)),
    ]
    records, summary = planned(tmp_path, rows)
    assert {r.image_id: r.captions for r in records} == {"a": ["A dog.", "A dog"], "d": ["x" * 30]}
    assert summary.dropped == {
        "caption: empty": 3,
        "caption: over 30 characters": 1,
        "caption: repeated in its record": 1,
        "caption: not valid Unicode": 1,
        "record: no caption left": 1,
        "row: image id is not valid Unicode": 1,
    }
    assert all(summary.examples.values())


def test_two_images_of_one_key_are_an_error_with_a_remedy(tmp_path: Path) -> None:
    rows = [Row("a/b.jpg", ("one",)), Row("c", ("two",)), Row("a_b.png", ("three",), split="test")]
    with pytest.raises(DataError, match=r"both come to the key 'a_b'.*--keys number or --keys hash"):
        planned(tmp_path, rows)
    assert len(planned(tmp_path, rows, GatherOptions("hash", 4, 0, 30, False))[0]) == 3
    with pytest.raises(DataError, match="91 characters, at most 90 fit; use --keys"):
        planned(tmp_path, [Row("k" * 91, ("x",))])


def test_nothing_left_says_why(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no record is left.*caption: empty"):
        planned(tmp_path, [Row("a", ("",))])
    with pytest.raises(DataError, match="the source is empty"):
        planned(tmp_path, [])
