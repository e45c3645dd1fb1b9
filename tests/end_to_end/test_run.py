"""The real launcher on tiny demo shards: both stages, hand-over, resume, refusals, evaluation, the bare command."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from mvptr_ds import builders
from mvptr_ds.checkpoints.model_folder import check_fits, load_model_folder
from mvptr_ds.config import load_config, override_config
from mvptr_ds.errors import CheckpointError
from mvptr_ds.train import parse_arguments
from tests.conftest import REPO
from tests.end_to_end.conftest import LIMIT_S, SMALL, Launch, Run
from tests.support.launch import free_port, run

pytestmark = pytest.mark.timeout(600)


def weights(run_dir: Path, stage: str, step: int = 4) -> dict[str, torch.Tensor]:
    return load_file(run_dir / stage / "checkpoints" / f"step-{step:08d}" / "model" / "model.safetensors")


def assert_equal(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


def reports(run_dir: Path, stage: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / stage / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    "line", ["a.b=1 --deepspeed z c.d=2", "--deepspeed z a.b=1 c.d=2", "--local_rank=0 a.b=1 c.d=2 --deepspeed z"]
)
def test_overrides_may_stand_anywhere(line: str) -> None:
    arguments = parse_arguments(line.split())
    assert (arguments.overrides, arguments.deepspeed, arguments.config) == (["a.b=1", "c.d=2"], "z", None)


def test_a_run_leaves_what_it_says(trained: Run) -> None:
    """Source: the issue, point 6."""
    for stage, objectives in (
        ("stage1", {"mcr_tags", "mcr_regions", "mcr_phrases", "mlm"}),
        ("stage2", {"mcr_tags", "mcr_regions", "mlm", "vsc", "wpg", "itm"}),
    ):
        lines = reports(trained.dir, stage)
        assert [line["step"] for line in lines] == [2, 4]
        keys = {"learning_rate", "grad_norm", "samples_per_s", "data/wait_frac", "data/padded_frac", "memory_gib"}
        keys |= {"tokens_per_s", "model_tflops_per_rank"}
        shares = [f"time/{phase}_frac" for phase in ("forward", "backward", "step")]
        for line in lines:
            assert {k.removeprefix("loss/") for k in line if k.startswith("loss/")} == objectives
            assert all(line[key] is not None for key in keys)
            assert all(line[key] > 0 for key in (*shares, "time/communication_frac", "model_tflops_per_rank"))
            assert "mfu_frac" not in line  # of a GPU alone
            assert sum(line[key] for key in (*shares, "data/wait_frac")) <= 1.0
        checkpoints = trained.dir / stage / "checkpoints"
        assert sorted(p.name for p in checkpoints.iterdir()) == ["latest", "step-00000002", "step-00000004"]
        filled = json.loads((trained.dir / stage / "ds_config.json").read_text(encoding="utf-8"))
        assert filled["zero_optimization"]["stage"] == 2 and filled["train_micro_batch_size_per_gpu"] == 4
        assert f"{stage} 4/4" in trained.output  # the progress line
        traces = {path.name for path in (trained.dir / stage / "profile").iterdir()}
        assert traces == {"rank0-steps2-3.json", "rank1-steps2-3.json"}
    assert load_config(trained.dir / "config.yaml").model.hidden_size == 32
    last = trained.dir / "stage2/checkpoints/step-00000004"
    assert (last / "model/model.safetensors").is_file()
    states = [torch.load(last / f"rng-rank{rank}.pt", weights_only=True)["cpu"] for rank in range(2)]
    assert len({int(state[:8].view(torch.int64)) for state in states}) == 2  # what dropout was seeded with


def test_both_stages_trained_what_is_theirs(trained: Run) -> None:
    early, late = weights(trained.dir, "stage1", 2), weights(trained.dir, "stage1")
    second = weights(trained.dir, "stage2")
    moved = {name.split(".")[0] for name in late if not torch.equal(early[name], late[name])}
    assert moved >= {"embeddings", "text_encoder", "visual_encoder", "region_embedding", "phrase_head", "tag_head"}
    assert not moved & {"cross_encoder", "itm_head", "pooler", "text_proj", "visual_proj", "logit_scale"}
    moved = {name.split(".")[0] for name in second if not torch.equal(late[name], second[name])}
    assert moved >= {"embeddings", "text_encoder", "visual_encoder", "cross_encoder", "itm_head", "text_proj"}
    assert not moved & {"phrase_head"}  # stays behind


def test_stage_2_starts_from_the_end_of_stage_1(trained: Run, train: Launch, tmp_path: Path) -> None:
    """With a learning rate of 0 a step changes nothing, so that what is saved is what it began with."""
    assert "stage2 starts from" in trained.output and "stage1/checkpoints/step-00000004/model" in trained.output
    overrides = [f"run.init_from={trained.dir / 'stage1'}", "run.stages=[2]", "stage2.max_steps=1", "run.seed=0"]
    code, output = train(tmp_path / "run", *overrides, "stage2.learning_rate=0", num_ranks=1)
    assert code == 0, output
    assert_equal(weights(tmp_path / "run", "stage2", 1), weights(trained.dir, "stage1"))


def test_a_resumed_run_ends_with_the_same_weights(trained: Run, train: Launch, tmp_path: Path) -> None:
    """Both stages are cut at step 2; stage 2 moreover in the middle of saving step 4. Bit-identical: dropout is 0."""
    copy = tmp_path / "run"
    shutil.copytree(trained.dir, copy)
    shutil.rmtree(copy / "stage1/checkpoints/step-00000004")
    (copy / "stage2/checkpoints/step-00000004/checksums.json").unlink()
    (copy / "stage2/checkpoints/step-00000004/model/model.safetensors").write_bytes(b"cut")
    code, output = train(copy)
    assert code == 0, output
    for stage in ("stage1", "stage2"):
        assert f"{stage} goes on from step 2" in output
        assert_equal(weights(copy, stage), weights(trained.dir, stage))
        assert [line["step"] for line in reports(copy, stage)] == [2, 4]
        ours, theirs = reports(copy, stage)[1], reports(trained.dir, stage)[1]
        assert {k: v for k, v in ours.items() if k.startswith("loss/")} == {
            k: v for k, v in theirs.items() if k.startswith("loss/")
        }


def test_a_checkpoint_of_other_dimensions_or_vocabulary_is_refused(
    trained: Run, train: Launch, small: list[str], tmp_path: Path
) -> None:
    wrong = [f"run.init_from={trained.dir}", "run.stages=[2]", "data.phrase_vocab=null", "model.hidden_size=16"]
    code, output = train(tmp_path / "run", *wrong, num_ranks=1)
    assert code == 2 and "Traceback" not in output, output
    for part in ("hidden_size: 32 there, 16 here", "num_phrases", "phrase vocabulary", "run.init_from"):
        assert part in output, output
    assert not list(tmp_path.rglob("*.safetensors"))


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("visual.backbone_config.depths=[2, 1]", "backbone"),  # same sizes of everything else
        ("model.max_positions=65", "max_positions"),
        ("model.tie_word_heads=false", "tie_word_heads"),
        ("data.word_vocab=null", "word vocabulary"),
    ],
)
def test_every_difference_is_named(trained: Run, small: list[str], override: str, named: str) -> None:
    config = load_config("demo", small)
    if override.startswith("visual.backbone_config"):
        assert config.visual.backbone_config is not None
        config.visual.backbone_config["depths"] = [2, 1]
    else:
        config = override_config(config, [override, *(["data.phrase_vocab=null"] if "word_vocab" in override else [])])
    vocabs = builders.build_vocabs(config.data)
    model = builders.build_model(config, vocabs)
    path = trained.dir / "stage1/checkpoints/step-00000004/model"
    with pytest.raises(CheckpointError, match=named):
        check_fits(model, vocabs, path)


def test_a_model_folder_stands_by_itself(trained: Run, tmp_path: Path) -> None:
    folder = tmp_path / "elsewhere"
    shutil.copytree(trained.dir / "stage2/checkpoints/step-00000004/model", folder)
    assert {p.suffix for p in folder.iterdir()} <= {".json", ".safetensors", ".txt", ".yaml"}  # no pickle
    model, vocabs, config = load_model_folder(folder)
    assert_equal(dict(model.state_dict()), weights(trained.dir, "stage2"))
    assert config.model.hidden_size == 32 and len(vocabs.words) == model.config.num_words


def test_evaluation(trained: Run, tmp_path: Path) -> None:
    """Source: the issue, point 7."""
    command = [sys.executable, str(REPO / "mvptr_ds/eval.py"), str(trained.dir), "eval.num_pictures=3"]
    code, output = run([*command, "--out", str(tmp_path / "out"), "eval.batch_size=5"], tmp_path / "log", LIMIT_S)
    assert code == 0, output
    report = json.loads((tmp_path / "out/report.json").read_text(encoding="utf-8"))
    assert report["num_scenes"] == 16
    keys = {f"{way}_r{k}" for way in ("t2i", "i2t") for k in (1, 5, 10)}
    for part in ("retrieval", "rerank"):
        assert set(report[part]) == keys
        assert all(0.0 <= value <= 1.0 for value in report[part].values())
        assert report[part]["t2i_r1"] <= report[part]["t2i_r5"] <= report[part]["t2i_r10"]
    assert {"stage1", "stage2", "evaluation"} <= set(report["wall_s"])
    for name in ("curves.png", "pictures.png"):
        assert (tmp_path / "out" / name).read_bytes().startswith(b"\x89PNG")
    assert "text -> image" in output and "re-ranked" in output and "GROUNDING" in output


def test_the_bare_command_on_a_fresh_checkout(tmp_path: Path) -> None:
    """`deepspeed mvptr_ds/train.py --deepspeed ds_configs/z2.json`: the demo, both stages; only made small here."""
    for name in ("mvptr_ds", "ds_configs"):
        shutil.copytree(REPO / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    command = ["deepspeed", "--master_port", str(free_port()), "mvptr_ds/train.py", "--deepspeed", "ds_configs/z2.json"]
    code, output = run([*command, *SMALL], tmp_path / "log", LIMIT_S, cwd=tmp_path, PYTHONPATH="")
    assert code == 0, output
    assert sum("this is the demo configuration" in line for line in output.splitlines()) == 1
    assert sum("demo shards built" in line for line in output.splitlines()) == 1
    for stage in ("stage1", "stage2"):
        assert (tmp_path / "runs/demo" / stage / "checkpoints/step-00000004/checksums.json").is_file()
    assert (tmp_path / "runs/demo/shards/train/manifest.json").is_file()
