"""Statements about demo scenes (task entailment), balanced so that their words alone do not tell the label.

    attribute    The dog is brown.             true of one scene, false of another with one dog, said of a third without
    relation     The dog is left of the cat.   true, the opposite false, either said of a scene without both

A statement is neutral of a scene that does not show all of its things.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from mvptr_ds.data.task_labels import ENTAILMENT_CLASSES
from mvptr_ds.demo.items import Item, Partners, Template, count, has, lacks, numbered, shuffled, singles
from mvptr_ds.demo.plan import Concept
from mvptr_ds.demo.relations import OPPOSITE, clear_relation
from mvptr_ds.demo.scene import Scene

CONTRADICTION, NEUTRAL, ENTAILMENT = ENTAILMENT_CLASSES
_KEY = 12  # of the random numbers; scenes are drawn by (seed, 0 or 1, number)
_ATTRIBUTE = Template("The {noun} is {attribute}.", (("noun",), ("noun", "attribute")))
_RELATION = Template("The {first} is {way} the {second}.", (("first",), ("second",), ("first", "way", "second")))
TEMPLATES = (_ATTRIBUTE, _RELATION)


def make_statements(scenes: Sequence[Scene], known: frozenset[Concept], seed: int) -> list[Item]:
    """Returns the statements about scenes in a random order; labels: label, pair_id.

    Args:
        known: the concepts that captions of the training scenes use. Attributes are stated among them.
    """
    rng = np.random.default_rng([seed, _KEY])
    partners = Partners(scenes, rng)
    items: list[Item] = []
    for number in range(len(scenes)):
        items += _attributes(scenes, number, partners, known)
        items += _relations(scenes, number, partners, rng)
    return numbered(shuffled(items, rng), "pair_id", str)


def _state(template: Template, scene: int, kind: str, label: str, **words: str) -> Item:
    return template.item(scene, kind, {"label": label}, **words)


def _attributes(scenes: Sequence[Scene], number: int, partners: Partners, known: frozenset[Concept]) -> Iterator[Item]:
    partner = partners.of(number)
    for noun, attribute in (thing.plan.concept for thing in singles(scenes[number])):
        if (noun, attribute) not in known or has(scenes[partner], noun):
            continue
        other = partners.with_noun(noun, partial(_denies, noun=noun, attribute=attribute))
        if other is None:
            continue
        for place, label in ((number, ENTAILMENT), (other, CONTRADICTION), (partner, NEUTRAL)):
            yield _state(_ATTRIBUTE, place, "attribute", label, noun=noun, attribute=attribute)


def _denies(scene: Scene, noun: str, attribute: str) -> bool:
    """Tells whether the scene shows one thing of the noun, without the attribute."""
    return count(scene, noun) == 1 and lacks(scene, noun, attribute)


def _relations(scenes: Sequence[Scene], number: int, partners: Partners, rng: np.random.Generator) -> Iterator[Item]:
    partner = partners.of(number)
    for pair in itertools.combinations(singles(scenes[number]), 2):
        first, second = pair if rng.random() < 0.5 else pair[::-1]
        way = clear_relation(first.box, second.box)
        words = {"first": first.plan.noun, "second": second.plan.noun}
        if way is None or all(has(scenes[partner], noun) for noun in words.values()):
            continue
        either = way if rng.random() < 0.5 else OPPOSITE[way]
        for place, said, label in (
            (number, way, ENTAILMENT),
            (number, OPPOSITE[way], CONTRADICTION),
            (partner, either, NEUTRAL),
        ):
            yield _state(_RELATION, place, "relation", label, way=said, **words)
