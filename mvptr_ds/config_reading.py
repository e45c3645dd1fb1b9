"""From nodes of YAML to the values of dataclasses: by annotation, with everything that is wrong at once.

What an annotation can say besides the type stands in `Annotated`: the Range of a number, PATH of a text.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from mvptr_ds.user_io.user_files import expanded
from mvptr_ds.user_io.yaml_nodes import BOOLEANS, Node, number_of, parse_argument, plain

PATH = "path"  # a text that names a file, a folder or a URL: its `~` is expanded


@dataclass(frozen=True)
class Range:
    """The numbers from `least` to `most`; an end that is open is not one of them."""

    least: float
    most: float = math.inf
    least_is_open: bool = False
    most_is_open: bool = False

    def __contains__(self, number: float) -> bool:
        above = number > self.least if self.least_is_open else number >= self.least
        below = number < self.most if self.most_is_open else number <= self.most
        return above and below and math.isfinite(number)

    def __str__(self) -> str:
        lower = f"{'above' if self.least_is_open else 'at least'} {self.least}"
        if self.most == math.inf:
            return lower
        return f"{lower} and {'below' if self.most_is_open else 'at most'} {self.most}"


def conclude(problems: Sequence[str]) -> None:
    """Raises ValueError if there are problems: one as it is, several as a list."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"the configuration has {len(problems)} errors:\n  - " + "\n  - ".join(problems))


class Overlay:
    """Lays what users write over a tree of dataclasses; `problems` collects what does not fit."""

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.problems: list[str] = []

    def add(self, node: Node) -> None:
        """A mapping of sections, of which each says what differs."""
        self._section(self.tree, node, "")

    def add_argument(self, argument: str) -> None:
        """`section.key=value`."""
        key, equals, value = argument.partition("=")
        if not equals or not key:
            self.problems.append(f"cannot read the argument {argument!r}; overrides look like train.batch_size=64")
            return
        try:
            node = parse_argument(value, argument)
        except ValueError as error:
            self.problems.append(str(error))
            return
        for name in reversed(key.split(".")):
            node = Node({name: node})
        self.add(node)

    def _section(self, out: Any, node: Node, prefix: str) -> None:
        content = node.content
        if not isinstance(content, dict):
            name = prefix.rstrip(".") or "the configuration"
            self.problems.append(f"{node.place}{name} is {plain(node)!r}, expected a section with keys")
            return
        hints = typing.get_type_hints(type(out), include_extras=True)
        for key, value in content.items():
            name = f"{prefix}{key}"
            if key not in hints:
                near = self._near(name, [f"{prefix}{known}" for known in hints])
                self.problems.append(f"{value.place}unknown configuration key {name!r}; {near}")
                continue
            old = getattr(out, key)
            named = _class_of_named_sections(hints[key])
            if named is not None:
                setattr(out, key, self._named_sections(named, value, f"{name}.", old))
            elif dataclasses.is_dataclass(old):
                self._section(old, value, f"{name}.")
            else:
                setattr(out, key, self._value(value, hints[key], name, old))

    def _named_sections(self, cls: type, node: Node, prefix: str, old: dict[str, Any]) -> dict[str, Any]:
        """The old sections with those of the node laid over them; null takes one away, and in place of all, all."""
        content = node.content
        if content is None:
            return {}
        if not isinstance(content, dict):
            self.problems.append(f"{node.place}{prefix.rstrip('.')} is {plain(node)!r}, expected sections by name")
            return old
        out = dict(old)
        for name, part in content.items():
            if part.content is None:
                out.pop(name, None)
            else:
                self._section(out.setdefault(name, cls()), part, f"{prefix}{name}.")
        return out

    def _value(self, node: Node, hint: Any, name: str, old: Any) -> Any:
        """The node as a value of the annotation; `old` where it is none."""
        try:
            return _coerced(node, hint)
        except _Misfit as misfit:
            wanted = misfit.args[0]
            self.problems.append(f"{misfit.node.place}{name} is {plain(misfit.node)!r}, expected {wanted}")
        except ValueError as error:
            self.problems.append(f"{node.place}{name}: {error}")
        return old

    def _near(self, name: str, of_section: Sequence[str]) -> str:
        """What a wrong key may have meant: the same word elsewhere, one like it here, one like it elsewhere."""
        everywhere = list(_names(type(self.tree)))
        if name in everywhere:
            return f"a file says it in sections, as in {name.replace('.', ': {')}: ...{'}' * name.count('.')}"
        word = _word(name)
        parts = set(name.split("."))
        same = sorted((n for n in everywhere if _word(n) == word), key=lambda n: -len(parts & set(n.split("."))))[:3]
        here, elsewhere = _like(word, of_section, 0.5), _like(word, everywhere, 0.8)
        found = same or (_like(word, of_section, 0.8) and here) or elsewhere or here or sorted(of_section)
        return f"did you mean {', '.join(found)}?"


class _Misfit(ValueError):
    """A node that is no value of its annotation; says what would be."""

    def __init__(self, node: Node, wanted: str) -> None:
        super().__init__(wanted)
        self.node = node


def _coerced(node: Node, hint: Any) -> Any:
    content, marks = node.content, ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, marks = hint.__origin__, hint.__metadata__
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if content is None and type(None) in args:
            return None
        return _coerced(node, next(a for a in args if a is not type(None)))
    if origin is list:
        return [_coerced(item, args[0]) for item in (content if isinstance(content, list) else [node])]
    if origin is dict:
        if isinstance(content, dict):
            return plain(node)
    elif isinstance(content, str):
        if hint is str:
            return expanded(content) if PATH in marks else content
        if hint is bool and content in BOOLEANS:
            return BOOLEANS[content]
        number = number_of(content)
        if hint in (int, float) and number is not None and (hint is float or number == int(number)):
            return hint(number)
    raise _Misfit(node, hint.__name__ if isinstance(hint, type) else str(hint))


def out_of_range(section: Any, prefix: str = "") -> Iterator[str]:
    """What is wrong with each number of a tree that is not in the Range of its annotation, which each must have."""
    for key, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value, name = getattr(section, key), f"{prefix}{key}"
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{name}.")
        elif _class_of_named_sections(hint) is not None:
            for own_name, named in value.items():
                yield from out_of_range(named, f"{name}.{own_name}.")
        else:
            for number in value if isinstance(value, list) else [value]:
                if isinstance(number, (int, float)) and not isinstance(number, bool):
                    allowed = range_of(hint)
                    assert allowed is not None, f"{name} is declared without a Range"
                    if number not in allowed:
                        yield f"{name} is {number}, must be {allowed}"


def range_of(hint: Any) -> Range | None:
    """The Range that an annotation holds anywhere in it."""
    marks = hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()
    found = [mark for mark in marks if isinstance(mark, Range)]
    found += [inner for inner in map(range_of, typing.get_args(hint)) if inner is not None]
    return found[0] if found else None


def _class_of_named_sections(hint: Any) -> type | None:
    """The dataclass of a section that the user names, where the annotation is dict[str, dataclass]."""
    args = typing.get_args(hint)
    is_named = typing.get_origin(hint) is dict and dataclasses.is_dataclass(args[1])
    return typing.cast(type, args[1]) if is_named else None


def _names(cls: type, prefix: str = "") -> Iterator[str]:
    """Of all sections and keys, as overrides write them; NAME stands for one that the user gives."""
    for key, hint in typing.get_type_hints(cls).items():
        yield f"{prefix}{key}"
        named = _class_of_named_sections(hint)
        if named is not None:
            yield from _names(named, f"{prefix}{key}.NAME.")
        elif dataclasses.is_dataclass(hint):
            yield from _names(typing.cast(type, hint), f"{prefix}{key}.")


def _word(name: str) -> str:
    return name.rpartition(".")[2]


def _like(word: str, names: Sequence[str], cutoff: float) -> list[str]:
    """The names whose last words are like this one, the likest first; three words at most."""
    words = difflib.get_close_matches(word, dict.fromkeys(map(_word, names)), n=3, cutoff=cutoff)
    return [name for near in words for name in names if _word(name) == near]
