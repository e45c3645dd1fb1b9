"""The report of a fine-tuned model on a split: its scores, and beside them what guesses and blind models earn.

    {"task", "score", "n", "by_kind": {KIND: {"score", "n"}}, "blind": {ROW: {"score", "n", "by_kind"}}, "wall_s", ...}

A score is worth what it lies above the rows of `blind`. `majority` and `text_alone` are learnt from the training texts,
without any picture. `permuted_pictures` shows the model other pictures, `without_tags` withholds the tags, and
`tags_alone` leaves nothing but them.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mvptr_ds.config import Config
from mvptr_ds.data.features import ReadLabels
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.other_pictures import OtherPictures
from mvptr_ds.errors import DataError
from mvptr_ds.evaluation.text_prior import TextPrior
from mvptr_ds.tasks.downstream import Downstream, Prediction, mean_scores
from mvptr_ds.tasks.pair_module import PairModule
from mvptr_ds.user_io.progress import progress_bar

logger = logging.getLogger(__name__)
MAX_TRAINING_TEXTS = 50_000  # spread over the training split


@dataclass(frozen=True)
class TaskReport:
    """What an evaluation writes.

    Attributes:
        report: the scores, ready for JSON.
        predictions: of the samples of the split, in order.
    """

    report: dict[str, Any]
    predictions: list[Prediction]


def examine(
    task: Downstream,
    module: PairModule,
    vocabs: Vocabs,
    config: Config,
    index: SampleIndex,
    train: Sequence[SampleIndex],
) -> TaskReport:
    """Returns predictions and scores of a split, with all rows of `blind`.

    Args:
        module: with its trained weights, on its device.
        train: what was trained on, for what its texts alone tell. Empty: those rows are left out.

    Raises:
        DataError: a sample cannot be read.
    """
    started_s = time.perf_counter()
    samples = task.samples(config, vocabs, index)
    predictions = list(task.predictions(module, index, samples, config))
    report: dict[str, Any] = {"task": task.name, "num_samples": len(predictions)}
    scores = mean_scores(predictions)
    if scores is not None:
        report |= scores | task.details(module, predictions, config)
        report["blind"] = dict(_blind(task, module, vocabs, config, index, train, predictions))
    most = Counter(prediction.answer for prediction in predictions).most_common(10)
    if task.names_answers:
        report["answers_given"] = {answer: count / len(predictions) for answer, count in most}
    report["wall_s"] = {"evaluation": round(time.perf_counter() - started_s, 1)}
    return TaskReport(report, predictions)


def _blind(
    task: Downstream,
    module: PairModule,
    vocabs: Vocabs,
    config: Config,
    index: SampleIndex,
    train: Sequence[SampleIndex],
    predictions: list[Prediction],
) -> Iterator[tuple[str, Any]]:
    yield from task.guesses(predictions).items()
    controls = config.eval.controls
    if train and task.names_answers and "texts" in controls:
        yield from _from_texts(task, config, index, train, predictions)

    def scored(name: str, index: SampleIndex, withhold_tags: bool = False, blind: bool = False) -> tuple[str, Any]:
        samples = task.samples(config, vocabs, index, withhold_tags)
        return name, mean_scores(task.predictions(module, index, samples, config, blind))

    if "permuted_pictures" in controls and index.num_records > 1:
        yield scored("permuted_pictures", OtherPictures(index, task.other_pictures))
    if "without_tags" in controls:
        yield scored("without_tags", index, withhold_tags=True)
    if "tags_alone" in controls:
        yield scored("tags_alone", index, blind=True)


def _from_texts(
    task: Downstream, config: Config, index: SampleIndex, train: Sequence[SampleIndex], predictions: list[Prediction]
) -> Iterator[tuple[str, Any]]:
    """Yields what the most frequent answer of each kind earns, and a naive Bayes guess from the words."""
    read_labels = task.evaluation_needs(config).read_labels
    assert read_labels is not None
    learnt: dict[Any, tuple[list[str], list[str]]] = {}
    for text, labels in _training_texts(train, read_labels):
        answer = task.known_answer(labels)
        if answer is not None:
            texts, answers = learnt.setdefault(labels.get("kind"), ([], []))
            texts.append(text)
            answers.append(answer)
    if not learnt:
        return
    priors = {kind: TextPrior.fit(texts, answers) for kind, (texts, answers) in learnt.items()}
    majority = {kind: Counter(answers).most_common(1)[0][0] for kind, (_, answers) in learnt.items()}
    texts = [text for number in range(index.num_records) for text, _ in _labelled_texts(index, number, read_labels)]
    yield "majority", mean_scores(_guessed(task, predictions, (majority.get(p.kind) for p in predictions)))
    guesses = (
        priors[prediction.kind].predict(text) if prediction.kind in priors else None
        for prediction, text in zip(predictions, texts, strict=True)
    )
    yield "text_alone", mean_scores(_guessed(task, predictions, guesses))


def _guessed(
    task: Downstream, predictions: Iterable[Prediction], guesses: Iterable[str | None]
) -> Iterator[Prediction]:
    """Yields the predictions with other answers; a kind that training has not earns nothing."""
    for prediction, guess in zip(predictions, guesses, strict=True):
        score = None if prediction.score is None else 0.0 if guess is None else task.score_of(guess, prediction.labels)
        yield prediction._replace(answer=guess or "", score=score)


def _training_texts(train: Sequence[SampleIndex], read_labels: ReadLabels) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields training texts and labels, of records spread over all folders if these have more texts than the most.

    Texts that cannot be read are left out: training has replaced them, too.
    """
    every = -(-sum(map(len, train)) // MAX_TRAINING_TEXTS)
    places = [(index, number) for index in train for number in range(0, index.num_records, every)]
    for index, number in progress_bar(places, desc="texts", leave=False):
        try:
            yield from _labelled_texts(index, number, read_labels)
        except (DataError, OSError) as error:
            logger.debug("a training text is left out: %s", error)


def _labelled_texts(index: SampleIndex, number: int, read_labels: ReadLabels) -> list[tuple[str, Mapping[str, Any]]]:
    """Returns texts and labels of a record, in order. Raises DataError or OSError where it cannot be read."""
    record, _ = index.describe(index.place(number))
    return [(caption.text, read_labels(caption.labels or {}, record)) for caption in record.captions]


def task_table(report: Mapping[str, Any]) -> str:
    """Returns the report as text: a line a row of scores, in percent, with a column a kind."""
    if "score" not in report:
        return f"{report['task']}: {report['num_samples']} predictions; the split has no answers to compare them with"
    kinds = list(report["by_kind"])
    rows = {"the model": report, **report["blind"]}
    width = max(map(len, rows)) + 2
    head = f"{report['task'].upper():{width}}" + "".join(f"{name:>{_width(name)}}" for name in ("all", *kinds))
    lines = [f"held out: {report['n']} samples; shares in %", "", head]
    lines.append(
        f"{'samples':{width}}{report['n']:>{_width('all')}}"
        + "".join(f"{report['by_kind'][kind]['n']:>{_width(kind)}}" for kind in kinds)
    )
    for name, row in rows.items():
        if row is not None:
            cells = [("all", row["score"]), *((kind, row["by_kind"].get(kind, {}).get("score")) for kind in kinds)]
            shown = "".join(f"{'-' if s is None else f'{100 * s:.1f}':>{_width(column)}}" for column, s in cells)
            lines.append(f"{name.replace('_', ' '):{width}}{shown}")
    return "\n".join(lines + _bounds(report))


def _bounds(report: Mapping[str, Any]) -> list[str]:
    """Returns a line for each share that bounds the score or counts it by detections."""
    shares = {name: report[name] for name in ("answerable", "upper_bound") if name in report}
    shares |= {
        f"by detections: {name}": share
        for name, share in report.get("by_detections", {}).items()
        if isinstance(share, float)  # the rest are counts
    }
    width = max(map(len, shares), default=0) + 2
    lines = [f"{name.replace('_', ' '):{width}}{100 * share:>6.1f}" for name, share in shares.items()]
    return ["", *lines] if lines else []


def _width(column: str) -> int:
    return max(8, len(column) + 2)
