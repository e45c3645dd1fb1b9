"""The file that says which samples were replaced."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from mvptr_ds.data.collate import BadSample
from mvptr_ds.monitoring import bad_samples
from mvptr_ds.monitoring.bad_samples import BadSamples


def bad(position: int, reason: str = "cut") -> BadSample:
    return BadSample(position, "train/shard-000000.tar", f"k{position}", 512 * position, 1, reason)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_each_line_has_place_and_reason_and_a_second_start_appends(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    first, second = BadSamples(0.1, tmp_path), BadSamples(0.1, tmp_path)
    first.write(stage="stage1", step=2)
    assert not first.path.exists()
    first.note([bad(9)])
    first.note([bad(7, "x" * 5000)])
    with caplog.at_level(logging.INFO, logger="mvptr_ds"):
        first.write(stage="stage1", step=4)
        first.write(stage="stage1", step=6)  # nothing new
    found = lines(tmp_path / "bad_samples.jsonl")
    assert [line.pop("time") is not None for line in found] == [True, True]
    assert found[1] == {
        "stage": "stage1", "step": 4, "position": 9, "shard": "train/shard-000000.tar", "key": "k9", "byte": 4608,
        "caption": 1, "reason": "cut",
    }  # fmt: skip
    assert found[0]["reason"] == "x" * 1000
    assert (
        caplog.text.count(f"2 samples were replaced by others since the last report; {first.path} says which and why")
        == 1
    )
    with first.path.open("a", encoding="utf-8") as file:
        file.write('{"stage": "sta')  # of a start that was killed in the middle of a line
    second.note([bad(11)])
    second.write(stage="stage1", step=8)
    *_, torn, last = first.path.read_text(encoding="utf-8").splitlines()
    assert torn == '{"stage": "sta' and json.loads(last)["position"] == 11


def test_the_file_is_bounded_and_what_is_noted_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(bad_samples, "MAX_FILE_BYTES", 600)
    monkeypatch.setattr(bad_samples, "MAX_NOTED", 3)
    found = BadSamples(0.1, tmp_path)
    for number in range(5):
        found.note([bad(5 * number + i) for i in range(5)])
        found.write(stage="stage1", step=number)
    assert [line["position"] for line in lines(found.path)] == [0, 1, 2]
    assert found.path.stat().st_size <= 600
    assert caplog.text.count("gets no more lines") == 1


def test_a_file_that_cannot_be_written_costs_its_lines_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "bad_samples.jsonl").mkdir()
    found = BadSamples(0.1, tmp_path)
    found.note([bad(1)])
    found.write(stage="stage1", step=1)
    assert "training goes on without these lines" in caplog.text
