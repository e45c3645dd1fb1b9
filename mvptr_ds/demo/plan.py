"""Decides which objects a demo scene has, and which pairs of them only held-out scenes may show.

A concept is (noun, attribute). About 15 % of the unordered pairs of concepts, chosen by a keyed hash, are held out: no
training scene has such a pair among its objects, and every held-out scene has one, mentioned by its caption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mvptr_ds.errors import DataError

Concept = tuple[str, str]  # (noun, attribute)

HELD_OUT_FRACTION = 0.15
TWIN_FRACTION = 0.25  # of scenes with two objects of one noun and different attributes
SIZES_PX = {"small": (19.0, 24.0), "medium": (29.0, 36.0), "large": (43.0, 52.0)}  # square root of a sprite's area
SIZE_WORDS = ("small", "large")  # a medium object has no word for its size
MAX_OBJECT_AREA_PX = 0.5 * 128 * 128
_TRIES = 400


@dataclass(frozen=True)
class Kind:
    """What a source can draw: a noun with its attribute, or with none, and then its size is the attribute."""

    noun: str
    attribute: str | None

    @property
    def concepts(self) -> tuple[Concept, ...]:
        words = SIZE_WORDS if self.attribute is None else (self.attribute,)
        return tuple((self.noun, word) for word in words)


@dataclass(frozen=True)
class ObjectPlan:
    kind: Kind
    attribute: str  # of the concept: the kind's own, else the size
    size: str  # small | medium | large
    size_px: float  # square root of width x height

    @property
    def noun(self) -> str:
        return self.kind.noun

    @property
    def concept(self) -> Concept:
        return (self.kind.noun, self.attribute)

    @property
    def attributes(self) -> frozenset[str]:
        """Returns every attribute that is true of the object."""
        return frozenset((self.attribute, self.size)) - {"medium"}


@dataclass
class Catalogue:
    """The kinds of a source, drawn noun first so that a noun of many kinds is no likelier than another."""

    kinds: Sequence[Kind]
    by_noun: dict[str, list[tuple[Kind, Concept]]] = field(init=False)
    nouns: list[str] = field(init=False)
    twin_nouns: list[str] = field(init=False)

    def __post_init__(self) -> None:
        self.by_noun = {}
        for kind in self.kinds:
            self.by_noun.setdefault(kind.noun, []).extend((kind, concept) for concept in kind.concepts)
        self.nouns = sorted(self.by_noun)
        self.twin_nouns = [noun for noun in self.nouns if len({c for _, c in self.by_noun[noun]}) > 1]

    def draw(self, rng: np.random.Generator, noun: str | None = None, twin: bool = False) -> tuple[Kind, Concept]:
        if noun is None:
            nouns = self.twin_nouns if twin else self.nouns
            noun = nouns[rng.integers(len(nouns))]
        choices = self.by_noun[noun]
        return choices[rng.integers(len(choices))]


@dataclass(frozen=True)
class SplitRule:
    """What a split may show. `known` are the concepts of the training captions; None in the training split itself."""

    seed: int
    known: frozenset[Concept] | None = None

    @property
    def is_train(self) -> bool:
        return self.known is None

    def is_held_out(self, first: Concept, second: Concept) -> bool:
        """Returns whether the unordered pair of concepts is reserved for held-out scenes."""
        text = "|".join(":".join(concept) for concept in sorted((first, second)))
        digest = hashlib.blake2b(text.encode(), key=f"held-out {self.seed}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") < HELD_OUT_FRACTION * 2**64

    def may_say(self, concept: Concept) -> bool:
        return self.known is None or concept in self.known

    def may_join(self, concept: Concept, chosen: Sequence[Concept]) -> bool:
        if concept in chosen or not self.may_say(concept):
            return False
        return not (self.is_train and any(self.is_held_out(concept, other) for other in chosen))


def plan_objects(rng: np.random.Generator, catalogue: Catalogue, rule: SplitRule) -> list[ObjectPlan]:
    """Draws 2 to 5 objects of distinct concepts; the first two are the pair that a held-out scene is about.

    Raises:
        DataError: when the known concepts hold no held-out pair (far too few training scenes).
    """
    num_objects = int(rng.integers(2, 6))
    is_twin = bool(catalogue.twin_nouns) and rng.random() < TWIN_FRACTION
    chosen = list(_draw_pair(rng, catalogue, rule, is_twin))
    for _ in range(_TRIES):
        if len(chosen) == num_objects:
            break
        kind, concept = catalogue.draw(rng)
        if rule.may_join(concept, [c for _, c in chosen]):
            chosen.append((kind, concept))
    return _with_sizes(rng, chosen)


def _draw_pair(
    rng: np.random.Generator, catalogue: Catalogue, rule: SplitRule, is_twin: bool
) -> tuple[tuple[Kind, Concept], tuple[Kind, Concept]]:
    for tries in range(20 * _TRIES):
        twin = is_twin and tries < _TRIES  # few known twins may be held out: give up on twins rather than on the scene
        first = catalogue.draw(rng, twin=twin)
        second = catalogue.draw(rng, noun=first[1][0] if twin else None)
        if not (rule.may_say(first[1]) and rule.may_join(second[1], [first[1]])):
            continue
        if rule.is_train or rule.is_held_out(first[1], second[1]):
            return first, second
    known = "all" if rule.known is None else len(rule.known)
    raise DataError(f"found no pair of objects for a scene among {known} known concepts; ask for more training scenes")


def _with_sizes(rng: np.random.Generator, chosen: list[tuple[Kind, Concept]]) -> list[ObjectPlan]:
    """Gives every object a size; crowded scenes get small ones where the size is not the concept itself."""
    plans: list[ObjectPlan] = []
    area_px = 0.0
    for kind, (_, attribute) in chosen:
        size = attribute if attribute in SIZE_WORDS else str(rng.choice(list(SIZES_PX), p=[0.3, 0.4, 0.3]))
        if attribute not in SIZE_WORDS and area_px + SIZES_PX[size][1] ** 2 > MAX_OBJECT_AREA_PX:
            size = "small"
        size_px = float(rng.uniform(*SIZES_PX[size]))
        area_px += size_px**2
        plans.append(ObjectPlan(kind, attribute, size, size_px))
    return plans
