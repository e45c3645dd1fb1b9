"""Run by each of two ranks in FOLDER: what preflight finds where the ranks differ; both write what they were told."""

from __future__ import annotations

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed as dist

from mvptr_ds.config import load_config
from mvptr_ds.distributed import collectives
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.preflight import checks, rank_checks
from tests.conftest import REPO

LATE_S = 5.0
SLOW_START_S, CONNECT_WITHIN_S = 15.0, 12.0


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An attribute of this process, for a while."""
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def examine(*overrides: str) -> list[dict[str, str]]:
    overrides_all = json.loads(Path("overrides.json").read_text(encoding="utf-8"))
    config = load_config("demo", [*overrides_all, *overrides])
    content = load_ds_config(REPO / "ds_configs/z2.json")
    found = checks.examine(config, content, torch.device("cpu"), prepare=False)
    return [vars(finding) for finding in found]


def sleep(**_: Any) -> None:
    time.sleep(60)


def wrong_sum(values: torch.Tensor) -> None:
    real_all_reduce(values)
    values[-1] += collectives.rank()


real_all_reduce, real_time, real_versions = dist.all_reduce, time.time, checks.versions


def scenarios(folder: Path) -> Iterator[tuple[str, Callable[[], list[dict[str, str]]]]]:
    second = collectives.rank() == 1
    yield "well", examine
    with replaced(checks, "versions", lambda: real_versions() | ({"torch": "1.0"} if second else {})):
        yield "versions", examine
    with replaced(time, "time", lambda: real_time() - second * LATE_S):
        yield "clocks", examine
    with replaced(rank_checks.dist, "all_reduce", wrong_sum):
        yield "all-reduce", examine
    yield "a task without its start", lambda: examine("run.stages=[entailment]", "run.init_from=gone")
    yield "arguments", lambda: examine(f"train.batch_size={8 + 8 * second}")
    yield "run folder", lambda: examine("run.dir=own")  # relative: each rank stands in another folder
    yield "shards", lambda: examine("data.train=own-train")
    yield "vocabularies", lambda: examine("data.phrase_vocab=own.json")


def main() -> None:
    folder = Path(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    second = os.environ["RANK"] == "1"
    if (folder / "one-does-not-connect").exists():
        with replaced(deepspeed, "init_distributed", sleep) if second else nullcontext():
            collectives.init(connect_within_s=0.0 if second else 2.0)
    time.sleep(SLOW_START_S if second else 0.0)
    collectives.init(connect_within_s=CONNECT_WITHIN_S)
    os.chdir(folder / f"node{collectives.rank()}")
    if (folder / "one-is-gone").exists():
        if second:
            sleep()
        with replaced(checks, "LIMIT_S", 2.0):
            examine()
    told = {name: scenario() for name, scenario in scenarios(folder)}
    (folder / f"told-rank{collectives.rank()}.json").write_text(json.dumps(told), encoding="utf-8")
    collectives.barrier()
    collectives.shut_down()


if __name__ == "__main__":
    main()
