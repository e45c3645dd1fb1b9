"""Preflight: each finding, through real ranks where it needs several."""

from __future__ import annotations

import json
import re
import shutil
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch

from mvptr_ds.builders import build_vocabs
from mvptr_ds.config import load_config
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.errors import PreflightError
from mvptr_ds.preflight import checks
from mvptr_ds.preflight.checks import Finding, conclude
from tests.conftest import REPO
from tests.end_to_end.conftest import Launch, Run
from tests.support.launch import free_port, run, run_ranks

LIMIT_S = 200.0
SHORT_WARM_UP = ("stage1.warmup_steps=2", "stage2.warmup_steps=2")  # that of the demo is longer than tests train
Told = dict[str, list[dict[str, str]]]


def nodes(folder: Path, small: list[str], shards: Path) -> None:
    """A folder for each rank to stand in: they differ as two nodes do whose storage is not the same."""
    for rank in range(2):
        (folder / f"node{rank}").mkdir()
        overrides = [*small, *SHORT_WARM_UP, f"run.dir={folder / 'run'}", "data.demo_source=null"]
        (folder / f"node{rank}/overrides.json").write_text(json.dumps(overrides), encoding="utf-8")
    shutil.copytree(shards / "train", folder / "node0/own-train")
    for rank, phrases in ((0, "phrase_vocab.json"), (1, "other.json")):
        vocab = json.loads((shards / "phrase_vocab.json").read_text(encoding="utf-8"))
        if phrases == "other.json":
            vocab["phrases"] = vocab["phrases"][:-1]
        (folder / f"node{rank}/own.json").write_text(json.dumps(vocab), encoding="utf-8")


@pytest.fixture(scope="module")
def told(small: list[str], shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Told:
    folder = tmp_path_factory.mktemp("nodes")
    nodes(folder, small, shards)
    run_ranks("tests.distributed.ranks_preflight", 2, folder, LIMIT_S)
    both = [json.loads((folder / f"told-rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    assert both[0] == both[1]
    first: Told = both[0]
    return first


def not_well(told: Told, name: str) -> list[tuple[str, str, str]]:
    return [(f["check"], f["level"], f["text"]) for f in told[name] if f["level"] != "ok"]


def test_two_ranks_that_are_well(told: Told) -> None:
    assert not_well(told, "well") == []
    texts = {finding["check"]: finding["text"] for finding in told["well"]}
    assert "2 ranks, " in texts["all-reduce"] and "GB/s a rank (gloo, 16 MiB)" in texts["all-reduce"]
    assert texts["batch"] == "8 samples a step = 2 ranks x 1 accumulated x 4"
    wanted = {"devices", "clocks", "versions", "run folder", "shards", "vocabularies", "kernels", "disk", "hand-over"}
    assert wanted <= texts.keys()
    assert (
        "data.held_out: 20 samples looked at (5 pictures decoded): pictures 100 %, features 0 %, regions 100 %"
        in texts["records"]
    )


def test_the_start_of_a_task_is_looked_for_by_all_ranks(told: Told) -> None:
    found = {finding["check"]: finding["text"] for finding in told["a task without its start"]}
    assert found["splits"] == "data.held_out shares no picture with data.train"
    assert found["hand-over"].startswith("gone does not exist; give a run folder")


@pytest.mark.parametrize(
    ("name", "check", "level", "parts"),
    [
        ("versions", "versions", "error", ["torch differs: ", " on rank 0 (", "; 1.0 on rank 1 ("]),
        ("clocks", "clocks", "warning", ["s apart: rank 1 (", ") is behind rank 0 ("]),
        ("all-reduce", "all-reduce", "error", ["the sum of 2 ranks' numbers is wrong on ranks [1]"]),
        ("arguments", "configuration", "error", ["configuration differs: ", " on rank 0 (", " on rank 1 ("]),
        ("run folder", "run folder", "error", ["rank 1 (", "): own is another folder than rank 0's"]),
        ("shards", "shards", "error", ["rank 1 (", "cannot open the index of own-train"]),
        ("vocabularies", "vocabularies", "error", ["rank 0 (", "142 words (", "33 phrases"]),
    ],
)
def test_what_differs_between_ranks_is_said_with_who_has_what(
    told: Told, name: str, check: str, level: str, parts: list[str]
) -> None:
    found = not_well(told, name)
    assert found and {(c, lvl) for c, lvl, _ in found} == {(check, level)}, found
    for part in parts:
        assert part in found[0][2]


@pytest.mark.parametrize(
    ("gone", "what"),
    [("one-does-not-connect", "the first exchange between the ranks"), ("one-is-gone", "the exchange of preflight")],
)
def test_a_rank_that_is_gone_is_not_waited_for(
    gone: str, what: str, small: list[str], shards: Path, tmp_path: Path
) -> None:
    nodes(tmp_path, small, shards)
    (tmp_path / gone).touch()
    with pytest.raises(AssertionError, match=r"exit codes \[1, None\]") as error:
        run_ranks("tests.distributed.ranks_preflight", 2, tmp_path, LIMIT_S)
    assert re.search(f"error: rank 0 on .*: no end of {what} within 2 s", str(error.value))


@pytest.mark.parametrize(
    ("rank", "said"), [(0, "1 of 2 ranks have not started: 1; see their logs"), (1, "it waits in vain at 127.0.0.1:")]
)
def test_a_rank_that_does_not_start_is_named(rank: int, said: str, small: list[str], tmp_path: Path) -> None:
    command = [sys.executable, str(REPO / "mvptr_ds/train.py"), "--config", "demo", *small, "train.start_timeout_s=3"]
    place = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    code, output = run(command, tmp_path / "log", LIMIT_S, cwd=tmp_path, MASTER_PORT=str(free_port()), **place)
    assert code == 1 and "Traceback" not in output, output
    (error,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert re.search(rf"error: rank {rank} on .*: after \d+ s \(train\.start_timeout_s\) {re.escape(said)}", error)


def test_preflight_only_trains_nothing_and_says_all(train: Launch, trained: Run, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(trained.dir, run_dir)
    before = sorted(path for path in run_dir.rglob("*"))
    code, output = train(run_dir, "run.stages=[2]", "train.preflight_only=true")
    assert code == 0, output
    assert f"stage2 goes on from {run_dir}/stage2/checkpoints/step-00000004" in output and "starts from" not in output
    assert sorted(path for path in run_dir.rglob("*")) == before
    wrong = ["model.hidden_size=16", "train.profile_steps=[1]", "train.batch_size=9", "train.round_batch_size=false"]
    code, output = train(run_dir, "run.stages=[2]", "train.preflight_only=true", *wrong)
    assert code == 2
    for part in (
        "error: preflight found 3 errors:",
        "train.profile_steps is [1]; give [first, stop]",
        "train.batch_size=9 cannot be shared by 2 ranks",
        "hidden_size: 32 there, 16 here",
    ):
        assert part in output


def examine(small: list[str], *overrides: str, prepare: bool = False) -> list[Finding]:
    config = load_config("demo", [*small, *SHORT_WARM_UP, *overrides])
    return checks.examine(config, load_ds_config(REPO / "ds_configs/z2.json"), torch.device("cpu"), prepare)


def test_the_estimate_of_a_checkpoint(trained: Run, small: list[str]) -> None:
    """Within a quarter of what was written: vocabularies, pickles and headers weigh on a tiny one."""
    config = load_config("demo", small)
    estimate = checks._num_bytes(config, checks._shapes(config, build_vocabs(config.data)), "float32")
    for stage, num_bytes in estimate.items():
        written = trained.dir / stage / "checkpoints/step-00000004"
        real = sum(file.stat().st_size for file in written.rglob("*") if file.is_file())
        assert num_bytes == pytest.approx(real, rel=0.25), stage


@pytest.mark.parametrize(("free", "level"), [(2**40, "ok"), (2**22, "warning"), (2**10, "error")])
def test_room_for_the_checkpoints(
    small: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: str
) -> None:
    usage = namedtuple("usage", "free")(free)
    monkeypatch.setattr("mvptr_ds.preflight.checks.shutil.disk_usage", lambda _: usage)
    (found,) = [f for f in examine(small, f"run.dir={tmp_path}") if f.check == "disk"]
    assert found.level == level and " free, the checkpoints take up to " in found.text


def test_shards_without_an_index_and_without_tars(small: list[str], shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "train", tmp_path / "train")
    (tmp_path / "train/manifest.json").unlink()
    own = ["data.demo_source=null", f"run.dir={tmp_path / 'run'}", f"data.train={tmp_path / 'train'}"]
    without = ["data.held_out=nowhere", "data.sidecars=[nothing]"]
    found = [f for f in examine(small, *own, *without) if f.check == "shards"]
    assert sorted(f.level for f in found) == ["error", "error", "warning"]
    errors = {f.text for f in found if f.level == "error"}
    named = ("nowhere (data.held_out)", "nothing (a sidecar of data.train)")
    assert errors == {f"{name} holds no .tar file" for name in named}
    assert not (tmp_path / "train/manifest.json").exists()
    assert not [f for f in examine(small, *own, prepare=True) if f.level != "ok"]  # which makes it


def test_one_byte_of_the_index(small: list[str], shards: Path, tmp_path: Path) -> None:
    shutil.copytree(shards / "train", tmp_path / "train")
    path = tmp_path / "train/index.npy"
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")
    own = ["data.demo_source=null", f"run.dir={tmp_path / 'run'}", f"data.train={tmp_path / 'train'}"]
    assert any("is not the one the manifest names" in f.text for f in examine(small, *own) if f.level == "error")


def test_several_errors_make_one_message(caplog: pytest.LogCaptureFixture) -> None:
    wrong, right = Finding("a", "error", "one is wrong", "do this"), Finding("b", "ok", "well")
    with pytest.raises(PreflightError, match=r"^one is wrong: do this$"):
        conclude([wrong, right], show_all=False)
    with pytest.raises(PreflightError, match="found 2 errors:\n  - one is wrong: do this\n  - another"):
        conclude([wrong, right, Finding("c", "error", "another")], show_all=True)
    conclude([right], show_all=False)


def test_it_takes_less_than_a_minute(small: list[str], tmp_path: Path) -> None:
    """Of the processor; the first call pays imports."""
    examine(small, f"run.dir={tmp_path}")
    started_s = time.process_time()
    examine(small, f"run.dir={tmp_path}")
    assert time.process_time() - started_s < 10.0
