"""The table of a comparison: for each task what each start comes to, overall and by kind of question."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mvptr_ds.transfer.arms import ARMS, Job

PERMUTED = "permuted"
Scores = Mapping[str, Any]  # `score`, `by_kind`


def gather(jobs: Sequence[Job]) -> dict[str, dict[str, Any]]:
    """Returns `{TASK: {ARM: {"score", "by_kind", "seeds"}}}`: means over the seeds, whose scores are in `seeds`."""
    found: dict[tuple[str, str], list[Scores]] = {}
    for job in jobs:
        if not job.evaluates:
            continue
        report = json.loads((job.folder / "report.json").read_text(encoding="utf-8"))
        found.setdefault((job.task, job.arm), []).append(_scores(job.task, report))
        if job.arm == "pretrained":
            found.setdefault((job.task, PERMUTED), []).append(_permuted_scores(job.task, report))
    tasks = dict.fromkeys(job.task for job in jobs if job.evaluates)
    return {task: {arm: _mean(found[task, arm]) for arm in (*ARMS, PERMUTED) if (task, arm) in found} for task in tasks}


def _scores(task: str, report: Mapping[str, Any]) -> Scores:
    return _recalls(report, report["rerank"]) if task == "retrieval" else report


def _permuted_scores(task: str, report: Mapping[str, Any]) -> Scores:
    if task == "retrieval":
        return _recalls(report, report["permuted_regions"]["retrieval"])
    found: Scores = report["blind"]["permuted_pictures"]
    return found


def _recalls(report: Mapping[str, Any], recalls: Mapping[str, float]) -> Scores:
    num = {"t2i_r1": report["num_captions"], "i2t_r1": report["num_scenes"]}
    by_kind = {way: {"score": recalls[way], "n": num[way]} for way in num}
    return {"score": statistics.mean(recalls[way] for way in num), "by_kind": by_kind}


def _mean(of_seeds: Sequence[Scores]) -> dict[str, Any]:
    kinds = of_seeds[0]["by_kind"]
    by_kind = {
        kind: {"score": statistics.mean(s["by_kind"][kind]["score"] for s in of_seeds), "n": kinds[kind]["n"]}
        for kind in kinds
    }
    scores = [of_seed["score"] for of_seed in of_seeds]
    return {"score": statistics.mean(scores), "by_kind": by_kind, "seeds": scores}


def table(report: Mapping[str, Mapping[str, Any]]) -> str:
    """Returns the report as text: a column a start, a line a kind, in percent; several seeds as mean and spread."""
    arms = [arm for arm in (*ARMS, PERMUTED) if any(arm in of_task for of_task in report.values())]
    lines = []
    for task, of_task in report.items():
        head = [task.upper(), "n", *(arm.replace("_", " ") for arm in arms)]
        rows = [["all", "", *(_cell(of_task.get(arm)) for arm in arms)]]
        for kind, of_kind in next(iter(of_task.values()))["by_kind"].items():
            values = (of_task.get(arm, {}).get("by_kind", {}).get(kind) for arm in arms)
            rows.append([f"  {kind}", str(of_kind["n"]), *map(_cell, values)])
        lines += [*(_line(cells) for cells in (head, *rows)), ""]
    return "\n".join(lines).rstrip()


def _cell(scores: Mapping[str, Any] | None) -> str:
    if scores is None:
        return "-"
    seeds = scores.get("seeds", [])
    spread = f" ±{100 * statistics.stdev(seeds):.1f}" if len(seeds) > 1 else ""
    return f"{100 * scores['score']:.1f}{spread}"


def _line(cells: Sequence[str]) -> str:
    return f"{cells[0]:20}{cells[1]:>7}" + "".join(f"{cell:>14}" for cell in cells[2:])
