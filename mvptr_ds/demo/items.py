"""What the items of all tasks on demo scenes share: texts with phrases, what is true of a scene, and partner scenes.

The items of a task (questions.py, statements.py, expressions.py) are balanced by construction: a text that is true of
one scene is asked of a partner scene where it is not. So the text alone says nothing of its answer.
"""

from __future__ import annotations

import string
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np

from mvptr_ds.data.schema import Caption, Phrase
from mvptr_ds.demo.captions import SceneObject
from mvptr_ds.demo.relations import clear_relation
from mvptr_ds.demo.scene import Scene

_PARTNER_TRIES = 8


@dataclass(frozen=True)
class Item:
    """A text about one scene, with the labels of its task."""

    scene: int  # number among the scenes that the items were made of
    kind: str  # scores are broken down by it
    text: str
    phrases: tuple[Phrase, ...]
    labels: Mapping[str, Any]

    @property
    def caption(self) -> Caption:
        """The item as a caption of a record."""
        return Caption(self.text, self.phrases, {**self.labels, "kind": self.kind})


class Template(NamedTuple):
    """A text with holes, and which of them make up each phrase: ("Is there a {noun}?", (("noun",),))."""

    text: str
    phrases: tuple[tuple[str, ...], ...] = ()

    def item(self, scene: int, kind: str, labels: Mapping[str, Any], **words: str) -> Item:
        """Fills the holes; the spans of the phrases are the characters of their words."""
        text, spans = "", {}
        for literal, hole, _, _ in string.Formatter().parse(self.text):
            text += literal
            if hole is not None:
                spans[hole] = (len(text), len(text) + len(words[hole]))
                text += words[hole]
        phrases = tuple(
            Phrase(tuple(words[hole] for hole in holes), tuple(spans[hole] for hole in holes)) for holes in self.phrases
        )
        return Item(scene, kind, text, phrases, labels)

    @property
    def fixed_text(self) -> str:
        """What every text of the template says, without its holes."""
        return " ".join(literal for literal, _, _, _ in string.Formatter().parse(self.text))


def has(scene: Scene, noun: str, attribute: str | None = None) -> bool:
    """Tells whether a scene shows a thing of this noun, with this attribute where one is given."""
    return any(
        thing.plan.noun == noun and (attribute is None or attribute in thing.plan.attributes) for thing in scene.objects
    )


def lacks(scene: Scene, noun: str, attribute: str) -> bool:
    """Tells whether no thing of this noun in a scene has this attribute."""
    return not has(scene, noun, attribute)


def count(scene: Scene, noun: str) -> int:
    """Counts the things of a noun in a scene."""
    return sum(thing.plan.noun == noun for thing in scene.objects)


def singles(scene: Scene) -> list[SceneObject]:
    """Returns the things that are the only ones of their noun, so that "the dog" is one of them alone."""
    return [thing for thing in scene.objects if count(scene, thing.plan.noun) == 1]


def only_thing(scene: Scene, way: str, landmark: SceneObject) -> SceneObject | None:
    """Returns the one thing that lies `way` a landmark; None where there are more or none, or one is disputed."""
    found = []
    for thing in scene.objects:
        if thing is landmark:
            continue
        relation = clear_relation(thing.box, landmark.box)
        if relation is None:
            return None
        if relation == way:
            found.append(thing)
    return found[0] if len(found) == 1 else None


class Partners:
    """Finds other scenes for a text: one drawn for each scene, or one that shows a noun under a condition."""

    def __init__(self, scenes: Sequence[Scene], rng: np.random.Generator) -> None:
        self._scenes, self._rng = scenes, rng
        circle = rng.permutation(len(scenes)).tolist()
        self._partner = dict(zip(circle, [*circle[1:], *circle[:1]], strict=True))
        self._with_noun: dict[str, list[int]] = defaultdict(list)
        for number, scene in enumerate(scenes):
            for noun in sorted({thing.plan.noun for thing in scene.objects}):
                self._with_noun[noun].append(number)

    def of(self, scene: int) -> int:
        """Returns the number of a scene's partner; each scene is the partner of one."""
        return self._partner[scene]

    def with_noun(self, noun: str, condition: Callable[[Scene], bool]) -> int | None:
        """Returns the number of a scene that shows the noun under a condition; None if a few draws find none."""
        candidates = self._with_noun[noun]
        for draw in self._rng.integers(len(candidates), size=_PARTNER_TRIES).tolist():
            if condition(self._scenes[candidates[draw]]):
                return candidates[draw]
        return None


def shuffled(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """Returns the items in a random order."""
    return [items[number] for number in rng.permutation(len(items)).tolist()]


def numbered(items: Iterable[Item], name: str, make: Callable[[int], Any] = int) -> list[Item]:
    """Gives each item its number as a label of this name."""
    return [replace(item, labels={**item.labels, name: make(number)}) for number, item in enumerate(items)]
