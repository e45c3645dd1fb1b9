"""Runs each reader of shards in a process of its own that may take 1 GiB more memory than it begins with.

    python -m tests.support.memory_limit     one job a line on stdin, as JSON; one answer a line on stdout

The process that imports torch forks one for each job: what a job takes is its own.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any

LIMIT_MIB = 1024


class Limited:
    """The other end: `with Limited() as limited: limited("index", folder=...)`."""

    def __enter__(self) -> Limited:
        command = [sys.executable, "-m", "tests.support.memory_limit"]
        folder = Path(__file__).resolve().parents[2]
        self._process = subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.communicate(timeout=60)

    def __call__(self, job: str, **arguments: Any) -> dict[str, Any]:
        """Does the job; fails when it ends otherwise than in a result or a DataError, or takes too much memory."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({"job": job, **arguments}, default=str) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        assert line, "the process has died"
        answer: dict[str, Any] = json.loads(line)
        assert answer["end"] in ("done", "DataError"), answer
        assert answer["grown_mib"] < LIMIT_MIB, answer
        return answer


def _validate(folder: str) -> Any:
    from mvptr_ds.corpus.validating.validation import validate

    return dict(validate(Path(folder)).summary.dropped)


def _index(folder: str) -> Any:
    from mvptr_ds.data.shards.index_builder import build_index

    return build_index(folder).num_records


def _read(path: str, num_bytes: int) -> Any:
    from mvptr_ds.data.shards.tar_reader import read_record

    return sorted(read_record(path, 0, num_bytes))


def _load(folder: str, number: int, source: str) -> Any:
    """The training reader's sample in place of number `number`: how many were passed over, and why."""
    from mvptr_ds.data.dataset import ShardDataset
    from mvptr_ds.data.sampling.plan import Plan
    from mvptr_ds.data.shards.index import Index
    from tests.fuzz import builder

    reasons: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: reasons.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("mvptr_ds.data.dataset").addHandler(handler)
    index = Index.open(folder)
    sample = ShardDataset(index, Plan(len(index), seed=0), builder(source)).load(0, 0, number)
    return {"num_bad": sample.num_bad, "reasons": reasons}


JOBS: dict[str, Callable[..., Any]] = {"validate": _validate, "index": _index, "read": _read, "load": _load}


def _memory_bytes(field: int) -> int:
    return int(Path("/proc/self/statm").read_text().split()[field]) * resource.getpagesize()


def _do(job: dict[str, Any]) -> dict[str, Any]:
    from mvptr_ds.errors import DataError

    resident = _memory_bytes(1)
    limit = _memory_bytes(0) + (LIMIT_MIB << 20)
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    try:
        answer = {"end": "done", "result": JOBS[job.pop("job")](**job)}
    except DataError as error:
        answer = {"end": "DataError", "result": str(error)}
    except Exception:
        answer = {"end": "error", "result": traceback.format_exc()}
    used = resource.getrusage(resource.RUSAGE_SELF)
    return {
        **answer,
        "grown_mib": (used.ru_maxrss * 1024 - resident) // 2**20,
        "cpu_s": used.ru_utime + used.ru_stime,  # of this job: a forked process begins at 0
    }


def _serve() -> None:
    from tests.fuzz import builder

    for source in ("features", "image"):
        builder(source)
    for line in sys.stdin:
        child = os.fork()
        if child == 0:
            os.write(1, (json.dumps(_do(json.loads(line))) + "\n").encode())
            os._exit(0)
        if os.waitpid(child, 0)[1]:
            print(json.dumps({"end": "died", "grown_mib": 0}), flush=True)


if __name__ == "__main__":
    _serve()
