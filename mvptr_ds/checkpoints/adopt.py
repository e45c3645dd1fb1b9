"""Fine-tuning takes sizes and vocabularies from the model that it starts from, whatever the configuration says of them.

What a user typed against that model is an error. All ranks call every function here together.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from mvptr_ds.checkpoints.checkpoint import newest_good
from mvptr_ds.checkpoints.hand_over import first_model, resumes
from mvptr_ds.config import Config, override_config
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import CheckpointError, StorageError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.user_io.atomic import replacing

logger = logging.getLogger(__name__)
WORDS, PHRASES = "data.word_vocab", "data.phrase_vocab"
VOCABULARIES = {WORDS: "vocab.txt", PHRASES: "phrase_vocab.json"}  # files of a model folder
FOLDER = "vocabularies"  # of a run: its copies, since the checkpoint that they come from may be removed
SIZES = (  # of the section `model`, named alike in the model's own configuration
    "hidden_size", "num_attention_heads", "intermediate_size", "num_text_layers", "num_visual_layers",
    "num_cross_layers", "max_positions", "tie_word_heads", "initializer_range",
)  # fmt: skip
BACKBONE = "visual.backbone"  # a model folder holds its weights, and knows its name
OWN_CHOICE = "model.initializer_range"  # of fresh weights: it need not be that of the start


def model_to_adopt(config: Config, follows: str | None) -> Path | None:
    """Returns the model folder that gives the first of `run.stages` its sizes, if that is a downstream task.

    It is the newest checkpoint of the stage itself, or else its start, which may be gone by the time there is one.

    Args:
        follows: see `hand_over.first_model`.

    Returns:
        None for a stage of pre-training, for fresh weights, and where there is no start, which `first_model` reports.
    """
    stage = config.stage_names[0]
    if config.finetuning(stage) is None:
        return None
    with suppress(CheckpointError, StorageError):
        if resumes(config, stage):
            newest = newest_good(Path(config.run.dir) / stage / "checkpoints")
            return None if newest is None else newest / "model"
        return first_model(config, follows, stage)
    return None


def adopt(config: Config, overrides: Sequence[str], source: Path) -> Config:
    """Returns the configuration with the sizes, the visual source and the vocabularies of a model folder.

    The log says which sizes differ.

    Args:
        overrides: what the user typed, as `section.key=value`; it is part of `config` already.

    Raises:
        CheckpointError: something typed contradicts the model folder, with both values of everything that does.
        DataError: a vocabulary that was typed cannot be read.
    """
    wanted = collectives.of_main(lambda: _settings_of(source))
    adopted = _with(config, wanted)
    typed = override_config(adopted, overrides)
    apart = (OWN_CHOICE, BACKBONE, *VOCABULARIES)
    contradictions = [
        f"{key}: {_value(adopted, key)!r} there, {_value(typed, key)!r} typed"
        for key in wanted
        if key not in apart and _value(typed, key) != _value(adopted, key)
    ]
    origin = _backbone_origin(source)
    if BACKBONE in wanted and typed.visual.backbone not in (None, origin):
        contradictions.append(f"{BACKBONE}: {origin!r} there, {typed.visual.backbone!r} typed")
    contradictions += collectives.of_main(lambda: _other_vocabularies(source, adopted, typed))
    if contradictions:
        raise CheckpointError(
            f"the model to fine-tune, {source}, has other sizes or vocabularies than were typed:\n  - "
            + "\n  - ".join(contradictions)
            + "\n  leave them out, name another start (run.init_from=...), or begin with fresh weights "
            "(run.init_from=null)"
        )
    taken = _with(config, {key: value for key, value in wanted.items() if key != OWN_CHOICE})
    taken = _with(taken, {OWN_CHOICE: _value(typed, OWN_CHOICE)})
    changes = [
        f"{key}={_value(taken, key)} (not {_value(config, key)})"
        for key in wanted
        if key not in VOCABULARIES and _value(taken, key) != _value(config, key)
    ]
    logger.info("sizes and vocabularies are those of %s: %s", source, ", ".join(changes) or "as configured")
    return taken


def keep_vocabularies(config: Config, source: Path) -> Config:
    """Copies the vocabularies of a model folder to `RUN/vocabularies`, and returns a configuration that names those."""
    folder = Path(config.run.dir) / FOLDER

    def copy() -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for name in VOCABULARIES.values():
            content = (source / name).read_bytes()
            if not (folder / name).exists() or (folder / name).read_bytes() != content:
                with replacing(folder / name) as partial:
                    partial.write_bytes(content)

    collectives.run_on_rank_zero(copy)
    return _with(config, {key: str(folder / name) for key, name in VOCABULARIES.items()})


def _settings_of(source: Path) -> dict[str, Any]:
    """What a model folder decides, by the keys of the configuration."""
    saved = MvptrConfig.from_pretrained(source)
    out: dict[str, Any] = {f"model.{name}": getattr(saved, name) for name in SIZES}
    if saved.region_norm:  # a task may add the norm, and cannot take it away
        out["model.region_norm"] = True
    out |= {"visual.source": saved.visual_source, "visual.grid_size": saved.grid_size}
    if saved.visual_source == "features":
        out["visual.feature_dim"] = saved.region_feature_dim
    else:
        out |= {f"visual.{name}": getattr(saved, name) for name in ("image_size", "roi_bins", "backbone_config")}
        out[BACKBONE] = None
    return out | {key: str(source / name) for key, name in VOCABULARIES.items()}


def _backbone_origin(source: Path) -> str | None:
    origin: str | None = collectives.of_main(lambda: MvptrConfig.from_pretrained(source).backbone_origin)
    return origin


def _other_vocabularies(source: Path, adopted: Config, typed: Config) -> list[str]:
    """What was typed of vocabularies that hold something else than those of the model folder."""
    words = WordPiece(adopted.data.word_vocab)
    asked = WordPiece(typed.data.word_vocab)
    if asked.fingerprint != words.fingerprint:
        return [f"{WORDS}: {adopted.data.word_vocab} there, {typed.data.word_vocab} typed, of other words"]
    if typed.data.phrase_vocab == adopted.data.phrase_vocab:
        return []
    there = PhraseVocab.load(source / VOCABULARIES[PHRASES], words)
    path = typed.data.phrase_vocab
    here = PhraseVocab.load(path, words) if path else PhraseVocab.empty(words)
    if here.fingerprint == there.fingerprint:
        return []
    return [f"{PHRASES}: {len(there)} phrases there, {len(here)} others typed ({path})"]


def _value(config: Config, key: str) -> Any:
    section, name = key.split(".")
    return getattr(getattr(config, section), name)


def _with(config: Config, values: Mapping[str, Any]) -> Config:
    for key, value in values.items():
        section, name = key.split(".")
        config = replace(config, **{section: replace(getattr(config, section), **{name: value})})
    return config
