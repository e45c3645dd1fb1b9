"""Weights of the reference's fine-tuned models, in and out: a backbone, and the head of a task beside it.

What each task has beside `bert.*`, under the reference's names:

    retrieval   logit_scale, classifier.*     class 1 is a match; ours is class 0 of the head of pre-training
    vqa         cls.predictions.* of answers, or classifier.* on the pooled state
    entailment  classifier.*                  contradiction, neutral, entailment
    referring   classifier.*                  also where the model scores by cosine, and never reads it
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import (
    State,
    compare,
    config_from_reference,
    from_reference,
    head_name,
    our_shapes,
    to_theirs,
)

TASKS = ("retrieval", "vqa", "entailment", "referring")
_CLASSIFIER, _WORDS_HEAD = "classifier.", "cls.predictions."
_CLASSES = {"retrieval": 2, "entailment": 3, "referring": 1}  # rows of their classifiers
_ITM = "itm_head."
_OTHER_HEADS = ("token_head.", "tag_head.", _ITM)  # the reference's fine-tuned classes have none of them
_ROW_HEAD = ("dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias", "decoder")


class Finetuned(NamedTuple):
    """A checkpoint of a fine-tuned model under our names."""

    config: MvptrConfig
    model: dict[str, Tensor]  # some of the names of `Mvptr(config)`
    head: dict[str, Tensor]  # names of the task's own head
    fresh: list[str]  # the names of `Mvptr(config)` that the checkpoint lacks


def from_finetuned(state: State, config_json: Mapping[str, Any], task: str) -> Finetuned:
    """Translates a checkpoint of a task; tensors keep their dtype.

    Args:
        config_json: the content of the checkpoint's config.json.
        task: one of TASKS.

    Raises:
        ValueError: listing every missing, extra and wrongly shaped name; or for settings that this model does not have.
    """
    names = _head_names(state, task)
    backbone = {name: tensor for name, tensor in state.items() if name not in names}
    config = config_from_reference(config_json, backbone)
    config.num_answers = 0  # of the head of another pre-training
    shapes = _head_shapes(state, names, config.hidden_size, task)
    compare(f"the head of {task}", {name: state[name] for name in names if name in state}, shapes)
    head = {ours: state[theirs].clone() for theirs, ours in names.items() if theirs in state}
    has_scale = task == "retrieval" or "logit_scale" in backbone  # other classes do without
    model = from_reference(backbone, config, _OTHER_HEADS if has_scale else (*_OTHER_HEADS, "logit_scale"))
    if task == "retrieval":
        model |= {_ITM + name: tensor.flip(0) for name, tensor in head.items()}
        head = {}
    return Finetuned(config, model, head, [name for name in our_shapes(config) if name not in model])


def to_finetuned(model: State, head: State, config: MvptrConfig, task: str) -> dict[str, Tensor]:
    """Translates a model and its head into the reference's names; the inverse of `from_finetuned`.

    Args:
        model: some or all names of `Mvptr(config)`. The heads of words and phrases, which the reference's classes
            lack, are left out, and so is the head of pairs for all tasks but retrieval, whose classifier it is.
        head: names of the task's own head.

    Raises:
        ValueError: for parts that the reference does not have.
    """
    if config.visual_source != "features":
        raise ValueError(f"visual_source is {config.visual_source!r}: the reference reads detector features only")
    left_out = (*_OTHER_HEADS, "phrase_head.", "phrase_rows")
    theirs = to_theirs({name: t for name, t in model.items() if not name.startswith(left_out)}, config)
    if task == "retrieval":
        head = {name.removeprefix(_ITM): t.flip(0) for name, t in model.items() if name.startswith(_ITM)}
    theirs |= {_their_head_name(name, is_row_head="dense.weight" in head): tensor for name, tensor in head.items()}
    return {name: tensor.detach().clone() for name, tensor in theirs.items()}


def _head_names(state: State, task: str) -> dict[str, str]:
    """Returns the names that the task's head has in the state, theirs -> ours."""
    if task not in TASKS:
        raise ValueError(f"task {task!r} is unknown; choose from {', '.join(TASKS)}")
    if task == "vqa" and any(name.startswith(_WORDS_HEAD) for name in state):
        return {_their_head_name(name, is_row_head=True): name for name in _ROW_HEAD}
    return {_CLASSIFIER + name: name for name in ("weight", "bias")}


def _their_head_name(name: str, is_row_head: bool) -> str:
    return _WORDS_HEAD + head_name(name) if is_row_head else _CLASSIFIER + name


def _head_shapes(state: State, names: Mapping[str, str], dim: int, task: str) -> dict[str, tuple[int, ...]]:
    """Returns the shapes that the head must have, by their names; of answers there may be any number."""
    biases = [theirs for theirs, ours in names.items() if ours == "bias" and theirs in state]
    num_rows = _CLASSES.get(task) or (len(state[biases[0]]) if biases else 0)
    shapes: dict[str, tuple[int, ...]] = {
        "weight": (num_rows, dim), "decoder": (num_rows, dim), "bias": (num_rows,), "dense.weight": (dim, dim),
        "dense.bias": (dim,), "norm.weight": (dim,), "norm.bias": (dim,),
    }  # fmt: skip
    return {theirs: shapes[ours] for theirs, ours in names.items()}
