"""Questions about demo scenes (task vqa), balanced so that their words alone do not tell the answer.

exist_noun         Is there a dog?                        yes | no, each text once of either
exist_attribute    Is there a brown dog?                  yes | no, where there is a dog of another attribute
count_noun         How many dog things are there?         0 | 1 | 2, each text once of each
count_all          How many things are there?             2 to 5
is_relation        Is the dog left of the cat?            yes, and no to the opposite
where              Where is the dog from the cat?         the four ways
what_relation      What is left of the dog?               a noun, in scenes of four things or more
colour_relation    What colour is the thing left of the dog?
colour             What colour is the circle?             only where no noun fixes its colour
"""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np

from mvptr_ds.demo.captions import COLOURS, article
from mvptr_ds.demo.items import Item, Partners, Template, count, has, lacks, numbered, only_thing, shuffled, singles
from mvptr_ds.demo.plan import Concept
from mvptr_ds.demo.relations import OPPOSITE, WAYS, clear_relation
from mvptr_ds.demo.scene import Scene

_KEY = 11  # of the random numbers; scenes are drawn by (seed, 0 or 1, number)
_EXIST_NOUN = Template("Is there {article} {noun}?", (("noun",),))
_EXIST_ATTRIBUTE = Template("Is there {article} {attribute} {noun}?", (("noun",), ("noun", "attribute")))
_COUNT_NOUN = Template("How many {noun} things are there?", (("noun",),))
_COUNT_ALL = Template("How many things are there?")
_IS_RELATION = Template("Is the {first} {way} the {second}?", (("first",), ("second",), ("first", "way", "second")))
_WHERE = Template("Where is the {first} from the {second}?", (("first",), ("second",)))
_WHAT_RELATION = Template("What is {way} the {noun}?", (("noun",),))
_COLOUR_RELATION = Template("What colour is the thing {way} the {noun}?", (("noun",),))
_COLOUR = Template("What colour is the {noun}?", (("noun",),))
TEMPLATES = (
    _EXIST_NOUN, _EXIST_ATTRIBUTE, _COUNT_NOUN, _COUNT_ALL, _IS_RELATION, _WHERE, _WHAT_RELATION, _COLOUR_RELATION,
    _COLOUR,
)  # fmt: skip
_MIN_THINGS = 4  # for what_relation: among two or three things a guess is right too often
_FEW_ANSWERS = 4  # a kind of up to so many has each equally often


def make_questions(scenes: Sequence[Scene], known: frozenset[Concept], seed: int) -> list[Item]:
    """Returns the questions about scenes in a random order; labels: answers, question_id.

    Args:
        known: the concepts that captions of the training scenes use. Attributes are asked for among them.
    """
    rng = np.random.default_rng([seed, _KEY])
    partners = Partners(scenes, rng)
    has_free_colours = _has_free_colours(known)
    items: list[Item] = []
    for number, scene in enumerate(scenes):
        items += _existence(scenes, number, partners, known)
        items += _counts(scenes, number, partners)
        items += _relations(scene, number, rng)
        items += _landmarks(scene, number)
        if has_free_colours:
            items += _colours(scene, number)
    others = [item for item in items if item.kind != "where"]
    items = others + _without_favourite_axis([item for item in items if item.kind == "where"], rng)
    return numbered(shuffled(_balanced(items, rng), rng), "question_id")


def answer_of(item: Item) -> str:
    """Returns the answer of a question of the demo, which has one."""
    (answer,) = item.labels["answers"]
    return str(answer)


def _ask(template: Template, scene: int, kind: str, answer: str, **words: str) -> Item:
    return template.item(scene, kind, {"answers": {answer: 1.0}}, **words)


def _existence(scenes: Sequence[Scene], number: int, partners: Partners, known: frozenset[Concept]) -> Iterator[Item]:
    scene, partner = scenes[number], partners.of(number)
    for noun in sorted({thing.plan.noun for thing in scene.objects}):
        if not has(scenes[partner], noun):
            for place, answer in ((number, "yes"), (partner, "no")):
                yield _ask(_EXIST_NOUN, place, "exist_noun", answer, article=article(noun), noun=noun)
    for noun, attribute in (thing.plan.concept for thing in scene.objects):
        other = partners.with_noun(noun, partial(lacks, noun=noun, attribute=attribute))
        if other is None or (noun, attribute) not in known:
            continue
        words = {"article": article(attribute), "attribute": attribute, "noun": noun}
        for place, answer in ((number, "yes"), (other, "no")):
            yield _ask(_EXIST_ATTRIBUTE, place, "exist_attribute", answer, **words)


def _counts(scenes: Sequence[Scene], number: int, partners: Partners) -> Iterator[Item]:
    scene, none = scenes[number], partners.of(number)
    yield _ask(_COUNT_ALL, number, "count_all", str(len(scene.objects)))
    for noun in sorted({thing.plan.noun for thing in scene.objects}):
        if count(scene, noun) != 2 or has(scenes[none], noun):
            continue
        one = partners.with_noun(noun, partial(_shows_one, noun=noun))
        if one is not None:
            for place, answer in ((none, "0"), (one, "1"), (number, "2")):
                yield _ask(_COUNT_NOUN, place, "count_noun", answer, noun=noun)


def _shows_one(scene: Scene, noun: str) -> bool:
    return count(scene, noun) == 1


def _relations(scene: Scene, number: int, rng: np.random.Generator) -> Iterator[Item]:
    for pair in itertools.combinations(singles(scene), 2):
        first, second = pair if rng.random() < 0.5 else pair[::-1]
        way = clear_relation(first.box, second.box)
        if way is None:
            continue
        words = {"first": first.plan.noun, "second": second.plan.noun}
        yield _ask(_IS_RELATION, number, "is_relation", "yes", way=way, **words)
        yield _ask(_IS_RELATION, number, "is_relation", "no", way=OPPOSITE[way], **words)
        yield _ask(_WHERE, number, "where", way, **words)


def _without_favourite_axis(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """Leaves out questions of kind where, until every noun lies beside others as often as above or below, but for one.

    A wide thing has less room to the sides than up and down, so that its noun alone would tell the axis.
    """
    kept: list[Item] = []
    surplus: Counter[str] = Counter()  # of questions answered left or right, by noun
    for item in shuffled(items, rng):
        nouns = [phrase.tuple[0] for phrase in item.phrases]
        sign = 1 if answer_of(item) in ("left of", "right of") else -1
        if all(sign * surplus[noun] <= 0 for noun in nouns):
            surplus.update({noun: sign for noun in nouns})
            kept.append(item)
    return kept


def _landmarks(scene: Scene, number: int) -> Iterator[Item]:
    for landmark, way in itertools.product(singles(scene), WAYS):
        thing = only_thing(scene, way, landmark)
        if thing is None:
            continue
        words = {"way": way, "noun": landmark.plan.noun}
        if len(scene.objects) >= _MIN_THINGS:
            yield _ask(_WHAT_RELATION, number, "what_relation", thing.plan.noun, **words)
        if thing.plan.attribute in COLOURS:
            yield _ask(_COLOUR_RELATION, number, "colour_relation", thing.plan.attribute, **words)


def _colours(scene: Scene, number: int) -> Iterator[Item]:
    for thing in singles(scene):
        if thing.plan.attribute in COLOURS:
            yield _ask(_COLOUR, number, "colour", thing.plan.attribute, noun=thing.plan.noun)


def _has_free_colours(known: frozenset[Concept]) -> bool:
    """Tells whether every noun comes in several colours."""
    colours: dict[str, set[str]] = defaultdict(set)
    for noun, attribute in known:
        colours[noun] |= {attribute} & COLOURS
    return bool(colours) and all(len(of_noun) > 1 for of_noun in colours.values())


def _balanced(items: Sequence[Item], rng: np.random.Generator) -> list[Item]:
    """Leaves items out: a kind of few answers has each equally often, of many none more than twice the mean."""
    by_kind: dict[str, dict[str, list[Item]]] = defaultdict(lambda: defaultdict(list))
    for item in items:
        by_kind[item.kind][answer_of(item)].append(item)
    kept: list[Item] = []
    for by_answer in by_kind.values():
        sizes = [len(group) for group in by_answer.values()]
        most = min(sizes) if len(by_answer) <= _FEW_ANSWERS else max(1, round(2 * float(np.mean(sizes))))
        for group in by_answer.values():
            kept += [group[place] for place in rng.permutation(len(group))[:most].tolist()]
    return kept
