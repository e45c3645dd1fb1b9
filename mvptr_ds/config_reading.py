"""From YAML files and arguments to dataclasses: by annotation, with everything that is wrong at once.

An annotation is a type, `Literal` with the choices of a text, or `Annotated` with the Range of a number or PATH for a
text that names a file.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from mvptr_ds.user_io.user_files import expanded, read_text
from mvptr_ds.user_io.yaml_nodes import BOOLEANS, Node, number_of, parse_argument, parse_yaml, plain

CONFIGS_DIR = Path(__file__).resolve().parent / "configs"
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


PathText = Annotated[str, PATH]
Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(0, least_is_open=True)]
Share = Annotated[float, Range(0, 1)]
Below1 = Annotated[float, Range(0, 1, most_is_open=True)]


def conclude(problems: Sequence[str]) -> None:
    """Raises ValueError if there are problems: one as it is, several as a list."""
    if len(problems) == 1:
        raise ValueError(problems[0])
    if problems:
        raise ValueError(f"the configuration has {len(problems)} errors:\n  - " + "\n  - ".join(problems))


def layers_of(path: Path, inner: tuple[Path, ...] = ()) -> list[Node]:
    """Returns the YAML of a file, and before it that of the files that it extends.

    Raises:
        ValueError: a file extends itself or what is no file, or is not YAML.
    """
    if path.resolve() in [other.resolve() for other in inner]:
        raise ValueError(f"{path} extends itself, through {', '.join(map(str, inner))}")
    node = parse_yaml(read_text(path), str(path))
    if node.content is None:  # nothing is said
        return []
    if not isinstance(node.content, dict) or "extends" not in node.content:
        return [node]
    base = node.content["extends"].content
    if isinstance(base, (list, dict)):
        found = plain(node.content["extends"])
        raise ValueError(f"{path}: extends is {found!r}, expected one file or the name of a packaged configuration")
    own = dataclasses.replace(node, content={key: part for key, part in node.content.items() if key != "extends"})
    return [own] if base is None else [*layers_of(find_config(base, path), (*inner, path)), own]


def find_config(path: str | Path, extended_by: Path | None = None) -> Path:
    """Returns the file of that path or, with or without `.yaml`, the packaged configuration of that name.

    Args:
        extended_by: the file that names it after `extends`, beside which it may lie.

    Raises:
        ValueError: there is none, or it is a folder.
    """
    path = Path(expanded(str(path)))
    candidates = [path, CONFIGS_DIR / path, CONFIGS_DIR / f"{path}.yaml"]
    if extended_by is not None and extended_by.parent == CONFIGS_DIR:  # packaged ones extend each other
        candidates = candidates[1:]
    elif extended_by is not None:
        candidates.insert(0, extended_by.parent / path)
    own = extended_by.resolve() if extended_by is not None else None
    for candidate in candidates:
        if candidate.is_file() and candidate.resolve() != own:  # mine/base.yaml may extend the packaged base.yaml
            return candidate
    said = f"{extended_by} extends {str(path)!r}, but there" if extended_by is not None else "there"
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a YAML file")
    packaged = ", ".join(sorted(p.stem for p in CONFIGS_DIR.glob("*.yaml")))
    raise ValueError(f"{said} is no config {str(path)!r}; give a YAML file or one of the packaged ones: {packaged}")


class Overlay:
    """Lays what users write over a tree of dataclasses.

    `tree` is the result, made of new sections where something differs. `problems` collects what does not fit.
    """

    def __init__(self, tree: Any) -> None:
        self.tree = tree
        self.problems: list[str] = []

    def add(self, node: Node) -> None:
        """Adds a mapping of sections, of which each says what differs."""
        self.tree = self._section(self.tree, node, "")

    def add_argument(self, argument: str) -> None:
        """Adds one argument, `section.key=value`."""
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

    def _section(self, old: Any, node: Node, prefix: str) -> Any:
        """The old section with the values of the node laid over it."""
        content = node.content
        if not isinstance(content, dict):
            name = prefix.rstrip(".") or "the configuration"
            self.problems.append(f"{node.place}{name} is {plain(node)!r}, expected a section with keys")
            return old
        hints = typing.get_type_hints(type(old), include_extras=True)
        changes = {}
        for key, value in content.items():
            name = f"{prefix}{key}"
            if key not in hints:
                near = self._near(name, [f"{prefix}{known}" for known in hints])
                self.problems.append(f"{value.place}unknown configuration key {name!r}; {near}")
                continue
            old_value = getattr(old, key)
            named = class_of_named_sections(hints[key])
            if named is not None:
                changes[key] = self._named_sections(named, value, f"{name}.", old_value)
            elif dataclasses.is_dataclass(old_value):
                changes[key] = self._section(old_value, value, f"{name}.")
            else:
                changes[key] = self._value(value, hints[key], name, old_value)
        return dataclasses.replace(old, **changes)

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
                out[name] = self._section(out.get(name, cls()), part, f"{prefix}{name}.")
        return out

    def _value(self, node: Node, hint: Any, name: str, old: Any) -> Any:
        """The node as a value of the annotation; `old` where it is none."""
        try:
            return _coerced(node, hint)
        except _Misfit as misfit:
            self.problems.append(f"{misfit.node.place}{name} is {misfit.shown!r}{misfit.args[0]}")
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
    """A node that is no value of its annotation; `ending` of the message says what would be."""

    def __init__(self, node: Node, shown: Any, ending: str) -> None:
        super().__init__(ending)
        self.node, self.shown = node, shown


def _coerced(node: Node, hint: Any) -> Any:
    content, marks = node.content, ()
    if typing.get_origin(hint) is typing.Annotated:
        hint, marks = hint.__origin__, hint.__metadata__
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if content is None and type(None) in args:
            return None
        return _coerced(node, next(a for a in args if a is not type(None)))
    if origin is Literal:
        return _choice(node, args)
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
    raise _Misfit(node, plain(node), f", expected {hint.__name__ if isinstance(hint, type) else str(hint)}")


def _choice(node: Node, choices: Sequence[str]) -> str:
    """The text of the node if it is one of the choices."""
    if not isinstance(node.content, str):
        raise _Misfit(node, plain(node), f"; choose from {', '.join(choices)}")
    if node.content not in choices:
        near = difflib.get_close_matches(node.content.lower(), choices, n=1)
        meant = f"; did you mean {near[0]}?" if near else ""
        raise _Misfit(node, node.content, f"; choose from {', '.join(choices)}{meant}")
    return node.content


def out_of_range(section: Any, prefix: str = "") -> Iterator[str]:
    """Yields what is wrong with each number of a tree outside the Range of its annotation, which each must have."""
    for key, hint in typing.get_type_hints(type(section), include_extras=True).items():
        value, name = getattr(section, key), f"{prefix}{key}"
        if dataclasses.is_dataclass(value):
            yield from out_of_range(value, f"{name}.")
        elif class_of_named_sections(hint) is not None:
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
    """Returns the Range that an annotation holds anywhere in it."""
    marks = hint.__metadata__ if typing.get_origin(hint) is typing.Annotated else ()
    found = [mark for mark in marks if isinstance(mark, Range)]
    found += [inner for inner in map(range_of, typing.get_args(hint)) if inner is not None]
    return found[0] if found else None


def class_of_named_sections(hint: Any) -> type | None:
    """Returns the dataclass of a section that the user names, where the annotation is dict[str, dataclass]."""
    args = typing.get_args(hint)
    is_named = typing.get_origin(hint) is dict and dataclasses.is_dataclass(args[1])
    return typing.cast(type, args[1]) if is_named else None


def _names(cls: type, prefix: str = "") -> Iterator[str]:
    """Lists all sections and keys as overrides write them; NAME stands for one that the user gives."""
    for key, hint in typing.get_type_hints(cls).items():
        yield f"{prefix}{key}"
        named = class_of_named_sections(hint)
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
