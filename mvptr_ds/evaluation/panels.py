"""Draws a sheet of panels as PNG: a picture with boxes in each, and lines of text below it."""

from __future__ import annotations

import io
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from mvptr_ds.evaluation.figures import drawable, plain_figures

Box = tuple[float, float, float, float]  # x1 y1 x2 y2 in pixels
PLAIN = "dimgray"  # colour of what is neither right nor wrong
_COLUMNS = 4
_LINE_CHARS, _LINES_OF_ONE = 42, 3
_LINES = 6  # that have room below a picture
_MAX_LABEL = 24  # characters
_FONT_SIZE = 9


class DrawnBox(NamedTuple):
    """A box on a picture; `style` is a line of matplotlib: `-`, `--`, `:`."""

    box: Box
    colour: str = PLAIN
    style: str = "-"
    label: str = ""  # stands in its upper left corner
    width: float = 1.8  # of the line, in points


class Line(NamedTuple):
    """A line of text below a picture; a long one is broken, and then cut."""

    text: str
    colour: str = "black"


@dataclass(frozen=True)
class Panel:
    """A picture of so many pixels, with boxes and lines. Without an image the boxes stand on an empty canvas."""

    image: Image.Image | None
    width: int
    height: int
    boxes: Sequence[DrawnBox]
    lines: Sequence[Line]


@plain_figures()
def drawn_sheet(panels: Sequence[Panel], columns: int = _COLUMNS) -> bytes:
    """Returns the PNG of a sheet of panels, row by row."""
    columns = max(1, min(columns, len(panels)))
    rows = -(-len(panels) // columns) or 1
    # picture and lines have their own axes, so none overlaps its neighbour
    figure, axes = plt.subplots(
        2 * rows, columns, figsize=(3.3 * columns, 4.7 * rows), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": (3.4, 1.2) * rows},
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    buffer = io.BytesIO()
    try:
        for number, panel in enumerate(panels):
            row, column = divmod(number, columns)
            _draw_picture(axes[2 * row, column], panel)
            _draw_lines(axes[2 * row + 1, column], panel.lines)
        if not panels:
            figure.text(0.5, 0.5, "there is nothing to draw", ha="center")
        figure.savefig(buffer, format="png", dpi=90)
    finally:
        plt.close(figure)
    return buffer.getvalue()


def _draw_picture(axis: Any, panel: Panel) -> None:
    width, height = panel.width, panel.height
    if panel.image is not None:
        axis.imshow(panel.image, extent=(0, width, height, 0))
    else:
        axis.add_patch(Rectangle((0, 0), width, height, facecolor="whitesmoke", edgecolor="lightgray"))
    axis.set(xlim=(0, width), ylim=(height, 0), aspect="equal")
    for drawn in panel.boxes:
        x1, y1, x2, y2 = _within(drawn.box, width, height)
        line: dict[str, Any] = {"edgecolor": drawn.colour, "linestyle": drawn.style, "linewidth": drawn.width}
        axis.add_patch(Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, **line))
        if drawn.label:
            axis.text(
                x1, y1, drawable(drawn.label, _MAX_LABEL), color="white", fontsize=7, va="top", clip_on=True,
                bbox={"facecolor": drawn.colour, "edgecolor": "none", "pad": 1.0},
            )  # fmt: skip


def _draw_lines(axis: Any, lines: Sequence[Line]) -> None:
    place = 0
    for line in lines:
        text = drawable(line.text, _LINES_OF_ONE * _LINE_CHARS)
        broken = textwrap.wrap(text, _LINE_CHARS, max_lines=_LINES_OF_ONE, placeholder=" …")
        for part in broken:
            # a clipped text of wide letters takes no space from other panels
            axis.text(
                0.5, 1.0 - place / _LINES, part, color=line.colour, fontsize=_FONT_SIZE, ha="center", va="top",
                transform=axis.transAxes, clip_on=True,
            )  # fmt: skip
            place += 1


def _within(box: Box, width: float, height: float) -> Box:
    x1, y1, x2, y2 = box
    return min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)
