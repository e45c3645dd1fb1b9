"""Expressions that mean one thing of a demo scene (task referring), and how many things they are told apart from.

noun              the dog                    the only one, among all things
attribute         the brown dog              among dogs
relation_twin     the dog left of the cat    among dogs
absolute          the dog on the left        among dogs
relation_thing    the thing left of the cat  among all other things
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

import numpy as np

from mvptr_ds.demo.captions import SceneObject
from mvptr_ds.demo.items import Item, Template, numbered, only_thing, shuffled, singles
from mvptr_ds.demo.plan import Concept
from mvptr_ds.demo.relations import MIN_DISTANCE_PX, WAYS, clear_relation
from mvptr_ds.demo.scene import Scene

_KEY = 13  # of the random numbers; scenes are drawn by (seed, 0 or 1, number)
_NOUN = Template("the {noun}", (("noun",),))
_ATTRIBUTE = Template("the {attribute} {noun}", (("noun",), ("noun", "attribute")))
_RELATION_TWIN = Template("the {noun} {way} the {second}", (("noun",), ("second",), ("noun", "way", "second")))
_ABSOLUTE = Template("the {noun} on the {side}", (("noun",),))
_RELATION_THING = Template("the thing {way} the {noun}", (("noun",),))
TEMPLATES = (_NOUN, _ATTRIBUTE, _RELATION_TWIN, _ABSOLUTE, _RELATION_THING)
SIDES = ("left", "right")


def make_expressions(scenes: Sequence[Scene], known: frozenset[Concept], seed: int) -> list[Item]:
    """Returns the expressions in a random order; labels: box in pixels, rivals (things that it could mean), id.

    Nouns alone are many and easy: as many are kept as there are of all other kinds.

    Args:
        known: the concepts that captions of the training scenes use. Attributes are named among them.
    """
    rng = np.random.default_rng([seed, _KEY])
    nouns: list[Item] = []
    others: list[Item] = []
    for number, scene in enumerate(scenes):
        nouns += [_refer(_NOUN, scene, number, "noun", thing, len(scene.objects)) for thing in singles(scene)]
        others += _among_twins(scene, number, known)
        others += _by_landmark(scene, number)
    return numbered(shuffled(shuffled(nouns, rng)[: len(others)] + others, rng), "id")


def _refer(
    template: Template, scene: Scene, number: int, kind: str, thing: SceneObject, rivals: int, **words: str
) -> Item:
    box = list(scene.record.regions[thing.region].box)
    return template.item(number, kind, {"box": box, "rivals": rivals}, **{"noun": thing.plan.noun, **words})


def _among_twins(scene: Scene, number: int, known: frozenset[Concept]) -> Iterator[Item]:
    for noun in sorted({thing.plan.noun for thing in scene.objects}):
        twins = [thing for thing in scene.objects if thing.plan.noun == noun]
        if len(twins) == 1:
            continue
        rivals = len(twins)
        for thing in twins:
            attribute = thing.plan.attribute
            is_told_apart = sum(attribute in twin.plan.attributes for twin in twins) == 1
            if is_told_apart and thing.plan.concept in known:
                yield _refer(_ATTRIBUTE, scene, number, "attribute", thing, rivals, attribute=attribute)
        for landmark, way in itertools.product(singles(scene), WAYS):
            found = _only_twin(twins, way, landmark)
            if found is not None:
                words = {"way": way, "second": landmark.plan.noun}
                yield _refer(_RELATION_TWIN, scene, number, "relation_twin", found, rivals, **words)
        for side, found in zip(SIDES, _outermost(twins), strict=True):
            if found is not None:
                yield _refer(_ABSOLUTE, scene, number, "absolute", found, rivals, side=side)


def _only_twin(twins: Sequence[SceneObject], way: str, landmark: SceneObject) -> SceneObject | None:
    """Returns the one twin that lies `way` the landmark; None where there are more or none, or one is disputed."""
    relations = [clear_relation(twin.box, landmark.box) for twin in twins]
    if None in relations or relations.count(way) != 1:
        return None
    return twins[relations.index(way)]


def _outermost(twins: Sequence[SceneObject]) -> tuple[SceneObject | None, SceneObject | None]:
    """Returns the leftmost and the rightmost twin; None for one that is hardly further out than the next."""
    ordered = sorted(twins, key=lambda twin: twin.box[0] + twin.box[2])
    middles = [(twin.box[0] + twin.box[2]) / 2 for twin in ordered]
    return (
        ordered[0] if middles[1] - middles[0] > MIN_DISTANCE_PX else None,
        ordered[-1] if middles[-1] - middles[-2] > MIN_DISTANCE_PX else None,
    )


def _by_landmark(scene: Scene, number: int) -> Iterator[Item]:
    for landmark, way in itertools.product(singles(scene), WAYS):
        thing = only_thing(scene, way, landmark)
        if thing is not None and len(scene.objects) > 2:
            words = {"way": way, "noun": landmark.plan.noun}
            yield _refer(_RELATION_THING, scene, number, "relation_thing", thing, len(scene.objects) - 1, **words)
