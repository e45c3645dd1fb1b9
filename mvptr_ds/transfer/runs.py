"""Carries out the runs of a comparison, several at a time, each in a process of its own."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import shutil
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from mvptr_ds.errors import DataError
from mvptr_ds.transfer.arms import Job
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.signals import end_with_parent

logger = logging.getLogger(__name__)
MARKER, LOG = "arguments.json", "log.txt"


def run_all(jobs: Sequence[Job], num_processes: int) -> None:
    """Runs what is not done yet.

    Raises:
        DataError: a run failed, a folder holds one of other arguments, or the shards of a task cannot be built.
    """
    waiting = [job for job in jobs if not is_done(job)]
    done = {job.folder for job in jobs if job not in waiting}
    num_threads = max(1, (os.cpu_count() or 1) // num_processes)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["mvptr_ds.train", "mvptr_ds.eval"])  # imported once: a run begins in no time
    running: dict[ForkServerProcess, Job] = {}
    prepared: set[str] = set()
    with progress_bar(total=len(waiting), desc="runs", unit="run") as bar:
        try:
            while waiting or running:
                for job in _that_can_begin(waiting, done, num_processes - len(running)):
                    waiting.remove(job)
                    if job.prepare is not None and job.task not in prepared:
                        job.prepare()
                        prepared.add(job.task)
                    process = context.Process(target=_run, args=(job, num_threads))
                    process.start()
                    running[process] = job
                wait([process.sentinel for process in running])
                for process in [process for process in running if not process.is_alive()]:
                    job = running.pop(process)
                    _check(job, process.exitcode)
                    done.add(job.folder)
                    bar.update(1)
        finally:
            for process in running:  # after an error, or Ctrl-C
                process.terminate()
            for process in running:
                process.join()


def _that_can_begin(waiting: Sequence[Job], done: set[Path], num: int) -> list[Job]:
    return [job for job in waiting if job.after is None or job.after in done][:num]


def is_done(job: Job) -> bool:
    """Returns whether the run is there with what comes after it.

    Raises:
        DataError: the folder holds one of other arguments, which is finished, too.
    """
    before = _arguments(job)
    if before is None or not before["done"]:
        return False
    if before["overrides"] != list(job.overrides):
        differ = sorted(set(before["overrides"]) ^ set(job.overrides))
        raise DataError(f"{job.folder} was made with other arguments ({', '.join(differ)}): give another --out")
    return True


def _arguments(job: Job) -> dict[str, Any] | None:
    marker = job.folder / MARKER
    return dict(json.loads(marker.read_text(encoding="utf-8"))) if marker.is_file() else None


def _check(job: Job, code: int | None) -> None:
    if code:
        log = job.folder / LOG
        last = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()[-1:]
        raise DataError(f"the run {job.folder} ended with {code}: {' '.join(last)[:300]} (all of it: {log})")
    logger.info("%s, %s, seed %d: done", job.task, job.arm, job.seed)


def _run(job: Job, num_threads: int) -> None:
    """Trains and evaluates in this process, which ends with their status; what is said goes into the run's log."""
    end_with_parent()
    import torch

    from mvptr_ds import eval as evaluation
    from mvptr_ds import train

    os.environ["OMP_NUM_THREADS"] = str(num_threads)  # else a run takes all cores, as it does by itself
    torch.set_num_threads(num_threads)  # torch has read that variable already
    before = _arguments(job)
    if before is not None and before["overrides"] != list(job.overrides):  # interrupted, and of other arguments
        shutil.rmtree(job.folder)
    job.folder.mkdir(parents=True, exist_ok=True)
    _mark(job, done=False)
    started_s = time.perf_counter()
    with (job.folder / LOG).open("wb") as log:
        for stream in (sys.stdout, sys.stderr):  # of the process: compilers that DeepSpeed tries write there, too
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    code = train.main(["--config", job.config, *job.overrides])
    if not code and job.evaluates:
        code = evaluation.main([str(job.folder)])
    if not code:
        sys.stdout.write(f"{time.perf_counter() - started_s:.0f} s\n")
        _mark(job, done=True)
    sys.stdout.flush()
    sys.exit(code)


def _mark(job: Job, done: bool) -> None:
    content = {"overrides": list(job.overrides), "done": done}
    Path(job.folder / MARKER).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
