"""Meters and `metrics.jsonl`."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from mvptr_ds.config import Config
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import collate
from mvptr_ds.monitoring.meters import Meters
from mvptr_ds.monitoring.metrics import MetricsLog
from mvptr_ds.monitoring.trackers import Trackers
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.objectives.table import OBJECTIVES, objectives_of
from tests.support.tiny_models import TEXT_SLOTS, sample, tiny_model, whole_batch

VALUES = {
    "seconds_per_step": 0.1,
    "learning_rate": 1e-3,
    "grad_norm": 1.0,
    "samples_per_s": 10.0,
    "data/wait_frac": 0.0,
    "data/padded_frac": 0.2,
    "memory_gib": 1.0,
}


def log_in(folder: Path, resumed_at: int = 0) -> MetricsLog:
    return MetricsLog(folder, resumed_at, Config())


def part(total: float, count: float) -> LossSum:
    return LossSum(torch.tensor(total), torch.tensor(count))


def strict(path: Path) -> list[dict[str, Any]]:
    """The lines as any JSON reader sees them: NaN and Infinity are not JSON."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text(encoding="utf-8").splitlines()]


def test_a_mean_is_sum_over_count_of_all_steps() -> None:
    meters = Meters(torch.device("cpu"))
    meters.add_parts({"mlm": part(6.0, 2), "wpg": part(0.0, 0)})
    meters.add_parts({"mlm": part(1.0, 8), "wpg": part(0.0, 0)})
    meters.add_batch(whole_batch(), 0.0)
    report = meters.report()
    assert report["loss/mlm"] == pytest.approx(0.7)  # not the mean 1.5625 of the two means
    assert report["loss/wpg"] is None  # nothing was asked
    meters.add_parts({"mlm": part(float("nan"), 2)})
    meters.add_batch(whole_batch(), 0.0)
    assert math.isnan(meters.report()["loss/mlm"])  # it diverges, which is something else
    meters.add_parts({"mlm": part(3.0, 1)})
    meters.add_batch(whole_batch(), 0.0)
    assert meters.report()["loss/mlm"] == 3.0  # the first report reset it


@pytest.mark.parametrize("stage", ["stage1", "stage2"])
def test_masked_predictions_are_also_reported_by_source(stage: str) -> None:
    samples = [sample(i, i, tokens=3 + i, tags=1 + i, regions=2) for i in range(4)]
    batch = collate([dataclasses.replace(s, source=i // 3) for i, s in enumerate(samples)])
    parts = {}
    for name, chosen in (("all", range(4)), ("a", range(3)), ("b", range(3, 4))):
        section = Config().stage(stage)
        numbers = {"max_text_slots": TEXT_SLOTS, "max_steps": 9, "seed": 0}
        task = PretrainingLosses(
            tiny_model(), STAGES[stage], section.weights, Config().task, **numbers, per_sample=True
        )
        parts[name] = task(collate([samples[i] for i in chosen]) if name != "all" else batch, 0).parts
    meters = Meters(torch.device("cpu"), ["a", "b"])
    meters.add_batch(batch, 0.0)
    meters.add_parts(parts["all"], batch.source_B)
    report = meters.report()
    own = {key for key in report if key.startswith("source/a/loss/")}
    objectives = ["mcr_phrases", "mcr_tags", "mlm"] if stage == "stage1" else ["mcr_tags", "mlm"]
    assert sorted(own) == [f"source/a/loss/{name}" for name in objectives]
    for name in objectives:
        for source in "ab":  # what each sample loses does not depend on those beside it
            wanted = float(parts[source][name].sum / parts[source][name].count)
            assert report[f"source/{source}/loss/{name}"] == pytest.approx(wanted, rel=1e-5)


def test_shares_of_a_batch() -> None:
    meters = Meters(torch.device("cpu"))
    short = sample(0, 0, tokens=2, phrases=1, tags=1, regions=1)
    long = sample(1, 1, tokens=6, phrases=1, tags=3, regions=5)
    short.num_oov_phrases = 2
    meters.add_batch(collate([short, long]), data_wait_s=0.0)
    report = meters.report()
    real = (5 + 9) + (3 + 5) + (1 + 5)
    assert report["data/padded_frac"] == pytest.approx(1 - real / (2 * (9 + 5 + 5)))
    assert report["data/oov_phrases_frac"] == 0.5  # two dropped, one kept in each sample
    assert report["samples_per_s"] > 0 and report["memory_gib"] > 0


def test_waiting_is_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([100.0, 110.0, 110.0])
    monkeypatch.setattr("mvptr_ds.monitoring.meters.time.perf_counter", lambda: next(clock))
    meters = Meters(torch.device("cpu"))
    meters.add_batch(whole_batch(), data_wait_s=2.5)
    report = meters.report()
    assert report["data/wait_frac"] == 0.25 and report["samples_per_s"] == 0.4


def test_a_report_is_one_line_of_json_whatever_the_values(tmp_path: Path) -> None:
    log = log_in(tmp_path / "stage1")
    log.write(10, 100, VALUES | {"loss/mlm": 2.0, "loss/wpg": float("nan"), "grad_norm": float("inf")})
    log.write(20, 100, VALUES | {"loss/mlm": float("-inf")})
    first, second = strict(tmp_path / "stage1" / "metrics.jsonl")
    assert first["step"] == 10 and first["loss/mlm"] == 2.0
    assert first["loss/wpg"] is None and first["grad_norm"] is None and second["loss/mlm"] is None


def test_an_objective_without_targets_is_a_dash_and_is_named_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Through a real task whose samples have no tag; one that had some before is not said to have nothing to learn."""
    sent: list[dict[str, Any]] = []
    monkeypatch.setattr(Trackers, "log", lambda self, step, values: sent.append(values))
    weights, config = Config().stage1.weights, Config().task
    task = PretrainingLosses(
        tiny_model(), STAGES["stage1"], weights, config, max_text_slots=TEXT_SLOTS, max_steps=9, seed=0
    )
    meters, log = Meters(torch.device("cpu")), log_in(tmp_path / "stage1")
    batches = [collate([sample(i, i, tags=0) for i in range(4)]), collate([sample(i, i, masked=False) for i in (5, 6)])]
    with caplog.at_level(logging.INFO, logger="mvptr_ds.monitoring.metrics"):
        for step, batch in enumerate((batches[0], *batches), start=1):
            meters.add_batch(batch, 0.0)
            meters.add_parts(task(batch, step).parts)
            log.write(step, 100, VALUES | meters.report())
    lines = [record.getMessage() for record in caplog.records]
    assert "nan" not in caplog.text and "mcr_tags - mlm" in lines[0] and "mcr_regions - mcr_tags -" in lines[0]
    said = [line for line in lines if "nothing to learn" in line]
    assert said == [
        "mcr_regions has nothing to learn so far (-): none of the 4 samples had a masked tag beside a region; "
        "stage1.weights.mcr_regions=0 turns it off",
        "mcr_tags has nothing to learn so far (-): none of the 4 samples had a masked tag; "
        "stage1.weights.mcr_tags=0 turns it off",
    ]
    assert "mlm -" in lines[-1] and "mcr_phrases -" in lines[-1]
    first = strict(tmp_path / "stage1/metrics.jsonl")[0]
    assert first["loss/mcr_tags"] is None and first["loss/mlm"] > 0
    assert {name for name, value in sent[0].items() if value is None} == {"loss/mcr_tags", "loss/mcr_regions"}


def test_every_objective_has_its_targets_named() -> None:
    assert (
        set(OBJECTIVES) == {*objectives_of(aligned=False), *objectives_of(aligned=True)} == set(vars(WeightsConfig()))
    )


def test_lines_after_the_resume_point_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = log_in(tmp_path)
    for step in (10, 20, 30, 40):
        log.write(step, 100, VALUES)
    with path.open("a", encoding="utf-8") as file:
        file.write('{"step": 50, "loss/m')  # killed while writing
    log = log_in(tmp_path, 20)
    assert [line["step"] for line in strict(path)] == [10, 20]
    log.write(30, 100, VALUES)
    assert [line["step"] for line in strict(path)] == [10, 20, 30]
    log_in(tmp_path)
    assert strict(path) == []


@pytest.mark.parametrize(
    ("line", "is_said"),
    [
        (b'{"step": 20, "loss/mlm": 0.5, "caf\xc3', False),  # killed while writing, also in the middle of a character
        (b'{"step": 2', False),
        (b"\xff\xfe\x00", False),
        (b'{"step": 20, "a": "\xff"}\n', True),
        (b"\x00" * 50 + b"\n", True),  # blocks that the disk has lost
        (b"{}\n", True),
        (b"3\n", True),
        (b"[1]\n", True),
        (b'{"step": null}\n', True),
        (b'{"step": "20"}\n', True),
        (b"[" * 100_000 + b"\n", True),
        (b"9" * 5_000 + b"\n", True),
        (b"\n\n", False),
    ],
    ids=lambda value: str(value)[:20],
)
def test_lines_that_are_no_reports_end_no_run(
    tmp_path: Path, line: bytes, is_said: bool, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    log_in(tmp_path).write(10, 100, VALUES)
    before = path.read_bytes()
    path.write_bytes(line + before + line if line.endswith(b"\n") else before + line)
    log_in(tmp_path, 20)
    assert path.read_bytes() == before
    assert ("no reports are dropped (2)" in caplog.text) == is_said


def test_only_rank_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mvptr_ds.distributed.collectives.rank", lambda: 1)
    log = log_in(tmp_path)
    log.write(10, 100, VALUES)
    assert not (tmp_path / "metrics.jsonl").exists()


def test_what_cannot_be_written_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A full disk writes a part of a line and fails; when there is space again nothing is missing nor cut."""
    path = tmp_path / "metrics.jsonl"
    log = log_in(tmp_path)
    log.write(10, 100, VALUES)
    real_open = Path.open

    def full(self: Path, *args: Any, **kwargs: Any) -> Any:
        with real_open(self, "a", encoding="utf-8") as file:
            file.write('{"step": 2')
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", full)
        log.write(20, 100, VALUES)
        log.write_scores(20, {"eval/x": 1.0})
    assert "No space left" in caplog.text and [line["step"] for line in strict(path)] == [10]
    log.write(30, 100, VALUES)
    assert [line["step"] for line in strict(path)] == [10, 20, 20, 30]


def test_a_kill_while_lines_are_dropped_loses_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    log = log_in(tmp_path)
    for step in (10, 20):
        log.write(step, 100, VALUES)

    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        log_in(tmp_path, 10)
    assert [line["step"] for line in strict(path)] == [10, 20]
