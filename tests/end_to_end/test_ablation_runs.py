"""tools/dev/ablate.py for real, at the smallest size: two arms, then the same command again."""

from __future__ import annotations

import json
import signal
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.conftest import REPO
from tests.end_to_end.conftest import SMALL
from tests.support.launch import environment, run, started, tail


@pytest.mark.timeout(600)
def test_arms_are_trained_once_and_their_table_is_printed(tmp_path: Path) -> None:
    out = tmp_path / "ablation"
    tool = [sys.executable, str(REPO / "tools/dev/ablate.py"), "--out", str(out), "--config", "demo", "--ranks", "1"]
    settings = [*SMALL, "data.demo_train_scenes=32", "data.demo_held_out_scenes=8"]
    command = [*tool, "--arms", "full", "stage2_alone", "--set", *settings]
    code, output = run(command, tmp_path / "first.log", 500.0)
    assert code == 0, output
    assert "| full | 1 |" in output and "| stage2_alone | 1 |" in output
    assert (out / "full/seed-0/stage1").is_dir() and not (out / "stage2_alone/seed-0/stage1").exists()
    steps = [json.loads(line)["step"] for line in (out / "stage2_alone/seed-0/stage2/metrics.jsonl").open()]
    assert steps[-1] == 8  # those of both stages

    reports = [out / arm / "seed-0/report.json" for arm in ("full", "stage2_alone")]
    written = [path.stat().st_mtime_ns for path in reports]
    code, again = run(command, tmp_path / "second.log", 100.0)
    assert code == 0 and again.splitlines()[-6:] == output.splitlines()[-6:]
    assert [path.stat().st_mtime_ns for path in reports] == written

    code, refused = run([*command, "optim.eps=1e-7"], tmp_path / "third.log", 100.0)
    assert code == 1 and "was made with" in refused and "change --out" in refused
    code, table = run([*tool, "--table"], tmp_path / "table.log", 100.0)
    assert code == 0 and table == (out / "table.md").read_text(encoding="utf-8")


@pytest.mark.timeout(300)
def test_a_stopped_ablation_leaves_no_rank_behind(tmp_path: Path) -> None:
    out, log = tmp_path / "ablation", tmp_path / "log"
    tool = [sys.executable, str(REPO / "tools/dev/ablate.py"), "--out", str(out), "--config", "demo", "--ranks", "1"]
    settings = [*SMALL, "data.demo_train_scenes=32", "data.demo_held_out_scenes=8", "stage1.max_steps=100000"]
    with started([*tool, "--arms", "full", "--set", *settings], log, environment()) as process:
        metrics = out / "full/seed-0/stage1/metrics.jsonl"
        end = time.monotonic() + 150
        while not (metrics.is_file() and metrics.stat().st_size):
            assert process.poll() is None and time.monotonic() < end, tail(log)
            time.sleep(0.1)
        below = psutil.Process(process.pid).children(recursive=True)
        process.send_signal(signal.SIGTERM)
        code = process.wait(90)
    try:
        assert code == 128 + signal.SIGTERM and below
        _, alive = psutil.wait_procs(below, timeout=30)
        assert not alive
    finally:
        for child in below:
            if child.is_running():
                child.kill()
