"""Saves that fail when none follows, no checkpoint that is good, fewer steps, a new beginning: nothing is lost."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvptr_ds.checkpoints.checkpoint import verify
from tests.conftest import REPO
from tests.support.launch import run_ranks

pytestmark = pytest.mark.timeout(600)
LIMIT_S = 400.0


@dataclass
class Outcome:
    dir: Path
    codes: list[int]
    said: str  # by rank 0

    def saved(self, stage: str = "stage1") -> list[str]:
        """Checkpoints, all of them complete and good."""
        paths = sorted((self.dir / stage / "checkpoints").glob("step-*"))
        assert all(verify(path) is None for path in paths)
        return [path.name for path in paths]


@pytest.fixture(scope="module")
def outcomes(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """One after the other in one launch of two ranks, most of them in the folder of the one before."""
    folder = tmp_path_factory.mktemp("scenarios")
    run, stopped, bad = folder / "run", folder / "stopped", folder / "bad"
    # name -> run folder, arguments, and what else ranks_disturbed.py reads
    scenarios = {
        "no room at the end": (run, ["run.stages=[1,2]"], {"disturb": "no room at the end"}),
        "signal without room": (stopped, ["run.stages=[1]"], {"disturb": "signal without room"}),
        "again": (run, ["run.stages=[1,2]", "stage2.max_steps=2"], {}),
        "fewer steps": (run, ["run.stages=[1,2]", "stage1.max_steps=3", "stage2.max_steps=1"], {}),
        "all damaged": (bad, ["run.stages=[1,2]"], {"copy": [str(run), "stage1", 4], "damage": True}),
        "anew": (run, ["run.stages=[1]", "stage1.max_steps=2", "train.resume=never"], {}),
    }
    common = ["--config", "demo", "--deepspeed", str(REPO / "ds_configs/z2.json"), *small, "train.keep_checkpoints=9"]
    content = [
        {"name": name, "arguments": [*common, *arguments, f"run.dir={run_dir}"], "disturb": None, **more}
        for name, (run_dir, arguments, more) in scenarios.items()
    ]
    (folder / "scenarios.json").write_text(json.dumps(content), encoding="utf-8")
    run_ranks("tests.end_to_end.ranks_disturbed", 2, folder, LIMIT_S)
    codes = [json.loads((folder / f"codes-rank{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]
    said = (folder / "rank0.log").read_text(encoding="utf-8").split("=== ")[1:]
    assert not any("Traceback" in part for part in said)
    return {
        name: Outcome(run_dir, [code[name] for code in codes], part)
        for (name, (run_dir, _, _)), part in zip(scenarios.items(), said, strict=True)
    }


def test_the_last_save_of_a_stage_fails(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["no room at the end"]
    assert outcome.codes == [2, 2]
    assert outcome.said.count("error: ") == 1
    assert "error: step 4 could not be saved in" in outcome.said and "goes on from step 2" in outcome.said
    assert "stage2" not in outcome.said.partition("preflight")[2]


def test_the_save_at_a_signal_fails(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["signal without room"]
    assert outcome.codes == [2, 2]
    assert "no checkpoint at step 2, going on without" in outcome.said
    assert "error: step 2 could not be saved in" in outcome.said and "goes on from the beginning" in outcome.said
    assert "stopped at step" not in outcome.said


def test_the_next_start_finishes_both_stages(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["again"]
    assert outcome.codes == [0, 0]
    end = outcome.dir / "stage1/checkpoints/step-00000004"
    assert "stage1 goes on from step 2" in outcome.said and f"stage2 starts from {end}/model" in outcome.said
    assert "stage1 starts from" not in outcome.said
    assert not (outcome.dir / "lock").exists()


def test_a_stage_of_which_fewer_steps_are_asked_is_finished(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["fewer steps"]
    assert outcome.codes == [0, 0]
    for stage, asked, done in (("stage1", 3, 4), ("stage2", 1, 2)):
        path = outcome.dir / stage / f"checkpoints/step-{done:08d}"
        assert f"{stage} is finished: {stage}.max_steps={asked}, and {path} has done {done}" in outcome.said
    assert "starts from" not in outcome.said and "goes on from" not in outcome.said
    assert outcome.saved("stage2") == ["step-00000002"]


def test_no_checkpoint_is_good(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["all damaged"]
    assert outcome.codes == [2, 2]
    assert "error: no checkpoint in" in outcome.said
    for step in (2, 4):
        assert f"step-0000000{step}: model/model.safetensors has changed" in outcome.said
        assert (outcome.dir / f"stage1/checkpoints/step-0000000{step}/checksums.json").exists()
    lines = (outcome.dir / "stage1/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_a_new_beginning_keeps_the_work_before_it(outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes["anew"]
    assert outcome.codes == [0, 0]
    assert outcome.saved() == ["step-00000002"]
    assert f"the earlier stage1 stays in {outcome.dir}/before-1" in outcome.said
    before = Outcome(outcome.dir / "before-1", [], "")
    assert before.saved() == ["step-00000002", "step-00000004"]
    assert (before.dir / "stage1/metrics.jsonl").exists() and not (before.dir / "stage2").exists()
