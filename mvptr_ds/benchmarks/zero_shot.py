"""Zero-shot classification: a class is the mean of the states of texts that name it, a picture gets the nearest one.

Source: Radford et al., Learning Transferable Visual Models From Natural Language Supervision, section 3.1.4.

Legend: N pictures, C classes, D hidden.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.benchmarks.labelled import LabelledPicture, LabelledPictures
from mvptr_ds.errors import DataError
from mvptr_ds.inference.pictures import Picture
from mvptr_ds.inference.trained import TrainedModel
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.user_files import read_text

TEMPLATES = ("a picture of a {}.",)  # those of TrainedModel.classify
TOP = 5
_PLACE = re.compile(r"\{c?\}")  # of the name: ours, and CLIP_benchmark's
_TEXTS = 1024  # that are embedded together
_CELL = 10  # width of a column
_SHOWN = 20  # classes and unreadable pictures of a table


class ClassScore(NamedTuple):
    """A class, the number of its pictures, and their top-1, None where there are none."""

    name: str
    num_pictures: int
    top1: float | None


@dataclass(frozen=True)
class ZeroShotScores:
    """The scores of a classification. Shares are fractions of 1, and None where nothing was asked.

    Attributes:
        top1: of all pictures, those whose class is the most similar one.
        top5: of all pictures, those whose class is among the five most similar ones. None: there are fewer classes.
        mean_per_class: the mean of top1 over the classes that have pictures.
        classes: the score of each, in the order of their numbers. Two may bear one name.
        unreadable: pictures that are left out, each with the reason.
    """

    top1: float
    top5: float | None
    mean_per_class: float
    num_pictures: int
    num_templates: int
    classes: list[ClassScore]
    unreadable: list[tuple[str, str]] = field(default_factory=list)

    @property
    def metrics(self) -> dict[str, float | None]:
        """Returns the scores under the names of CLIP_benchmark."""
        return {"acc1": self.top1, "acc5": self.top5, "mean_per_class_recall": self.mean_per_class}

    @property
    def details(self) -> dict[str, object]:
        """Returns what CLIP_benchmark does not write."""
        return {
            "num_pictures": self.num_pictures,
            "num_templates": self.num_templates,
            "classes": [one._asdict() for one in self.classes],
            "unreadable": dict(self.unreadable),
        }


def read_templates(path: Path) -> tuple[str, ...]:
    """Returns the templates of a file, one a line, in which `{}` or CLIP_benchmark's `{c}` stands for the name.

    Raises:
        ValueError: the file cannot be read, holds no template, or one without a place for the name.
    """
    templates = tuple(line.strip() for line in read_text(path).splitlines() if line.strip())
    for template in templates:
        if not _PLACE.search(template):
            raise DataError(f"{path}: {template!r} has no {{}} or {{c}} for the name of the class")
    if not templates:
        raise DataError(f"{path} holds no template; write one a line, such as {TEMPLATES[0]}")
    return templates


def prompt(template: str, name: str) -> str:
    """Returns a template with the name of a class in its place, with spaces for underscores."""
    return _PLACE.sub(lambda _: " ".join(name.replace("_", " ").split()), template)


def class_states(model: TrainedModel, names: Sequence[str], templates: Sequence[str]) -> Tensor:
    """Returns the states of classes, of length 1, float32 [C, D]: means over the templates, as CLIP takes them."""
    parts = []
    for group in torch.arange(len(names)).split(max(1, _TEXTS // len(templates))):
        texts = [prompt(template, names[number]) for number in group.tolist() for template in templates]
        parts.append(model.embed_text(texts).unflatten(0, (len(group), len(templates))).mean(1))
    return F.normalize(torch.cat(parts), dim=-1)


def classify(model: TrainedModel, given: LabelledPictures, templates: Sequence[str] = TEMPLATES) -> ZeroShotScores:
    """Classifies pictures by the names of their classes.

    A picture that cannot be read is left out and named. A class that ties with the right one precedes it, so a
    constant score earns nothing.

    Raises:
        DataError: no picture can be read, or storage fails in a way that may pass.
    """
    states_CD = class_states(model, given.classes, templates)
    ranks: list[int] = []  # classes before the right one, of each picture
    labels: list[int] = []
    unreadable: list[tuple[str, str]] = []
    for batch in progress_bar(_batches(given.pictures, model.batch_size), desc="classify", unit="batches"):
        kept, images_ND = _embed(model, batch, unreadable)
        if not kept:
            continue
        label_N = torch.tensor([picture.label for picture in kept])
        scores_NC = images_ND @ states_CD.T
        own_N1 = scores_NC.gather(1, label_N[:, None])
        ranks += ((~(scores_NC < own_N1)).sum(1) - 1).tolist()  # NaN earns nothing
        labels += label_N.tolist()
    if not labels:
        raise DataError(f"none of the {len(given.pictures)} pictures can be read; {': '.join(unreadable[0])}")
    return _scores(given.classes, ranks, labels, len(templates), unreadable)


def _batches(pictures: Sequence[LabelledPicture], size: int) -> list[Sequence[LabelledPicture]]:
    return [pictures[start : start + size] for start in range(0, len(pictures), size)]


def _embed(
    model: TrainedModel, batch: Sequence[LabelledPicture], unreadable: list[tuple[str, str]]
) -> tuple[list[LabelledPicture], Tensor]:
    """Returns the pictures of a batch that can be read, and their states [N, D]; it adds the others to `unreadable`."""
    seen: list[tuple[LabelledPicture, Picture]] = []
    for one in batch:
        try:
            seen.append((one, one.read()))
        except DataError as error:
            _leave_out(one, error, unreadable)
    try:
        return [one for one, _ in seen], model.embed_image([picture for _, picture in seen]) if seen else torch.empty(0)
    except DataError:  # of which picture, the states of each by itself will tell
        kept: list[LabelledPicture] = []
        states: list[Tensor] = []
        for one, picture in seen:
            try:
                states.append(model.embed_image(picture))
                kept.append(one)
            except DataError as error:
                _leave_out(one, error, unreadable)
        return kept, torch.cat(states) if states else torch.empty(0)


def _leave_out(one: LabelledPicture, error: DataError, unreadable: list[tuple[str, str]]) -> None:
    if error.passes:
        raise error
    unreadable.append((one.name, str(error).removeprefix("picture 0 of 1: ")))


def _scores(
    classes: Sequence[str],
    ranks: Sequence[int],
    labels: Sequence[int],
    num_templates: int,
    unreadable: list[tuple[str, str]],
) -> ZeroShotScores:
    num_C, right_C = [0] * len(classes), [0] * len(classes)
    for rank, label in zip(ranks, labels, strict=True):
        num_C[label] += 1
        right_C[label] += rank == 0
    shares_C = [right / num if num else None for right, num in zip(right_C, num_C, strict=True)]
    asked = [share for share in shares_C if share is not None]
    return ZeroShotScores(
        top1=sum(right_C) / len(ranks),
        top5=sum(rank < TOP for rank in ranks) / len(ranks) if len(classes) >= TOP else None,
        mean_per_class=sum(asked) / len(asked),
        num_pictures=len(ranks),
        num_templates=num_templates,
        classes=[ClassScore(*one) for one in zip(classes, num_C, shares_C, strict=True)],
        unreadable=unreadable,
    )


def table(scores: ZeroShotScores) -> str:
    """Returns the scores as text: shares in percent with one decimal, a dash where nothing was asked."""
    return "\n".join(_lines(scores))


def _lines(scores: ZeroShotScores) -> Iterator[str]:
    classes = scores.classes
    yield (
        f"zero-shot: {scores.num_pictures} pictures, {len(classes)} classes, "
        f"{scores.num_templates} {'template' if scores.num_templates == 1 else 'templates'}; shares in %"
    )
    yield ""
    lowest = sorted(classes, key=lambda one: (one.top1 is None, one.top1 or 0.0))[:_SHOWN]
    width = max(len("mean of the classes"), *(len(one.name) for one in lowest)) + 2
    yield f"{'':{width}}" + "".join(f"{head:>{_CELL}}" for head in ("pictures", "top-1", f"top-{TOP}"))
    chance = 1 / len(classes), TOP / len(classes) if len(classes) >= TOP else None
    yield _row("all pictures", width, str(scores.num_pictures), scores.top1, scores.top5)
    yield _row("mean of the classes", width, "", scores.mean_per_class)
    yield _row("chance", width, "", *chance)
    yield ""
    for one in lowest:
        yield _row(one.name, width, str(one.num_pictures), one.top1)
    if len(classes) > len(lowest):
        yield f"(the {len(lowest)} lowest of {len(classes)} classes)"
    if scores.unreadable:
        yield ""
        yield f"left out, since they cannot be read: {len(scores.unreadable)}"
        yield from (f"  {name}: {reason}" for name, reason in scores.unreadable[:_SHOWN])
        if len(scores.unreadable) > _SHOWN:
            yield f"  and {len(scores.unreadable) - _SHOWN} more"


def _row(name: str, width: int, num: str, *shares: float | None) -> str:
    cells = [num, *("-" if share is None else f"{100 * share:.1f}" for share in shares)]
    return f"{name:{width}}" + "".join(f"{cell:>{_CELL}}" for cell in cells)
