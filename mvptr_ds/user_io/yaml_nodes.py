"""YAML whose values are still text, so that what a value is for decides how it is read.

PyYAML reads by the look of a value: `2026_11_29` is 20261129 to it, `0123` is 83, `12:30:45` is 45045, `1e-4` is text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any, TypeAlias

import yaml

from mvptr_ds.user_io.user_files import given_twice

NULLS = ("", "~", "null", "Null", "NULL")
BOOLEANS = {
    text: value
    for value, words in ((True, ("true", "yes", "on")), (False, ("false", "no", "off")))
    for word in words
    for text in (word, word.capitalize(), word.upper())
}
_INTEGER = re.compile(r"[+-]?\d+(_\d+)*", re.ASCII)
_DECIMAL = re.compile(r"[+-]?(\d[\d_]*(\.[\d_]*)?|\.\d[\d_]*)(e[+-]?\d+)?", re.ASCII | re.IGNORECASE)
_TAG = "tag:yaml.org,2002:"
_KNOWN_TAGS = {_TAG + name for name in ("bool", "float", "int", "map", "null", "seq", "str", "timestamp", "value")}


@dataclass(frozen=True)
class Node:
    """A value, a list or a mapping, as it is written; `content` is None for null."""

    content: Content
    place: str = ""  # "FILE, line 3: ", which begins a message
    is_quoted: bool = False


Content: TypeAlias = "str | list[Node] | dict[str, Node] | None"


def parse_yaml(text: str, origin: str, has_lines: bool = True) -> Node:
    """Returns what the YAML says, if each mapping says each key once.

    Args:
        has_lines: whether messages about a value begin with its place.

    Raises:
        ValueError: it is not YAML, has a tag that is none of data, or gives a key twice, with the lines.
    """
    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        composed = _Composed(origin if has_lines else "")
        found = Node(None) if root is None else composed.node(root, "")
    except (yaml.YAMLError, RecursionError) as error:
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error
    if composed.problems:
        raise ValueError(f"{origin}: {'; '.join(composed.problems)}")
    return found


class _Composed:
    """PyYAML's nodes as ours; what is wrong with them is collected."""

    def __init__(self, origin: str) -> None:
        self.origin = origin
        self.problems: list[str] = []
        self._done: dict[int, Node] = {}  # what an alias stands for is read once

    def node(self, node: yaml.Node, path: str) -> Node:
        if id(node) not in self._done:
            line = node.start_mark.line + 1
            if node.tag not in _KNOWN_TAGS:
                self.problems.append(f"{path or 'line ' + str(line)} has the tag {node.tag}: leave it out")
            self._done[id(node)] = Node(None)  # for what holds itself
            place, is_quoted = f"{self.origin}, line {line}: " if self.origin else "", False
            if isinstance(node, yaml.ScalarNode):
                is_quoted = node.style is not None
                content: Content = None if node.tag == f"{_TAG}null" else node.value
            elif isinstance(node, yaml.SequenceNode):
                content = [self.node(item, path) for item in node.value]
            else:
                assert isinstance(node, yaml.MappingNode)
                content = self._mapping(node, path)
            self._done[id(node)] = Node(content, place, is_quoted)
        return self._done[id(node)]

    def _mapping(self, node: yaml.MappingNode, path: str) -> dict[str, Node]:
        own: dict[str, Node] = {}
        merged: dict[str, Node] = {}
        lines: dict[str, list[int]] = {}
        for key, value in node.value:
            name = f"{path}.{key.value}" if path else str(key.value)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(f"line {key.start_mark.line + 1} has a key that is no text")
                continue
            lines.setdefault(key.value, []).append(key.start_mark.line + 1)
            if key.tag == f"{_TAG}merge":
                merged = self._merged(value, path)
            else:
                own[key.value] = self.node(value, name)
        for key_text, where in lines.items():
            if len(where) > 1:
                self.problems.append(given_twice(f"{path}.{key_text}" if path else key_text, where))
        return merged | own

    def _merged(self, node: yaml.Node, path: str) -> dict[str, Node]:
        """What `<<` takes over: of a mapping, or of a list of them, of which the first counts most."""
        found: dict[str, Node] = {}
        for part in reversed(node.value if isinstance(node, yaml.SequenceNode) else [node]):
            content = self.node(part, path).content
            if isinstance(content, dict):
                found |= content
            else:
                self.problems.append(f"line {node.start_mark.line + 1} merges what is no mapping")
        return found


def parse_argument(text: str, origin: str) -> Node:
    """Returns the value of `section.key=value`: as it stands, unless brackets or quotes say that it is YAML."""
    if text.lstrip()[:1] in tuple("[{'\""):
        return parse_yaml(text, origin, has_lines=False)
    return Node(None if text.strip() in NULLS else text)


def plain(node: Node) -> Any:
    """Returns the value where nothing says what it is for: null, a boolean, a number, or text."""
    content = node.content
    if isinstance(content, dict):
        return {key: plain(value) for key, value in content.items()}
    if isinstance(content, list):
        return [plain(item) for item in content]
    return content if content is None or node.is_quoted else _plain_text(content)


def _plain_text(text: str) -> Any:
    if text in BOOLEANS:
        return BOOLEANS[text]
    number = number_of(text)
    return text if number is None else number


def number_of(text: str) -> int | float | None:
    """Returns the number that a text looks like (`0100` 100, `1_000` 1000, `1e-4` 0.0001), None for any other text."""
    text = text.strip()
    if _INTEGER.fullmatch(text):
        return int(text) if len(text) < 300 else None  # what a float can hold
    if not _DECIMAL.fullmatch(text):
        return None
    try:
        number = float(text)
    except ValueError:  # underscores elsewhere than between digits
        return None
    return number if math.isfinite(number) else None


def dump_yaml(tree: Any) -> str:
    """Writes YAML that `parse_yaml` reads back to the same tree, by `plain` or by what its values are for."""
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False)


class _Dumper(yaml.SafeDumper):
    """PyYAML's, but text that looks like something else to us is quoted, too."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    looks_else = text in NULLS or not isinstance(_plain_text(text), str)
    return dumper.represent_scalar(f"{_TAG}str", text, style="'" if looks_else else None)


_Dumper.add_representer(str, _represent_text)
