"""wandb: offline without network and account, the same run after a resume. See test_trackers.py, too."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import wandb

from mvptr_ds.config import WandbConfig
from mvptr_ds.monitoring.wandb_run import WandbRun, stored_id

CONFIG = {"run": {"seed": 3}, "train": {"batch_size": 8}, "versions": {"deepspeed": "0"}}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account of whoever runs the tests, and no way to the service."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once


def offline_runs(folder: Path) -> list[Path]:
    wandb.teardown()  # its helper process may write after a run has finished
    return sorted(folder.glob("wandb/offline-run-*"))


def content(run: Path) -> str:
    """Of the run's binary record file, as far as it is text."""
    (record,) = run.glob("*.wandb")
    return record.read_bytes().decode("utf-8", errors="replace")


def test_offline_and_the_same_run_after_a_resume(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = []
    for steps in ((1, 2), (2, 3)):  # the second goes back behind the first's last report
        time.sleep(1.1 * len(ids))  # the folder's name holds the second
        run = WandbRun(tmp_path, WandbConfig(mode="offline", name="mine"), CONFIG)
        for step in steps:
            run.log(step, {"loss/mlm": 4.0 / step})
        run.close()
        ids.append(stored_id(tmp_path))
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text(encoding="utf-8")
    assert [path.name.rpartition("-")[2] for path in offline_runs(tmp_path)] == ids
    for path in offline_runs(tmp_path):
        said = content(path)
        assert '"batch_size"' in said or "batch_size" in said
        assert "versions" in said and "deepspeed" in said and "loss/mlm" in said
    assert [record for record in caplog.records if record.name.startswith("mvptr_ds")] == []


def test_online_without_an_account_goes_offline_at_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = WandbRun(tmp_path, WandbConfig(mode="online"), CONFIG)
    run.log(1, {"loss/mlm": 4.0})
    run.close()
    assert "there is no account here (wandb login): logging offline" in caplog.text
    assert len(offline_runs(tmp_path)) == 1


def test_online_without_an_answer_goes_offline(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setattr("mvptr_ds.monitoring.wandb_run.START_TIMEOUT_S", 1.0)
    run = WandbRun(tmp_path, WandbConfig(mode="online"), CONFIG)
    run.log(1, {"loss/mlm": 4.0})
    run.close()
    (path,) = offline_runs(tmp_path)
    assert "there is no answer" in caplog.text and "loss/mlm" in content(path)
