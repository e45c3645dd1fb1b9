"""Progress of long work: a bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io
import re
import sys

import pytest

from mvptr_ds.user_io import progress
from mvptr_ds.user_io.progress import progress_bar


class Clock:
    now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress, "_LOOK_S", 0.0)
    monkeypatch.setattr(progress, "_lines", progress._Lines())
    return clock


def work(clock: Clock, num: int, seconds: float, name: str) -> None:
    for _ in progress_bar(range(num), desc=name, unit="batch", leave=False):
        clock.now_s += seconds


def test_without_a_terminal_there_is_a_line_every_half_minute(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    work(clock, 10, 9.0, "encode texts")
    said = capsys.readouterr().err
    assert "\r" not in said
    lines = said.splitlines()
    assert [re.sub(r",.*", "", line) for line in lines] == [
        "encode texts: 4 of 10 batch",
        "encode texts: 8 of 10 batch",
    ]
    assert re.fullmatch(r"encode texts: 4 of 10 batch, \d\d:\d\d so far, \S+ left", lines[0])


def test_parts_that_are_short_together_are_not_silent(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("one", "two", "three", "four"):
        work(clock, 10, 2.0, name)
    assert [line.partition(":")[0] for line in capsys.readouterr().err.splitlines()] == ["two", "three"]


def test_short_work_now_and_then_says_nothing(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    """As the evaluation of a small run at intervals."""
    for _ in range(3):
        work(clock, 10, 1.0, "encode")
        clock.now_s += 600.0
    assert capsys.readouterr().err == ""


def test_bytes_without_a_total_and_a_bar_that_is_off(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar(unit="B", unit_scale=True, desc="lines") as bar:
        for _ in range(5):
            clock.now_s += 20.0
            bar.update(3_000_000)
    with progress_bar(total=9, desc="off", disable=True) as bar:
        clock.now_s += 100.0
        bar.update(9)
    said = capsys.readouterr().err
    assert said.startswith("lines: 6.00M of ? B, ") and "off" not in said


def test_on_a_terminal_it_is_tqdms_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(terminal, "isatty", lambda: True)
    monkeypatch.setattr(sys, "stderr", terminal)
    assert list(progress_bar(range(3), desc="bar")) == [0, 1, 2]
    assert "bar: 100%" in terminal.getvalue()
