"""Fine-tuning as a user starts it: the best checkpoint, an early end, kills, other ranks, chains of stages."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvptr_ds.checkpoints.hand_over import find_model
from tests.conftest import REPO
from tests.end_to_end.conftest import LIMIT_S
from tests.support.labelled_shards import small_run, write_labelled
from tests.support.launch import run_on_ranks

pytestmark = pytest.mark.timeout(900)
BY = "eval/entailment/score"
LABELS = ("entailment", "neutral", "contradiction")
SETTINGS = [
    "run.stages=[entailment]", "run.init_from=null", "model.hidden_size=16", "model.dropout=0.1",
    "model.initializer_range=0.15", "data.tag_withhold_prob=0", "data.tag_wrong_prob=0", "data.tag_drop_prob=0",
    "entailment.max_steps=40", "entailment.warmup_steps=0", "entailment.learning_rate=6e-3", "entailment.patience=3",
    "entailment.learning_rate_factors={head: 3, text: 0.5}", "train.batch_size=24", "train.evaluate_every_steps=2",
    "train.checkpoint_every_steps=5", "train.keep_checkpoints=1",
]  # fmt: skip
# Ends rank 0 at once at a step: in its evaluation, before that is recorded (a checkpoint of it may be there), or after.
ENTRY = """
import os, sys
sys.path.insert(0, {repo!r})
from mvptr_ds.checkpoints.best import Evaluations
from mvptr_ds.tasks.entailment import Entailment
from mvptr_ds.train import main
WHERE, STEP = {where!r}, {step}
record, evaluate, seen = Evaluations.record, Entailment.evaluate, []

def ending_record(evaluations):
    ends = evaluations.done[-1].step == STEP
    if ends and WHERE == "before":
        os._exit(9)
    record(evaluations)
    if ends and WHERE == "after":
        os._exit(9)

def ending_evaluate(*arguments):
    seen.append(2 * len(seen) + 2)
    if WHERE == "inside" and seen[-1] == STEP:
        os._exit(9)
    return evaluate(*arguments)

Evaluations.record, Entailment.evaluate = ending_record, ending_evaluate
sys.exit(main())
"""


def train(run_dir: Path, overrides: list[str], num_ranks: int = 1, entry: Path = REPO / "mvptr_ds/train.py") -> str:
    """What rank 0 says of a run that ends well."""
    codes, said = start(run_dir, overrides, num_ranks, entry)
    assert codes == [0] * num_ranks, said
    return said


def start(
    run_dir: Path, overrides: list[str], num_ranks: int = 1, entry: Path = REPO / "mvptr_ds/train.py"
) -> tuple[list[int | None], str]:
    run_dir.mkdir(parents=True, exist_ok=True)
    codes = run_on_ranks([str(entry), f"run.dir={run_dir}", *overrides], num_ranks, run_dir, LIMIT_S)
    return codes, (run_dir / "rank0.log").read_text(encoding="utf-8")


def best(run_dir: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run_dir / "entailment/best.json").read_text(encoding="utf-8"))
    return content


def checkpoints(run_dir: Path, stage: str = "entailment") -> dict[str, dict[str, str]]:
    """The checksums of each checkpoint's files, but for what names the run's own folder and time."""
    out = {}
    for path in (run_dir / stage / "checkpoints").glob("step-*/checksums.json"):
        sums = json.loads(path.read_text(encoding="utf-8"))
        out[path.parent.name] = {n: s for n, s in sums.items() if n not in ("state.json", "model/mvptr.yaml")}
    return out


def lines(run_dir: Path) -> list[dict[str, Any]]:
    text = (run_dir / "entailment/metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """24 statements of three texts; what a text says of its picture is right for three of four."""
    labels = [{"label": LABELS[(number + (number % 4 == 3)) % 3]} for number in range(24)]
    folder = write_labelled(
        tmp_path_factory.mktemp("labelled") / "shards", labels, ("a dog sleeps", "two cats run", "the sun is red")
    )
    return small_run(folder)


@pytest.fixture(scope="module")
def undisturbed(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("undisturbed") / "run"
    train(run_dir, [*small, *SETTINGS], 2)
    return run_dir


def test_a_stage_ends_early_and_keeps_its_best_checkpoint(undisturbed: Path) -> None:
    scores = [(line["step"], line[BY]) for line in lines(undisturbed) if BY in line]
    record, vain, stopped_at = scores[0], 0, 0
    for step, score in scores[1:]:
        record, vain = ((step, score), 0) if score > record[1] else (record, vain + 1)
        stopped_at = stopped_at or (step if vain == 3 else 0)
    found = best(undisturbed)
    assert 0 < stopped_at < 40 and scores[-1][0] == stopped_at
    assert found == {
        "step": record[0], "score": record[1], "by": BY, "stopped_at": stopped_at, "evaluations": [*map(list, scores)],
    }  # fmt: skip
    assert sorted(checkpoints(undisturbed)) == [f"step-{step:08d}" for step in (record[0], stopped_at)]
    assert find_model(undisturbed) == undisturbed / f"entailment/checkpoints/step-{record[0]:08d}/model"
    # the log shows the rate of the schedule; the groups have it times their factors
    rate = 6e-3 * (40 - stopped_at + 1) / 40
    trained = [line["learning_rate"] for line in lines(undisturbed) if "learning_rate" in line]
    assert trained[-1] == pytest.approx(rate) and len(trained) == stopped_at
    assert rates(undisturbed, stopped_at) == pytest.approx([rate, rate, rate / 2, rate / 2, 3 * rate, 3 * rate])


def rates(run_dir: Path, step: int) -> list[float]:
    """The learning rates of the optimiser's groups as a checkpoint holds them."""
    engine = run_dir / f"entailment/checkpoints/step-{step:08d}/engine"
    saved = torch.load(next(engine.glob("*rank_0_*optim_states.pt")), weights_only=False)["optimizer_state_dict"]
    return [group["lr"] for group in saved["base_optimizer_state"]["param_groups"]]


def test_a_second_start_says_so_and_trains_nothing(undisturbed: Path, small: list[str], tmp_path: Path) -> None:
    run_dir = shutil.copytree(undisturbed, tmp_path / "run")
    found, logged = best(run_dir), lines(run_dir)
    said = train(run_dir, [*small, *SETTINGS], 2)
    assert f"entailment is finished: it stopped at step {found['stopped_at']}, after 3 evaluations in a row" in said
    assert f"entailment was best at step {found['step']} ({BY} {found['score']:.4f})" in said
    assert best(run_dir) == found and lines(run_dir) == logged
    assert checkpoints(run_dir) == checkpoints(undisturbed)


@pytest.mark.parametrize(
    ("where", "at"),
    [
        ("before", "best"),  # its checkpoint was written, its score was not
        ("before", "stopped_at"),
        ("inside", "checkpoint"),  # both are due at this step
        ("after", "vain"),  # no checkpoint has seen this evaluation: it comes again
    ],
)
def test_a_kill_changes_nothing(where: str, at: str, undisturbed: Path, small: list[str], tmp_path: Path) -> None:
    found, run_dir = best(undisturbed), tmp_path / "run"
    steps = [step for step, _ in found["evaluations"]]
    # one behind the first checkpoint; the vain one is neither the last nor the best of its time
    vain = next(step for step in steps if step > found["step"] and step % 5)
    step = {"best": found["step"], "stopped_at": found["stopped_at"], "checkpoint": 10, "vain": vain}[at]
    entry = tmp_path / "entry.py"
    entry.write_text(ENTRY.format(repo=str(REPO), where=where, step=step), encoding="utf-8")
    codes, said = start(run_dir, [*small, *SETTINGS], 2, entry)
    assert 0 not in codes and "entailment was best" not in said, said
    assert "entailment goes on from step" in train(run_dir, [*small, *SETTINGS], 2)
    assert best(run_dir) == found
    assert checkpoints(run_dir) == checkpoints(undisturbed)
    ours, theirs = ([line for line in lines(folder) if "grad_norm" in line] for folder in (run_dir, undisturbed))
    assert [line["step"] for line in ours] == [line["step"] for line in theirs]
    assert [line["loss/entailment"] for line in ours] == [line["loss/entailment"] for line in theirs]


@pytest.mark.parametrize("zero_stage", [1, 2, 3])
def test_factors_on_another_number_of_ranks(zero_stage: int, small: list[str], tmp_path: Path) -> None:
    """Four steps on two ranks; then two of them again on one."""
    settings = [*small, *SETTINGS, "entailment.max_steps=4", "entailment.patience=0", "model.dropout=0"]
    settings += ["optim.eps=1e-5", "train.checkpoint_every_steps=2", "train.keep_checkpoints=3"]
    settings += ["--deepspeed", f"z{zero_stage}"]
    train(tmp_path / "two", settings, 2)
    shutil.copytree(tmp_path / "two", tmp_path / "one")
    shutil.rmtree(tmp_path / "one/entailment/checkpoints/step-00000004")
    said = train(tmp_path / "one", settings, 1)
    assert "is converted for 1 ranks" in said and "entailment goes on from step 2" in said
    for file in ("model.safetensors", "head.safetensors"):
        ours, theirs = (
            load_file(tmp_path / f"{run}/entailment/checkpoints/step-00000004/model/{file}") for run in ("one", "two")
        )
        assert all(float((ours[name] - theirs[name]).abs().max()) < 1e-5 for name in theirs)
    factors = json.loads(
        (tmp_path / "one/entailment/checkpoints/step-00000004/state.json").read_text(encoding="utf-8")
    )["learning_rate_factors"]
    assert factors == {"head": 3.0, "text": 0.5}
    if zero_stage < 3:  # which saves its groups elsewhere
        assert rates(tmp_path / "one", 4) == rates(tmp_path / "two", 4)
    codes, said = start(tmp_path / "one", [*settings, "entailment.learning_rate_factors={head: 2}"])
    assert codes == [2] and "was written with learning_rate_factors {'head': 3.0, 'text': 0.5}" in said


@pytest.fixture(scope="module")
def pretrained(small: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stage 1 and 2 of one step each, then entailment and retrieval, in one start."""
    run_dir = tmp_path_factory.mktemp("pretrained") / "run"
    stages = ["run.stages=[1, 2, entailment, retrieval]", "stage1.weights.mcr_phrases=0", "model.hidden_size=16"]
    stages += [f"{name}.max_steps={steps}" for name, steps in (("stage1", 1), ("stage2", 2), ("entailment", 3))]
    said = train(run_dir, [*small, *stages, "retrieval.max_steps=1"])
    assert f"stage2 starts from {run_dir}/stage1/checkpoints/step-00000001/model" in said
    for task in ("entailment", "retrieval"):  # not from the task before it
        assert f"{task} starts from {run_dir}/stage2/checkpoints/step-00000002/model" in said
    assert "entailment starts with fresh weights for head.weight, head.bias" in said
    return run_dir


def test_sizes_come_from_the_model_that_is_fine_tuned(pretrained: Path, small: list[str], tmp_path: Path) -> None:
    """The demo's are four times as large, and read pixels; once there is a checkpoint, the start may go."""
    source, run_dir = shutil.copytree(pretrained, tmp_path / "pretrained"), tmp_path / "run"
    data = [
        item for item in small if item.startswith(("data.train", "data.held_out", "data.demo", "train.", "data.num"))
    ]
    settings = [*data, f"run.init_from={source}", "run.stages=[entailment]", "entailment.max_steps=1"]
    codes, said = start(run_dir, [*settings, "model.hidden_size=32", "visual.source=features", "data.word_vocab=null"])
    assert codes == [2], said
    assert "has other sizes or vocabularies than were typed:\n  - model.hidden_size: 16 there, 32 typed" in said
    said = train(run_dir, [*settings, "model.hidden_size=16", "train.preflight=true"])
    model = f"{source}/stage2/checkpoints/step-00000002/model"
    assert f"sizes and vocabularies are those of {model}: model.num_attention_heads=1 (not 4), " in said
    assert f"entailment starts from {model}" in said
    assert (run_dir / "vocabularies/vocab.txt").is_file()
    shutil.rmtree(source)
    said = train(run_dir, [*settings, "entailment.max_steps=2"])
    assert "entailment goes on from step 1" in said
    tuned = run_dir / "entailment/checkpoints/step-00000002/model"
    assert json.loads((tuned / "config.json").read_text(encoding="utf-8"))["hidden_size"] == 16


def test_a_norm_of_regions_may_be_added(pretrained: Path, small: list[str], tmp_path: Path) -> None:
    settings = [*small, f"run.init_from={pretrained}", "run.stages=[retrieval]", "retrieval.max_steps=1"]
    settings = [item for item in settings if not item.startswith("model.")]
    said = train(tmp_path / "run", [*settings, "model.region_norm=true"])
    assert "retrieval starts with fresh weights for region_embedding.norm.weight, region_embedding.norm.bias" in said
