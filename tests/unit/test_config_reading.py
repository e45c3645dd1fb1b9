"""Values as they are written, keys that come twice, ranges of all numbers, names that were meant, files that extend."""

from __future__ import annotations

import argparse
import dataclasses
import json
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from mvptr_ds.config import Config, load_config, override_config, save_config
from mvptr_ds.config_data import SourceConfig
from mvptr_ds.config_reading import range_of
from mvptr_ds.data.shards.other_pictures import Mode
from mvptr_ds.data.shards.sidecar_join import DROP, KEEP
from mvptr_ds.demo.build import SOURCES
from mvptr_ds.demo.tasks import Task as DemoTask
from mvptr_ds.ds_config import load_ds_config
from mvptr_ds.model.config import VISUAL_SOURCES
from mvptr_ds.model.encoder import Execution
from mvptr_ds.objectives.candidates import SCOPES
from mvptr_ds.objectives.hard_negatives import MODES
from mvptr_ds.user_io.user_files import parse_json, user_path
from mvptr_ds.user_io.yaml_nodes import dump_yaml, number_of, parse_yaml, plain
from tests.conftest import REPO


def write(folder: Path, name: str, text: str | bytes) -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode() if isinstance(text, str) else text)
    return path


def message_of(*overrides: str, path: Path | str | None = None) -> str:
    with pytest.raises(ValueError) as error:
        load_config(path, overrides)
    return str(error.value)


# each is a number, a date, a boolean or a comment to PyYAML
TEXTS = (
    "1.10", "0123", "12:30:45", "2024_01", "2026_11_29", "0x10", "1e3", "yes", "No", "on", "off", "true", "2026-11-29",
    ".inf", "1_000", "+5", "007", "=", "1:30",
)  # fmt: skip


@pytest.mark.parametrize("text", TEXTS)
def test_text_stays_as_it_is_written(text: str, tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "a.yaml",
        f"wandb: {{name: {text}}}\nrun:\n  dir: {text}\ndata: {{sidecars: [{text}], held_out_sidecars: {text}}}\n",
    )
    overrides = [f"wandb.name={text}", f"run.dir={text}", f"data.sidecars=[{text}]", f"data.held_out_sidecars={text}"]
    for config in (load_config(None, overrides), load_config(path)):
        assert (config.wandb.name, config.run.dir) == (text, text)
        assert (config.data.sidecars, config.data.held_out_sidecars) == ([text], [text])
        save_config(config, tmp_path / "saved.yaml")
        assert load_config(tmp_path / "saved.yaml") == config


def test_files_of_runs_that_are_under_way_are_read_as_they_were_written(tmp_path: Path) -> None:
    """By PyYAML, which quotes what it would read as something else, and nothing besides."""
    config = load_config("demo", [f"data.sidecars=[{', '.join(TEXTS)}]", "wandb.name='null'", "run.init_from=1e-4"])
    text = yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)
    assert load_config(write(tmp_path, "config.yaml", text)) == config


@pytest.mark.parametrize("text", ["run #3", "a: b", "- a", "&x", "*x", "!x", "%x", "@x", " two  blanks ", "a\tb", "#1"])
def test_an_argument_is_no_yaml_where_it_is_text(text: str) -> None:
    assert load_config(None, [f"wandb.name={text}"]).wandb.name == text


@pytest.mark.parametrize(
    ("text", "value"), [("null", None), ("~", None), ("", None), ("'null'", "null"), ("'a #b'", "a #b")]
)
def test_null_and_quotes(text: str, value: str | None, tmp_path: Path) -> None:
    assert load_config(None, [f"wandb.name={text}"]).wandb.name == value
    assert load_config(write(tmp_path, "a.yaml", f"wandb:\n  name: {text}\n")).wandb.name == value
    if value is None:
        assert message_of(f"run.dir={text}") == "run.dir is None, expected str"


def test_numbers_mean_what_they_look_like() -> None:
    numbers = {"0100": 100, "1_000": 1000, "-07": -7, "1e-4": 1e-4, "1E3": 1e3, ".5": 0.5, "2.": 2.0, " 5 ": 5}
    assert {text: number_of(text) for text in numbers} == numbers
    others = (
        "1:30",
        "0x10",
        "0o7",
        "1__0",
        "_1",
        "1_",
        "nan",
        ".inf",
        "1e400",
        "9" * 400,
        "1,5",
        "١٢",
        "",
        "1 2",
        "e5",
    )
    assert [text for text in others if number_of(text) is not None] == []
    big = 2**53 - 1  # which a float of 7 digits would round
    assert load_config(None, [f"run.seed={big}"]).run.seed == big
    assert message_of("train.batch_size=1:30") == "train.batch_size is '1:30', expected int"
    assert message_of("stage1.learning_rate=.inf") == "stage1.learning_rate is '.inf', expected float"


def test_values_that_nothing_declares(tmp_path: Path) -> None:
    """Those of the backbone: null, booleans, numbers, else text; quotes make text of all."""
    text = "{a: 1e-6, b: '1e-6', c: 010, d: 2020-01-01, e: [true, no], f: {g: null}, h: 'yes', i: '010', j: '12:30'}"
    expected = {
        "a": 1e-6, "b": "1e-6", "c": 10, "d": "2020-01-01", "e": [True, False], "f": {"g": None}, "h": "yes",
        "i": "010", "j": "12:30",
    }  # fmt: skip
    config = load_config(None, [f"visual.backbone_config={text}"])
    assert config.visual.backbone_config == expected
    save_config(config, tmp_path / "saved.yaml")
    assert load_config(tmp_path / "saved.yaml") == config
    assert plain(parse_yaml(dump_yaml(expected), "x")) == expected


def test_anchors_and_merge_keys_still_work(tmp_path: Path) -> None:
    path = write(
        tmp_path, "a.yaml", "stage1: &s {max_steps: 010, warmup_steps: 1}\nstage2:\n  <<: *s\n  max_steps: 9\n"
    )
    config = load_config(path)
    assert (config.stage1.max_steps, config.stage2.max_steps, config.stage2.warmup_steps) == (10, 9, 1)
    assert "unknown configuration key 'a'" in message_of(path=write(tmp_path, "b.yaml", "a: &a [*a]\n"))
    assert "has the tag" in message_of(path=write(tmp_path, "c.yaml", "run: !!python/tuple [1]\n"))


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("data: {}\ntrain: {}\ndata: {}\n", ["a.yaml: data is given twice, in lines 1 and 3"]),
        ("train:\n  batch_size: 64\n  batch_size: 8\n", ["train.batch_size is given twice, in lines 2 and 3"]),
        ("data:\n  sources:\n    a: {shards: x}\n    a: {shards: y}\n", ["data.sources.a is given twice"]),
        ("visual: {backbone_config: {x: {y: 1, 'y': 1}}}", ["visual.backbone_config.x.y is given twice, in line 1"]),
        ("run: {dir: a}\nrun: {dir: b}\nrun: {}\ntrain: {a: 1, a: 1}", ["run is given 3 times", "train.a is"]),
        ("stage1: &s {max_steps: 1, max_steps: 2}\nstage2: {<<: *s}\n", ["stage1.max_steps is given twice, in line 1"]),
        ("stage2: {<<: {max_steps: 1, max_steps: 2}}\n", ["stage2.max_steps is given twice, in line 1"]),
    ],
)  # fmt: skip
def test_a_key_that_comes_twice_in_yaml(text: str, parts: list[str], tmp_path: Path) -> None:
    found = message_of(path=write(tmp_path, "a.yaml", text))
    assert [part for part in parts if part not in found] == [], found


def test_a_key_that_comes_twice_in_an_argument() -> None:
    assert "batch_size is given twice" in message_of("train={batch_size: 1, batch_size: 2}")


@pytest.mark.parametrize(
    ("text", "twice"),
    [
        ('{"a": {"stage": 2},\n "b": 1,\n "a": {"stage": 1}}', "a is given twice, in lines 1 and 3: keep one"),
        ('{"a": {"b": [0, {"c": 1,\n"\\u0063": 2}]}}', "a.b.c is given twice, in lines 1 and 2: keep one"),
        ('{"a": "}{:,\\"", "b": ["a", "a"], "c": {"a": "b"}, "b": 1}', "b is given twice, in line 1: keep one"),
    ],
)
def test_a_key_that_comes_twice_in_the_deepspeed_json(text: str, twice: str, tmp_path: Path) -> None:
    path = write(tmp_path, "ds.json", text)
    with pytest.raises(ValueError) as error:
        load_ds_config(path)
    assert str(error.value) == f"{path}: {twice}"


def test_json_that_is_sound_is_read_as_before(tmp_path: Path) -> None:
    content = {
        "bf16": {"enabled": "auto"},
        "fp16": {"enabled": "auto"},
        "x": [{"a": "\n}"}, {"a": 1.5}],
        "": {"": None},
    }
    assert parse_json(json.dumps(content, indent=1), "x") == content
    for wrong in ('{"gradient_clipping": NaN}', '{"a": 1', "[" * 100_000):
        with pytest.raises(ValueError, match="is not JSON"):
            load_ds_config(write(tmp_path, "ds.json", wrong))
    with pytest.raises(ValueError, match=r"ds\.json is not UTF-8"):
        load_ds_config(write(tmp_path, "ds.json", '{"ä": 1}'.encode("latin-1")))


def numeric_hints(cls: type, prefix: str = "") -> Iterator[tuple[str, typing.Any]]:
    for key, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from numeric_hints(typing.cast(type, hint), f"{prefix}{key}.")
        elif "int" in str(hint) or "float" in str(hint):
            yield f"{prefix}{key}", hint


def test_every_number_has_a_range_and_its_default_lies_in_it() -> None:
    found = [*numeric_hints(Config), *numeric_hints(SourceConfig)]
    assert len(found) > 90
    assert [name for name, hint in found if range_of(hint) is None] == []
    load_config(None)  # which looks at the defaults


@pytest.mark.parametrize(
    ("override", "must_be"),
    [
        ("run.seed=-1", "-1, must be at least 0 and at most 9007199254740992"),
        ("data.num_workers=-1", "-1, must be at least 0"),
        ("data.block_samples=0", "0, must be at least 1"),
        ("data.read_timeout_s=0", "0.0, must be above 0"),
        ("data.max_bad_fraction=1.01", "1.01, must be at least 0 and at most 1"),
        ("data.max_text_slots=2", "2, must be at least 3"),
        ("stage1.learning_rate=-1", "-1.0, must be at least 0"),
        ("stage2.masking.word_prob=1.5", "1.5, must be at least 0 and at most 1"),
        ("joint.weights.itm=-1", "-1.0, must be at least 0"),
        ("optim.beta2=1", "1.0, must be at least 0 and below 1"),
        ("optim.eps=0", "0.0, must be above 0"),
        ("model.dropout=1", "1.0, must be at least 0 and below 1"),
        ("train.profile_steps=[3, -1]", "-1, must be at least 0"),
        ("data.sources.coco={shards: a, weight: 0}", "0.0, must be above 0"),
    ],
)
def test_numbers_out_of_range(override: str, must_be: str) -> None:
    name = "data.sources.coco.weight" if "coco" in override else override.partition("=")[0]
    assert message_of(override) == f"{name} is {must_be}"


def test_everything_that_is_wrong_is_said_at_once(tmp_path: Path) -> None:
    base = write(tmp_path, "base.yaml", "trian: {}\n")
    path = write(
        tmp_path, "mine.yaml", "extends: base.yaml\ntrain:\n  batch_size: many\n  epochs: 3\noptim: {eps: -1}\n"
    )
    found = message_of("data.batch_size=1", "nope", "run.stages=[", "run.seed=-1", path=path)
    lines = found.splitlines()
    assert lines[0] == "the configuration has 8 errors:"
    assert lines[1].startswith(f"  - {base}, line 1: unknown configuration key 'trian'; did you mean train")
    assert lines[2] == f"  - {path}, line 3: train.batch_size is 'many', expected int"
    assert lines[3].startswith(f"  - {path}, line 4: unknown configuration key 'train.epochs'")
    for part in (
        "'data.batch_size'",
        "argument 'nope'",
        "run.stages=[ is not YAML",
        "run.seed is -1",
        "optim.eps is -1.0",
    ):
        assert part in found


@pytest.mark.parametrize(
    ("override", "meant"),
    [
        ("data.batch_size=8", "train.batch_size, eval.batch_size"),
        ("batch_size=8", "train.batch_size, eval.batch_size"),
        ("data.batchsize=8", "train.batch_size, eval.batch_size"),
        ("optim.learning_rate=1", "stage1.learning_rate, stage2.learning_rate, joint.learning_rate"),
        ("stage2.mlm=1", "stage2.weights.mlm, stage1.weights.mlm, joint.weights.mlm"),
        ("train.num_workers=1", "data.num_workers"),
        ("data.shards=x", "data.sources.NAME.shards"),
        ("data.sources.coco.wieght=1", "data.sources.coco.weight"),
        ("train.batchsize=8", "train.batch_size, train.round_batch_size"),
    ],
)
def test_wrong_keys_are_looked_for_in_all_sections(override: str, meant: str) -> None:
    assert message_of(override).endswith(f"; did you mean {meant}?")


def test_a_key_with_a_dot_in_a_file(tmp_path: Path) -> None:
    assert "train: {batch_size: ...}" in message_of(path=write(tmp_path, "a.yaml", "train.batch_size: 3\n"))


def test_a_tilde_is_a_home_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path, "mine.yaml", "extends: ~/other.yaml\ndata: {train: ~/shards, sidecars: [~/a, b~, memory://~]}\n")
    write(tmp_path, "other.yaml", "run: {dir: ~/run}\nwandb: {name: ~x}\n")
    write(tmp_path, "ds.json", "{}")
    config = load_config("~/mine.yaml", ["data.cache_dir=~", "data.sources.a.shards=~/c", "visual.backbone=~/d"])
    assert (config.run.dir, config.data.train) == (f"{tmp_path}/run", f"{tmp_path}/shards")
    assert config.data.sidecars == [f"{tmp_path}/a", "b~", "memory://~"] and config.data.cache_dir is None
    assert (config.data.sources["a"].shards, config.visual.backbone) == (f"{tmp_path}/c", f"{tmp_path}/d")
    assert config.wandb.name == "~x"  # no path
    assert load_ds_config("~/ds.json") == {}
    assert "run.dir: ~nobody-here/x begins with the home folder of a user who" in message_of("run.dir=~nobody-here/x")


def test_no_tool_takes_a_path_without_its_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert [str(user_path(text)) for text in ("~/a", "~", "b~/c")] == [f"{tmp_path}/a", str(tmp_path), "b~/c"]
    with pytest.raises(argparse.ArgumentTypeError, match="of a user who does not exist"):
        user_path("~nobody-here/a")
    tools = [*(REPO / "tools").rglob("*.py"), *(REPO / "mvptr_ds/commands").glob("*.py"), REPO / "mvptr_ds/eval.py"]
    assert [path.name for path in tools if "type=Path" in path.read_text(encoding="utf-8")] == []


def test_extends_counts_from_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "c/common.yaml", "extends: base\ntrain: {batch_size: 77}\n")
    write(tmp_path, "common.yaml", "train: {batch_size: 1}\n")
    child = write(tmp_path, "c/child.yaml", "extends: common.yaml\n")
    monkeypatch.chdir(tmp_path)
    assert load_config(child).train.batch_size == load_config("c/child.yaml").train.batch_size == 77
    (tmp_path / "c/common.yaml").unlink()
    assert load_config(child).train.batch_size == 1  # then from the working folder
    # a name that a packaged one has, too
    assert load_config(write(tmp_path, "c/base.yaml", "extends: base.yaml\n")).data.num_workers == 6
    write(tmp_path, "demo", "train: {batch_size: 5}\n")
    assert load_config("demo_stamps").train.batch_size == 64  # packaged ones extend packaged ones


def test_what_cannot_be_extended(tmp_path: Path) -> None:
    several = message_of(path=write(tmp_path, "a.yaml", "extends: [base, large]\n"))
    assert several.endswith("extends is ['base', 'large'], expected one file or the name of a packaged configuration")
    assert "a.yaml extends 'nowhere', but there is no config" in message_of(
        path=write(tmp_path, "a.yaml", "extends: nowhere\n")
    )
    write(tmp_path, "b.yaml", "extends: a.yaml\n")
    assert "extends itself" in message_of(path=write(tmp_path, "a.yaml", "extends: b.yaml\n"))


def test_files_that_cannot_be_read_are_named(tmp_path: Path) -> None:
    path = write(tmp_path, "a.yaml", "run: {dir: ä}\n".encode("utf-16"))
    assert message_of(path=path) == f"{path} is not UTF-8 (byte 0 is 0xff): save it as UTF-8"
    assert message_of(path=tmp_path) == f"{tmp_path} is a folder, expected a YAML file"
    assert "is not YAML" in message_of(path=write(tmp_path, "a.yaml", "run: {dir: " + "[" * 5_000))
    assert load_config(write(tmp_path, "a.yaml", "\ufeffrun: {seed: 3}\n")).run.seed == 3


def choices(cls: type, prefix: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each key with one choice, and what it may be besides null."""
    for key, hint in typing.get_type_hints(cls).items():
        kinds = [hint, *(typing.get_args(hint) if typing.get_origin(hint) is not list else ())]
        found = [typing.get_args(kind) for kind in kinds if typing.get_origin(kind) is typing.Literal]
        if found:
            yield f"{prefix}{key}", found[0]
        elif dataclasses.is_dataclass(hint):
            yield from choices(typing.cast(type, hint), f"{prefix}{key}.")


CHOICES = dict(choices(Config))


def test_the_choices_are_those_that_the_code_knows() -> None:
    assert {
        "data.missing_partners": (DROP, KEEP),
        "data.demo_source": SOURCES,
        "data.demo_task": typing.get_args(DemoTask),
        "referring.score": ("product", "cosine", "dot", "region"),
        "vqa.head": ("words", "linear"),
        "data.permute_pictures": typing.get_args(Mode),
        "visual.source": VISUAL_SOURCES,
        "model.execution": typing.get_args(Execution),
        "task.vsc.scope": SCOPES,
        "task.wpg.states": ("uni", "cross", "auto"),
        "task.wpg.negatives": (*MODES, "auto"),
        "task.wpg.scope": SCOPES,
        "task.itm.negatives": (*MODES, "schedule", "auto"),
        "task.itm.scope": SCOPES,
        "optim.name": ("adamw", "lamb"),
        "train.resume": ("auto", "never"),
        "wandb.mode": ("online", "offline", "disabled"),
    } == CHOICES


@pytest.mark.parametrize("name", CHOICES)
def test_an_unknown_choice_is_refused_with_all_that_there_are(name: str, tmp_path: Path) -> None:
    known = ", ".join(CHOICES[name])
    assert message_of(f"{name}=zzz") == f"{name} is 'zzz'; choose from {known}"
    assert message_of(f"{name}=[{CHOICES[name][0]}]") == f"{name} is ['{CHOICES[name][0]}']; choose from {known}"
    sections, key = name.split(".")[:-1], name.split(".")[-1]
    text = "".join(f"{section}: {{" for section in sections) + f"{key}: zzz" + "}" * len(sections)
    path = write(tmp_path, "mine.yaml", text + "\n")
    assert message_of(path=path) == f"{path}, line 1: {name} is 'zzz'; choose from {known}"
    for choice in CHOICES[name]:
        config = load_config(None, [f"{name}={choice}"])
        for part in name.split("."):
            config = getattr(config, part)
        assert config == choice  # type: ignore[comparison-overlap]  # a leaf of the tree by now


@pytest.mark.parametrize(
    ("override", "meant"),
    [("optim.name=Adam", "adamw"), ("wandb.mode=off", "offline"), ("task.itm.negatives=hard", "hardest")],
)
def test_the_nearest_choice_is_named(override: str, meant: str) -> None:
    found = message_of(override)
    assert f"is '{override.partition('=')[2]}'; choose from" in found and found.endswith(f"; did you mean {meant}?")


def test_keys_of_the_demo_and_of_controls_may_have_no_choice() -> None:
    assert load_config("demo", ["data.demo_source=null"]).data.demo_source is None
    assert load_config("demo", ["data.demo_task=null"]).data.demo_task is None
    assert load_config("demo", ["data.permute_pictures=null"]).data.permute_pictures is None
    assert message_of("train.resume=null") == "train.resume is None; choose from auto, never"


def test_unknown_choices_are_told_with_all_else_that_is_wrong() -> None:
    found = message_of("train.resume=always", "optim.name=sgd", "data.num_workers=-1", "train.batch=8")
    assert found.startswith("the configuration has 4 errors:")
    for part in ("train.resume is 'always'; choose from auto, never", "optim.name is 'sgd'", "num_workers is -1"):
        assert part in found


def test_an_override_makes_another_configuration() -> None:
    config = load_config("demo", ["data.sources.a.shards=x"])
    before = dataclasses.asdict(config)
    overrides = ["train.batch_size=3", "data.sources.a.weight=2", "data.sources.b.shards=y", "stage2.weights.vsc=9"]
    other = override_config(config, overrides)
    assert dataclasses.asdict(config) == before
    assert (other.train.batch_size, other.stage2.weights.vsc) == (3, 9.0)
    assert other.data.sources == {"a": SourceConfig("x", 2.0), "b": SourceConfig("y")}
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.data.sources["a"].weight = 1.0  # type: ignore[misc]
