"""What preflight sees of records: shares, what cannot be used, objectives that have nothing to learn from."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest

from mvptr_ds.config import Config, load_config
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.schema import Caption, Extractor, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_writer import write_tar
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.objectives.table import OBJECTIVES
from mvptr_ds.preflight import checks, sample_checks, setting_checks
from mvptr_ds.preflight.rank_checks import Finding

FEATURE_DIM = 8
WORDS = WordPiece()
VOCABS = Vocabs(WORDS, PhraseVocab.build({("dog",): 9}, WORDS, 1))


def npy(num: int) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.zeros((num, FEATURE_DIM), dtype=np.float16))
    return buffer.getvalue()


def item(
    number: int, tag: str = "dog", phrase: str = "dog", features: bool = True
) -> tuple[str, Record, dict[str, bytes]]:
    phrases = (Phrase((phrase,), ((2, 5),)),) if phrase else ()
    regions = (Region((1.0, 1.0, 9.0, 9.0), tag),) * 2
    record = Record(str(number), 20, 20, (Caption(f"a dog number {number}", phrases),), regions)
    return f"{number:04d}", record, {"npy": npy(2)} if features else {}


def look(folder: Path, items: Sequence[tuple[str, Record, dict[str, bytes]]], *overrides: str) -> list[Finding]:
    write_shards(folder, items, 10)
    return look_at({"data.train": Index.open(folder)}, *overrides)


def look_at(indices: Mapping[str, Index], *overrides: str) -> list[Finding]:
    return list(sample_checks.examine(config_of(*overrides), VOCABS, indices))


def config_of(*overrides: str) -> Config:
    return load_config(None, [f"visual.feature_dim={FEATURE_DIM}", "run.stages=[1,2]", *overrides])


def not_well(findings: Sequence[Finding]) -> dict[str, str]:
    return {f.text: f.level for f in findings if f.level != "ok"}


def test_what_is_well(tmp_path: Path) -> None:
    (found,) = look(tmp_path, [item(number) for number in range(20)])
    assert found == Finding(
        "records",
        "ok",
        "data.train: 20 samples looked at: pictures 0 %, features 100 %, regions 100 %, tags 100 %, "
        "phrases of the vocabulary 100 %",
    )


@pytest.mark.parametrize(
    ("lacks", "lacking", "objectives"),
    [
        ({"tag": ""}, "tags", ["mcr_tags", "mcr_regions"]),
        ({"phrase": ""}, "phrases of the vocabulary", ["mcr_phrases", "wpg", "wpg_cross"]),
        ({"phrase": "zebra"}, "phrases of the vocabulary", ["mcr_phrases", "wpg", "wpg_cross"]),
    ],
)
def test_objectives_without_anything_to_learn_from(
    lacks: dict[str, str], lacking: str, objectives: list[str], tmp_path: Path
) -> None:
    found = look(tmp_path, [item(number, **lacks) for number in range(20)], "stage2.weights.itm=0")  # type: ignore[arg-type]
    assert f"{lacking} 0 %" in found[0].text
    warned = not_well(found)
    assert set(warned.values()) == {"warning"}
    keys = [f"{s}.weights.{name}" for s in ("stage1", "stage2") for name in objectives]
    config = config_of()
    wanted = [key for key in keys if getattr(config.stage(key.split(".")[0]).weights, key.split(".")[-1]) > 0]
    assert sorted(text.split(" is ")[0] for text in warned) == sorted(wanted)
    assert all(f"none of the training samples looked at has {lacking}" in text for text in warned)
    assert all(f"set {f.text.split(' is ')[0]}=0" in f.remedy for f in found[1:])
    assert not not_well(look_at({"data.train": Index.open(tmp_path)}, *(f"{key}=0" for key in wanted)))


def test_a_hundredth_is_something(tmp_path: Path) -> None:
    items = [
        item(number, tag="dog" if number == 57 else "", phrase="dog" if number == 3 else "") for number in range(100)
    ]
    (found,) = look(tmp_path, items)
    assert "tags 1 %, phrases of the vocabulary 1 %" in found.text


def test_samples_are_spread_over_a_large_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_checks, "NUM_LOOKED_AT", 20)
    items = [item(number, tag="dog" if number >= 90 else "") for number in range(100)]
    (found,) = look(tmp_path, items)
    assert "20 samples looked at" in found.text and "tags 10 %" in found.text
    assert look_at({"data.train": Index.open(tmp_path)}) == [found]


def test_masking_that_asks_for_nothing(tmp_path: Path) -> None:
    masks = [f"{stage}.masking.word_prob=0" for stage in ("stage1", "stage2")]
    warned = not_well(look(tmp_path, [item(0)], *masks, "data.tag_withhold_prob=1", "stage1.masking.phrase_prob=0"))
    texts = "\n".join(warned)
    assert "stage2.weights.mlm is 1.0, but stage2.masking.word_prob is 0" in texts
    assert "stage2.weights.mcr_tags is 1.0, but data.tag_withhold_prob is 1" in texts
    assert [text for text, level in warned.items() if level == "error"] == [
        "stage1 has nothing to learn: mcr_tags, mcr_regions, mcr_phrases, mlm lack what they need"
    ]


def test_features_that_are_missing_or_of_another_width(tmp_path: Path) -> None:
    items = [item(number, features=False) for number in range(20)]
    ((text, level),) = not_well(look(tmp_path / "a", items)).items()  # and not a word of the objectives
    assert level == "error" and "20 of 20 samples looked at cannot be used; the first: the record has no npy" in text
    half = [item(number, features=number % 2 == 0) for number in range(40)]
    assert list(not_well(look(tmp_path / "b", half)).values()) == ["error"]
    few = [item(number, features=number != 7) for number in range(40)]
    ((text, level),) = not_well(look(tmp_path / "c", few)).items()
    assert level == "warning" and "1 of 40 samples looked at cannot be used" in text
    ((text, level),) = not_well(look(tmp_path / "d", [item(0)], "visual.feature_dim=9")).items()
    assert level == "error" and "features have 8 numbers, visual.feature_dim is 9" in text


def test_held_out_records_are_an_error_only_of_a_run_that_evaluates(tmp_path: Path) -> None:
    write_shards(tmp_path / "train", [item(0)], 1)
    write_shards(tmp_path / "held_out", [item(0, tag="", features=False)], 1)
    indices = {"data.train": Index.open(tmp_path / "train"), "data.held_out": Index.open(tmp_path / "held_out")}
    assert list(not_well(look_at(indices)).values()) == ["warning"]
    assert list(not_well(look_at(indices, "train.evaluate_every_steps=5")).values()) == ["error"]


def test_a_held_out_sidecar_of_other_keys(tmp_path: Path) -> None:
    for split in ("train", "held_out"):
        write_shards(tmp_path / split, [item(0)], 1)
    write_tar(tmp_path / "shard-000000.tar", [("other", {"json": sidecar_json(Extractor("x", "1"), regions=())})])
    (tmp_path / "sidecar").mkdir()
    (tmp_path / "shard-000000.tar").rename(tmp_path / "sidecar/shard-000000.tar")
    build_index(tmp_path / "sidecar")
    folders = [f"data.{split}={tmp_path / split}" for split in ("train", "held_out")]
    given = [*folders, f"data.held_out_sidecars=[{tmp_path / 'sidecar'}]", f"run.dir={tmp_path / 'run'}"]
    for every, level in ((0, "warning"), (5, "error")):
        found = checks._shards(config_of(*given, f"train.evaluate_every_steps={every}"), {})
        ((text, found_level),) = not_well(found).items()
        assert found_level == level and "has a partner in the sidecar" in text


def test_what_objectives_need_is_what_is_looked_for() -> None:
    assert {kind for objective in OBJECTIVES.values() for kind in objective.needs} == set(sample_checks.REMEDIES)


def test_a_warm_up_or_a_trace_behind_the_end_of_a_stage_and_several_wrong_lists() -> None:
    overrides = ("stage1.max_steps=4", "stage1.warmup_steps=5", "stage2.max_steps=5", "stage2.warmup_steps=5")
    (well, warning) = setting_checks.examine(config_of(*overrides))
    assert (well.level, warning.level) == ("ok", "warning")
    assert warning.text == "stage1.warmup_steps is 5, but stage1.max_steps only 4"
    assert len(list(setting_checks.examine(config_of(*overrides, "run.stages=[2]")))) == 1
    traced = ("stage1.warmup_steps=0", "stage1.max_steps=4", "stage2.warmup_steps=0", "stage2.max_steps=5")
    found = list(setting_checks.examine(config_of(*traced, "train.profile_steps=[4,6]")))
    assert [(f.level, f.text) for f in found[1:]] == [
        ("warning", "train.profile_steps is [4, 6], but stage1.max_steps only 4")
    ]
    wrong = ("run.stages=[3]", "train.profile_steps=[1]")
    found = [f.text.partition(" is ")[0] for f in setting_checks.examine(config_of(*wrong))]
    assert found == ["train.profile_steps", "run.stages"]
