"""A trained model as a folder that needs nothing else: weights, vocabularies, configuration. Holds no pickle.

config.json  model.safetensors  vocab.txt  phrase_vocab.json  mvptr.yaml  [task.json: of a task  head.safetensors]
"""

from __future__ import annotations

import copy
import json
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from mvptr_ds.config import Config, load_config, save_config
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import CheckpointError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import HEAD, TaskModule

WEIGHTS, HEAD_WEIGHTS, HEAD_SETTINGS = "model.safetensors", "head.safetensors", "task.json"
STRUCTURE = (  # what two models must share for the weights of one to mean the same in the other
    "num_words", "num_rows", "num_phrases", "hidden_size", "num_attention_heads", "intermediate_size",
    "num_text_layers", "num_visual_layers", "num_cross_layers", "max_positions", "type_vocab_size", "layer_norm_eps",
    "visual_source", "region_feature_dim", "roi_bins", "tie_word_heads",
    "data_schema",
)  # fmt: skip


def save_model_folder(
    path: Path,
    model: Mvptr,
    weights: Mapping[str, torch.Tensor],
    vocabs: Vocabs,
    config: Config,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Writes the folder: the structure of `model`, and these weights; those behind `head.` have a file of their own.

    Args:
        settings: of the head (`TaskModule.head_settings`), which tell the task also where it has no weights of its own.
    """
    path.mkdir(parents=True, exist_ok=True)
    structure = copy.deepcopy(model.config)
    structure.architectures, structure.dtype = [type(model).__name__], "float32"
    structure.save_pretrained(path)
    head = {name.removeprefix(HEAD): tensor for name, tensor in weights.items() if name.startswith(HEAD)}
    of_model = {name: tensor for name, tensor in weights.items() if not name.startswith(HEAD)}
    save_file(of_model, path / WEIGHTS, metadata={"format": "pt"})
    if head:
        save_file(head, path / HEAD_WEIGHTS, metadata={"format": "pt"})
    if head or settings:  # a task without weights of its own has settings as well
        (path / HEAD_SETTINGS).write_text(json.dumps(settings or {}) + "\n", encoding="utf-8")
    (path / "vocab.txt").write_text("\n".join(vocabs.words.tokens) + "\n", encoding="utf-8")
    vocabs.phrases.save(path / "phrase_vocab.json")
    save_config(config, path / "mvptr.yaml")


def load_model_folder(path: Path) -> tuple[Mvptr, Vocabs, Config]:
    """Returns the model (float32, eval mode), its vocabularies and the configuration of the run that trained it."""
    words = WordPiece(path / "vocab.txt")
    vocabs = Vocabs(words, PhraseVocab.load(path / "phrase_vocab.json", words))
    model = Mvptr.from_pretrained(path, dtype=torch.float32)
    model.eval()
    return model, vocabs, load_config(path / "mvptr.yaml")


def init_from_folder(module: TaskModule, vocabs: Vocabs, path: Path, fresh: Sequence[str] = ()) -> list[str]:
    """Gives a task's model and head the weights of a model folder: the hand-over from stage to stage.

    Args:
        fresh: prefixes of the names of weights that the folder may lack; those keep their fresh values.

    Returns:
        The names of the weights that stayed fresh.

    Raises:
        CheckpointError: as `check_fits`.
    """
    check_fits(module.model, vocabs, path, fresh)
    saved = load_file(path / WEIGHTS)
    missing, _ = module.model.load_state_dict(saved, strict=False)  # what may be missing was checked
    if module.head is None:
        return list(missing)
    saved_head = _read_head(module, path)
    own = module.head.state_dict()
    fitting = {name: t for name, t in saved_head.items() if name in own and t.shape == own[name].shape}
    head_missing, _ = module.head.load_state_dict(fitting, strict=False)
    problems = [HEAD + name for name in head_missing if not (HEAD + name).startswith(tuple(fresh))]
    if problems:
        raise CheckpointError(_does_not_fit(path, [f"{len(problems)} weights only here, the first {problems[0]}"]))
    return [*missing, *(HEAD + name for name in head_missing)]


def check_fits(model: Mvptr, vocabs: Vocabs, path: Path, fresh: Sequence[str] = ()) -> None:
    """Checks that `model`, of which only shapes are looked at, could take the weights of a model folder.

    Args:
        fresh: see `init_from_folder`.

    Raises:
        CheckpointError: dimensions, vocabularies or schema differ, listing all that do with both values.
    """
    problems = differences(model, vocabs, path, fresh)
    if problems:
        raise CheckpointError(_does_not_fit(path, problems))


def _does_not_fit(path: Path, problems: Sequence[str]) -> str:
    return (
        f"run.init_from: {path} does not fit this configuration:\n  - "
        + "\n  - ".join(problems)
        + "\n  use the configuration of that run (its mvptr.yaml), or start fresh without run.init_from"
    )


def load_weights(module: TaskModule, path: Path) -> None:
    """Gives a task's model and head the weights of a model folder of the same task."""
    module.model.load_state_dict(load_file(path / WEIGHTS))
    load_head(module, path)


def load_head(module: TaskModule, path: Path) -> None:
    """Gives the head of a task's module, if there is one, its weights of a model folder of the same task.

    Raises:
        CheckpointError: the folder holds another head, or none.
    """
    if module.head is not None:
        saved, own = _read_head(module, path), module.head.state_dict()
        if saved.keys() != own.keys():
            raise CheckpointError(
                f"{path} holds the own weights {', '.join(saved) or 'of none'}, and this configuration asks for "
                f"{', '.join(own)}: resume it with the objectives it had, or start elsewhere with run.init_from={path}"
            )
        module.head.load_state_dict(saved)


def head_settings(path: Path) -> dict[str, Any]:
    """Returns the settings of a model folder's task (`TaskModule.head_settings`); of a pre-trained model none."""
    file = path / HEAD_SETTINGS
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.exists() else {}


def _read_head(module: TaskModule, path: Path) -> dict[str, torch.Tensor]:
    """Returns the weights of the folder's head if it is of the same task, else none.

    Raises:
        CheckpointError: it was trained with other settings, which gave its rows another meaning.
    """
    there, here = head_settings(path), json.loads(json.dumps(module.head_settings))
    if not (path / HEAD_WEIGHTS).exists() or there.get("task") != here.get("task"):
        return {}
    names = [name for name in {**there, **here} if there.get(name) != here.get(name)]
    if names:
        changes = "\n  - ".join(
            f"{name}: {there.get(name)!s:.100} there, {here.get(name)!s:.100} here" for name in names
        )
        raise CheckpointError(
            f"the head of {path} was trained with other settings:\n  - {changes}\n  set them as they are in "
            f"{path / HEAD_SETTINGS}, or start from a model without this head"
        )
    return load_file(path / HEAD_WEIGHTS)


def copy_of(model: Mvptr, weights: Mapping[str, torch.Tensor], device: torch.device) -> Mvptr:
    """Returns another model of this structure with these weights, in eval mode; no random number is drawn."""
    with torch.random.fork_rng(devices=[]):  # fresh weights are made on the host
        copied = Mvptr(typing.cast(MvptrConfig, model.config))
    copied.load_state_dict({name: tensor for name, tensor in weights.items() if not name.startswith(HEAD)})
    copied.to(device)  # type: ignore[arg-type]  # see eval.py
    copied.eval()
    return copied


def differences(model: Mvptr, vocabs: Vocabs, path: Path, fresh: Sequence[str] = ()) -> list[str]:
    """Returns why the weights of a model folder would not fit `model`, each with both values; empty where they do.

    Args:
        fresh: prefixes of the names of weights that the folder may lack.
    """
    saved, current = MvptrConfig.from_pretrained(path), model.config
    words = WordPiece(path / "vocab.txt")
    saved_phrases = PhraseVocab.load(path / "phrase_vocab.json", words)
    problems = [
        f"model {name}: {getattr(saved, name)!r} there, {getattr(current, name)!r} here"
        for name in STRUCTURE
        if getattr(saved, name) != getattr(current, name)
    ]
    for name, there, here in (
        ("word vocabulary", words.fingerprint, vocabs.words.fingerprint),
        ("phrase vocabulary", saved_phrases.fingerprint, vocabs.phrases.fingerprint),
    ):
        if there != here:
            problems.append(f"{name}: {there[:12]} there, {here[:12]} here (sha256)")
    if not problems:  # what the list above does not tell apart, such as two backbones of equal width
        # published models carry a head that nothing here reads
        saved_weights = {n: t for n, t in load_file(path / WEIGHTS).items() if not n.startswith("qa_head.")}
        ours = {n: t for n, t in model.state_dict().items() if n in saved_weights or not n.startswith(tuple(fresh))}
        problems = _differing_weights(saved_weights, ours)
    return problems


def _differing_weights(there: Mapping[str, torch.Tensor], here: Mapping[str, torch.Tensor]) -> list[str]:
    kinds = {
        "only there": sorted(there.keys() - here.keys()),
        "only here": sorted(here.keys() - there.keys()),
        "of another shape": sorted(n for n in there.keys() & here.keys() if there[n].shape != here[n].shape),
    }
    return [f"{len(names)} weights {kind}, the first {names[0]}" for kind, names in kinds.items() if names]
