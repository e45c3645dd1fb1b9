"""Runs work in several processes so that an interruption loses no finished unit; counts what was dropped and why.

out/.progress/arguments.json   what the work was started with
out/.progress/000012.json      the summary of unit 12: it is done
out/summary.json               the sum, written when all units are done; .progress is gone then
"""

from __future__ import annotations

import contextlib
import filecmp
import json
import logging
import multiprocessing
import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

from mvptr_ds.errors import DataError, portable
from mvptr_ds.user_io.atomic import replacing
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.signals import blocked, end_with_parent

logger = logging.getLogger(__name__)
Unit = TypeVar("Unit")

SUMMARY_NAME = "summary.json"
PROGRESS_NAME = ".progress"
MAX_EXAMPLES = 5  # kept of each reason
_STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Summary:
    """Counts what some work did, and what it dropped and why."""

    counts: Counter[str] = field(default_factory=Counter)  # "records", "captions", ...
    dropped: Counter[str] = field(default_factory=Counter)  # reason -> number
    examples: dict[str, list[str]] = field(default_factory=dict)  # reason -> the first few "where: detail"

    def drop(self, reason: str, where: str, number: int = 1) -> None:
        """Counts `number` things dropped for `reason`; `where` names one of them."""
        self.dropped[reason] += number
        examples = self.examples.setdefault(reason, [])
        if len(examples) < MAX_EXAMPLES:
            examples.append(where)

    def add(self, other: Summary) -> None:
        self.counts.update(other.counts)
        self.dropped.update(other.dropped)
        for reason, more in other.examples.items():
            own = self.examples.setdefault(reason, [])
            own += more[: MAX_EXAMPLES - len(own)]

    def to_json(self) -> dict[str, Any]:
        return {"counts": dict(self.counts), "dropped": dict(self.dropped), "examples": self.examples}

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> Summary:
        examples = {reason: list(lines) for reason, lines in content["examples"].items()}
        return cls(Counter(content["counts"]), Counter(content["dropped"]), examples)

    def lines(self) -> list[str]:
        """Returns lines to print: the counts, then each reason with number and example, the most frequent first."""
        out = [f"{name}: {number:,}" for name, number in self.counts.items()]
        for reason, number in sorted(self.dropped.items(), key=lambda item: (-item[1], item[0])):
            example = next(iter(self.examples.get(reason, ())), None)
            out.append(f"dropped {number:,}: {reason}" + (f" (e.g. {example})" if example is not None else ""))
        return out


def run_units(
    out: Path,
    arguments: dict[str, Any],
    units: Sequence[Unit],
    work: Callable[[Unit], Summary],
    num_processes: int,
    desc: str,
) -> Summary:
    """Runs work(unit) for every unit, in any order; returns the sum of the summaries in the order of the units.

    A unit writes its own output files atomically. What is finished is remembered in `out`, so that an interrupted run
    resumes with the missing units; a finished folder returns its summary at once. `work` and the units must be
    picklable unless `num_processes` is 1: then all is done in this process.

    Raises:
        DataError: `out` was started or finished with other arguments, or a process was killed.
        SystemExit: SIGINT or SIGTERM came (status 128 + its number); the processes are ended before.
    """
    if num_processes < 1:
        raise DataError(f"{num_processes} processes: at least 1 is needed")
    out = Path(out)
    arguments = json.loads(json.dumps(arguments))
    finished = finished_summary(out, arguments)
    if finished is not None:
        logger.info("%s is finished: all its units were done with these arguments", out)
        return finished
    progress = _open_progress(out, {**arguments, "num_units": len(units)})
    todo = [number for number in range(len(units)) if not _unit_path(progress, number).exists()]
    num_before = len(units) - len(todo)
    if num_before:
        logger.info("%s: going on, %d of %d units are done", out, num_before, len(units))
    with _stop_on_signals(), progress_bar(total=len(units), initial=num_before, desc=desc, unit="unit") as bar:
        run = _run_here if num_processes == 1 else _run_spawned
        with contextlib.closing(run(units, todo, work, min(num_processes, max(1, len(todo))))) as results:
            try:
                for number, summary in results:
                    _write_json(_unit_path(progress, number), summary.to_json())
                    bar.update()
            except SystemExit:
                logger.warning("%s: interrupted; the same command goes on with the units that are missing", out)
                raise
    total = Summary()
    for number in range(len(units)):
        total.add(Summary.from_json(_read_json(_unit_path(progress, number))))
    _write_json(out / SUMMARY_NAME, {"arguments": arguments, **total.to_json()})
    shutil.rmtree(progress)
    return total


def refuse_foreign_tars(out: Path, *inputs: Path) -> None:
    """Keeps work that writes tars into `out` from writing over the tars of something else.

    Raises:
        DataError: `out` is one of the inputs, or holds tars that no work of this kind has begun there.
    """
    for folder in inputs:
        if Path(out).resolve() == Path(folder).resolve():
            raise DataError(f"{out} is what is read; write to another folder")
    begun = (Path(out) / SUMMARY_NAME).exists() or (Path(out) / PROGRESS_NAME).exists()
    if not begun and any(Path(out).glob("*.tar")):
        raise DataError(f"{out} already holds tars; remove them or name another folder")


def put_in_place(finished: Path, out: Path) -> None:
    """Gives a finished file its name; the same command may be repeated, but what else stands there is not lost.

    Raises:
        DataError: `out` holds something else; `finished` is removed.
    """
    if out.exists() and not filecmp.cmp(finished, out, shallow=False):
        finished.unlink()
        raise DataError(f"{out} is there and holds something else; remove it, or name another file to write")
    os.replace(finished, out)


def finished_summary(out: Path, arguments: dict[str, Any]) -> Summary | None:
    """Returns the summary of a finished folder, None for one that is not.

    Raises:
        DataError: it was finished with other arguments.
    """
    path = Path(out) / SUMMARY_NAME
    if not path.exists():
        return None
    content = _read_json(path)
    _check_arguments(path, content.get("arguments"), json.loads(json.dumps(arguments)))
    try:
        return Summary.from_json(content)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise DataError(f"{path} is not a summary ({error!r}); remove it, or write to another folder") from error


def _open_progress(out: Path, arguments: dict[str, Any]) -> Path:
    progress = out / PROGRESS_NAME
    path = progress / "arguments.json"
    if path.exists():
        _check_arguments(path, _read_json(path), arguments)
    else:
        progress.mkdir(parents=True, exist_ok=True)
        _write_json(path, arguments)
    return progress


def _check_arguments(path: Path, before: Any, now: dict[str, Any]) -> None:
    if not isinstance(before, dict):
        raise DataError(f"{path} does not hold the arguments of a run; remove it, or write to another folder")
    missing = object()
    names = sorted({*before, *now})
    differ = [
        f"{n}: {before.get(n)!r}, now {now.get(n)!r}" for n in names if before.get(n, missing) != now.get(n, missing)
    ]
    if differ:
        raise DataError(
            f"{path} was written with other arguments ({'; '.join(differ)}); use those, write to another folder, or "
            "remove this one"
        )


def _unit_path(progress: Path, number: int) -> Path:
    return progress / f"{number:06d}.json"


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); remove it and start again") from error
    return content if isinstance(content, dict) else {}


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, ensure_ascii=False, indent=1) + "\n", encoding="utf-8", errors="replace")


@contextlib.contextmanager
def _stop_on_signals() -> Iterator[None]:
    """Makes SIGINT and SIGTERM raise SystemExit in the main thread, so that all that is open is closed."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = {number: signal.signal(number, stop) for number in _STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


_Results = Generator[tuple[int, Summary], None, None]  # number of the unit, its summary


def _run_here(
    units: Sequence[Unit], todo: Sequence[int], work: Callable[[Unit], Summary], num_processes: int
) -> _Results:
    for number in todo:
        yield number, work(units[number])


def _run_spawned(
    units: Sequence[Unit], todo: Sequence[int], work: Callable[[Unit], Summary], num_processes: int
) -> _Results:
    """Runs the units in a pool of processes; no more units than processes are submitted at a time."""
    others = set(multiprocessing.active_children())
    workers: set[BaseProcess] = set()  # the pool starts one when a unit is submitted and no worker is idle
    waiting = iter(todo)
    running: dict[Future[Summary], int] = {}
    pool = ProcessPoolExecutor(num_processes, multiprocessing.get_context("spawn"), _begin_worker, (work,))

    def submit(num: int) -> None:
        for number in islice(waiting, num):
            with blocked([signal.SIGINT]):  # which a terminal sends to all: the parent ends the workers
                running[pool.submit(_work_on, units[number])] = number
            remember_workers()

    def remember_workers() -> None:
        workers.update(set(multiprocessing.active_children()) - others)

    try:
        submit(num_processes)
        while running:
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                yield running.pop(future), future.result()
                submit(1)
    except BrokenProcessPool as error:
        pool.shutdown()
        raise DataError(
            f"a process ended in its work (exit code {_first_exit_code(workers)}; -9 is mostly a lack of memory); "
            "start the same command again, it goes on with the missing units, with fewer processes if memory is short"
        ) from error
    finally:
        remember_workers()  # a signal may have come while one was started
        for worker in workers:
            worker.terminate()  # after an error or a signal, units are still in work
        pool.shutdown()


def _first_exit_code(workers: Iterable[BaseProcess]) -> int:
    """Returns the exit code of the worker that broke the pool, which then ends the others by SIGTERM."""
    codes = [worker.exitcode for worker in workers]
    return next((code for code in codes if code not in (None, 0, -signal.SIGTERM)), -signal.SIGTERM)


_work: Callable[[Any], Summary]  # of a worker, which gets it once: it may hold what takes long to load


def _begin_worker(work: Callable[[Any], Summary]) -> None:
    global _work
    end_with_parent()  # it would write beside the next run that does the same unit
    _work = work


def _work_on(unit: Any) -> Summary:
    try:
        return _work(unit)
    except Exception as error:
        sendable = portable(error)
        if sendable is error:
            raise
        raise sendable from error
