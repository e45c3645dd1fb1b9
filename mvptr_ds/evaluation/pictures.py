"""Pictures of what a model finds, as PNG."""

from __future__ import annotations

import io
import textwrap
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from mvptr_ds.data.loader import read_sample_record
from mvptr_ds.data.shards import SampleIndex
from mvptr_ds.data.tars import IMAGE_EXTENSIONS
from mvptr_ds.evaluation.grounding import GroundedPhrase

COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:cyan")
_COLUMNS = 4
_MAX_PHRASES = len(COLOURS)
Box = tuple[float, float, float, float]
_MARK = {True: "right", False: "wrong", None: ""}


def draw_grounding(index: SampleIndex, found: Sequence[GroundedPhrase], num_pictures: int, path: Path) -> None:
    """Scenes with the region found for each phrase: solid where it is right, dashed where it is wrong.

    Dots show a box that the phrase names and the model missed. Phrases without ground truth are left out unless the
    split has none. Half of the scenes have a phrase that went wrong, as far as there are, whatever their real share.
    """
    chosen = choose_scenes(index, found, num_pictures)
    rows = -(-len(chosen) // _COLUMNS) or 1
    # caption, picture and list have their own axes: none can run into its neighbour
    figure, axes = plt.subplots(
        3 * rows, _COLUMNS, figsize=(3.3 * _COLUMNS, 5.1 * rows), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": (0.55, 3.4, 1.1) * rows},
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    for number, (caption, phrases) in enumerate(chosen):
        row, column = divmod(number, _COLUMNS)
        title, picture, listing = axes[3 * row : 3 * row + 3, column]
        record, of_record = read_sample_record(index, caption)
        text = "\n".join(textwrap.wrap(record.captions[of_record].text, 42, max_lines=3))
        title.text(0.5, 0.05, text, fontsize=9, ha="center", va="bottom", transform=title.transAxes)
        picture.imshow(_image(index, caption), extent=(0, record.width, record.height, 0))
        _draw_phrases(picture, listing, [r.box for r in record.regions], phrases, record.width / 160)
    if not chosen:
        figure.text(0.5, 0.5, "no scene with an image and a phrase", ha="center")
    figure.savefig(path, dpi=90)
    plt.close(figure)


def choose_scenes(
    index: SampleIndex, found: Sequence[GroundedPhrase], num_pictures: int
) -> list[tuple[int, list[GroundedPhrase]]]:
    """(caption, phrases) by scene: one caption of each image, those with and without a wrong phrase in turn."""
    shown = [g for g in found if g.right is not None] or found
    by_caption: dict[int, list[GroundedPhrase]] = defaultdict(list)
    for grounded in shown:
        by_caption[grounded.caption].append(grounded)
    kinds: tuple[list[int], list[int]] = ([], [])
    images = set()
    for caption in sorted(by_caption):
        record = index.locate(caption).record
        wrong = any(g.right is False for g in by_caption[caption][:_MAX_PHRASES])
        if record in images or len(kinds[wrong]) >= num_pictures or _image(index, caption) is None:
            continue
        images.add(record)
        kinds[wrong].append(caption)
    num_wrong = min(len(kinds[True]), max(num_pictures // 2, num_pictures - len(kinds[False])))
    chosen = sorted(kinds[True][:num_wrong] + kinds[False][: num_pictures - num_wrong])
    return [(caption, by_caption[caption][:_MAX_PHRASES]) for caption in chosen]


def _draw_phrases(
    picture: Any, listing: Any, boxes: Sequence[Box], phrases: Sequence[GroundedPhrase], step_px: float
) -> None:
    """Args: step_px: how far boxes of several phrases on one region lie apart."""
    for i, grounded in enumerate(phrases):
        colour, inset = COLOURS[i], step_px * i
        picture.add_patch(_rectangle(boxes[grounded.region], inset, colour, "--" if grounded.right is False else "-"))
        if grounded.right is False:
            for missed in grounded.phrase.regions:
                picture.add_patch(_rectangle(boxes[missed], inset, colour, ":"))
        listing.text(
            0.0, 0.95 - i / _MAX_PHRASES, f"{', '.join(grounded.phrase.tuple)}   {_MARK[grounded.right]}",
            color=colour, fontsize=9, transform=listing.transAxes, va="top",
        )  # fmt: skip


def _rectangle(box: Box, inset: float, colour: str, style: str) -> Rectangle:
    x1, y1, x2, y2 = box
    width, height = max(1.0, x2 - x1 - 2 * inset), max(1.0, y2 - y1 - 2 * inset)
    return Rectangle((x1 + inset, y1 + inset), width, height, fill=False, edgecolor=colour, linestyle=style, lw=1.8)


def _image(index: SampleIndex, sample: int) -> Image.Image | None:
    place = index.locate(sample)
    members = index.read(place)[1]
    content = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
    return Image.open(io.BytesIO(content)).convert("RGB") if content is not None else None
