"""Draws answers as HTML and SVG without scripts: hovering is done by the style sheet.

`Markup.format` escapes every text that is put into it, and `readable` spells out what a reader cannot see in it.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup
from PIL import Image

from mvptr_ds.corpus.preview.card import place_labels, segments
from mvptr_ds.corpus.preview.render import readable, shortened
from mvptr_ds.data.schema import Phrase
from mvptr_ds.demo_page.answers import Found, HeldOut, ReadOut, Search
from mvptr_ds.errors import DataError
from mvptr_ds.inference import Grounding, Picture
from mvptr_ds.inference.pictures import rgb_of

COLOURS = ("#c2352b", "#1d66b8", "#2c7a3d", "#8341ad", "#b35900", "#00767f", "#b0186a", "#6b5200")
MAX_PHRASES, MAX_REGIONS = 24, 100  # of one drawing; the rest is counted
_DRAWING_SIZE, _THUMBNAIL_SIZE = 520, 200  # pixels and units of the longer side
_JPEG_QUALITY = 85
_MAX_WORDS = 60  # characters of a tag or a word

Box = tuple[float, float, float, float]


class Sheet(NamedTuple):
    """What stands behind the boxes: a picture, or a plain sheet where there is none."""

    width: float  # units of the drawing
    height: float
    scale: float  # units a pixel of the original
    uri: str | None


def style() -> str:
    """Returns the style sheet of the page, with a rule for every phrase and region that can be hovered."""
    rules = [(Path(__file__).parent / "page.css").read_text(encoding="utf-8")]
    for number in range(MAX_PHRASES):
        on = f".mv-ground:has(.mv-p{number}:hover), .mv-ground:has(.mv-p{number}:focus)"
        one, two = on.split(", ")
        rules.append(f"{one} .mv-s{number}, {two} .mv-s{number} {{ display: inline; }}")
        rules.append(f"{one} .mv-best:not(.mv-b{number}), {two} .mv-best:not(.mv-b{number}) {{ display: none; }}")
    rules += [f".mv-ground:has(.mv-r{r}:hover) .mv-t{r} {{ display: block; }}" for r in range(MAX_REGIONS)]
    return "\n".join(rules)


def message(text: str) -> Markup:
    """Returns a message that says what to do differently."""
    return _filled('<p class="mv-problem" role="alert">{}</p>', text)


def sheet_of(picture: Picture, longest: int = _DRAWING_SIZE) -> Sheet:
    """Returns a picture as the page shows it, at most `longest` pixels wide and high.

    Raises:
        DataError: it cannot be decoded.
    """
    if picture.image is None:
        if picture.size is None:
            raise DataError("there is no picture to show")
        width, height = picture.size
        scale = longest / max(width, height)
        return Sheet(width * scale, height * scale, scale, None)
    rgb = rgb_of(picture.image)
    scale = longest / max(rgb.size)
    shown = (max(1, round(rgb.width * scale)), max(1, round(rgb.height * scale)))
    buffer = io.BytesIO()
    smaller = rgb if scale >= 1 else rgb.resize(shown, Image.Resampling.BICUBIC)
    smaller.save(buffer, "JPEG", quality=_JPEG_QUALITY)
    uri = "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return Sheet(rgb.width * scale, rgb.height * scale, scale, uri)


def chosen(picture: Picture) -> Markup:
    """Returns a picture with the boxes and tags that the model is given; hovering shows a tag."""
    sheet = sheet_of(picture)
    boxes: list[Box] = [] if picture.boxes is None else [tuple(box) for box in picture.boxes][:MAX_REGIONS]
    tags = _tags(picture, len(boxes))
    regions = [
        _filled('<g class="mv-region"><title>{}</title>{}</g>', tag or "no tag", _rectangle(box, sheet))
        for box, tag in zip(boxes, tags, strict=True)
    ]
    said = ", ".join(tag for tag in tags if tag)
    if not boxes:
        note = "No boxes: the model reads the cells of a grid."
    elif said:
        note = f"{len(boxes)} regions with the tags {said}"
    else:
        note = f"{len(boxes)} regions without tags"
    return _filled('<div class="mv-chosen">{}<p class="mv-note">{}</p></div>', _svg(sheet, regions), note)


def grounding(picture: Picture, sentence: str, found: Sequence[Grounding]) -> Markup:
    """Returns a sentence with its phrases in colours, and the picture with the region of each.

    Hovering a phrase shows its score on every region, hovering a region the scores of all phrases for it.
    """
    shown = list(found[:MAX_PHRASES])
    sheet = sheet_of(picture)
    boxes = shown[0].boxes[:MAX_REGIONS]
    tags = _tags(picture, len(boxes))
    names = [" ".join(one.phrase) for one in shown]
    regions, tips = [], []
    for r, (box, tag) in enumerate(zip(boxes, tags, strict=True)):
        title = "; ".join(f"{name} {one.scores[r]:.2f}" for name, one in zip(names, shown, strict=True))
        head = f"region {r}" + (f", {tag}" if tag else "")
        regions.append(
            _filled(
                '<g class="mv-region mv-r{}"><title>{}</title>{}</g>', r, f"{head}: {title}", _rectangle(box, sheet)
            )
        )
        rows = [
            _filled('<li><i style="background: {}"></i>{} <b>{}</b></li>', _colour(p), name, f"{one.scores[r]:.2f}")
            for p, (name, one) in enumerate(zip(names, shown, strict=True))
        ]
        tips.append(_filled('<div class="mv-tip mv-t{}"><b>{}</b><ul>{}</ul></div>', r, head, _joined(rows)))
    best = _best_boxes(shown, names, sheet)
    scores = [_scores(p, one, boxes, sheet) for p, one in enumerate(shown)]
    chips = [
        _filled(
            '<li tabindex="0" class="mv-chip mv-p{}" style="border-color: {}">'
            '<i style="background: {}"></i>{} <b>{}</b></li>',
            *(p, _colour(p), _colour(p), name, f"{one.score:.2f}"),
        )
        for p, (name, one) in enumerate(zip(names, shown, strict=True))
    ]
    hidden = [_more(len(found) - len(shown), "phrases"), _more(len(shown[0].boxes) - len(boxes), "regions")]
    return _filled(
        '<div class="mv-ground"><p class="mv-sentence">{}</p><ul class="mv-chips">{}</ul>{}'
        '<div class="mv-tips"><p class="mv-note">Hover a phrase for its score on every region, or a region for the '
        "scores of all phrases. {}</p>{}</div></div>",
        *(_coloured(sentence, shown), _joined(chips), _svg(sheet, [*regions, *best, *scores])),
        *(" ".join(filter(None, hidden)), _joined(tips)),
    )


def search(result: Search, held_out: Sequence[HeldOut]) -> Markup:
    """Returns the pictures that a search found, by each read-out, side by side."""
    columns = (("by the global states", "cosine", result.by_similarity), ("re-ranked", "match", result.reranked))
    return _filled(
        '<div class="mv-columns">{}</div>',
        _joined(
            _filled(
                "<section><h3>{}</h3><ol>{}</ol></section>", head, _joined(_hit(one, unit, held_out) for one in found)
            )
            for head, unit, found in columns
        ),
    )


def _hit(found: Found, unit: str, held_out: Sequence[HeldOut]) -> Markup:
    one = held_out[found.number]
    caption = one.captions[0] if one.captions else ""
    return _filled(
        '<li title="{}">{}<span><b>{} {}</b> picture {}</span></li>',
        *(shortened(caption, 200), _svg(sheet_of(one.picture, _THUMBNAIL_SIZE), []), unit, f"{found.score:.2f}"),
        found.number,
    )


def comparison(read_outs: Sequence[ReadOut], first: str, second: str) -> Markup:
    """Returns a table of the read-outs: what each gives both captions, and which one it holds for true."""
    rows = []
    for one in read_outs:
        cells = [
            _filled('<td class="{}">{}</td>', "mv-true" if one.true_one == n else "", _number(score))
            for n, score in enumerate((one.first, one.second))
        ]
        verdict = {0: "the first", 1: "the second", None: one.note or "neither"}[one.true_one]
        rows.append(_filled("<tr><th>{}</th>{}<td>{}</td></tr>", one.name, _joined(cells), verdict))
    return _filled(
        '<table class="mv-table"><thead><tr><th>read-out</th><th>{}</th><th>{}</th><th>held for true</th></tr></thead>'
        "<tbody>{}</tbody></table>",
        *(first, second, _joined(rows)),
    )


def filled_masks(words: Sequence[Sequence[tuple[str, float]]]) -> Markup:
    """Returns the likeliest words of each mask, with bars of their probabilities."""
    return _joined(
        _filled(
            '<section class="mv-mask"><h3>mask {}</h3><table class="mv-table">{}</table></section>',
            number + 1,
            _joined(
                _filled(
                    '<tr><th>{}</th><td><i class="mv-bar" style="width: {}%"></i></td><td>{}</td></tr>',
                    *(shortened(word, _MAX_WORDS), f"{100 * chance:.1f}", f"{chance:.3f}"),
                )
                for word, chance in likeliest
            ),
        )
        for number, likeliest in enumerate(words)
    )


def _filled(template: str, *values: Any) -> Markup:
    """Returns a template of this file with values in it; all but markup is escaped."""
    shown = [readable(value) if isinstance(value, str) and not isinstance(value, Markup) else value for value in values]
    return Markup(template).format(*shown)


def _joined(parts: Any) -> Markup:
    return Markup("").join(parts)


def _colour(phrase: int) -> str:
    return COLOURS[phrase % len(COLOURS)]


def _number(score: float | None) -> str:
    return "none" if score is None else f"{score:.4f}"


def _more(num: int, what: str) -> str:
    return f"{num} more {what} are not shown." if num > 0 else ""


def _tags(picture: Picture, num: int) -> list[str]:
    tags = [shortened(str(tag), _MAX_WORDS) for tag in picture.tags or ()][:num]
    return tags + [""] * (num - len(tags))


def _svg(sheet: Sheet, parts: Sequence[Markup]) -> Markup:
    size = f"{sheet.width:.0f}", f"{sheet.height:.0f}"
    if sheet.uri is None:
        behind = _filled('<rect class="mv-sheet" width="{}" height="{}"/>', *size)
    else:
        behind = _filled('<image href="{}" preserveAspectRatio="none" width="{}" height="{}"/>', sheet.uri, *size)
    return _filled('<svg viewBox="0 0 {} {}" role="img">{}{}</svg>', *size, behind, _joined(parts))


def _place(box: Box, sheet: Sheet) -> Box:
    """Returns a box in units of the drawing, cut to it."""
    x1, y1, x2, y2 = (float(value) * sheet.scale for value in box)
    return max(0.0, x1), max(0.0, y1), min(sheet.width, x2), min(sheet.height, y2)


def _rectangle(box: Box, sheet: Sheet, options: str = "") -> Markup:
    x1, y1, x2, y2 = _place(box, sheet)
    return Markup('<rect x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"{}/>').format(
        x1, y1, max(1.0, x2 - x1), max(1.0, y2 - y1), Markup(options)
    )


def _best_boxes(found: Sequence[Grounding], names: Sequence[str], sheet: Sheet) -> list[Markup]:
    """Returns the best region of each phrase, then the labels of all, so that no box covers a label."""
    names = [shortened(name, 40) for name in names]
    places = [_place(one.box, sheet) for one in found]
    labels = place_labels(places, names, sheet.width, sheet.height)
    seen: dict[Box, int] = {}
    outlines, labelled = [], []
    for p, (one, name, (label, _)) in enumerate(zip(found, names, labels, strict=True)):
        inset = 4.0 * seen.get(one.box, 0)  # phrases of one region lie inside each other
        seen[one.box] = seen.get(one.box, 0) + 1
        x1, y1, x2, y2 = places[p]
        inset = min(inset, (x2 - x1) / 3, (y2 - y1) / 3)
        pixels = inset / sheet.scale
        inner = (one.box[0] + pixels, one.box[1] + pixels, one.box[2] - pixels, one.box[3] - pixels)
        outline = _rectangle(inner, sheet, f' stroke="{_colour(p)}"')
        outlines.append(_filled('<g class="mv-best mv-outline mv-b{}">{}</g>', p, outline))
        labelled.append(
            _filled(
                '<g class="mv-best mv-b{}"><rect x="{}" y="{}" width="{}" height="15" fill="{}"/>'
                '<text x="{}" y="{}">{}</text></g>',
                *(p, f"{label[0]:.1f}", f"{label[1]:.1f}", f"{label[2] - label[0]:.1f}", _colour(p)),
                *(f"{label[0] + 4:.1f}", f"{label[1] + 11.5:.1f}", name),
            )
        )
    return outlines + labelled


def _scores(phrase: int, found: Grounding, boxes: Sequence[Box], sheet: Sheet) -> Markup:
    """Returns the score of a phrase on every region, which is shown while the phrase is hovered."""
    texts = []
    for box, score in zip(boxes, found.scores, strict=False):
        x1, y1, x2, y2 = _place(box, sheet)
        texts.append(
            _filled(
                '<text x="{}" y="{}" fill="{}">{}</text>',
                *(f"{(x1 + x2) / 2:.1f}", f"{(y1 + y2) / 2 + 5:.1f}", _colour(phrase), f"{score:.2f}"),
            )
        )
    return _filled('<g class="mv-scores mv-s{}">{}</g>', phrase, _joined(texts))


def _coloured(sentence: str, found: Sequence[Grounding]) -> Markup:
    """Returns a sentence in which every phrase underlines its words in its colour."""
    phrases = [Phrase(one.phrase, one.spans) for one in found]
    parts = []
    for begin, end, covering in segments(len(sentence), phrases):
        text = sentence[begin:end]
        if not covering:
            parts.append(_filled("{}", text))
            continue
        lines = ", ".join(f"0 {3 * (n + 1)}px 0 {_colour(p)}" for n, p in enumerate(covering[:4]))
        longest = max(covering, key=lambda p: len(phrases[p].tuple) if len(phrases[p].tuple) < 3 else 0)
        parts.append(
            _filled('<span class="mv-mark mv-p{}" style="box-shadow: {}">{}</span>', longest, Markup(lines), text)
        )
    return _joined(parts)
