"""Computes the sizes and texts of histograms and bars, which templates/charts.html draws as inline SVG."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

_WIDTH, _HEIGHT, _MARGIN = 320, 110, 18  # of a histogram, in its own units; the margin is for the numbers below
_MAX_BARS = 40


class Bar(NamedTuple):
    """A bar of a histogram in the histogram's units, and the text that pointing at it shows."""

    x: float
    y: float
    width: float
    height: float
    hint: str


class Limit(NamedTuple):
    """A vertical line of a histogram, and the name beside it."""

    name: str
    x: float
    text_x: float
    anchor: str  # start or end: the side of the text that is at text_x


@dataclass
class Histogram:
    """A drawing of width x height units; without values it has no bars."""

    title: str
    summary: str = ""
    bars: list[Bar] = field(default_factory=list)
    labels: list[tuple[float, str]] = field(default_factory=list)  # x, number below the axis
    limit: Limit | None = None
    width: int = _WIDTH
    height: int = _HEIGHT
    base: int = _HEIGHT - _MARGIN  # y of the axis


@dataclass
class NameCounts:
    """The most frequent names with their counts."""

    title: str
    summary: str
    rows: list[tuple[str, str, float]]  # name, count, its percentage of the highest count


def bins_of(values: Sequence[int]) -> tuple[int, list[int]]:
    """Returns the width of a bin, and how many values each holds: bin i is i * width <= value < (i + 1) * width."""
    width = max(values) // _MAX_BARS + 1
    counts = Counter(value // width for value in values)
    return width, [counts[number] for number in range(max(counts) + 1)]


def histogram(title: str, values: Sequence[int], limit: tuple[str, int] | None = None) -> Histogram:
    """Returns how often each value occurs; `limit` (name, value) becomes a line when the scale reaches it."""
    if not values:
        return Histogram(title)
    ordered = sorted(values)
    median, mean = ordered[len(ordered) // 2], sum(ordered) / len(ordered)
    out = Histogram(title, f"median {median}, mean {mean:.1f}, max {ordered[-1]}")
    width, counts = bins_of(values)
    step = _WIDTH / max(len(counts), 8)
    for number, count in enumerate(counts):
        if count:
            height = max(1.0, (out.base - 14) * count / max(counts))
            span = f"{number * width}" if width == 1 else f"{number * width} to {(number + 1) * width - 1}"
            hint = f"{span}: {count:,}"
            out.bars.append(Bar(number * step + 0.5, out.base - height, max(step - 1, 0.5), height, hint))
    every = max(1, -(-len(counts) // 8))
    out.labels = [((number + 0.5) * step, str(number * width)) for number in range(0, len(counts), every)]
    if limit is not None and limit[1] // width < len(counts):
        x = (limit[1] // width + 1) * step
        out.limit = Limit(limit[0], x, *((x - 3, "end") if x > _WIDTH / 2 else (x + 3, "start")))
    return out


def name_counts(title: str, counts: Counter[str], num: int) -> NameCounts:
    """Returns the `num` most frequent names."""
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:num]
    rows = [(name, f"{count:,}", 100 * count / top[0][1]) for name, count in top]
    return NameCounts(title, f"{len(counts):,} different, {sum(counts.values()):,} in all", rows)
