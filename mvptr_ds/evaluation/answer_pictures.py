"""Draws what a fine-tuned model answers: half of the pictures with right answers and half with wrong ones."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.errors import DataError
from mvptr_ds.evaluation.panels import PLAIN, Box, DrawnBox, Line, Panel, drawn_sheet
from mvptr_ds.evaluation.pictures import small_picture

logger = logging.getLogger(__name__)

RIGHT_FROM = 0.5  # score from which an answer is shown as right
_COLOURS = {True: "tab:green", False: "tab:red", None: PLAIN}
_WORDS = {True: "right", False: "wrong", None: "not known"}
_THIN = 0.6  # points, of the lines of other regions
_MAX_TAGS = 12  # regions whose tags are shown where there is no image
_BOX_LABEL = "box"  # among the labels of a caption: the box that it means


class AnswerItem(NamedTuple):
    """An answer to the text of one sample."""

    sample: int  # its number in the index
    answer: str
    known: str | None  # the right answer
    score: float | None  # of the answer, from 0 to 1; None where nobody knows the right one
    box: Box | None = None  # that the model chose, in pixels; the right one stands in the labels of the caption

    @property
    def is_right(self) -> bool | None:
        """Whether the answer is right, at least by half; None where nobody knows."""
        return None if self.score is None else self.score >= RIGHT_FROM


def draw_answers(path: Path, index: SampleIndex, items: Iterable[AnswerItem], num_pictures: int = 12) -> None:
    """Draws pictures with a text below each, the answer of a model, and whether it is right, as a PNG.

    Items without a known answer are left out unless no answer is known. If possible, half of the pictures have a wrong
    answer, whatever their real share. A chosen box is solid where it is right and dashed where it is wrong; dots show
    the right one. A picture that cannot be read is left out, and the log says so.

    Args:
        path: of the PNG, which is replaced.
        index: of the split; a record without an image shows its regions with their tags.
        items: answers, of which one of each picture is drawn.
    """
    left_out: list[str] = []
    panels = []
    for item in choose_items(index, list(items), num_pictures):
        try:
            panels.append(_panel(index, item))
        except (DataError, OSError) as error:
            left_out.append(f"sample {item.sample}: {error}")
    path.write_bytes(drawn_sheet(panels))
    if left_out:
        logger.warning("%d pictures were left out of %s; the first: %s", len(left_out), path.name, left_out[0])


def choose_items(index: SampleIndex, items: Sequence[AnswerItem], num_pictures: int) -> list[AnswerItem]:
    """Returns items of different pictures, half of them wrong where there are enough, in the order of the samples."""
    shown = [item for item in items if item.score is not None] or items
    kinds: dict[bool, list[AnswerItem]] = {True: [], False: []}
    pictures: set[int] = set()
    for item in sorted(shown, key=lambda item: item.sample):
        kind = kinds[item.is_right is not False]
        record = index.locate(item.sample).record
        if record not in pictures and len(kind) < num_pictures:
            pictures.add(record)
            kind.append(item)
    num_wrong = min(len(kinds[False]), max(num_pictures // 2, num_pictures - len(kinds[True])))
    return sorted(kinds[False][:num_wrong] + kinds[True][: num_pictures - num_wrong], key=lambda item: item.sample)


def _panel(index: SampleIndex, item: AnswerItem) -> Panel:
    """Returns the panel of an item. Raises DataError or OSError where its record cannot be read."""
    place = index.locate(item.sample)
    record, members = index.read(place)
    image = small_picture(members)
    boxes = [] if image is not None else _tagged_regions(record)
    colour = _COLOURS[item.is_right]
    if item.box is not None:
        boxes.append(DrawnBox(item.box, colour, "--" if item.is_right is False else "-"))
        right_box = (record.captions[place.caption].labels or {}).get(_BOX_LABEL)
        if right_box is not None:
            boxes.append(DrawnBox(tuple(right_box), _COLOURS[True], ":"))
    return Panel(image, record.width, record.height, boxes, _lines(item, record.captions[place.caption].text))


def _tagged_regions(record: Record) -> list[DrawnBox]:
    return [DrawnBox(region.box, PLAIN, "-", region.tag, _THIN) for region in record.regions[:_MAX_TAGS]]


def _lines(item: AnswerItem, text: str) -> list[Line]:
    colour, verdict = _COLOURS[item.is_right], _WORDS[item.is_right]
    if item.score is not None and 0 < item.score < 1:
        verdict = f"{verdict}, score {item.score:.2f}"
    if item.box is not None:  # the number of a region says nothing to a reader
        return [Line(text), Line(verdict, colour)]
    lines = [Line(text), Line(f"{item.answer} ({verdict})", colour)]
    if item.known is not None and item.known != item.answer:
        lines.append(Line(f"known: {item.known}"))
    return lines
