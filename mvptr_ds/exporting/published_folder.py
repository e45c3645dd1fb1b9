"""Folders of the published code: config.json beside pytorch_model.bin or model.safetensors, read and written."""

from __future__ import annotations

import json
import math
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mvptr_ds.checkpoints.model_folder import HEAD_WEIGHTS, head_settings, load_model_folder
from mvptr_ds.config import STAGES, Config
from mvptr_ds.errors import DataError
from mvptr_ds.exporting.exported_folder import make_new
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import config_to_reference, to_reference
from mvptr_ds.model.convert_finetuned import TASKS, to_finetuned
from mvptr_ds.user_io.user_files import parse_json, read_text

PICKLED, SAFE = "pytorch_model.bin", "model.safetensors"
ANSWERS, ID2PHRASE = "answers.json", "id2phrase.json"  # beside them, where the model has such


def read_published(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the weights (float32 where they are floats) and the content of config.json. No code of a pickle is run.

    Raises:
        DataError: a file is missing, or it holds something else.
    """
    config_json = parse_json(read_text(folder / "config.json"), str(folder / "config.json"))
    file = next((folder / name for name in (SAFE, PICKLED) if (folder / name).is_file()), None)
    if file is None:
        raise DataError(f"{folder} holds neither {PICKLED} nor {SAFE}; name the folder of a published checkpoint")
    try:
        state = load_file(file) if file.name == SAFE else torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        reason = str(error).strip().splitlines()[0]
        raise DataError(f"{file} holds no weights that can be read safely ({reason}); download it again") from error
    if not isinstance(config_json, dict) or not isinstance(state, Mapping) or not state:
        raise DataError(
            f"{folder} is no published checkpoint; config.json must hold an object, {file.name} tensors by name"
        )
    others = [str(name) for name, tensor in state.items() if not isinstance(tensor, Tensor)]
    if others:
        raise DataError(f"{file} holds more than weights ({', '.join(others[:5])}); name the file of the weights alone")
    return {name: t.float() if t.is_floating_point() else t for name, t in state.items()}, config_json


def export_published(model_folder: Path, out: Path, drop_phrase_head: bool = True) -> None:
    """Writes a model under the published names: `pytorch_model.bin`, which `torch.load` reads, config.json, vocab.txt.

    A fine-tuned model gets the names of the published class of its task, and one of VQA its answers.json.

    Raises:
        DataError: `out` holds something already.
        ValueError: the model has parts that the published code lacks.
    """
    model, _, config = load_model_folder(model_folder)
    structure, settings = cast(MvptrConfig, model.config), head_settings(model_folder)
    task = task_of(model_folder, config)
    if task is None:
        state = to_reference(model, structure, drop_phrase_head)
    else:
        _refuse_unpublished(settings)
        head = load_file(model_folder / HEAD_WEIGHTS) if (model_folder / HEAD_WEIGHTS).is_file() else {}
        state = to_finetuned(_without_untrained_scale(model.state_dict(), structure, task), head, structure, task)
    content = config_to_reference(structure)
    make_new(out)
    torch.save(state, out / PICKLED)
    (out / "config.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(model_folder / "vocab.txt", out / "vocab.txt")
    if "answers" in settings:
        (out / ANSWERS).write_text(json.dumps(settings["answers"]) + "\n", encoding="utf-8")


def task_of(model_folder: Path, config: Config) -> str | None:
    """Returns the downstream task that a model folder was trained for; None for one of pre-training.

    Retrieval has no head of its own to tell: the stage's folder does, or the stages of the configuration.
    """
    task = head_settings(model_folder).get("task")
    if task in TASKS:
        return cast(str, task)
    checkpoint = model_folder.absolute().parent
    stage = checkpoint.parent.parent.name if checkpoint.parent.name == "checkpoints" else config.stage_names[-1]
    return stage if stage in STAGES and stage == "retrieval" else None


def _refuse_unpublished(settings: Mapping[str, Any]) -> None:
    if settings.get("score") == "product":
        raise ValueError("referring.score is 'product': the published code scores by cosine, dot or region")


def _without_untrained_scale(state: Mapping[str, Tensor], config: MvptrConfig, task: str) -> dict[str, Tensor]:
    """Leaves out a scale that was never trained: of the published classes, that of retrieval alone has one."""
    first = np.float32(math.log(1.0 / config.initial_temperature))
    untrained = task != "retrieval" and state["logit_scale"].item() == float(first)
    return {name: tensor for name, tensor in state.items() if not (untrained and name == "logit_scale")}
