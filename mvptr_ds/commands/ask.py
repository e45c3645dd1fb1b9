"""Asks a trained model about a picture: a question, a statement, an expression, or whether a text describes it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mvptr_ds.user_io.terminal import accept_any_text
from mvptr_ds.user_io.user_files import user_path, whole_number

if TYPE_CHECKING:
    from mvptr_ds.inference.asking import Said

EPILOG = """\
examples:
  %(prog)s runs/vqa dog.jpg "what is left of the dog?" "how many dogs are there?"
  %(prog)s runs/entailment dog.jpg "A dog sleeps."               contradiction, neutral, entailment
  %(prog)s runs/referring dog.jpg "the dog on the left" --out found.png
  %(prog)s runs/mine dog.jpg "a dog on a sofa" --json            does the text describe the picture?

The model decides what is asked. One of vqa gives the best answers, one of referring the boxes of regions in pixels.
A model of pre-training or retrieval gives the probability that text and picture belong together.
Without --detector the regions of a picture are the cells of a grid.
Exit status: 0 done, 1 an error (one line on stderr), 2 wrong usage."""


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status."""
    accept_any_text()
    args = _parser().parse_args(argv)
    # torch and transformers take seconds to import, which --help and wrong usage need not wait for
    from mvptr_ds.errors import USER_ERRORS
    from mvptr_ds.inference.asking import ask_any, task_of
    from mvptr_ds.inference.loading import load

    try:
        model = load(args.model, detector=args.detector)
        said = ask_any(model, args.picture, args.texts, args.num)
        if args.out is not None:
            _draw(args.out, args.picture, args.texts, said)
        print(_as_json(args, task_of(model), said) if args.json else _as_text(args.texts, said))
    except USER_ERRORS as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", type=user_path, metavar="MODEL", help="run, checkpoint, model folder or name on the hub")
    add("picture", type=user_path, metavar="PICTURE", help="a JPEG, PNG or WebP file")
    add("texts", nargs="+", metavar="TEXT", help="questions or other texts about the picture")
    add("--num", type=whole_number(1), default=5, metavar="N", help="answers or regions of a text (%(default)s)")
    add("--detector", metavar="NAME", help="folder or hub name of what finds the regions of the picture")
    add("--out", type=user_path, metavar="FILE", help="draw the picture with what the model says, and boxes, as PNG")
    add("--json", action="store_true", help="print JSON")
    return parser


def _as_text(texts: Sequence[str], said: Sequence[Sequence[Said]]) -> str:
    return "\n".join(
        line for text, of_text in zip(texts, said, strict=True) for line in (text, *(f"  {one}" for one in of_text))
    )


def _as_json(args: argparse.Namespace, task: str, said: Sequence[Sequence[Said]]) -> str:
    texts = [
        {"text": text, "answers": [one.as_json() for one in of_text]}
        for text, of_text in zip(args.texts, said, strict=True)
    ]
    content = {"model": str(args.model), "task": task, "picture": str(args.picture), "texts": texts}
    return json.dumps(content, indent=1, ensure_ascii=False)


def _draw(path: Path, picture: Path, texts: Sequence[str], said: Sequence[Sequence[Said]]) -> None:
    """Draws a panel for each text; the best region is solid."""
    from mvptr_ds.evaluation.panels import PLAIN, DrawnBox, Line, Panel, drawn_sheet
    from mvptr_ds.inference.pictures import rgb_of
    from mvptr_ds.user_io.atomic import replacing

    image, panels = rgb_of(picture), []
    for text, of_text in zip(texts, said, strict=True):
        boxes = [
            DrawnBox(one.box, "tab:red" if place == 1 else PLAIN, "-" if place == 1 else "--", str(place))
            for place, one in enumerate(of_text, start=1)
            if one.box is not None
        ]
        lines = [Line(text), *(Line(str(one)) for one in of_text[:3])]
        panels.append(Panel(image, *image.size, boxes[::-1], lines))  # the best is drawn last
    with replacing(path) as partial:
        partial.write_bytes(drawn_sheet(panels))
