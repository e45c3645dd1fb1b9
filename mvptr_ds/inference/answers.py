"""What a fine-tuned model is asked: answers to questions, entailment, and the region that an expression means.

Samples, module and logits are those of the task's own evaluation, so that both give the same numbers.

Legend: B pairs of a text and a picture, A answers, C classes, R regions.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

from mvptr_ds.data.collate import collate
from mvptr_ds.data.phrases import PhraseTuple
from mvptr_ds.data.task_labels import ENTAILMENT_CLASSES
from mvptr_ds.errors import DataError
from mvptr_ds.inference.pairs import as_texts, pairs_of
from mvptr_ds.inference.pictures import Seen, as_list, is_one
from mvptr_ds.inference.samples import SampleMaker
from mvptr_ds.tasks.downstream import Downstream
from mvptr_ds.tasks.entailment import EntailmentModule
from mvptr_ds.tasks.pair_module import PairModule
from mvptr_ds.tasks.referring import ReferringModule
from mvptr_ds.tasks.vqa import VqaModule

METHODS = {"vqa": "ask", "entailment": "entails", "referring": "find"}
Box = tuple[float, float, float, float]  # x1 y1 x2 y2 in pixels
Result = TypeVar("Result")
Module = TypeVar("Module", bound=PairModule)


class Answer(NamedTuple):
    """An answer of the model's list, and the probability that it is right."""

    answer: str
    probability: float


class FoundRegion(NamedTuple):
    """A region's box in pixels of its picture, and how well the text means it."""

    box: Box
    score: float


@dataclass(frozen=True)
class FineTuned:
    """A task that a model was fine-tuned for, and its module: the model with the task's head."""

    task: Downstream
    module: PairModule


class Answers:
    """The methods of a fine-tuned model, which `TrainedModel` has.

    Pictures and texts stand alone or in lists: one to one, one picture with many texts, or one text with many pictures.
    For a lone picture and a lone text a method returns one result, else a list of the results of all pairs.

    `phrases` are those of each text, or of the lone text, such as `[("car", "red")]`. Default: the parser finds them.

    Every method raises DataError where the model is of another task, a picture cannot be read, or a text is empty.
    `ask` and `find` raise ValueError for a `k` below 1.
    """

    batch_size: int
    samples: SampleMaker
    finetuned: FineTuned | None

    @torch.inference_mode()
    def ask(
        self, pictures: Any, questions: str | Sequence[str], k: int = 5, phrases: Sequence[Any] | None = None
    ) -> Any:
        """Returns the `k` best answers to a question about a picture, the best first: a list of `Answer`. Task `vqa`.

        The probability is the sigmoid of an answer's logit, as it is trained: several answers may be right, and the
        probabilities of all do not add up to 1.
        """
        module, results = self._module("vqa", VqaModule), []
        for logits_BA, _ in self._logits(module, pictures, questions, phrases):
            best = logits_BA.sigmoid().topk(_at_most(k, len(module.answers)), dim=-1)
            for numbers, chances in zip(best.indices.tolist(), best.values.tolist(), strict=True):
                results.append([Answer(module.answers[n], chance) for n, chance in zip(numbers, chances, strict=True)])
        return _one_or_all(results, pictures, questions)

    @torch.inference_mode()
    def entails(self, pictures: Any, texts: str | Sequence[str], phrases: Sequence[Any] | None = None) -> Any:
        """Returns the probabilities of the classes `contradiction`, `neutral` and `entailment`. Task `entailment`.

        The result of a pair is a dict of floats that add up to 1. A picture entails what is true of it.
        """
        module, results = self._module("entailment", EntailmentModule), []
        for logits_BC, _ in self._logits(module, pictures, texts, phrases):
            results += [dict(zip(ENTAILMENT_CLASSES, row, strict=True)) for row in logits_BC.softmax(-1).tolist()]
        return _one_or_all(results, pictures, texts)

    @torch.inference_mode()
    def find(self, pictures: Any, texts: str | Sequence[str], k: int = 5, phrases: Sequence[Any] | None = None) -> Any:
        """Returns the `k` regions that a text most likely means, the best first: a list of `FoundRegion`.

        The task is `referring`. Where it was trained with `referring.score=product`, a score is the probability among
        all regions of the picture. With `dot` and `region` it is that of the region by itself, with `cosine` no
        probability, but the cosine.
        """
        module, results = self._module("referring", ReferringModule), []
        for logits_BR, seen in self._logits(module, pictures, texts, phrases):
            for scores_R, one in zip(module.chances(logits_BR), seen, strict=True):
                boxes = self._boxes(one)
                best = scores_R[: len(boxes)].topk(_at_most(k, len(boxes)))
                ranked = zip(best.indices.tolist(), best.values.tolist(), strict=True)
                results.append([FoundRegion(boxes[region], score) for region, score in ranked])
        return _one_or_all(results, pictures, texts)

    def _module(self, task: str, kind: type[Module]) -> Module:
        """Returns the module of the task. Raises DataError where the model is of another."""
        module = None if self.finetuned is None else self.finetuned.module
        if isinstance(module, kind):
            return module
        wanted = f"{METHODS[task]}() needs a model that was fine-tuned for {task}"
        if module is None:
            raise DataError(
                f"{wanted}, and this one has no head of a task: fine-tune it with run.stages=[{task}], or use match, "
                "rank, ground or fill"
            )
        known = METHODS.get(module.name)
        remedy = f"use {known}()" if known else "score it with eval.py"
        raise DataError(f"{wanted}, and this one was trained for {module.name}: {remedy}")

    def _logits(
        self, module: PairModule, pictures: Any, texts: str | Sequence[str], phrases: Sequence[Any] | None
    ) -> Iterator[tuple[Tensor, list[Seen]]]:
        """Yields the logits of some pairs at a time, on the CPU, at least float32, and the pictures of the pairs."""
        wanted, given = as_texts(texts), as_list(pictures)
        pairs = pairs_of(len(wanted), len(given))
        captions = self.samples.captions(wanted, _of_each_text(texts, phrases))

        @functools.lru_cache(maxsize=1)  # one picture with many texts is read once
        def see(number: int) -> Seen:
            return self.samples.see(given[number], number, len(given))

        for start in range(0, len(pairs), self.batch_size):
            part = [(captions[text], see(picture)) for text, picture in pairs[start : start + self.batch_size]]
            batch = collate([self.samples.of_pair(caption, seen) for caption, seen in part])
            yield module.logits(module.outputs(batch)).cpu(), [seen for _, seen in part]

    def _boxes(self, seen: Seen) -> list[Box]:
        """Returns the boxes of the regions that the model reads, as they were given; without any, those of the grid."""
        num_read = len(self.samples.of_picture(seen).region_geometry_R6)
        return [region.box for region in seen.record.regions[:num_read]] or self.samples.boxes_of(seen)


def _of_each_text(texts: str | Sequence[str], phrases: Sequence[Any] | None) -> Sequence[Sequence[PhraseTuple]] | None:
    return [phrases] if phrases is not None and isinstance(texts, str) else phrases


def _at_most(k: int, num: int) -> int:
    if k < 1:
        raise ValueError(f"k is {k}, the number of results must be at least 1")
    return min(k, num)


def _one_or_all(results: list[Result], pictures: Any, texts: str | Sequence[str]) -> Any:
    return results[0] if isinstance(texts, str) and is_one(pictures) else results
