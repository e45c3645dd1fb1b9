"""The DeepSpeed JSON: what is filled, what is refused; every shipped YAML with every shipped JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from deepspeed.runtime.config import DeepSpeedConfig

from mvptr_ds import ds_config
from mvptr_ds.builders import model_config
from mvptr_ds.config import Config, OptimConfig, TrainConfig, load_config
from mvptr_ds.config_reading import CONFIGS_DIR
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.ds_config import fill_ds_config, load_ds_config, packaged_ds_configs
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.tasks import TASKS
from tests.conftest import REPO

ZERO_2: dict[str, Any] = {"zero_optimization": {"stage": 2}}
JSONS = sorted((REPO / "ds_configs").glob("*.json"))
YAMLS = sorted(CONFIGS_DIR.glob("*.yaml"))


def fill(content: dict[str, Any], num_ranks: int = 2, bf16: bool = False, fp16: bool = False) -> dict[str, Any]:
    train = TrainConfig(batch_size=16, accumulation_steps=2)
    return fill_ds_config(content, train, OptimConfig(), num_ranks, bf16_supported=bf16, fp16_supported=fp16)


def test_auto_and_absent_are_filled_alike() -> None:
    keys = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    content = {key: "auto" for key in keys} | {"zero_optimization": {"stage": 2}}
    filled = fill(content)
    assert [filled[key] for key in keys] == [16, 4, 2, 10.0]
    assert fill({"zero_optimization": {"stage": 2}}) == filled
    assert content["train_batch_size"] == "auto"  # what was given is left alone
    assert fill({**content, "train_batch_size": 16, "gradient_clipping": 10}) == filled
    assert filled["zero_optimization"] == {"stage": 2}


def test_the_timer_that_waits_for_the_device_is_off_unless_asked_for() -> None:
    assert fill(ZERO_2)["timers"] == {"throughput": {"enabled": False}}
    asked = {"throughput": {"enabled": True, "synchronized": False}}
    assert fill({**ZERO_2, "timers": asked})["timers"] == asked
    alone = {**fill(ZERO_2), "train_batch_size": 8}  # of the one rank that this process is
    assert DeepSpeedConfig(alone).timers_config.enabled is False


@pytest.mark.parametrize("path", JSONS, ids=lambda path: path.stem)
def test_no_shipped_json_waits_for_the_device_behind_each_backward_pass(path: Path) -> None:
    """DeepSpeed's `overlap_comm` does, in stages 1 and 2."""
    zero = load_ds_config(path)["zero_optimization"]
    assert zero["stage"] == 3 or zero["overlap_comm"] is False


def test_lamb_is_let_into_zero() -> None:
    """DeepSpeed asks for that with an optimiser which it does not know."""
    train, optim = TrainConfig(batch_size=16), OptimConfig(name="lamb")
    filled = fill_ds_config(
        {"zero_optimization": {"stage": 1}}, train, optim, 2, bf16_supported=False, fp16_supported=False
    )
    assert filled["zero_allow_untested_optimizer"] is True
    assert "zero_allow_untested_optimizer" not in fill({"zero_optimization": {"stage": 1}})


def test_every_mismatch_is_listed_at_once() -> None:
    content = {
        "train_batch_size": 32,
        "train_micro_batch_size_per_gpu": 3,
        "gradient_accumulation_steps": 4,
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW"},
        "scheduler": {"type": "WarmupLR"},
        "bf16": {"enabled": True},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"},
    }
    with pytest.raises(ValueError) as error:
        fill(content)
    expected = [
        "train_batch_size is 32", "train.batch_size is 16", "train_micro_batch_size_per_gpu is 3", "is 4",
        "gradient_accumulation_steps is 4", "train.accumulation_steps is 2", "gradient_clipping is 1.0",
        "optim.clip_norm is 10.0", "'optimizer'", "'scheduler'", "both enabled", "zero_optimization.reduce_bucket_size",
    ]  # fmt: skip
    assert [part for part in expected if part not in str(error.value)] == []


AUTO = {"enabled": "auto"}
ON, OFF = {"enabled": True}, {"enabled": False}


@pytest.mark.parametrize(
    ("bf16", "fp16", "supported", "wanted"),
    [
        (AUTO, AUTO, (True, True), (True, False)),  # a GPU that computes bf16
        (AUTO, AUTO, (False, True), (False, True)),  # V100
        (AUTO, AUTO, (False, False), (False, False)),  # CPU
        (AUTO, None, (True, True), (True, False)),
        (AUTO, None, (False, True), (False, False)),  # fp16 was not asked for
        (None, AUTO, (True, True), (False, True)),
        (OFF, AUTO, (True, True), (False, True)),
        (AUTO, ON, (True, True), (False, True)),
        (ON, AUTO, (False, False), (True, False)),  # bf16 on a CPU works, when it is asked for
        (None, None, (True, True), (False, False)),
        (OFF, OFF, (True, True), (False, False)),
    ],
)
def test_precision(bf16: Any, fp16: Any, supported: tuple[bool, bool], wanted: tuple[bool, bool]) -> None:
    content = dict(ZERO_2) | {n: dict(value) for n, value in (("bf16", bf16), ("fp16", fp16)) if value is not None}
    filled = fill(content, bf16=supported[0], fp16=supported[1])
    assert tuple(bool(filled[name].get("enabled")) for name in ("bf16", "fp16")) == wanted


def test_precision_that_the_device_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match=r"fp16 is enabled, but this machine has no GPU"):
        fill(ZERO_2 | {"fp16": {"enabled": True}})
    with pytest.raises(ValueError, match="both enabled"):
        fill(ZERO_2 | {"bf16": {"enabled": True}, "fp16": {"enabled": True}}, bf16=True, fp16=True)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, r"zero_optimization\.stage is 0, .*--deepspeed z1"),
        ({"zero_optimization": {}}, r"zero_optimization\.stage is 0, .*--deepspeed z1"),
        ({"zero_optimization": {"stage": 0}}, r"zero_optimization\.stage is 0, .*--deepspeed z1"),
        ({"zero_optimization": {"stage": 0}, "bf16": {"enabled": True}}, r"no float32 weights beside those of bf16"),
        ({"zero_optimization": {"stage": 4}}, r"zero_optimization\.stage is 4; choose from 1, 2, 3"),
        ({"zero_optimization": {"stage": "2"}}, r"zero_optimization\.stage is '2'; choose from 1, 2, 3"),
        ({"zero_optimization": {"stage": True}}, r"zero_optimization\.stage is True; choose from 1, 2, 3"),
        ({"zero_optimization": {"stage": "auto"}}, r'zero_optimization\.stage is "auto", which nothing here fills'),
        ({"zero_optimization": True}, r"zero_optimization is True, expected an object"),
        ({"zero_optimization": {"stage": 1, "compute_grad_norm": False}}, r"compute_grad_norm is false, .*not finite"),
        (ZERO_2 | {"bf16": {"enabled": True, "check_grad_overflow": False}}, r"check_grad_overflow is false"),
    ],
)
def test_what_would_step_on_a_gradient_that_is_not_finite_is_refused(content: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fill(content)


def test_files(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no DeepSpeed JSON.*/none\.json'; the packaged ones are z1, z2,"):
        load_ds_config(tmp_path / "none.json")
    for text, part in (("{", "not JSON"), ("[1]", "list")):
        (tmp_path / "ds.json").write_text(text, encoding="utf-8")
        with pytest.raises(ValueError, match=part):
            load_ds_config(tmp_path / "ds.json")
    (tmp_path / "ds.json").write_text('{"a": 1}', encoding="utf-8")
    assert load_ds_config(tmp_path / "ds.json") == {"a": 1}


def test_packaged_jsons_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert list(packaged_ds_configs().values()) == JSONS
    for path in JSONS:
        assert load_ds_config(path.stem) == load_ds_config(path.name) == load_ds_config(path)
    with pytest.raises(ValueError, match=r"'z4'; the packaged ones are z1, z2, z2_offload, z3$"):
        load_ds_config("z4")
    with pytest.raises(ValueError, match=r"z3; did you mean z2\?$"):  # a path is not taken for a name
        load_ds_config("ds_configs/z2.json")
    (tmp_path / "z2.json").write_text('{"own": 1}', encoding="utf-8")
    assert load_ds_config("z2.json") == {"own": 1} and load_ds_config("z2") != {"own": 1}


def test_an_installed_package_has_its_own_jsons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the package stand before the folder beside it, which may belong to something else."""
    for name in ("inside", "beside"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "z2.json").write_text(json.dumps({"of": name}), encoding="utf-8")
    monkeypatch.setattr(ds_config, "_FOLDERS", (tmp_path / "inside", tmp_path / "beside"))
    assert load_ds_config("z2") == {"of": "inside"}
    monkeypatch.setattr(ds_config, "_FOLDERS", (tmp_path / "nowhere", tmp_path / "beside"))
    assert load_ds_config("z2") == {"of": "beside"}


class _Phrases(PhraseVocab):
    """As many phrases as the published list, without its file."""

    def __init__(self, words: WordPiece, num_phrases: int) -> None:
        tuples = [(f"phrase{i}",) for i in range(num_phrases)]
        super().__init__(tuples, range(len(words), len(words) + num_phrases), [1] * num_phrases, len(words), "")


@pytest.fixture(scope="module")
def vocabs() -> Vocabs:
    words = WordPiece()
    return Vocabs(words, _Phrases(words, 1000))


def build_stages(config: Config, vocabs: Vocabs) -> list[PretrainingLosses]:
    with torch.device("meta"):
        model = Mvptr(model_config(config, vocabs))
    return [TASKS[stage].build(config, model, config.run.seed) for stage in {*config.stage_names, "joint"}]


@pytest.mark.parametrize("num_ranks", [1, 2, 8])
@pytest.mark.parametrize("json_path", JSONS, ids=lambda path: path.stem)
@pytest.mark.parametrize("yaml_path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_fits_every_json(yaml_path: Path, json_path: Path, num_ranks: int) -> None:
    config = load_config(yaml_path)
    for bf16, fp16 in ((False, False), (False, True), (True, True)):
        filled = fill_ds_config(
            load_ds_config(json_path), config.train, config.optim, num_ranks, bf16_supported=bf16, fp16_supported=fp16
        )
        assert filled["train_batch_size"] == (
            filled["train_micro_batch_size_per_gpu"] * filled["gradient_accumulation_steps"] * num_ranks
        )
        assert '"auto"' not in json.dumps(filled)
        assert not (filled["bf16"]["enabled"] and filled["fp16"]["enabled"])
    if num_ranks == 1:
        DeepSpeedConfig(filled)  # DeepSpeed's own validation; its batch arithmetic asks for the real number of ranks


@pytest.mark.parametrize("yaml_path", YAMLS, ids=lambda path: path.stem)
def test_every_yaml_builds_its_model_and_its_stages(yaml_path: Path, vocabs: Vocabs, tmp_path: Path) -> None:
    answers = tmp_path / "answers.json"
    answers.write_text('["yes", "no"]', encoding="utf-8")
    config = load_config(yaml_path, [f"vqa.answers={answers}"])
    for task in build_stages(config, vocabs):
        names = task.model.parameters_of(task.trained_parts())
        assert names and all(p.is_meta for p in task.model.parameters())


def test_published_size() -> None:
    """198,660,471 parameters tied, of which 86,051 rows; no phrase head there. Source: the published code, Model."""
    words = WordPiece()
    phrases = _Phrases(words, 86051 - 30522)
    config = model_config(Config(), Vocabs(words, phrases))
    assert config.num_rows == 86051 and config.num_words == 30522
    config.num_phrases = 0
    with torch.device("meta"):
        assert sum(p.numel() for p in Mvptr(config).parameters()) == 198_660_471
