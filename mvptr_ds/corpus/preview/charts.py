"""Histograms and bars as inline SVG, coloured by the page's style sheet."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from mvptr_ds.corpus.preview.markup import Html, element, joined, shortened

_WIDTH, _HEIGHT, _MARGIN = 320, 110, 18  # of a histogram, in its own units; the margin is for the numbers below
_MAX_BARS = 40
_MAX_NAME_LEN = 48


def bins_of(values: Sequence[int]) -> tuple[int, list[int]]:
    """Width of a bin, and how many values each bin holds: bin i is i * width <= value < (i + 1) * width."""
    width = max(values) // _MAX_BARS + 1
    counts = Counter(value // width for value in values)
    return width, [counts[number] for number in range(max(counts) + 1)]


def histogram(title: str, values: Sequence[int], limit: tuple[str, int] | None = None) -> Html:
    """How often each length occurs; `limit` (name, value) is drawn as a line when the scale reaches it."""
    if not values:
        return element("figure", element("figcaption", title), element("p", "nothing to count", class_="note"))
    width, counts = bins_of(values)
    step = _WIDTH / max(len(counts), 8)
    base = _HEIGHT - _MARGIN
    bars = []
    for number, count in enumerate(counts):
        if count:
            height = max(1.0, (base - 14) * count / max(counts))
            span = f"{number * width}" if width == 1 else f"{number * width} to {(number + 1) * width - 1}"
            bar = element("title", f"{span}: {count:,}")
            size = {"x": number * step + 0.5, "y": base - height, "width": max(step - 1, 0.5), "height": height}
            bars.append(element("rect", bar, class_="bar", **size))
    every = max(1, -(-len(counts) // 8))
    labels = [
        element("text", str(number * width), x=(number + 0.5) * step, y=_HEIGHT - 4, text_anchor="middle")
        for number in range(0, len(counts), every)
    ]
    line = []
    if limit is not None and limit[1] // width < len(counts):
        x = (limit[1] // width + 1) * step
        line.append(element("line", x1=x, x2=x, y1=4, y2=base, class_="limit"))
        side = ("end", x - 3) if x > _WIDTH / 2 else ("start", x + 3)
        line.append(element("text", limit[0], x=side[1], y=11, text_anchor=side[0], class_="limit"))
    axis = element("line", x1=0, x2=_WIDTH, y1=base, y2=base, class_="axis")
    drawing = joined(axis, *bars, *labels, *line)
    svg = element("svg", drawing, viewBox=f"0 0 {_WIDTH} {_HEIGHT}", role="img", aria_label=title, class_="histogram")
    return element("figure", element("figcaption", title, " ", _summary(values)), svg)


def _summary(values: Sequence[int]) -> Html:
    ordered = sorted(values)
    text = f"median {ordered[len(ordered) // 2]}, mean {sum(ordered) / len(ordered):.1f}, max {ordered[-1]}"
    return element("span", text, class_="note")


def bars(title: str, counts: Counter[str], num: int) -> Html:
    """The `num` most frequent names, with their counts as bars."""
    top = sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:num]
    total = sum(counts.values())
    rows = []
    for name, count in top:
        bar = element("rect", width=100 * count / top[0][1], height=1)
        rows.append(
            element(
                "tr",
                element("th", element("bdi", shortened(name, _MAX_NAME_LEN) or "(empty)"), scope="row"),
                element("td", element("svg", bar, class_="bar", viewBox="0 0 100 1", preserveAspectRatio="none")),
                element("td", f"{count:,}", class_="number"),
            )
        )
    kinds = f"{len(counts):,} different, {total:,} in all"
    content = element("table", *rows, class_="bars") if rows else element("p", "none", class_="note")
    return element("figure", element("figcaption", title, " ", element("span", kinds, class_="note")), content)
