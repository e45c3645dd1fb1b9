"""Sizes and vocabularies of the model that is fine-tuned, against what was typed; and what each stage starts from."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mvptr_ds.checkpoints.adopt import adopt, keep_vocabularies, model_to_adopt
from mvptr_ds.checkpoints.hand_over import stage_before
from mvptr_ds.checkpoints.model_folder import save_model_folder
from mvptr_ds.config import Config, load_config
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import CheckpointError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.tasks import TASKS

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat"]
CONVNEXT = {
    "model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "num_channels": 3,
}  # fmt: skip


def model_folder(path: Path, **changes: Any) -> Path:
    """A model of hidden size 8 with eight words and a phrase."""
    path.mkdir(parents=True)
    (path / "words.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    words = WordPiece(path / "words.txt")
    vocabs = Vocabs(words, PhraseVocab.build({("dog",): 3}, words, 1))
    sizes = {"num_words": len(words), "num_rows": vocabs.phrases.num_rows, "num_phrases": len(vocabs.phrases)}
    shape: dict[str, Any] = {"hidden_size": 8, "num_attention_heads": 2, "intermediate_size": 12, "max_positions": 48}
    shape |= {"num_text_layers": 1, "num_visual_layers": 2, "num_cross_layers": 3, "initializer_range": 0.19}
    model = Mvptr(MvptrConfig(**(sizes | shape | {"grid_size": 3, "region_feature_dim": 5} | changes)))
    save_model_folder(path / "model", model, model.state_dict(), vocabs, Config())
    return path / "model"


def taken(source: Path, *overrides: str) -> Config:
    arguments = ["run.stages=[entailment]", f"run.dir={source.parent / 'run'}", *overrides]
    return adopt(load_config("base", arguments), arguments, source)


def test_all_that_the_model_decides_is_taken(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "start")
    config = taken(source, "model.dropout=0.3", "visual.freeze_backbone=true", "data.max_regions=7")
    model = config.model
    assert (model.hidden_size, model.num_attention_heads, model.intermediate_size) == (8, 2, 12)
    assert (model.num_text_layers, model.num_visual_layers, model.num_cross_layers) == (1, 2, 3)
    assert model.max_positions == 48 and model.initializer_range == 0.19
    assert (config.visual.source, config.visual.feature_dim, config.visual.grid_size) == ("features", 5, 3)
    assert config.data.word_vocab == str(source / "vocab.txt")
    assert config.data.phrase_vocab == str(source / "phrase_vocab.json")
    # what it does not decide
    assert model.dropout == 0.3 and config.visual.freeze_backbone and config.data.max_regions == 7


def test_a_backbone_comes_as_its_structure(tmp_path: Path) -> None:
    source = model_folder(
        tmp_path / "start", visual_source="image", backbone_config=CONVNEXT, image_size=32, roi_bins=2
    )
    visual = taken(source, "visual.source=image").visual
    assert (visual.source, visual.image_size, visual.roi_bins, visual.backbone) == ("image", 32, 2, None)
    assert visual.backbone_config is not None and visual.backbone_config["hidden_sizes"] == [8, 16]
    with pytest.raises(CheckpointError, match=r"visual\.backbone: None there, 'microsoft/resnet-50' typed"):
        taken(source, "visual.backbone=microsoft/resnet-50")


def test_what_was_typed_against_it_is_told_with_both_values(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "start")
    other = tmp_path / "words.txt"
    other.write_text("\n".join([*WORDS, "bird"]) + "\n", encoding="utf-8")
    with pytest.raises(CheckpointError) as caught:
        taken(source, "model={hidden_size: 16, num_cross_layers: 3}", "visual.grid_size=4", f"data.word_vocab={other}")
    lines = str(caught.value).split("\n  ")
    assert lines[1:4] == [
        "- model.hidden_size: 8 there, 16 typed",
        "- visual.grid_size: 3 there, 4 typed",
        f"- data.word_vocab: {source / 'vocab.txt'} there, {other} typed, of other words",
    ]
    assert "run.init_from=null" in lines[4]
    with pytest.raises(CheckpointError, match=r"data\.phrase_vocab: 1 phrases there, 0 others typed \(None\)"):
        taken(source, "data.phrase_vocab=null")


def test_typing_the_same_is_no_contradiction(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "start")
    same = source.parent / "words.txt"  # of the same words, elsewhere
    config = taken(source, "model.hidden_size=8", f"data.word_vocab={same}", "model.initializer_range=0.5")
    assert config.data.word_vocab == str(source / "vocab.txt") and config.model.initializer_range == 0.5


def test_a_norm_of_regions_may_be_added_but_not_taken_away(tmp_path: Path) -> None:
    plain, normed = (model_folder(tmp_path / str(norm), region_norm=norm) for norm in (False, True))
    assert not taken(plain).model.region_norm and taken(plain, "model.region_norm=true").model.region_norm
    assert taken(normed).model.region_norm
    with pytest.raises(CheckpointError, match=r"model\.region_norm: True there, False typed"):
        taken(normed, "model.region_norm=false")


def test_the_run_keeps_the_vocabularies(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "start")
    config = keep_vocabularies(taken(source), source)
    folder = tmp_path / "start/run/vocabularies"
    assert config.data.word_vocab == str(folder / "vocab.txt")
    for name in ("vocab.txt", "phrase_vocab.json"):
        assert (folder / name).read_bytes() == (source / name).read_bytes()
    words = WordPiece(config.data.word_vocab)
    assert config.data.phrase_vocab is not None and len(PhraseVocab.load(config.data.phrase_vocab, words)) == 1


def test_pre_training_and_fresh_weights_adopt_nothing(tmp_path: Path) -> None:
    source = model_folder(tmp_path / "start")

    def asked(*overrides: str) -> Path | None:
        config = load_config("base", [f"run.dir={tmp_path / 'run'}", f"run.init_from={source}", *overrides])
        return model_to_adopt(config, TASKS[config.stage_names[0]].follows)

    assert asked("run.stages=[vqa]") == asked("run.stages=[retrieval, vqa]") == source
    assert asked("run.stages=[2]") is None and asked("run.stages=[1, 2, vqa]") is None
    assert asked("run.stages=[vqa]", "run.init_from=null") is None
    assert asked("run.stages=[vqa]", "run.init_from=auto") is None  # there is none: the hand-over says so


@pytest.mark.parametrize(
    ("stages", "before"),
    [
        ("[1, 2]", [None, "stage1"]),
        ("[1, 2, vqa]", [None, "stage1", "stage2"]),
        ("[joint, vqa]", [None, "joint"]),
        ("[retrieval, entailment]", [None, None]),
        ("[2, retrieval, vqa]", [None, "stage2", "stage2"]),
        ("[1, vqa]", [None, None]),  # stage 1 has no cross encoder
        ("[vqa, 2]", [None, None]),
    ],
)
def test_a_task_starts_from_the_stage_that_it_follows(stages: str, before: list[str | None]) -> None:
    config = load_config("base", [f"run.stages={stages}"])
    assert [stage_before(config, name, TASKS[name].follows) for name in config.stage_names] == before
