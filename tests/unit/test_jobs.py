from __future__ import annotations

import functools
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.corpus.resumable_jobs import (
    PROGRESS_NAME,
    SUMMARY_NAME,
    Summary,
    finished_summary,
    refuse_foreign_tars,
    run_units,
)
from mvptr_ds.data.shards.tar_header import TarError
from mvptr_ds.errors import DataError

ROOT = Path(__file__).resolve().parents[2]
ARGUMENTS = {"source": "a.json", "width": 3}


def write_unit(folder: Path, number: int) -> Summary:
    """Units of this file's tests: a file that says which process wrote it, a count, and what odd units drop."""
    with open(folder / f"{number}.txt", "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    summary = Summary()
    summary.counts["records"] += number
    if number % 2:
        summary.drop("odd", f"unit {number}: {number}")
    return summary


def fail_at(folder: Path, last: int, number: int) -> Summary:
    if number == last:
        raise TarError(512, f"unit {number} is damaged")
    return write_unit(folder, number)


def die(folder: Path, number: int) -> Summary:
    os.kill(os.getpid(), signal.SIGKILL)
    return Summary()


class Unsendable(Exception):
    """An error that its own constructor keeps from being sent between processes."""

    def __init__(self, number: int, reason: str) -> None:
        super().__init__(f"{number}: {reason}")


def fail_unsendably(number: int) -> Summary:
    raise Unsendable(number, "of a kind that does not travel")


def linger(folder: Path, number: int) -> Summary:
    write_unit(folder, number)
    if number >= 2:
        time.sleep(600)
    return Summary()


def _pids(folder: Path) -> dict[int, list[int]]:
    return {int(path.stem): [int(line) for line in path.read_text().split()] for path in folder.glob("*.txt")}


@pytest.mark.parametrize("num_processes", [1, 2])
def test_every_unit_is_done_once_and_the_sum_does_not_depend_on_the_processes(
    tmp_path: Path, num_processes: int
) -> None:
    out = tmp_path / "out"
    work = functools.partial(write_unit, tmp_path)
    summary = run_units(out, ARGUMENTS, range(7), work, num_processes, "test")
    assert summary.counts == {"records": 21} and summary.dropped == {"odd": 3}
    assert summary.examples == {"odd": ["unit 1: 1", "unit 3: 3", "unit 5: 5"]}
    pids = _pids(tmp_path)
    assert sorted(pids) == list(range(7)) and {len(own) for own in pids.values()} == {1}
    assert (os.getpid() in {own[0] for own in pids.values()}) == (num_processes == 1)
    assert [path.name for path in out.iterdir()] == [SUMMARY_NAME]
    content = json.loads((out / SUMMARY_NAME).read_text())
    assert content["arguments"] == ARGUMENTS and Summary.from_json(content) == summary
    for pid in {own[0] for own in pids.values()} - {os.getpid()}:
        assert not _alive(pid)


def test_a_finished_folder_returns_its_summary_and_refuses_other_arguments(tmp_path: Path) -> None:
    out, work = tmp_path / "out", functools.partial(write_unit, tmp_path)
    assert finished_summary(out, ARGUMENTS) is None
    first = run_units(out, ARGUMENTS, range(3), work, 1, "test")
    assert run_units(out, dict(ARGUMENTS), range(3), work, 1, "test") == first
    assert {len(own) for own in _pids(tmp_path).values()} == {1}
    with pytest.raises(DataError, match=r"other arguments \(width: 3, now 4\)"):
        run_units(out, {**ARGUMENTS, "width": 4}, range(3), work, 1, "test")
    (out / SUMMARY_NAME).write_text("[")
    with pytest.raises(DataError, match=r"summary\.json is damaged"):
        run_units(out, ARGUMENTS, range(3), work, 1, "test")
    (out / SUMMARY_NAME).write_text(json.dumps({"arguments": ARGUMENTS}))
    with pytest.raises(DataError, match="not a summary"):
        run_units(out, ARGUMENTS, range(3), work, 1, "test")


@pytest.mark.parametrize("num_processes", [1, 2])
def test_after_an_error_the_missing_units_are_done_and_no_others(tmp_path: Path, num_processes: int) -> None:
    out = tmp_path / "out"
    with pytest.raises(DataError, match="unit 4 is damaged"):
        run_units(out, ARGUMENTS, range(5), functools.partial(fail_at, tmp_path, 4), num_processes, "test")
    done = sorted(out.glob(f"{PROGRESS_NAME}/0*.json"))
    assert done and not (out / SUMMARY_NAME).exists()
    before = _pids(tmp_path)
    with pytest.raises(DataError, match="num_units: 5, now 6"):
        run_units(out, ARGUMENTS, range(6), functools.partial(write_unit, tmp_path), 1, "test")
    with pytest.raises(DataError, match="other arguments"):
        run_units(out, {}, range(5), functools.partial(write_unit, tmp_path), 1, "test")
    summary = run_units(out, ARGUMENTS, range(5), functools.partial(write_unit, tmp_path), 1, "test")
    assert summary.counts == {"records": 10} and sorted(_pids(tmp_path)) == list(range(5))
    for path in done:
        assert _pids(tmp_path)[int(path.stem)] == before[int(path.stem)]


def test_a_killed_process_is_an_error_that_says_so(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"exit code -9.*start the same command again"):
        run_units(tmp_path / "out", ARGUMENTS, range(3), functools.partial(die, tmp_path), 2, "test")
    with pytest.raises(DataError, match="0 processes"):
        run_units(tmp_path / "out", ARGUMENTS, range(3), functools.partial(die, tmp_path), 0, "test")


def test_an_error_in_a_process_is_raised_with_the_traceback_of_that_process(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="unit 1 is damaged") as damaged:
        run_units(tmp_path / "a", ARGUMENTS, range(2), functools.partial(fail_at, tmp_path, 1), 2, "test")
    assert "in fail_at" in "".join(traceback.format_exception(damaged.value))
    with pytest.raises(RuntimeError, match="Unsendable: 0: of a kind that does not travel") as unsendable:
        run_units(tmp_path / "b", ARGUMENTS, range(1), fail_unsendably, 2, "test")
    assert "in fail_unsendably" in "".join(traceback.format_exception(unsendable.value))


def test_no_more_units_are_read_ahead_than_there_are_processes(tmp_path: Path) -> None:
    """Units may be large, and there may be many of them."""
    num_ahead = []

    class Units(Sequence[int]):
        def __len__(self) -> int:
            return 12

        def __getitem__(self, number: Any) -> Any:
            num_ahead.append(len(num_ahead) + 1 - len(list(tmp_path.glob(f"out/{PROGRESS_NAME}/0*.json"))))
            return number

    run_units(tmp_path / "out", ARGUMENTS, Units(), functools.partial(write_unit, tmp_path), 2, "test")
    assert len(num_ahead) == 12 and max(num_ahead) == 2


PROGRAM = """
import functools, sys
from pathlib import Path
from mvptr_ds.corpus.resumable_jobs import run_units
from tests.unit.test_jobs import ARGUMENTS, linger
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    run_units(folder / "out", ARGUMENTS, range(5), functools.partial(linger, folder), int(sys.argv[2]), "test")
"""


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(condition, timeout_s: float = 120.0) -> None:  # type: ignore[no-untyped-def]
    end_s = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end_s, "nothing happened"
        time.sleep(0.02)


@pytest.mark.parametrize(
    ("number", "num_processes"), [(signal.SIGINT, 2), (signal.SIGTERM, 1), (signal.SIGTERM, 2), (signal.SIGKILL, 2)]
)
def test_signals_end_the_processes_and_the_next_run_goes_on(
    tmp_path: Path, number: signal.Signals, num_processes: int
) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(tmp_path), str(num_processes)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)
    lingering = {2} if num_processes == 1 else {2, 3}
    _wait_until(lambda: lingering <= {unit for unit, pids in _pids(tmp_path).items() if pids})
    process.send_signal(number)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number)
    assert number == signal.SIGKILL or ("goes on with the units" in stderr and "Traceback" not in stderr)
    pids = {pid for own in _pids(tmp_path).values() for pid in own}
    _wait_until(lambda: not any(_alive(pid) for pid in pids))
    assert len(list((tmp_path / "out" / PROGRESS_NAME).glob("0*.json"))) == 2
    run_units(tmp_path / "out", ARGUMENTS, range(5), functools.partial(write_unit, tmp_path), 1, "test")
    assert {unit: len(own) for unit, own in _pids(tmp_path).items() if unit < 2} == {0: 1, 1: 1}


def test_summaries_add_up_and_read_well() -> None:
    first, second = Summary(), Summary()
    first.counts["records"] = 12345
    for number in range(9):
        first.drop("empty caption", f"line {number}")
    second.drop("empty caption", "line 100", 7)
    second.drop("no image", "x.jpg: cut")
    first.add(second)
    assert first.dropped == {"empty caption": 16, "no image": 1}
    assert first.examples["empty caption"] == [f"line {number}" for number in range(5)]
    assert Summary.from_json(json.loads(json.dumps(first.to_json()))) == first
    assert first.lines() == [
        "records: 12,345",
        "dropped 16: empty caption (e.g. line 0)",
        "dropped 1: no image (e.g. x.jpg: cut)",
    ]


def test_tars_of_something_else_are_not_written_over(tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "other"
    out.mkdir()
    refuse_foreign_tars(out, other)
    (out / "shard-000000.tar").write_bytes(b"pictures")
    with pytest.raises(DataError, match="already holds tars; remove them or name another folder"):
        refuse_foreign_tars(out, other)
    (out / PROGRESS_NAME).mkdir()
    refuse_foreign_tars(out, other)  # begun by this work
    with pytest.raises(DataError, match="is what is read"):
        refuse_foreign_tars(out, other, out)
