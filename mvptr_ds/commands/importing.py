"""A published checkpoint as a model folder: weights, vocabularies, and a configuration whose sizes fit."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.checkpoints.model_folder import save_model_folder
from mvptr_ds.config import Config, ModelConfig, RunConfig, override_config
from mvptr_ds.config_data import DataConfig, VisualConfig
from mvptr_ds.config_stages import ReferringConfig, VqaConfig
from mvptr_ds.corpus.phrases.id2phrase import read_id2phrase
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.exporting.exported_folder import make_new
from mvptr_ds.exporting.published_folder import ANSWERS, ID2PHRASE, read_published
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import config_from_reference, from_reference
from mvptr_ds.model.convert_finetuned import Finetuned, from_finetuned
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import HEAD
from mvptr_ds.tasks import TASKS
from mvptr_ds.tasks.vqa import load_answers
from mvptr_ds.user_io.atomic import replacing_folder

PRETRAINING = "pretraining"
_WORD_ROWS = "embeddings.word_embeddings.weight"
_SEED = 0  # of the weights that start fresh
_CUT_TAG_SLOTS = 20  # tag slots behind these go on into the cross encoder of the published models for VQA


@dataclass(frozen=True)
class Slots:
    """Sizes of a sample in a published script: tokens, text slots with phrases, tag slots, regions."""

    max_tokens: int
    max_text_slots: int
    max_tag_slots: int = 20
    max_regions: int = 50


_SLOTS = {
    PRETRAINING: Slots(33, 40),
    "retrieval": Slots(48, 55),
    "vqa": Slots(126, 133, max_tag_slots=30),
    "entailment": Slots(68, 75, max_regions=70),
    "referring": Slots(28, 35),
}


def import_published(
    folder: Path,
    task: str,
    out: Path,
    answers: Path | None = None,
    id2phrase: Path | None = None,
    overrides: Sequence[str] = (),
) -> list[str]:
    """Writes a model folder of a published checkpoint.

    Args:
        task: `pretraining` or the name of a downstream task.
        answers: of vqa; default: answers.json in `folder`.
        id2phrase: the phrase list; default: id2phrase.json in `folder`. Without one the rows of phrases are left out.
        overrides: `section.key=value` for the configuration in the folder.

    Returns:
        What was taken, left out and started fresh, a line each.

    Raises:
        DataError, ValueError: the checkpoint, a list or an override does not fit, or `out` holds something already.
    """
    state, config_json = read_published(folder)
    found = _translated(state, config_json, task)
    vocabs, report = _vocabs(folder, found, id2phrase)
    config = _config(found, vocabs, task, out.absolute())
    if task == "vqa":
        config = replace(config, vqa=replace(config.vqa, answers=_answers(folder, answers)))
    config = override_config(config, overrides)
    if config.referring.score == "product" and task == "referring":
        raise DataError("referring.score is 'product': published models score by cosine, dot or region")
    model, weights, fresh = _weights(found, vocabs)
    settings: Mapping[str, Any] = {}
    if task != PRETRAINING:
        module = TASKS[task].build(config, model, _SEED)
        settings = module.head_settings
        _check_head(found, {} if module.head is None else module.head.state_dict())
    make_new(out)
    with replacing_folder(out) as partial:
        if task == "vqa":
            names = load_answers(config.vqa.answers)
            (partial / ANSWERS).write_text(json.dumps(names) + "\n", encoding="utf-8")
            config = replace(config, vqa=replace(config.vqa, answers=str(out.absolute() / ANSWERS)))
        save_model_folder(partial, model, weights, vocabs, config, settings)
    of_head = f", {len(found.head)} of the head of {task}" if found.head else ""
    return [f"taken: {len(found.model)} tensors of the model{of_head}", *report, *_fresh_lines(fresh)]


def _translated(state: Mapping[str, Tensor], config_json: Mapping[str, Any], task: str) -> Finetuned:
    if task != PRETRAINING:
        return from_finetuned(state, config_json, task)
    config = config_from_reference(config_json, state)
    return Finetuned(config, from_reference(state, config), {}, [])


# --- vocabularies


def _vocabs(folder: Path, found: Finetuned, id2phrase: Path | None) -> tuple[Vocabs, list[str]]:
    """Returns the vocabularies of a checkpoint, and what is to be said of its phrases."""
    config, own = found.config, folder / "vocab.txt"
    words = WordPiece(own if own.is_file() else None)
    if len(words) != config.num_words:
        raise DataError(
            f"the checkpoint has {config.num_words} rows of words, but {words.source} has {len(words)}: put the "
            f"vocab.txt that it was trained with into {folder}"
        )
    if id2phrase is None and (folder / ID2PHRASE).is_file():
        id2phrase = folder / ID2PHRASE
    if id2phrase is None:
        num_lost = config.num_rows - config.num_words
        lost = [f"left out: {num_lost} rows of phrases; give --id2phrase to keep them"] if num_lost else []
        return Vocabs(words, PhraseVocab.empty(words)), lost
    phrases, _ = read_id2phrase(id2phrase, words)
    if phrases.num_rows != config.num_rows:
        raise DataError(
            f"{id2phrase} has rows up to {phrases.num_rows - 1}, but the checkpoint has {config.num_rows} rows: give "
            "the list that it was trained with"
        )
    return Vocabs(words, phrases), [f"phrases: {len(phrases)} of {id2phrase}"]


# --- weights


def _weights(found: Finetuned, vocabs: Vocabs) -> tuple[Mvptr, dict[str, Tensor], list[str]]:
    """Returns the model, all weights of its folder, and the names of those that start fresh."""
    phrases, taken = vocabs.phrases, dict(found.model)
    structure = MvptrConfig(**{**found.config.to_dict(), **_vocabulary_sizes(vocabs)})
    taken[_WORD_ROWS] = taken[_WORD_ROWS][: phrases.num_rows].clone()
    torch.manual_seed(_SEED)
    model = Mvptr(structure)
    if len(phrases):
        model.set_phrase_rows(torch.from_numpy(phrases.rows))
        taken["phrase_rows"] = model.phrase_rows.clone()
    fresh, _ = model.load_state_dict(taken, strict=False)  # both sides were compared when they were translated
    model.eval()
    head = {HEAD + name: tensor for name, tensor in found.head.items()}
    return model, {**model.state_dict(), **head}, list(fresh)


def _vocabulary_sizes(vocabs: Vocabs) -> dict[str, int]:
    words, phrases = vocabs.words, vocabs.phrases
    return {
        "num_rows": phrases.num_rows,
        "num_phrases": len(phrases),
        "cls_token_id": words.cls_id,
        "sep_token_id": words.sep_id,
    }


def _answers(folder: Path, given: Path | None) -> str:
    """Returns the path of the list of answers. Raises DataError where there is none."""
    path = given or folder / ANSWERS
    if not path.is_file():
        raise DataError(
            f"a model of vqa needs the list of its answers, and there is no {path}: give --answers FILE, which "
            "build_answers.py --from-pickle makes of the published pickle"
        )
    return str(path)


def _check_head(found: Finetuned, own: Mapping[str, Tensor]) -> None:
    """Raises DataError where the task's head, if it has one, could not take the checkpoint's."""
    wrong = [
        f"{name} has shape {tuple(found.head[name].shape)} there, {tuple(tensor.shape)} here"
        for name, tensor in own.items()
        if found.head[name].shape != tensor.shape
    ]
    if wrong:
        raise DataError(f"the head does not fit: {'; '.join(wrong)}; vqa.answers must list an answer for each row")


def _fresh_lines(names: Sequence[str]) -> list[str]:
    return [f"fresh: {', '.join(of_part)}" for _, of_part in groupby(names, lambda name: name.split(".")[0])]


# --- configuration


def _config(found: Finetuned, vocabs: Vocabs, task: str, out: Path) -> Config:
    """Returns the configuration of the published script, as far as evaluation and further training need it."""
    structure, slots = found.config, _SLOTS[task]
    most = structure.max_positions
    is_bert = vocabs.words.fingerprint == WordPiece().fingerprint
    data = DataConfig(
        train=None,
        held_out=None,
        word_vocab=None if is_bert else str(out / "vocab.txt"),
        phrase_vocab=str(out / "phrase_vocab.json") if len(vocabs.phrases) else None,
        max_tokens=min(slots.max_tokens, most - 2),
        max_text_slots=min(slots.max_text_slots, most),
        max_tag_slots=min(slots.max_tag_slots, most),
        max_regions=slots.max_regions,
    )
    return Config(
        run=RunConfig(stages=["2" if task == PRETRAINING else task]),
        data=data,
        visual=VisualConfig(source="features", feature_dim=structure.region_feature_dim),
        model=_model_section(structure),
        vqa=VqaConfig(
            head="words" if "decoder" in found.head else "linear",
            tags_in_text=True,
            crossing_tags_from=_CUT_TAG_SLOTS,
        ),
        referring=ReferringConfig(score="cosine", cross_layers=max(1, structure.num_cross_layers // 2)),
    )


def _model_section(structure: MvptrConfig) -> ModelConfig:
    return ModelConfig(
        hidden_size=structure.hidden_size,
        num_attention_heads=structure.num_attention_heads,
        intermediate_size=structure.intermediate_size,
        num_text_layers=structure.num_text_layers,
        num_visual_layers=structure.num_visual_layers,
        num_cross_layers=structure.num_cross_layers,
        max_positions=structure.max_positions,
        dropout=structure.hidden_dropout,
        attention_dropout=structure.attention_dropout,
        initializer_range=structure.initializer_range,
        tie_word_heads=structure.tie_word_heads,
        region_norm=structure.region_norm,
    )
