"""Preflight names the held-out pictures that a task, or its pre-training, was trained on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mvptr_ds.builders import build_vocabs
from mvptr_ds.checkpoints.checkpoint import _checksums
from mvptr_ds.checkpoints.model_folder import save_model_folder
from mvptr_ds.config import load_config
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.preflight.rank_checks import OK, WARNING
from mvptr_ds.preflight.shared_pictures import examine, pretrained_data
from tests.support.labelled_shards import write_labelled

LABELS = {"label": "neutral"}


def folder(path: Path, num: int) -> Index:
    """Records of the keys 0000, 0001, ..."""
    return ensure_index(write_labelled(path, [LABELS] * num))


@pytest.fixture
def pretrained(tmp_path: Path) -> Path:
    """A model folder whose configuration names the shards that it was trained on."""
    folder(tmp_path / "pretraining", 3)
    config = load_config(None, [f"data.train={tmp_path / 'pretraining'}", "data.phrase_vocab=null"])
    vocabs = build_vocabs(config.data)
    sizes = {"hidden_size": 8, "num_attention_heads": 1, "intermediate_size": 8, "max_positions": 8}
    layers = dict.fromkeys(("num_text_layers", "num_visual_layers", "num_cross_layers"), 1)
    words = {"num_words": len(vocabs.words), "num_rows": len(vocabs.words)}
    model = Mvptr(MvptrConfig(**sizes, **layers, **words))
    save_model_folder(tmp_path / "model", model, model.state_dict(), vocabs, config)
    return tmp_path / "model"


def test_shared_pictures_are_counted_and_named(tmp_path: Path, pretrained: Path) -> None:
    held_out, train = folder(tmp_path / "held_out", 5), folder(tmp_path / "train", 2)
    config = load_config(None, ["run.stages=[entailment]", f"run.init_from={pretrained}"])
    own, before = examine(config, {"data.train": train, "data.held_out": held_out}, pretrained_data(config))
    assert own.level == before.level == WARNING
    assert own.text == "data.held_out shares 2 of its 5 pictures with data.train (0000, 0001)"
    start = tmp_path / "pretraining"
    assert before.text == f"data.held_out shares 3 of its 5 pictures with the pre-training's {start} (0000, 0001, 0002)"


def test_the_pre_training_counts_and_no_other_task_of_its_run(tmp_path: Path, pretrained: Path) -> None:
    """A run folder holds stage 2 and a newer task, whose own shards are no pre-training."""
    run = tmp_path / "run"
    for stage in ("stage2", "vqa"):
        checkpoint = run / stage / "checkpoints/step-00000001"
        shutil.copytree(pretrained, checkpoint / "model")
        settings = checkpoint / "model/mvptr.yaml"
        text = settings.read_text(encoding="utf-8").replace("pretraining", f"{stage}-shards")
        settings.write_text(text, encoding="utf-8")
        (checkpoint / "checksums.json").write_text(json.dumps(_checksums(checkpoint, ".")), encoding="utf-8")
    for overrides in ([f"run.init_from={run}"], [f"run.dir={run}", "run.init_from=auto"]):
        data = pretrained_data(load_config(None, ["run.stages=[entailment]", *overrides]))
        assert data is not None and data.train == str(tmp_path / "stage2-shards")


def test_nothing_shared_and_a_start_that_is_gone(tmp_path: Path) -> None:
    held_out = folder(tmp_path / "held_out", 2)
    others = ensure_index(write_labelled(tmp_path / "train", [LABELS] * 2, first=10))
    config = load_config(None, ["run.stages=[entailment]", f"run.init_from={tmp_path / 'gone'}"])
    assert pretrained_data(config) is None
    (finding,) = examine(config, {"data.train": others, "data.held_out": held_out})
    assert (finding.level, finding.text) == (OK, "data.held_out shares no picture with data.train")
    assert list(examine(config, {"data.train": others})) == []
    pretraining = load_config(None, ["run.stages=[1]"])
    assert list(examine(pretraining, {"data.train": held_out, "data.held_out": held_out})) == []
