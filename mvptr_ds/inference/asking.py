"""Asks a model about a picture in the way that it was trained for, whatever the task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mvptr_ds.inference.answers import Box
from mvptr_ds.inference.trained import TrainedModel

MATCHING = "matching"  # of a model without a head of a task: retrieval, pre-training


class Said(NamedTuple):
    """One of the things that a model says of a text and a picture."""

    answer: str
    score: float
    is_probability: bool = True
    box: Box | None = None  # of a region, in pixels

    def as_json(self) -> dict[str, Any]:
        """Returns the same as JSON holds it, with the key `probability` or `score`."""
        what = {"answer": self.answer} if self.box is None else {"box": [round(side, 2) for side in self.box]}
        return {**what, "probability" if self.is_probability else "score": self.score}

    def __str__(self) -> str:
        score = f"{100 * self.score:5.1f} %" if self.is_probability else f"{self.score:7.3f}"
        return f"{score}  {self.answer}"


def task_of(model: TrainedModel) -> str:
    """Returns the task whose question `ask_any` asks: vqa, entailment, referring, or matching."""
    name = MATCHING if model.finetuned is None else model.finetuned.module.name
    return name if name in _ASK else MATCHING


def ask_any(model: TrainedModel, picture: Any, texts: Sequence[str], k: int) -> list[list[Said]]:
    """Returns what a model says of each text beside one picture, the likeliest first.

    Args:
        k: the most answers or regions of a text; classes of entailment are three.

    Raises:
        DataError: the picture cannot be read, or a text is empty.
    """
    return _ASK[task_of(model)](model, picture, list(texts), k)


def _answers(model: TrainedModel, picture: Any, texts: list[str], k: int) -> list[list[Said]]:
    return [[Said(*answer) for answer in answers] for answers in model.ask(picture, texts, k)]


def _classes(model: TrainedModel, picture: Any, texts: list[str], k: int) -> list[list[Said]]:
    return [
        [Said(name, chances[name]) for name in sorted(chances, key=chances.__getitem__, reverse=True)]
        for chances in model.entails(picture, texts)
    ]


def _regions(model: TrainedModel, picture: Any, texts: list[str], k: int) -> list[list[Said]]:
    assert model.finetuned is not None
    is_probability = model.finetuned.module.head_settings["score"] != "cosine"
    return [
        [Said(f"box {' '.join(f'{side:.0f}' for side in box)}", score, is_probability, box) for box, score in found]
        for found in model.find(picture, texts, k)
    ]


def _match(model: TrainedModel, picture: Any, texts: list[str], k: int) -> list[list[Said]]:
    return [[Said("the text describes the picture", chance)] for chance in model.match(picture, texts).tolist()]


_ASK = {"vqa": _answers, "entailment": _classes, "referring": _regions, MATCHING: _match}
