"""Draws the curves of a run as PNG: losses, and scores where it was evaluated at intervals."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from mvptr_ds.evaluation.figures import drawable, plain_figures

_COLUMNS = 4
_COLOURS = {"stage1": "tab:blue"}
_STATES = (("uni", "uni/accuracy"), ("cross", "cross/accuracy"), ("chance", "chance"))
_RECALLS = (("text -> image", "t2i_r1"), ("image -> text", "i2t_r1"))
SCORES: Mapping[str, Sequence[tuple[str, str]]] = {  # panel -> (line, key behind eval/)
    "retrieval R@1": (
        *((label, f"retrieval/{key}") for label, key in _RECALLS),
        ("re-ranked", "rerank/t2i_r1"),
        ("chance", "chance/t2i_r1"),
    ),
    "retrieval R@1, without tags": (
        *((label, f"without_tags/retrieval/{key}") for label, key in _RECALLS),
        ("re-ranked", "without_tags/rerank/t2i_r1"),
        ("regions permuted", "permuted_regions/retrieval/t2i_r1"),
        ("chance", "chance/t2i_r1"),
    ),
    "grounding": tuple((label, f"grounding/{key}") for label, key in _STATES),
    "grounding, without tags": (
        *((label, f"without_tags/grounding/{key}") for label, key in _STATES),
        ("regions permuted", "permuted_regions/grounding/uni/accuracy"),
    ),
    "attribute among one noun": (
        ("uni", "grounding/uni/attribute_among_one_noun/accuracy"),
        ("cross", "grounding/cross/attribute_among_one_noun/accuracy"),
        ("chance", "grounding/uni/attribute_among_one_noun/chance"),
    ),
    "tag MCR": (("accuracy", "mcr/accuracy"), ("majority", "mcr/majority")),
    "phrase MCR": (("accuracy", "mcr/phrases/accuracy"), ("majority", "mcr/phrases/majority")),
    "ITM": (("both", "itm/accuracy"), ("own image", "itm/match"), ("hardest other", "itm/mismatch")),
}
Line = tuple[list[int], list[float]]  # steps, values


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Reads the reports of a `metrics.jsonl`. It skips a line that a killed run cut off, or that is no report."""
    reports = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            report = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(report, dict):
            reports.append(report)
    return reports


def wall_s(reports: Sequence[Mapping[str, Any]]) -> float | None:
    """Returns the seconds that a stage took, from its last report that holds them."""
    return next((float(r["wall_s"]) for r in reversed(reports) if isinstance(r.get("wall_s"), int | float)), None)


@plain_figures()
def draw_curves(stage_dirs: Sequence[Path], path: Path) -> None:
    """Draws one panel for each objective, with the stages in sequence on the axis of steps."""
    panels: dict[str, list[tuple[str, Line]]] = defaultdict(list)
    for stage, start, reports in _stages(stage_dirs):
        for name in sorted({k for r in reports for k in r if k.startswith("loss/")}):
            panels[name.removeprefix("loss/")].append((stage, _line(reports, name, start)))
    if not panels:
        return
    figure, axes = _panels(sorted(panels))
    for name, lines in panels.items():
        for stage, (steps, values) in lines:
            axes[name].plot(steps, values, label=stage, color=_COLOURS.get(stage, "tab:orange"))
    handles = {h.get_label(): h for axis in axes.values() for h in axis.get_lines()}
    named = [stage.name for stage in stage_dirs if stage.name in handles]
    figure.legend([handles[n] for n in named], named, loc="outside upper right", ncols=len(named), fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


@plain_figures()
def draw_scores(stage_dirs: Sequence[Path], path: Path) -> bool:
    """Draws one panel for each kind of score of the evaluations while training. Without any it returns False."""
    panels: dict[str, dict[str, Line]] = {}
    ends = []
    for _, start, reports in _stages(stage_dirs):
        ends.append(start)
        for panel, keys in SCORES.items():
            for label, key in keys:
                steps, values = _line(reports, f"eval/{key}", start)
                if steps:
                    line = panels.setdefault(panel, {}).setdefault(label, ([], []))
                    line[0].extend(steps)
                    line[1].extend(values)
    if not panels:
        return False
    figure, axes = _panels([name for name in SCORES if name in panels])
    for name, axis in axes.items():
        for label, (steps, values) in panels[name].items():
            baseline = label in ("chance", "majority")
            style = {"color": "grey", "linestyle": ":"} if baseline else {"marker": "o", "markersize": 3}
            axis.plot(steps, [100 * v for v in values], label=label, **style)
        for end in ends[1:]:
            axis.axvline(end, color="black", linewidth=0.6)  # the next stage begins
        axis.set_ylim(bottom=0)
        axis.set_ylabel("%")
        axis.legend(fontsize=7)
    figure.savefig(path, dpi=110)
    plt.close(figure)
    return True


def _stages(stage_dirs: Sequence[Path]) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """Returns (name, steps before it, reports) of the stages that have reports."""
    out = []
    start = 0
    for folder in stage_dirs:
        reports = read_metrics(folder / "metrics.jsonl")
        if reports:
            out.append((folder.name, start, reports))
            start += reports[-1]["step"]
    return out


def _line(reports: Sequence[Mapping[str, Any]], key: str, start: int) -> Line:
    points = [(start + int(r["step"]), float(r[key])) for r in reports if r.get(key) is not None]
    return [step for step, _ in points], [value for _, value in points]


def _panels(names: Sequence[str]) -> tuple[Any, dict[str, Any]]:
    """Makes a figure with a titled panel for each name."""
    columns = min(_COLUMNS, len(names))
    rows = -(-len(names) // columns)
    size = (3.3 * columns, 2.5 * rows + 0.3)
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, sharex=True, layout="constrained")
    for axis in axes.flat[len(names) :]:
        axis.set_axis_off()
    out = dict(zip(names, axes.flat, strict=False))
    for name, axis in out.items():
        axis.set_title(drawable(name, 40), fontsize=10)
        axis.grid(alpha=0.3)
        axis.set_xlabel("step")
        axis.tick_params(labelbottom=True)  # also above a place without a panel
    return figure, out
