"""Scores in the JSON that CLIP_benchmark writes, of which its `build` makes a table of many models."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvptr_ds.evaluation.retrieval import RANKS
from mvptr_ds.user_io.atomic import replacing

MODEL = "mvptr"
CLASSIFICATION, RETRIEVAL = "zeroshot_classification", "zeroshot_retrieval"


def result(dataset: str, pretrained: str, task: str, metrics: Mapping[str, float | None]) -> dict[str, Any]:
    """Returns the result of a task, with the fields of CLIP_benchmark.

    Args:
        dataset: the name of the data.
        pretrained: the run or folder that the model is of.
        metrics: fractions of 1 under CLIP_benchmark's names; None where it has NaN, which is no JSON.

    Source: `run` of clip_benchmark/cli.py, version 1.6.2.
    """
    return {
        "dataset": dataset,
        "model": MODEL,
        "pretrained": pretrained,
        "task": task,
        "metrics": dict(metrics),
        "language": "en",
    }


def retrieval_metrics(recalls: Mapping[str, float]) -> dict[str, float]:
    """Returns `t2i_r1` ... `i2t_r10` of a report under CLIP_benchmark's names: what is retrieved comes first."""
    ways = {"image": "t2i", "text": "i2t"}
    return {f"{found}_retrieval_recall@{k}": recalls[f"{way}_r{k}"] for k in RANKS for found, way in ways.items()}


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Writes a result as a whole; the folder is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as partial:
        partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
