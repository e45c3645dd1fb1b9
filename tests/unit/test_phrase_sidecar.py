"""Phrases of shards' captions as a sidecar: joined by key, trained on, resumable."""

from __future__ import annotations

from pathlib import Path

import pytest

from mvptr_ds.corpus.concepts.parser import PhraseParser
from mvptr_ds.corpus.phrases.phrase_sidecar import extract_phrases
from mvptr_ds.data.schema import Caption, Phrase, Record
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_format import SIDECAR
from mvptr_ds.data.shards.sidecar_join import DROP, JoinedIndex, ensure_join
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.errors import DataError

TEXTS = [
    "A brown dog chases two cats.",
    "The man's red hat.",
    "Sitting.",
    "Two dogs ride a surfboard on top of a wave.",
]
STALE = Phrase(("stale",), ((0, 1),))


def write(folder: Path, num_records: int = 25, records_per_shard: int = 10) -> Path:
    """Records of one to three captions, some with a picture only, one with a phrase of before."""
    items = []
    for number in range(num_records):
        texts = [f"{TEXTS[(number + n) % len(TEXTS)]} {number}" for n in range(1 + number % 3)] if number % 7 else []
        captions = tuple(Caption(text, (STALE,)) for text in texts)
        items.append((f"key{number}", Record(f"id{number}", 4, 4, captions), {"jpg": b"picture"}))
    write_shards(folder, items, records_per_shard)
    return folder


def tars(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def test_the_sidecar_is_joined_by_key(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards")
    summary = extract_phrases(shards, tmp_path / "sidecar", "default", 1)
    main, sidecar = Index.open(shards), Index.open(tmp_path / "sidecar")
    assert sidecar.kind == SIDECAR and sidecar.num_records == 25 and sidecar.num_shards == 3
    assert sidecar.extractors == {f"mvptr_ds phrases (default) {PhraseParser().version}": 25}
    ensure_join(main, [sidecar], DROP, False, tmp_path / "joins")
    joined = JoinedIndex(main, [sidecar], DROP, tmp_path / "joins")
    assert len(joined) == len(main)  # records without captions have not been left out
    found = []
    for number in range(joined.num_records):
        record, members = joined.read(joined.place(number))
        assert members["jpg"] == b"picture"
        found += record.captions
    parsed = PhraseParser().parse([caption.text for caption in found])
    assert [list(caption.phrases) for caption in found] == parsed
    assert ("dog", "chase", "cat") in {phrase.tuple for phrases in parsed for phrase in phrases}
    assert STALE not in [phrase for phrases in parsed for phrase in phrases]
    assert summary.counts == {
        "records": 25,
        "records without a caption": 4,
        "captions": len(found),
        "captions without a phrase": sum(not phrases for phrases in parsed),
        "objects": sum(len(phrase.tuple) == 1 for phrases in parsed for phrase in phrases),
        "attributes": sum(len(phrase.tuple) == 2 for phrases in parsed for phrase in phrases),
        "relations": sum(len(phrase.tuple) == 3 for phrases in parsed for phrase in phrases),
    }


def test_any_number_of_processes_and_an_interruption_give_the_same_bytes(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards")
    for num_processes in (1, 2):
        extract_phrases(shards, tmp_path / str(num_processes), "default", num_processes)
    assert tars(tmp_path / "1") == tars(tmp_path / "2") and len(tars(tmp_path / "1")) == 3

    last = shards / "shard-000002.tar"
    sound = last.read_bytes()
    last.write_bytes(bytes(512) + sound[512:])
    with pytest.raises(DataError, match=r"shard-000002\.tar"):
        extract_phrases(shards, tmp_path / "3", "default", 1)
    written_ns = (tmp_path / "3" / "shard-000000.tar").stat().st_mtime_ns
    last.write_bytes(sound)
    extract_phrases(shards, tmp_path / "3", "default", 1)
    assert tars(tmp_path / "3") == tars(tmp_path / "1")
    assert (tmp_path / "3" / "shard-000000.tar").stat().st_mtime_ns == written_ns


def test_records_that_cannot_be_used_are_dropped_and_counted(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", 3)
    tar = shards / "shard-000000.tar"
    data = tar.read_bytes()
    at = data.index(b'{"schema":1,"image_id":"id1"')
    tar.write_bytes(data[:at] + b"#" + data[at + 1 :])  # behind the back of the index
    summary = extract_phrases(shards, tmp_path / "sidecar", "default", 1)
    assert summary.dropped == {"the record cannot be read": 1} and summary.counts["records"] == 2
    assert "shard-000000.tar, key 'key1': the record is not JSON" in summary.examples["the record cannot be read"][0]


def test_folders_that_do_not_go(tmp_path: Path) -> None:
    shards = write(tmp_path / "shards", 3)
    with pytest.raises(DataError, match="write to another folder"):
        extract_phrases(shards, shards, "default", 1)
    extract_phrases(shards, tmp_path / "sidecar", "default", 1)
    with pytest.raises(DataError, match="is a sidecar; give the folder of records"):
        extract_phrases(tmp_path / "sidecar", tmp_path / "other", "default", 1)
    other = write(tmp_path / "others", 4)
    with pytest.raises(DataError, match="other arguments"):
        extract_phrases(other, tmp_path / "sidecar", "default", 1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"holds no \.tar file"):
        extract_phrases(tmp_path / "empty", tmp_path / "x", "default", 1)
