"""Visual question answering (VQA v2): which answer of a list a question about a picture has.

Legend: B samples of this rank, D hidden, A answers of the list.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.config_stages import VqaConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.schema import Record
from mvptr_ds.data.vqa_answers import official_accuracy
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import CheckpointError, DataError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.heads import RowHead
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed, join, unjoin
from mvptr_ds.model.sequence_index import to_device
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.objectives.passes import PairPass
from mvptr_ds.tasks.downstream import Downstream, Prediction
from mvptr_ds.tasks.pair_module import Labels, PairModule, at_least_float32, fresh_linear
from mvptr_ds.user_io.user_files import parse_json, read_text

ANSWERS = "answers"


def read_labels(index_of: Mapping[str, int], labels: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """Returns what a question is trained and scored with.

    Returns:
        `targets`: pairs (number in the list, soft score); empty where no answer is in the list, and such a question
        counts all the same. Beside it `answers`, `annotations`, `question_id` and `kind` as the caption has them.

    Raises:
        DataError: scores that are none, or annotations that are no answers.
    """
    answers = labels.get(ANSWERS)
    if answers is not None and not isinstance(answers, dict):
        raise DataError(f"label {ANSWERS!r} is {answers!r}, expected scores by answer such as {{'dog': 1.0}}")
    for answer, score in (answers or {}).items():
        if isinstance(score, bool) or not isinstance(score, int | float) or not 0 <= score <= 1:
            raise DataError(f"label {ANSWERS!r} gives {answer!r} the score {score!r}, expected a number from 0 to 1")
    annotations = labels.get("annotations")
    if annotations is not None and not (
        isinstance(annotations, list) and annotations and all(isinstance(answer, str) for answer in annotations)
    ):
        raise DataError(
            f"label 'annotations' is {annotations!r:.80}, expected the answers of the annotators, ten as a rule; leave "
            "it out where there are none"
        )
    known = ("annotations", "question_id", "kind")
    return {
        "targets": [(index_of[a], float(s)) for a, s in (answers or {}).items() if a in index_of],
        ANSWERS: answers,
        **{name: labels.get(name) for name in known},
    }


class VqaModule(PairModule):
    """Scores every answer of the list from slot 0 of the cross encoder, or from the pooled state."""

    def __init__(self, model: Mvptr, section: VqaConfig, answers: Sequence[str], seed: int) -> None:
        config, dim = model.config, model.config.hidden_size
        self.on_words = section.head == "words"
        head: nn.Module
        if self.on_words:
            head = RowHead(dim, len(answers), config.layer_norm_eps, tied=False)
        else:
            head = fresh_linear(dim, len(answers), config.initializer_range, seed)
        settings = {"head": section.head, ANSWERS: list(answers)}
        super().__init__(model, "vqa", head, settings, parts=() if self.on_words else ("pooler",))
        self.answers, self.crossing_tags_from = list(answers), section.crossing_tags_from

    @torch.no_grad()
    def begin_head(self, words: WordPiece) -> None:
        """Takes the head of masked words; the row of an answer is the mean of its wordpieces' rows.

        Biases begin where each answer is as likely as any other. From 0, which calls each of them even, the first
        steps do nothing but unlearn that, and clipping makes them many.
        """
        if not isinstance(self.head, RowHead):
            return
        trained = self.model.token_head
        self.head.dense.load_state_dict(trained.dense.state_dict())
        self.head.norm.load_state_dict(trained.norm.state_dict())
        table_VD = self.model.embeddings.word_embeddings.weight if trained.decoder is None else trained.decoder
        assert self.head.decoder is not None
        for row_D, answer in zip(self.head.decoder, self.answers, strict=True):
            row_D.copy_(table_VD[torch.tensor(words.encode(answer)[0] or [words.unk_id])].mean(0))
        self.head.bias.fill_(-math.log(max(1, len(self.answers) - 1)))

    def outputs(self, batch: Batch | PackedBatch) -> PairPass:
        if self.crossing_tags_from is None:
            return super().outputs(batch)
        rows = {**self.objectives.output_rows(), "visual": frozenset({"regions", "all_tags"})}
        return _WithTags(self.model, self.packed(batch), rows, self.crossing_tags_from)

    def logits(self, outputs: PairPass) -> Tensor:
        """Returns a logit of each answer [B, A]."""
        assert self.head is not None
        text, dropout = outputs.matched.text, self.model.config.hidden_dropout
        if isinstance(self.head, RowHead):
            assert self.head.decoder is not None
            return at_least_float32(self.head(text.firsts(), self.head.decoder))
        return at_least_float32(self.head(F.dropout(self.model.pool(text), dropout, self.training)))

    def loss(self, logits_BA: Tensor, labels: Labels) -> LossSum:
        """Binary cross entropy with soft scores, summed over the answers. Source: the published code."""
        targets_BA = torch.zeros_like(logits_BA, device="cpu")
        for row_A, of_sample in zip(targets_BA, labels, strict=True):
            for number, score in of_sample["targets"]:
                row_A[number] = score
        targets_BA = to_device(targets_BA, logits_BA.device)
        return LossSum.of_samples(F.binary_cross_entropy_with_logits(logits_BA, targets_BA, reduction="none").sum(-1))

    def head_flops(self, lengths: Lengths, config: MvptrConfig) -> float:
        return 2 * lengths.samples * config.hidden_size * (config.hidden_size + len(self.answers))


class _WithTags(PairPass):
    """The published slip: tag slots behind the first ones go on into the cross encoder, before the regions."""

    def __init__(
        self, model: Mvptr, packed: PackedBatch, rows: Mapping[str, frozenset[str]], first_crossing: int
    ) -> None:
        self.first_crossing = first_crossing
        super().__init__(model, packed, rows)

    def crossing_regions(self) -> Packed:
        staying = [min(length, self.first_crossing) for length in self.tags.lengths]
        return join(unjoin(self.tags, staying)[1], self.regions)


class Vqa(Downstream):
    """Fine-tunes a pre-trained model to choose an answer; its head starts from that of masked words."""

    name, best_by = "vqa", "eval/vqa/score"

    def sample_needs(self, config: Config) -> SampleNeeds:
        index_of = {answer: number for number, answer in enumerate(load_answers(config.vqa.answers))}
        return SampleNeeds(
            labels={ANSWERS: {"dog": 1.0, "puppy": 0.3}},
            read_labels=partial(read_labels, index_of),
            tags_in_text=config.vqa.tags_in_text,
        )

    def evaluation_needs(self, config: Config) -> SampleNeeds:
        """Returns the needs without training targets, so that no list of answers is read."""
        return SampleNeeds(read_labels=partial(read_labels, {}), tags_in_text=config.vqa.tags_in_text)

    def build_module(self, config: Config, model: Mvptr, seed: int) -> VqaModule:
        return VqaModule(model, config.vqa, load_answers(config.vqa.answers), seed)

    def build_from(self, settings: Mapping[str, Any], config: Config, model: Mvptr) -> VqaModule:
        answers: list[str] = settings.get(ANSWERS, [])
        section = replace(config.vqa, head=settings.get("head", config.vqa.head))
        if problem := problem_of(answers):
            raise CheckpointError(f"task.json of the model {problem}; take the folder as the run wrote it")
        return VqaModule(model, section, answers, config.run.seed)

    def predict(self, module: PairModule, batch: Batch) -> Iterator[Prediction]:
        assert isinstance(module, VqaModule)
        best = module.logits(module.outputs(batch)).max(-1).indices
        for number, labels in zip(best.tolist(), batch.labels, strict=True):
            answer = module.answers[number]
            written = {"question_id": labels["question_id"], "answer": answer}
            yield Prediction(answer, self.score_of(answer, labels), labels, written)

    def details(self, module: PairModule, predictions: Sequence[Prediction], config: Config) -> dict[str, Any]:
        """Returns `num_answers` of the list, and `answerable`: the share of questions of which one is in it."""
        assert isinstance(module, VqaModule)
        listed = set(module.answers)
        known = [not listed.isdisjoint(p.labels[ANSWERS] or {}) for p in predictions if p.score is not None]
        return {"num_answers": len(listed), "answerable": sum(known) / len(known)}

    def known_answer(self, labels: Mapping[str, Any]) -> str | None:
        answers: Mapping[str, float] = labels[ANSWERS] or {}
        return max(answers, key=answers.__getitem__, default=None)

    def score_of(self, answer: str, labels: Mapping[str, Any]) -> float | None:
        """Returns the official accuracy where the annotators' answers are there, else the soft score."""
        if labels["annotations"] is not None:
            return official_accuracy(answer, labels["annotations"])
        return None if labels[ANSWERS] is None else float(labels[ANSWERS].get(answer, 0.0))


def load_answers(path: str | None) -> list[str]:
    """Reads the list of answers.

    Raises:
        DataError: there is none, or the file holds something else.
    """
    if path is None:
        raise DataError(
            "vqa.answers is not set: make the list with tools/build_answers.py SHARDS --out answers.json, and give "
            "vqa.answers=answers.json"
        )
    answers: list[str] = parse_json(read_text(Path(path)), path)
    if problem := problem_of(answers):
        raise DataError(f"vqa.answers={path} {problem}; make it with tools/build_answers.py")
    return answers


def problem_of(answers: Any) -> str | None:
    """Returns what is wrong with a list of answers, a row of the head each; None where nothing is."""
    if not isinstance(answers, list) or not answers or not all(isinstance(answer, str) for answer in answers):
        return "holds no list of answers"
    if len(set(answers)) < len(answers):
        twice = next(answer for answer in answers if answers.count(answer) > 1)
        return f"names {twice!r} twice, and each answer has one row"
    return None
