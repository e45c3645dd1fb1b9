"""Visual entailment (SNLI-VE): whether the picture shows what the statement says, in three classes.

Legend: B samples of this rank, C classes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.schema import Record
from mvptr_ds.data.task_labels import ENTAILMENT_CLASSES
from mvptr_ds.errors import DataError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.sequence_index import to_device
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.passes import PairPass
from mvptr_ds.tasks.downstream import Downstream, Prediction
from mvptr_ds.tasks.pair_module import Labels, PairModule, at_least_float32, fresh_linear

LABEL = "label"


def read_labels(labels: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """Returns `class` (a number, or None where there is no label), `pair_id` and `kind`.

    Raises:
        DataError: another class.
    """
    label = labels.get(LABEL)
    if label is not None and label not in ENTAILMENT_CLASSES:
        raise DataError(f"label {LABEL!r} is {label!r}, expected one of {', '.join(ENTAILMENT_CLASSES)}")
    return {
        "class": None if label is None else ENTAILMENT_CLASSES.index(label),
        "pair_id": labels.get("pair_id"),
        "kind": labels.get("kind"),
    }


class EntailmentModule(PairModule):
    """Dropout and a linear layer on the pooled state. Source: the published code."""

    def __init__(self, model: Mvptr, seed: int) -> None:
        config = model.config
        head = fresh_linear(config.hidden_size, len(ENTAILMENT_CLASSES), config.initializer_range, seed)
        super().__init__(model, "entailment", head, {"classes": ENTAILMENT_CLASSES}, parts=("pooler",))

    def logits(self, outputs: PairPass) -> Tensor:
        """Returns class logits [B, C]."""
        assert self.head is not None
        pooled_BD = F.dropout(self.model.pool(outputs.matched.text), self.model.config.hidden_dropout, self.training)
        return at_least_float32(self.head(pooled_BD))

    def loss(self, logits_BC: Tensor, labels: Labels) -> LossSum:
        classes_B = to_device(torch.tensor([of_sample["class"] for of_sample in labels]), logits_BC.device)
        return LossSum.of_samples(F.cross_entropy(logits_BC, classes_B, reduction="none"))

    def head_flops(self, lengths: Lengths, config: MvptrConfig) -> float:
        return 2 * lengths.samples * config.hidden_size * (config.hidden_size + len(ENTAILMENT_CLASSES))


class Entailment(Downstream):
    """Fine-tunes a pre-trained model for visual entailment; its head starts fresh."""

    name, best_by = "entailment", "eval/entailment/score"

    def sample_needs(self, config: Config) -> SampleNeeds:
        return SampleNeeds(labels={LABEL: ENTAILMENT_CLASSES[2]}, read_labels=read_labels)

    def build_module(self, config: Config, model: Mvptr, seed: int) -> EntailmentModule:
        return EntailmentModule(model, seed)

    def predict(self, module: PairModule, batch: Batch) -> Iterator[Prediction]:
        probabilities_BC = module.logits(module.outputs(batch)).softmax(-1)
        for probabilities, labels in zip(probabilities_BC.tolist(), batch.labels, strict=True):
            chances = dict(zip(ENTAILMENT_CLASSES, probabilities, strict=True))
            best = max(ENTAILMENT_CLASSES, key=chances.__getitem__)
            written = {"pairID": labels["pair_id"], "prediction": best, "probabilities": chances}
            yield Prediction(best, self.score_of(best, labels), labels, written)

    def details(self, module: PairModule, predictions: Sequence[Prediction], config: Config) -> dict[str, Any]:
        """Returns `confusion`: by the right class, how often each class was predicted."""
        pairs = Counter((self.known_answer(p.labels), p.answer) for p in predictions)
        return {
            "confusion": {
                right: {said: pairs[right, said] for said in ENTAILMENT_CLASSES} for right in ENTAILMENT_CLASSES
            }
        }

    def known_answer(self, labels: Mapping[str, Any]) -> str | None:
        return None if labels["class"] is None else ENTAILMENT_CLASSES[labels["class"]]

    def score_of(self, answer: str, labels: Mapping[str, Any]) -> float | None:
        known = self.known_answer(labels)
        return None if known is None else float(answer == known)
