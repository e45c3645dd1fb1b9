"""Trackers: what reaches TensorBoard and wandb, one run after a resume, and failures that end nothing.

TensorBoard's files are read back by TensorBoard's own reader, wandb's as the LevelDB log of its records that they are.
"""

from __future__ import annotations

import io
import json
import struct
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

from mvptr_ds import eval as entry
from mvptr_ds.config import Config, load_config, override_config, save_config
from mvptr_ds.monitoring.metrics import MetricsLog
from mvptr_ds.monitoring.tensorboard_run import TensorBoardRun
from mvptr_ds.monitoring.trackers import Trackers, open_trackers
from mvptr_ds.monitoring.wandb_run import stored_id
from tests.conftest import REPO

BOTH = override_config(Config(), ["train.report_to=[wandb,tensorboard]", "wandb.mode=offline"])
TENSORBOARD = override_config(Config(), ["train.report_to=tensorboard"])


@pytest.fixture(autouse=True)
def nobody(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No account of whoever runs the tests, and no way to the service."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # the discard port: refused at once


def shown(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """The curves that TensorBoard shows of a folder: (step, value) by name."""
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    return {
        name: [(point.step, round(point.value, 4)) for point in events.Scalars(name)]
        for name in events.Tags()["scalars"]
    }


def sent(stage_dir: Path) -> list[dict[str, Any]]:
    """What the offline runs of wandb hold, in the order of the runs."""
    wandb.teardown()  # its helper process may write after a run has finished
    return [row for path in sorted(stage_dir.glob("wandb/offline-run-*/*.wandb")) for row in rows_of(path)]


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The history of one run, out of blocks of 32 KiB whose records may continue in the next block."""
    log, at, content = path.read_bytes(), 7, b""  # behind the magic number
    while at + 7 <= len(log):
        if 32_768 - at % 32_768 < 7:  # the rest of a block that holds no header
            at += 32_768 - at % 32_768
            continue
        _, length, kind = struct.unpack_from("<IHB", log, at)
        content += log[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, content = Record.FromString(content), b""
            items = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            if items:
                yield {key: json.loads(value) for key, value in items.items() if not key.startswith("_")}


def picture(path: Path) -> Path:
    Image.new("RGBA", (5, 3), (255, 0, 0, 255)).save(path)
    return path


def test_both_get_reports_scores_and_pictures(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    trackers = open_trackers(tmp_path, BOTH, 0)
    trackers.log(10, {"loss/mlm": 4.0, "loss/wpg": None})
    trackers.log(10, {"eval/retrieval/t2i_r1": 0.5})
    trackers.log_picture(10, "eval/pictures", picture(tmp_path / "pictures.png"))
    trackers.close()
    assert [record for record in caplog.records if record.name.startswith("mvptr_ds")] == []
    folder = tmp_path / "tensorboard"
    assert shown(folder) == {"loss/mlm": [(10, 4.0)], "eval/retrieval/t2i_r1": [(10, 0.5)]}
    (image,) = EventAccumulator(str(folder)).Reload().Images("eval/pictures")
    with Image.open(io.BytesIO(image.encoded_image_string)) as found:
        assert (image.step, found.size, found.convert("RGB").getpixel((0, 0))) == (10, (5, 3), (255, 0, 0))
    losses, scores, pictures = sent(tmp_path)
    assert (losses, scores) == ({"step": 10, "loss/mlm": 4.0}, {"step": 10, "eval/retrieval/t2i_r1": 0.5})
    assert pictures["step"] == 10 and len(list(tmp_path.glob("wandb/offline-run-*/files/media/images/eval/*.png"))) == 1


def test_a_resumed_run_is_one_run_without_its_lost_part(tmp_path: Path) -> None:
    """Killed behind step 30, resumed from the checkpoint of step 20. No `close`: a killed run does not get there."""
    log = MetricsLog(tmp_path, 0, BOTH)
    for step in (10, 20, 30):
        log.write_scores(step, {"eval/x": step / 100})
    first, id_of_first = log, log.wandb_id
    wandb.teardown()  # of a killed run no helper process is left, either
    time.sleep(1.1)  # names of files and folders hold the second
    log = MetricsLog(tmp_path, 20, BOTH)
    for step in (30, 40):
        log.write_scores(step, {"eval/x": step / 50})
    log.close()
    assert shown(tmp_path / "tensorboard") == {"eval/x": [(10, 0.1), (20, 0.2), (30, 0.6), (40, 0.8)]}
    assert id_of_first is not None and log.wandb_id == id_of_first == stored_id(tmp_path)
    first.close()
    runs = sorted(path.name for path in tmp_path.glob("wandb/offline-run-*"))
    assert len(runs) == 2 and {name.rpartition("-")[2] for name in runs} == {log.wandb_id}
    assert [row["step"] for row in sent(tmp_path)] == [10, 20, 30, 30, 40]
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["step"] for line in lines] == [10, 20, 30, 40]


def test_a_start_without_a_checkpoint_drops_what_was_there(tmp_path: Path) -> None:
    for value in (1.0, 2.0):
        trackers = open_trackers(tmp_path, TENSORBOARD, 0)
        trackers.log(1, {"a": value})
        trackers.close()
        time.sleep(1.1)
    assert shown(tmp_path / "tensorboard") == {"a": [(1, 2.0)]}


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ()),
        (["wandb.mode=offline"], ("wandb", "wandb_id")),  # as before there was train.report_to
        (["train.report_to=tensorboard"], ("tensorboard",)),
        (["train.report_to=[wandb]"], ("wandb", "wandb_id")),
        (["train.report_to=[wandb,tensorboard]", "wandb.mode=disabled"], ("tensorboard",)),
    ],
    ids=str,
)
def test_who_is_named(
    overrides: list[str], names: tuple[str, ...], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    stage_dir = tmp_path / "run/stage1"
    stage_dir.mkdir(parents=True)
    trackers = open_trackers(stage_dir, load_config(None, overrides), 0)
    trackers.log(1, {"a": 1.0})
    trackers.close()
    assert {path.name for path in stage_dir.iterdir()} == set(names)
    assert ("nothing goes there" in caplog.text) == ("wandb.mode=disabled" in overrides)
    assert ("no account here" in caplog.text) == (overrides == ["train.report_to=[wandb]"])


def test_the_keys(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.report_to is 'mlflow'; choose from wandb, tensorboard"):
        load_config(None, ["train.report_to=[wandb,mlflow]"])
    save_config(BOTH, tmp_path / "mvptr.yaml")
    assert load_config(tmp_path / "mvptr.yaml") == BOTH
    (tmp_path / "older.yaml").write_text("wandb: {mode: disabled}\n", encoding="utf-8")
    assert load_config(tmp_path / "older.yaml").train.report_to == []


def test_nothing_is_imported_that_is_not_used(tmp_path: Path) -> None:
    program = (
        "import sys; from pathlib import Path; from mvptr_ds.config import Config; "
        "from mvptr_ds.monitoring.trackers import open_trackers; run = open_trackers(Path(sys.argv[1]), Config(), 0); "
        "run.log(1, {'a': 1.0}); run.close(); print('wandb' in sys.modules, 'tensorboard' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], cwd=REPO, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["False", "False"]
    assert list(tmp_path.iterdir()) == []


def test_a_missing_package_is_said_with_its_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "tensorboard"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)  # an import of it fails
    log = MetricsLog(tmp_path, 0, TENSORBOARD)
    log.write_scores(1, {"eval/x": 1.0})
    log.close()
    assert caplog.text.count("tensorboard could not start and is left out") == 1
    assert "pip install -c constraints.txt -e '.[tensorboard]'" in caplog.text
    assert "tensorboard" in (REPO / "setup.py").read_text(encoding="utf-8")
    assert (tmp_path / "metrics.jsonl").is_file()


class Failing:
    """Fails at its second report, at pictures and at its end."""

    def __init__(self) -> None:
        self.logged: list[Mapping[str, float]] = []

    def log(self, step: int, values: Mapping[str, float]) -> None:
        if self.logged:
            raise ConnectionError("the service is gone")
        self.logged.append(values)

    def log_picture(self, step: int, name: str, path: Path) -> None:
        raise ConnectionError("no pictures")

    def close(self) -> None:
        raise ConnectionError("the service is still gone")


def test_a_tracker_that_fails_is_said_once_and_ends_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    failing, ends, whole = Failing(), Failing(), TensorBoardRun(tmp_path, 0)
    trackers = Trackers()
    for name, tracker in (("bad", failing), ("tensorboard", whole)):
        trackers.add(name, lambda tracker=tracker: tracker)
    for step in (1, 2, 3):
        trackers.log(step, {"loss": float(step), "none": None})
    assert failing.logged == [{"loss": 1.0}]
    assert caplog.text.count("the service is gone") == 1 and "bad failed at step 2" in caplog.text
    trackers.add("ends", lambda: ends)
    trackers.close()
    assert "ends could not finish: the service is still gone" in caplog.text
    assert shown(tmp_path / "tensorboard") == {"loss": [(1, 1.0), (2, 2.0), (3, 3.0)]}

    pictures = Trackers()
    pictures.add("bad", Failing)
    pictures.log_picture(1, "eval/curves", tmp_path / "curves.png")
    pictures.close()
    assert "bad failed at picture eval/curves" in caplog.text


def test_one_that_cannot_start_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("no such luck")

    monkeypatch.setattr("mvptr_ds.monitoring.wandb_run._start", fail)
    (tmp_path / "tensorboard").touch()  # a file where the folder should be
    log = MetricsLog(tmp_path, 0, BOTH)
    log.write_scores(1, {"eval/x": 1.0})
    log.close()
    assert caplog.text.count("is left out") == 2 and "no such luck" in caplog.text
    assert log.wandb_id is not None


# A disk that is full: the limit of a file's size makes a write fail in TensorBoard's own thread, as a full disk does.
FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from mvptr_ds.config import load_config
from mvptr_ds.monitoring.trackers import open_trackers
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
trackers = open_trackers(Path(sys.argv[1]), load_config(None, ["train.report_to=tensorboard"]), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
for step in range(200):
    trackers.log(step, {"a": 1.0, "b": 2.0})
trackers.close()
sys.stdout.write("trained\\n")
"""


@pytest.mark.timeout(120)
def test_a_full_disk_ends_and_hangs_nothing(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], cwd=REPO, capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "trained\n"), done.stderr
    assert done.stderr.count("tensorboard failed at step") == 1  # the traceback of its thread quotes lines of ours


def test_eval_hands_scores_and_pictures_to_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Into the run of the stage, though training goes on there: TensorBoard still shows what it writes."""
    stage_dir = tmp_path / "run/stage2"
    model = stage_dir / "checkpoints/step-00000020/model"
    model.mkdir(parents=True)
    training = open_trackers(stage_dir, BOTH, 0)
    training.log(20, {"eval/retrieval/t2i_r1": 0.25})
    monkeypatch.setattr(entry, "read_state", lambda path: SimpleNamespace(step=int(path.name[-8:])))
    monkeypatch.chdir(tmp_path / "run")
    wandb.teardown()  # eval.py is another process: here only TensorBoard has two writers
    time.sleep(1.1)
    entry._track(
        model.relative_to(tmp_path / "run"), BOTH, {"eval/rerank/t2i_r1": 0.5}, [picture(tmp_path / "curves.png")]
    )
    training.log(30, {"eval/retrieval/t2i_r1": 0.75})
    training.close()
    assert shown(stage_dir / "tensorboard") == {"eval/retrieval/t2i_r1": [(20, 0.25), (30, 0.75)]}
    assert shown(stage_dir / "tensorboard/eval") == {"eval/rerank/t2i_r1": [(20, 0.5)]}
    (image,) = EventAccumulator(str(stage_dir / "tensorboard/eval")).Reload().Images("eval/curves")
    assert image.step == 20
    runs = {path.name.rpartition("-")[2] for path in stage_dir.glob("wandb/offline-run-*")}
    assert runs == {stored_id(stage_dir)}
    rows = sent(stage_dir)
    assert {"step": 20, "eval/rerank/t2i_r1": 0.5} in rows and any("eval/curves" in key for row in rows for key in row)


def test_eval_of_a_copy_of_the_model_has_no_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "elsewhere/model").mkdir(parents=True)
    entry._track(tmp_path / "elsewhere/model", BOTH, {"eval/x": 1.0}, [])
    assert [path.name for path in (tmp_path / "elsewhere").iterdir()] == ["model"] and caplog.text == ""
    (tmp_path / "stage2/checkpoints/step-1/model").mkdir(parents=True)
    entry._track(tmp_path / "stage2/checkpoints/step-1/model", BOTH, {"eval/x": 1.0}, [])  # without a state
    assert "nothing goes to the trackers" in caplog.text
    assert [path.name for path in (tmp_path / "stage2").iterdir()] == ["checkpoints"]
