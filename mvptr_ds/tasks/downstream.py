"""What the downstream tasks share: how they are built for fine-tuning, and how their predictions are scored."""

from __future__ import annotations

from abc import abstractmethod
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch

from mvptr_ds.builders import SampleNeeds, evaluation_samples
from mvptr_ds.config import Config
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.loader import eval_batches
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.other_pictures import Mode
from mvptr_ds.evaluation.encode import evaluating
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives.module import HEAD, TaskModule
from mvptr_ds.tasks.pair_module import PairModule
from mvptr_ds.tasks.task import Task
from mvptr_ds.user_io.progress import progress_bar


class Prediction(NamedTuple):
    """What a model says of one sample."""

    answer: str
    score: float | None  # from 0 to 1; None where nobody knows the answer, as in a test split
    labels: Mapping[str, Any]  # of the sample, as the task's `read_labels` makes them
    written: dict[str, Any]  # in the format of the task's public evaluation

    @property
    def kind(self) -> str | None:
        kind: str | None = self.labels.get("kind")
        return kind


class Downstream(Task):
    """A task that a pre-trained model is fine-tuned for, and that answers a text beside a picture."""

    follows = "stage2"
    fresh_weights = (HEAD,)
    other_pictures: Mode = "picture"  # what is exchanged to see how much pictures matter
    names_answers = True  # whether answers are words that occur again: texts alone may then tell them

    @abstractmethod
    def build_module(self, config: Config, model: Mvptr, seed: int) -> PairModule:
        """Returns the module with a fresh head. Raises ValueError like `build`."""

    @abstractmethod
    def predict(self, module: PairModule, batch: Batch) -> Iterator[Prediction]:
        """Yields the predictions for a batch on the host, in its order; the module is in evaluation mode."""

    @abstractmethod
    def known_answer(self, labels: Mapping[str, Any]) -> str | None:
        """Returns the best answer that the labels know; None where they know none."""

    @abstractmethod
    def score_of(self, answer: str, labels: Mapping[str, Any]) -> float | None:
        """Returns how right an answer is, from 0 to 1; None where nobody knows."""

    def check_evaluation(self, config: Config) -> None:  # most read nothing besides the shards
        """Raises DataError where the report could not be made, because of a file that the configuration names."""

    def guesses(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """Returns what guesses earn that need neither a model nor training texts, by name as `mean_scores` has them."""
        return {}

    def details(self, module: PairModule, predictions: Sequence[Prediction], config: Config) -> dict[str, Any]:
        """Returns what the task's own report has besides the scores."""
        return {}

    def build(self, config: Config, model: Mvptr, seed: int, per_sample: bool = False) -> TaskModule:
        module = self.build_module(config, model, seed)
        module.frozen = frozen_parts(config, self.name, module.trained_parts())
        return module

    def learning_rate_factors(self, config: Config) -> dict[str, float]:
        section = config.finetuning(self.name)
        assert section is not None
        return section.learning_rate_factors

    def evaluate(
        self, module: TaskModule, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device
    ) -> dict[str, float]:
        assert isinstance(module, PairModule)
        return flat_scores(self.name, self.predictions(module, index, self.samples(config, vocabs, index), config))

    def evaluation_needs(self, config: Config) -> SampleNeeds:
        """Returns what an evaluation wants of its samples; captions may lack labels, as in a test split."""
        return replace(self.sample_needs(config), labels={})

    def samples(self, config: Config, vocabs: Vocabs, index: SampleIndex, withhold_tags: bool = False) -> SampleBuilder:
        """Returns what makes the samples of an evaluation."""
        return evaluation_samples(config, vocabs, index, self.evaluation_needs(config), withhold_tags)

    def predictions(
        self, module: PairModule, index: SampleIndex, samples: SampleBuilder, config: Config, blind: bool = False
    ) -> Iterator[Prediction]:
        """Yields the predictions for all samples of a split, in order.

        Args:
            blind: whether all that is seen of the regions is zero, so that tags alone remain.

        Raises:
            DataError: a sample cannot be read.
        """
        size = config.eval.batch_size
        with evaluating(module):
            batches = eval_batches(index, samples, size)
            for batch in progress_bar(batches, total=-(-len(index) // size), desc=self.name, leave=False):
                yield from self.predict(module, without_regions(batch) if blind else batch)


def frozen_parts(config: Config, task: str, trained: Iterable[str]) -> frozenset[str]:
    """Returns the parts of the model that the section of the task keeps as they are.

    Raises:
        ValueError: a factor is no number, is below 0, or names no part that the task trains.
    """
    section, trained = config.finetuning(task), list(trained)
    assert section is not None
    for part, factor in section.learning_rate_factors.items():
        name = f"{task}.learning_rate_factors.{part}"
        if part not in ("head", *trained):
            known = ", ".join(("head", *trained))
            raise ValueError(f"{name} is {factor}, but {task} trains no such part; choose from {known}")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 <= factor < float("inf"):
            raise ValueError(f"{name} is {factor!r}, expected a number of at least 0")
    if section.probe:
        return frozenset(trained)
    return frozenset(part for part in trained if section.learning_rate_factors.get(part) == 0)


def without_regions(batch: Batch) -> Batch:
    """Returns the batch with regions that look and lie alike: features, pixels and geometry are zero."""

    def zeros(tensor: torch.Tensor | None) -> torch.Tensor | None:
        return None if tensor is None else torch.zeros_like(tensor)

    return replace(
        batch,
        region_features_BRF=zeros(batch.region_features_BRF),
        images_B3HW=zeros(batch.images_B3HW),
        region_geometry_BR6=torch.zeros_like(batch.region_geometry_BR6),
    )


def flat_scores(task: str, predictions: Iterable[Prediction]) -> dict[str, float]:
    """Returns the mean score and that of each kind under the keys of a log; empty where nothing is known."""
    of_kinds = mean_scores(predictions)
    if of_kinds is None:
        return {}
    kinds = {f"eval/{task}/kind/{kind}": of_kind["score"] for kind, of_kind in of_kinds["by_kind"].items()}
    return {f"eval/{task}/score": of_kinds["score"], **kinds}


def mean_scores(predictions: Iterable[Prediction]) -> dict[str, Any] | None:
    """Returns `score`, `n` and `by_kind` (the same of each kind); None where no answer is known."""
    scores: dict[str | None, list[float]] = defaultdict(list)
    for prediction in predictions:
        if prediction.score is not None:
            scores[prediction.kind].append(prediction.score)
    everything = [score for of_kind in scores.values() for score in of_kind]
    if not everything:
        return None
    by_kind = {
        kind: {"score": sum(of_kind) / len(of_kind), "n": len(of_kind)}
        for kind, of_kind in sorted(scores.items(), key=lambda item: str(item[0]))
        if kind is not None
    }
    return {"score": sum(everything) / len(everything), "n": len(everything), "by_kind": by_kind}
