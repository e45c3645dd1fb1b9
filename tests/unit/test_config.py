"""Defaults < YAML < overrides; coercion by annotation; errors that name key and value."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from mvptr_ds.config import Config, load_config, override_config, save_config
from mvptr_ds.config_reading import CONFIGS_DIR


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_precedence(tmp_path: Path) -> None:
    path = write(tmp_path, "train: {batch_size: 7, accumulation_steps: 3}\nstage1: {weights: {mlm: 0.5}}\n")
    config = load_config(path, ["train.batch_size=9", "train.batch_size=11"])
    assert config.train.batch_size == 11  # the last override wins over the file
    assert config.train.accumulation_steps == 3  # the file over the default
    assert config.train.resume == "auto"
    assert config.stage1.weights.mlm == 0.5 and config.stage1.weights.mcr_tags == 1.0  # laid over, not replaced
    assert config.stage1.masking.tag_prob == 0.5
    assert Config().train.batch_size == 1024 and Config().stage1.weights.mlm == 1.0  # the defaults are not shared


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("stage1.learning_rate=1e-4", 1e-4),  # a string to PyYAML
        ("stage1.learning_rate=3", 3.0),
        ("stage1.max_steps=1e3", 1000),
        ("stage1.max_steps='12'", 12),
        ("stage1.max_steps=5.0", 5),
        ("model.tie_word_heads=false", False),
        ("model.tie_word_heads=yes", True),
        ("run.init_from=null", None),
        ("run.init_from=", None),
        ("run.init_from=a=b", "a=b"),
        ("run.dir=7", "7"),
        ("run.stages=[1, joint]", ["1", "joint"]),
        ("run.stages=2", ["2"]),
        ("visual.backbone_config={model_type: convnext, depths: [1, 1]}", {"model_type": "convnext", "depths": [1, 1]}),
        ("visual.backbone_config.model_type=resnet", {"model_type": "resnet"}),
        ("data.held_out=null", None),
    ],
)
def test_coercion(override: str, value: object) -> None:
    config = load_config(None, [override])
    section, key = override.split("=")[0].split(".")[:2]
    found = getattr(getattr(config, section), key)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("train.batchsize=3", ["train.batchsize", "train.batch_size"]),
        ("trian.batch_size=3", ["trian", "train"]),
        ("stage1.weights.mcr_tag=3", ["stage1.weights.mcr_tag", "stage1.weights.mcr_tags"]),
        ("xyzzy.q=3", ["xyzzy", "train", "run"]),
        ("train.batch_size=many", ["train.batch_size", "'many'", "int"]),
        ("train.batch_size=1.5", ["train.batch_size", "1.5", "int"]),
        ("train.batch_size=true", ["train.batch_size", "True", "int"]),
        ("train.batch_size=null", ["train.batch_size", "None"]),
        ("train.batch_size=.inf", ["train.batch_size", "inf"]),
        ("train.batch_size=.nan", ["train.batch_size", "nan"]),
        ("train.batch_size=[1]", ["train.batch_size", "[1]"]),
        ("stage1.learning_rate=fast", ["stage1.learning_rate", "'fast'", "float"]),
        ("stage1.learning_rate=true", ["stage1.learning_rate", "True"]),
        ("model.tie_word_heads=1", ["model.tie_word_heads", "1", "bool"]),
        ("run.dir={a: 1}", ["run.dir", "{'a': 1}"]),
        ("run.dir=[unclosed", ["run.dir", "[unclosed"]),
        ("run.stages=[[1]]", ["run.stages", "[1]"]),
        ("visual.backbone_config=[1]", ["visual.backbone_config", "[1]"]),
        ("train=3", ["train", "3", "section"]),
        ("train.batch_size", ["train.batch_size", "train.batch_size=64"]),
        ("=3", ["'=3'"]),
    ],
)
def test_errors_name_key_and_value(override: str, parts: list[str]) -> None:
    with pytest.raises(ValueError) as error:
        load_config(None, [override])
    assert [part for part in parts if part not in str(error.value)] == [], str(error.value)


def test_errors_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"train\.batch_sise.*train\.batch_size"):
        load_config(write(tmp_path, "train: {batch_sise: 3}"))
    with pytest.raises(ValueError, match="stage1"):
        load_config(write(tmp_path, "stage1:\n"))
    with pytest.raises(ValueError, match=r"mine\.yaml"):
        load_config(write(tmp_path, "train: {batch_size: 3"))
    with pytest.raises(ValueError, match="the configuration"):
        load_config(write(tmp_path, "- 1"))
    with pytest.raises(ValueError, match=r"'nowhere'.*demo"):
        load_config("nowhere")
    assert load_config(write(tmp_path, "")) == Config()


def test_round_trip(tmp_path: Path) -> None:
    overrides = ["stage2.learning_rate=3e-5", "run.stages=[joint]", "visual.backbone_config={model_type: resnet}"]
    config = load_config("demo", [*overrides, "run.init_from='007'", "data.held_out=null"])
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert override_config(load_config(tmp_path / "saved.yaml"), ["run.seed=5"]).run.seed == 5


def test_stages() -> None:
    names = [load_config(None, [f"run.stages={s}"]).stage_names for s in ("[1,2]", "2", "[joint]", "[stage1]")]
    assert names == [["stage1", "stage2"], ["stage2"], ["joint"], ["stage1"]]
    for wrong in ("[3]", "[]", "[1,both]"):
        with pytest.raises(ValueError, match=r"run\.stages"):
            _ = load_config(None, [f"run.stages={wrong}"]).stage_names
    config = Config()
    assert config.stage("joint") is config.joint
    with pytest.raises(ValueError, match=r"'stage3'.*stage1"):
        config.stage("stage3")


@pytest.mark.parametrize("path", sorted(CONFIGS_DIR.glob("*.yaml")), ids=lambda path: path.stem)
def test_packaged_configs_are_found_by_name_and_hold_no_unknown_key(path: Path) -> None:
    config = load_config(path.stem)
    assert config == load_config(path)
    assert config.stage_names
    assert yaml.safe_load(yaml.safe_dump(dataclasses.asdict(config)))["train"]["batch_size"] == config.train.batch_size


@pytest.mark.parametrize(
    ("name", "task", "tokens", "phrases", "tags", "regions"),
    [
        ("retrieval_coco", "retrieval", 50, 5, 30, 50),
        ("retrieval_flickr30k", "retrieval", 50, 5, 20, 50),
        ("vqa", "vqa", 128, 5, 30, 50),
        ("snli_ve", "entailment", 70, 5, 20, 70),
        ("refcoco_plus", "referring", 30, 5, 20, 50),
    ],
)
def test_tasks_have_the_published_lengths(
    name: str, task: str, tokens: int, phrases: int, tags: int, regions: int
) -> None:
    """Source: the published commands, whose text slots hold [CLS] and [SEP]."""
    config = load_config(name)
    assert config.stage_names == [task] and config.run.init_from == "auto"
    data = config.data
    assert (data.max_tokens, data.max_text_slots) == (tokens - 2, tokens + phrases)
    assert (data.max_tag_slots, data.max_regions) == (tags, regions)
    every = config.train.evaluate_every_steps
    assert data.held_out is not None and every == config.train.checkpoint_every_steps > 0


@pytest.mark.parametrize(
    ("name", "task"),
    [("demo_vqa", "vqa"), ("demo_ve", "entailment"), ("demo_refs", "referring"), ("demo_retrieval", "retrieval")],
)
def test_tasks_of_the_demo_start_from_it(name: str, task: str) -> None:
    config, demo = load_config(name), load_config("demo")
    assert config.stage_names == [task] and config.run.init_from == demo.run.dir and config.model == demo.model
    assert config.data.sidecars == [demo.data.train] and config.data.held_out_sidecars == [demo.data.held_out]
    section = config.stage(task)
    assert (section.max_steps, section.learning_rate, config.train.batch_size) == (300, 5e-4, 64)


def test_published_defaults() -> None:
    """Source: the published code, Model, Losses and the optimiser's published defaults."""
    config = Config()
    optim = config.optim
    assert (optim.beta1, optim.beta2, optim.eps, optim.weight_decay, optim.clip_norm) == (0.9, 0.999, 1e-8, 0.01, 10.0)
    assert config.train.batch_size == 1024 and config.joint.learning_rate == 5e-5
    assert {k: v for k, v in vars(config.joint.weights).items() if v} == dict.fromkeys(
        ("mcr_tags", "mlm", "vsc", "wpg", "itm"), 1.0
    )
    assert (config.task.wpg.margin, config.task.wpg.top_k, config.task.vsc.initial_temperature) == (0.2, 3, 0.07)
    masking = config.joint.masking
    assert (masking.word_prob, masking.phrase_prob, masking.tag_prob) == (0.15, 0.15, 0.15)
    model = config.model
    assert (model.hidden_size, model.num_attention_heads, model.intermediate_size) == (768, 12, 3072)
    assert (model.dropout, model.attention_dropout) == (0.1, 0.1)
    assert (model.num_text_layers, model.num_visual_layers, model.num_cross_layers) == (6, 6, 6)
