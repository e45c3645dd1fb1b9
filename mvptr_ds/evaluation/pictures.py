"""Draws pictures of what a model finds, as PNG."""

from __future__ import annotations

import io
import logging
import textwrap
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.patches import Rectangle
from PIL import Image

from mvptr_ds.data.images import image_content
from mvptr_ds.data.pixels import MAX_IMAGE_PIXELS, open_image, read_rgb
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.errors import DataError
from mvptr_ds.evaluation.figures import drawable, plain_figures
from mvptr_ds.evaluation.grounding import GroundedPhrase

logger = logging.getLogger(__name__)

COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:cyan")
_COLUMNS = 4
_MAX_PHRASES = len(COLOURS)
Box = tuple[float, float, float, float]
_MARK = {True: "right", False: "wrong", None: ""}
_MAX_SIDE = 640  # pixels, for a picture that is drawn some 300 pixels wide
_CAPTION_LINE, _CAPTION_LINES = 42, 3  # characters of a line, lines
_MAX_PHRASE = 32  # characters
Scene = tuple[int, list[GroundedPhrase]]  # caption, its phrases


def draw_grounding(index: SampleIndex, found: Sequence[GroundedPhrase], num_pictures: int, path: Path) -> None:
    """Draws scenes with the region found for each phrase: solid where it is right, dashed where it is wrong.

    Dots show a box that the phrase names and the model missed. Phrases without ground truth are left out unless the
    split has none. If possible, half of the scenes have a wrong phrase, whatever their real share. A scene that
    cannot be read or drawn is left out, and the log says so.
    """
    left_out: list[str] = []
    scenes = choose_scenes(index, found, num_pictures, left_out)
    try:
        content = _figure(index, scenes)
    except Exception:  # matplotlib raises for bad numbers: each scene is tried alone to find the culprit
        scenes = [scene for scene in scenes if _can_be_drawn(index, scene, left_out)]
        content = _figure(index, scenes)
    path.write_bytes(content)
    if left_out:
        logger.warning("%d pictures were left out of %s; the first: %s", len(left_out), path.name, left_out[0])


def _can_be_drawn(index: SampleIndex, scene: Scene, left_out: list[str]) -> bool:
    try:
        _figure(index, [scene], columns=1)
    except Exception as error:  # as in draw_grounding
        left_out.append(f"sample {scene[0]}: {type(error).__name__}: {error}")
        return False
    return True


@plain_figures()
def _figure(index: SampleIndex, scenes: Sequence[Scene], columns: int = _COLUMNS) -> bytes:
    """Draws the scenes as a PNG."""
    rows = -(-len(scenes) // columns) or 1
    # caption, picture and list have their own axes, so none overlaps its neighbour
    figure, axes = plt.subplots(
        3 * rows, columns, figsize=(3.3 * columns, 5.1 * rows), squeeze=False, layout="constrained",
        gridspec_kw={"height_ratios": (0.55, 3.4, 1.1) * rows},
    )  # fmt: skip
    for axis in axes.flat:
        axis.set_axis_off()
    buffer = io.BytesIO()
    try:
        for number, scene in enumerate(scenes):
            row, column = divmod(number, columns)
            _draw_scene(axes[3 * row : 3 * row + 3, column], index, scene)
        if not scenes:
            figure.text(0.5, 0.5, "no scene with an image and a phrase", ha="center")
        figure.savefig(buffer, format="png", dpi=90)
    finally:
        plt.close(figure)
    return buffer.getvalue()


def _draw_scene(axes: Iterable[Any], index: SampleIndex, scene: Scene) -> None:
    """Draws one scene on the axes of the caption, the picture and the list of phrases."""
    title, picture, listing = axes
    caption, phrases = scene
    place = index.locate(caption)
    record, members = index.read(place)
    text = drawable(record.captions[place.caption].text, _CAPTION_LINES * _CAPTION_LINE)
    text = "\n".join(textwrap.wrap(text, _CAPTION_LINE, max_lines=_CAPTION_LINES))
    # a clipped text of wide letters takes no space from other pictures
    title.text(0.5, 0.05, text, fontsize=9, ha="center", va="bottom", transform=title.transAxes, clip_on=True)
    picture.imshow(small_picture(members), extent=(0, record.width, record.height, 0))
    boxes = [_within(region.box, record) for region in record.regions]
    _draw_phrases(picture, listing, boxes, phrases, record.width / 160)


def choose_scenes(
    index: SampleIndex, found: Sequence[GroundedPhrase], num_pictures: int, left_out: list[str] | None = None
) -> list[Scene]:
    """Returns (caption, phrases) by scene: one caption of each image, with and without a wrong phrase in turn.

    Args:
        left_out: receives a line for each record whose picture cannot be read.
    """
    left_out = [] if left_out is None else left_out
    shown = [g for g in found if g.right is not None] or found
    by_caption: dict[int, list[GroundedPhrase]] = defaultdict(list)
    for grounded in shown:
        by_caption[grounded.caption].append(grounded)
    kinds: tuple[list[int], list[int]] = ([], [])
    images = set()
    for caption in sorted(by_caption):
        record = index.locate(caption).record
        wrong = any(g.right is False for g in by_caption[caption][:_MAX_PHRASES])
        if record in images or len(kinds[wrong]) >= num_pictures:
            continue
        images.add(record)
        try:
            if small_picture(index.read(index.locate(caption))[1]) is not None:
                kinds[wrong].append(caption)
        except (DataError, OSError) as error:
            left_out.append(f"sample {caption}: {error}")
    num_wrong = min(len(kinds[True]), max(num_pictures // 2, num_pictures - len(kinds[False])))
    chosen = sorted(kinds[True][:num_wrong] + kinds[False][: num_pictures - num_wrong])
    return [(caption, by_caption[caption][:_MAX_PHRASES]) for caption in chosen]


def small_picture(members: Mapping[str, bytes]) -> Image.Image | None:
    """Returns the picture, at most _MAX_SIDE a side, or None where the record has none.

    Raises:
        DataError: it cannot be decoded.
    """
    if not any(extension in members for extension in IMAGE_EXTENSIONS):
        return None
    with open_image(image_content(members), MAX_IMAGE_PIXELS) as image:
        picture = read_rgb(image, least_side=_MAX_SIDE).image
    picture.thumbnail((_MAX_SIDE, _MAX_SIDE), Image.Resampling.BICUBIC)
    return picture


def _draw_phrases(
    picture: Any, listing: Any, boxes: Sequence[Box], phrases: Sequence[GroundedPhrase], step_px: float
) -> None:
    """Draws the boxes of phrases. Those of several phrases on one region lie `step_px` apart."""
    for i, grounded in enumerate(phrases):
        colour, inset = COLOURS[i], step_px * i
        picture.add_patch(_rectangle(boxes[grounded.region], inset, colour, "--" if grounded.right is False else "-"))
        if grounded.right is False:
            for missed in grounded.phrase.regions:
                picture.add_patch(_rectangle(boxes[missed], inset, colour, ":"))
        words = drawable(", ".join(grounded.phrase.tuple), _MAX_PHRASE)
        listing.text(
            0.0, 0.95 - i / _MAX_PHRASES, f"{words}   {_MARK[grounded.right]}",
            color=colour, fontsize=9, transform=listing.transAxes, va="top", clip_on=True,
        )  # fmt: skip


def _rectangle(box: Box, inset: float, colour: str, style: str) -> Rectangle:
    x1, y1, x2, y2 = box
    width, height = max(1.0, x2 - x1 - 2 * inset), max(1.0, y2 - y1 - 2 * inset)
    return Rectangle((x1 + inset, y1 + inset), width, height, fill=False, edgecolor=colour, linestyle=style, lw=1.8)


def _within(box: Box, record: Record) -> Box:
    x1, y1, x2, y2 = box
    width, height = record.width, record.height
    return min(max(x1, 0), width), min(max(y1, 0), height), min(max(x2, 0), width), min(max(y2, 0), height)
