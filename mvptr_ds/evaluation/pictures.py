"""Curves of a run and pictures of what its model finds, as PNG files."""

from __future__ import annotations

import io
import json
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
from mvptr_ds.data.shards import Index, read_record
from mvptr_ds.data.tars import IMAGE_EXTENSIONS
from mvptr_ds.evaluation.grounding import GroundedPhrase

COLOURS = ("tab:red", "tab:blue", "tab:green", "tab:orange", "tab:purple", "tab:cyan")
_COLUMNS = 4


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The reports of a `metrics.jsonl`."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def draw_curves(stage_dirs: Sequence[Path], path: Path) -> None:
    """One panel an objective; the stages one after the other on the axis of steps."""
    curves: dict[str, list[tuple[str, list[int], list[float]]]] = defaultdict(list)
    start = 0
    for stage in stage_dirs:
        reports = read_metrics(stage / "metrics.jsonl")
        for name in sorted({k for r in reports for k in r if k.startswith("loss/")}):
            points = [(start + r["step"], r[name]) for r in reports if r.get(name) is not None]
            curves[name.removeprefix("loss/")].append((stage.name, [p[0] for p in points], [p[1] for p in points]))
        start += reports[-1]["step"]
    rows = -(-len(curves) // _COLUMNS)
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(3.2 * _COLUMNS, 2.4 * rows), squeeze=False, sharex=True)
    for axis in axes.flat[len(curves) :]:
        axis.set_axis_off()
    for axis, (name, lines) in zip(axes.flat, sorted(curves.items()), strict=False):
        for stage_name, steps, values in lines:
            axis.plot(steps, values, label=stage_name, color="tab:blue" if stage_name == "stage1" else "tab:orange")
        axis.set_title(name, fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
    axes.flat[0].legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def draw_grounding(index: Index, found: Sequence[GroundedPhrase], num_pictures: int, path: Path) -> None:
    """Scenes with the region found for each phrase of a caption: solid where it is right, dashed where it is wrong."""
    by_caption: dict[int, list[GroundedPhrase]] = defaultdict(list)
    for grounded in found:
        by_caption[grounded.caption].append(grounded)
    with_image = (c for c in sorted(by_caption) if _image(index, c) is not None)
    chosen = [c for c, _ in zip(with_image, range(num_pictures), strict=False)]
    rows = -(-len(chosen) // _COLUMNS) or 1
    figure, axes = plt.subplots(rows, _COLUMNS, figsize=(3.4 * _COLUMNS, 4.6 * rows), squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for axis, caption in zip(axes.flat, chosen, strict=False):
        _draw_scene(axis, index, caption, by_caption[caption])
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def _draw_scene(axis: Any, index: Index, caption: int, found: Sequence[GroundedPhrase]) -> None:
    record, number = read_sample_record(index, caption)
    axis.imshow(_image(index, caption))
    axis.set_title("\n".join(textwrap.wrap(record.captions[number].text, 38)), fontsize=9)
    for i, grounded in enumerate(found):
        x1, y1, x2, y2 = record.regions[grounded.region].box
        colour = COLOURS[i % len(COLOURS)]
        style = "--" if grounded.right is False else "-"
        inset = 0.6 * i  # boxes of several phrases on one region stay visible
        box = (x1 + inset, y1 + inset), max(1.0, x2 - x1 - 2 * inset), max(1.0, y2 - y1 - 2 * inset)
        axis.add_patch(Rectangle(*box, fill=False, edgecolor=colour, linestyle=style, linewidth=1.8))
        mark = {True: "right", False: "wrong", None: ""}[grounded.right]
        axis.text(
            0.0, -0.03 - 0.065 * i, f"{' '.join(grounded.phrase.tuple)}  {mark}",
            color=colour, fontsize=8, transform=axis.transAxes, va="top",
        )  # fmt: skip


def _image(index: Index, sample: int) -> Image.Image | None:
    place = index.locate(sample)
    members = read_record(place.path, place.offset, place.num_bytes)
    content = next((members[ext] for ext in IMAGE_EXTENSIONS if ext in members), None)
    return Image.open(io.BytesIO(content)).convert("RGB") if content is not None else None
