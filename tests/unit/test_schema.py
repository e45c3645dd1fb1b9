from __future__ import annotations

import json
from typing import Any

import pytest

from mvptr_ds.data import schema
from mvptr_ds.data.schema import (
    Caption,
    Extractor,
    Phrase,
    Record,
    Region,
    load_json,
    parse_record,
    parse_sample_record,
)
from mvptr_ds.errors import DataError

WHOLE = Record(
    "7",
    64,
    48,
    (Caption("Füße 🐕", (Phrase(("füße",), ((0, 4),), (0,)), Phrase(("🐕",), ((5, 6),)))),),
    (Region((0, 0, 1.5, 2), "dog", 0.25),),
    Extractor("facebook/detr-resnet-50", "0123456789ab"),
)


@pytest.mark.parametrize(
    "record", [WHOLE, Record("", 0, 0, (Caption("a"),)), Record("a", 640, 480, (Caption("a"),)), Record("1", 2, 3, ())]
)
def test_a_record_reads_as_it_was_written(record: Record) -> None:
    assert parse_record(json.dumps(record.to_json()).encode()) == record
    assert ("extractor" in record.to_json()) == (record.extractor is not None)


def changed(**changes: Any) -> bytes:
    return json.dumps({**WHOLE.to_json(), **changes}).encode()


def region(**changes: Any) -> list[dict[str, Any]]:
    return [{"box": [0, 0, 1, 1], "tag": "dog", **changes}]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xff\xfe", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (changed().replace(b'"width": 64', b'"width": ' + b"9" * 5_000), "wrong type"),
        (b"[]", "a list, not a JSON object"),
        (changed(schema=2), "schema is 2"),
        (changed(width=0), "0 x 48, both must be at least 1"),
        (changed(width=0, height=0), "0 x 0, both must be at least 1"),
        (changed(width=0, captions=[], regions=[]), "0 x 48, both"),
        (changed(width=-1), "width is -1"),
        (changed(height=10**400), r"height is 100000000000\.\.\., expected 0 to 1000000 pixels"),
        (changed(width=float("nan")), "wrong type"),
        (changed(width=float("inf")), "wrong type"),
        (changed(width=[1]), "wrong type"),
        (changed(captions=None), "wrong type"),
        (changed(captions=[{"text": " \t"}]), "says nothing; write one, or leave it out"),
        (changed(captions=[{"text": 3}]), "caption text is 3, expected text"),
        (changed(captions=[{"text": "a \ud800 b"}]), "no valid Unicode"),
        (changed(captions=["a"]), "wrong type"),
        (changed(captions=[{"text": "ab", "phrases": [{"tuple": ["a"], "spans": [[1, 3]]}]}]), "spans"),
        (changed(captions=[{"text": "ab", "phrases": [{"tuple": [""], "spans": []}]}]), "one to three words"),
        (changed(captions=[{"text": "ab", "phrases": [{"tuple": ["\udfff"], "spans": []}]}]), "no valid Unicode"),
        (changed(captions=[{"text": "a", "phrases": [{"tuple": ["a"], "spans": [], "regions": [1]}]}]), "regions"),
        (changed(regions=region(box=[0, 0, float("nan"), 1])), "region box"),
        (changed(regions=region(box=[0, 0, 1])), "wrong type"),
        (changed(regions=region(tag=None)), "region tag is None"),
        (changed(regions=region(score=float("inf"))), "score is inf"),
        (changed(extractor={"name": "a", "version": 1}), "extractor version is 1, expected text"),
        (changed(extractor={"name": " ", "version": "1"}), "must not be empty"),
        (changed(image_id="\ud800"), "no valid Unicode"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_no_record_is_refused_with_its_reason(content: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        parse_record(content)


def with_own_fields(value: bytes) -> bytes:
    """A record with fields of its user's own at every level."""
    own = b'{"own": %s, "more": {"tag": [1, 2.5e9]}, ' % value
    return changed().replace(b"{", own)


TWICE = b'{"schema": 1, "image_id": "a", "image_id": "b", "width": 2, "height": 3, "captions": [], "captions": []}'
USUAL = [
    changed(),
    changed(captions=[{"text": "a"}], regions=[]),
    changed(captions=[], width=0, height=0, regions=[]),
    changed(regions=region(box=[0, -1, 1.25, 2**70])),
    changed(image_id="\U0001f415", captions=[{"text": 'a "\\ \n\u20ac'}]),
    TWICE,
    changed(url="https://example.org/a.jpg", regions=region(colour="brown")),
    *map(with_own_fields, (b"null", b'"a\\u00e9\xc3\xa9"', b"[" * 400 + b"]" * 400, b"9" * 5_000, b"-" + b"9" * 5_000)),
]
UNUSUAL = [
    changed(image_id=7),
    changed(width="640"),
    changed(width=640.0),
    changed(width=True),
    changed(regions=region(box=["0", "0", "1", "1"])),
    with_own_fields(b"NaN"),
    with_own_fields(b'"\\ud800"'),
    changed(captions=[{"text": "ab", "phrases": [{"tuple": ["a"], "spans": [[0.5, 1]]}]}]),
    changed().decode().encode("utf-16"),
    b"\xef\xbb\xbf" + changed(),
]


@pytest.mark.parametrize(("contents", "is_usual"), [(USUAL, True), (UNUSUAL, False)], ids=["usual", "unusual"])
def test_records_are_the_same_by_the_quick_way_and_by_the_other(contents: list[bytes], is_usual: bool) -> None:
    for content in contents:
        assert (schema._usual_record(content, slice(None)) is not None) == is_usual, content
        assert parse_record(content) == schema._record(load_json(content)), content


@pytest.mark.parametrize("value", [b'"\xff"', b'{"\xff": 1}', b"[1,]", b"01", b'"\t"', b"tru", b"[" * 100_000])
def test_what_is_no_json_is_refused_in_fields_of_the_users_own_too(value: bytes) -> None:
    content = with_own_fields(value)
    assert schema._usual_record(content, slice(None)) is None
    with pytest.raises(DataError, match="not JSON"):
        parse_record(content)


def test_one_caption_is_read_and_the_others_may_be_bad() -> None:
    good = {"text": "a dog", "phrases": [{"tuple": ["dog"], "spans": [[2, 5]], "regions": [0]}]}
    for other in (good, {"text": ""}, {"text": "a", "phrases": [{"tuple": [], "spans": []}]}, {}, 3):
        content = changed(captions=[other, good])
        assert parse_sample_record(content, 1).captions == (Caption("a dog", (Phrase(("dog",), ((2, 5),), (0,)),)),)
    for caption in (-1, 2):
        with pytest.raises(DataError, match=f"caption {caption} of a record with 2; rebuild the index"):
            parse_sample_record(changed(captions=[good, good]), caption)
    assert parse_sample_record(changed(captions=[]), 0).captions == ()
