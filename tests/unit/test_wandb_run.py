"""wandb: offline without network and account, the same run after a resume, never a reason to end."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.config import WandbConfig
from mvptr_ds.monitoring.wandb_run import WandbRun
from tests.conftest import REPO

CONFIG = {"run": {"seed": 3}, "train": {"batch_size": 8}}


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account of whoever runs the tests, and no way to the service."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once


def offline_runs(folder: Path) -> list[Path]:
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
            run.log(step, {"loss/mlm": 4.0 / step, "loss/wpg": None})
        run.close()
        ids.append(run.id)
    assert ids[0] == ids[1] == (tmp_path / "wandb_id").read_text(encoding="utf-8")
    assert [path.name.rpartition("-")[2] for path in offline_runs(tmp_path)] == ids
    for path in offline_runs(tmp_path):
        said = content(path)
        assert '"batch_size"' in said or "batch_size" in said
        assert "versions" in said and "deepspeed" in said and "loss/mlm" in said
    assert caplog.text == ""


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
    assert "there is no answer" in caplog.text and len(offline_runs(tmp_path)) == 1


def test_disabled_writes_nothing_and_does_not_import_it(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mvptr_ds.config import WandbConfig; "
        "from mvptr_ds.monitoring.wandb_run import WandbRun; run = WandbRun(Path(sys.argv[1]), WandbConfig(), {}); "
        "run.log(1, {'a': 1.0}); run.close(); print('wandb' in sys.modules, run.id)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "None"]
    assert list(tmp_path.iterdir()) == []


class FailingRun:
    """Fails at its second report and when it is finished."""

    def __init__(self) -> None:
        self.logged: list[dict[str, Any]] = []

    def log(self, values: dict[str, Any]) -> None:
        if self.logged:
            raise ConnectionError("the service is gone")
        self.logged.append(values)

    def finish(self) -> None:
        raise ConnectionError("the service is still gone")


def test_a_service_that_fails_is_said_once_and_ends_nothing(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    failing = FailingRun()
    monkeypatch.setattr("mvptr_ds.monitoring.wandb_run._start", lambda *_: failing)
    run = WandbRun(tmp_path, WandbConfig(mode="offline"), CONFIG)
    for step in (1, 2, 3):
        run.log(step, {"loss": 1.0 / step, "none": None})
    run.close()
    assert failing.logged == [{"step": 1, "loss": 1.0}]
    assert caplog.text.count("the service is gone") == 1 and "at step 2" in caplog.text

    run._run = failing
    run.close()
    assert "still gone" in caplog.text


def test_a_service_that_cannot_start_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("mvptr_ds.monitoring.wandb_run._start", fail)
    run = WandbRun(tmp_path, WandbConfig(mode="offline"), CONFIG)
    run.log(1, {"loss": 1.0})
    run.close()
    assert "no such luck" in caplog.text and run.id is not None
