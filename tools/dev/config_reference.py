#!/usr/bin/env python3
"""Writes the reference of every configuration key, docs/configuration.md, from config.py and the packaged YAML files.

The page down to the line MADE is written by hand; what follows it is made. Keys, choices, ranges and defaults come from
the dataclasses, meanings from the texts below their fields.
"""

from __future__ import annotations

import argparse
import ast
import dataclasses
import inspect
import sys
import textwrap
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

REPO = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPO))

if __name__ == "__main__":
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

from mvptr_ds.config import STAGES, Config
from mvptr_ds.config_reading import CONFIGS_DIR, PATH, class_of_named_sections, range_of
from mvptr_ds.user_io.terminal import accept_any_text

PAGE = REPO / "docs/configuration.md"
MADE = "<!-- From here on the page is made by: python tools/dev/config_reference.py -->"
PRETRAINING = [name for name in STAGES if Config().pretraining(name) is not None]
KINDS = {bool: "true or false", int: "integer", float: "number", str: "text"}


class Key(NamedTuple):
    name: str
    kind: str
    defaults: list[Any]  # one for each section of the class
    meaning: str


def meanings_of(cls: type) -> dict[str, str]:
    """The text below each field of a dataclass and of those it is derived from, by the field's name."""
    base = cls.__mro__[1]
    inherited = meanings_of(base) if dataclasses.is_dataclass(base) else {}
    (body,) = ast.parse(textwrap.dedent(inspect.getsource(cls))).body
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, text in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
            assert isinstance(field.target, ast.Name)
            found[field.target.id] = " ".join(str(text.value.value).split())
    return inherited | found


def keys_of(sections: list[Any], prefix: str) -> Iterator[Key]:
    """Every key of sections of one class, in the order of the fields; `sections` give the defaults."""
    meanings = meanings_of(type(sections[0]))
    for name, hint in typing.get_type_hints(type(sections[0]), include_extras=True).items():
        values = [getattr(section, name) for section in sections]
        named = class_of_named_sections(hint)
        if dataclasses.is_dataclass(values[0]):
            yield from keys_of(values, f"{prefix}{name}.")
            continue
        yield Key(f"{prefix}{name}", kind_of(hint), values, meanings.get(name, ""))
        if named is not None:
            yield from keys_of([named()], f"{prefix}{name}.NAME.")


def kind_of(hint: Any) -> str:
    """What a value may be, in words."""
    marks = getattr(hint, "__metadata__", ())
    allowed = range_of(hint) if marks else None
    hint = hint.__origin__ if marks else hint
    args = typing.get_args(hint)
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in args)
    if type(None) in args:
        return f"{kind_of(next(a for a in args if a is not type(None)))}, or `null`"
    if typing.get_origin(hint) is list:
        return f"list of: {kind_of(args[0])}"
    if typing.get_origin(hint) is dict:
        return "sections by name" if class_of_named_sections(hint) else "mapping"
    if PATH in marks:
        return "path"
    return f"{KINDS[hint]}, {allowed}" if allowed else KINDS[hint]


def defaults_of(key: Key) -> str:
    """The default; where the stages have several, the most frequent one and the stages of the others."""
    texts = [f"`{_as_argument(value)}`" for value in key.defaults]
    usual = max(texts, key=texts.count)
    others = [f"{stage}: {text}" for stage, text in zip(PRETRAINING, texts, strict=False) if text != usual]
    return f"{usual} ({', '.join(others)})" if others else usual


def _as_argument(value: Any) -> str:
    """A value as `section.key=value` takes it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list):
        return f"[{', '.join(map(str, value))}]"
    return str(value) if value != "" else "''"


def sections() -> Iterator[tuple[str, list[Any], str]]:
    """Heading, sections of one class, and what their keys begin with."""
    config = Config()
    for name in typing.get_type_hints(Config):
        if name not in PRETRAINING:
            yield f"`{name}`", [getattr(config, name)], f"{name}."
        elif name == PRETRAINING[0]:
            stages = ", ".join(f"`{stage}`" for stage in PRETRAINING)
            yield stages, [getattr(config, stage) for stage in PRETRAINING], "STAGE."


def reference() -> str:
    """The part of the page that is made."""
    lines = [MADE, "", "## Packaged configurations", "", "| name | what it is |", "| --- | --- |"]
    for path in sorted(CONFIGS_DIR.glob("*.yaml")):
        first, _, _ = path.read_text(encoding="utf-8").partition("\n")
        link = f"[{path.stem}](../{path.relative_to(REPO)})"
        lines.append(f"| {link} | {first.removeprefix('# ').replace('|', chr(92) + '|')} |")
    for heading, same_class, prefix in sections():
        doc = inspect.getdoc(type(same_class[0])) or ""
        lines += ["", f"## {heading}", "", " ".join(doc.split())]
        if prefix == "STAGE.":
            lines[-1] += f" STAGE stands for {', '.join(PRETRAINING[:-1])} or {PRETRAINING[-1]}."
        lines += ["", "| key | value | default | meaning |", "| --- | --- | --- | --- |"]
        for key in keys_of(same_class, prefix):
            cells = (f"`{key.name}`", key.kind, defaults_of(key), key.meaning.replace("|", "\\|"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def current_page() -> str:
    """The page as it should be: its part by hand, and the reference.

    Raises:
        ValueError: the page has no line MADE.
    """
    by_hand, found, _ = PAGE.read_text(encoding="utf-8").partition(MADE)
    if not found:
        raise ValueError(f"{PAGE} lacks the line {MADE}")
    return by_hand + reference()


def main() -> int:
    """Returns the exit status."""
    accept_any_text()
    parser = argparse.ArgumentParser(description=__doc__, epilog="Exit status: 0 done, 1 --check found differences.")
    parser.add_argument("--check", action="store_true", help="write nothing; say whether the page is current")
    arguments = parser.parse_args()
    page = current_page()
    if not arguments.check:
        PAGE.write_text(page, encoding="utf-8")
    elif PAGE.read_text(encoding="utf-8") != page:
        print(f"{PAGE.relative_to(REPO)} is not current: run python tools/dev/config_reference.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
