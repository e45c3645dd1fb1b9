"""The table that compares starts: means over seeds by task, arm and kind, and what is written for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.errors import DataError
from mvptr_ds.transfer.arms import ARMS, Job
from mvptr_ds.transfer.runs import is_done
from mvptr_ds.transfer.table import gather, table


def scores(noun: float, relation: float) -> dict[str, Any]:
    by_kind = {"noun": {"score": noun, "n": 30}, "relation": {"score": relation, "n": 10}}
    return {"score": (30 * noun + 10 * relation) / 40, "n": 40, "by_kind": by_kind}


def job(folder: Path, task: str, arm: str, seed: int, report: dict[str, Any]) -> Job:
    run = folder / task / arm / f"seed-{seed}"
    run.mkdir(parents=True)
    (run / "report.json").write_text(json.dumps(report), encoding="utf-8")
    return Job(task, arm, seed, run, "demo", (f"run.seed={seed}",))


def test_means_over_seeds_by_arm_and_kind(tmp_path: Path) -> None:
    jobs = [Job("pretraining", "stage2_alone", 0, tmp_path / "alone", "demo", (), evaluates=False)]
    for seed in (0, 1):
        for number, arm in enumerate(ARMS):
            own = scores(0.4 + 0.1 * number + 0.2 * seed, 0.5)
            report = {**own, "blind": {"permuted_pictures": scores(0.3, 0.1)}}
            jobs.append(job(tmp_path, "entailment", arm, seed, report))
    found = gather(jobs)
    assert list(found) == ["entailment"] and list(found["entailment"]) == [*ARMS, "permuted"]
    scratch, pretrained = found["entailment"]["scratch"], found["entailment"]["pretrained"]
    assert scratch["by_kind"]["noun"] == {"score": pytest.approx(0.5), "n": 30}
    assert scratch["score"] == pytest.approx((30 * 0.5 + 10 * 0.5) / 40)
    assert pretrained["by_kind"]["noun"]["score"] == pytest.approx(0.7)
    assert found["entailment"]["permuted"]["by_kind"]["relation"]["score"] == pytest.approx(0.1)
    lines = table(found).splitlines()
    assert lines[0].split() == [
        "ENTAILMENT",
        "n",
        "scratch",
        "stage2",
        "alone",
        "pretrained",
        "text",
        "alone",
        "permuted",
    ]
    assert lines[1].split()[:5] == ["all", "50.0", "±10.6", "57.5", "±10.6"]
    assert lines[2].split() == ["noun", "30", "50.0", "60.0", "70.0", "80.0", "30.0"]


def test_retrieval_is_the_mean_of_both_ways(tmp_path: Path) -> None:
    report = {
        "num_captions": 600,
        "num_scenes": 500,
        "rerank": {"t2i_r1": 0.6, "i2t_r1": 0.7, "t2i_r5": 0.9},
        "permuted_regions": {"retrieval": {"t2i_r1": 0.002, "i2t_r1": 0.0}},
    }
    found = gather([job(tmp_path, "retrieval", "pretrained", 0, report)])["retrieval"]
    assert found["pretrained"]["score"] == pytest.approx(0.65)
    assert found["pretrained"]["by_kind"]["i2t_r1"] == {"score": 0.7, "n": 500}
    assert found["permuted"]["score"] == pytest.approx(0.001)
    assert "scratch" not in found
    assert [line.split()[-2:] for line in table({"retrieval": found}).splitlines()[:2]] == [
        ["pretrained", "permuted"], ["65.0", "0.1"],
    ]  # fmt: skip


def test_a_run_of_other_arguments_is_refused(tmp_path: Path) -> None:
    one = Job("vqa", "scratch", 0, tmp_path, "demo", ("vqa.max_steps=100", "run.seed=0"))
    assert not is_done(one)
    content = {"overrides": ["vqa.max_steps=300", "run.seed=0"], "done": True}
    (tmp_path / "arguments.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(
        DataError, match=r"other arguments \(vqa\.max_steps=100, vqa\.max_steps=300\): give another --out"
    ):
        is_done(one)
    content["overrides"] = list(one.overrides)
    for done in (False, True):
        (tmp_path / "arguments.json").write_text(json.dumps({**content, "done": done}), encoding="utf-8")
        assert is_done(one) == done
