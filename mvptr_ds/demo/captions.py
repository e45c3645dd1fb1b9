"""Writes sentences about a demo scene, with their phrases and the characters of every phrase's words."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mvptr_ds.data.schema import Caption, Phrase
from mvptr_ds.demo.plan import SIZE_WORDS, ObjectPlan, SplitRule

Box = tuple[int, int, int, int]  # x1, y1, x2, y2 in pixels, half open
Span = tuple[int, int]

COLOURS = frozenset(
    ("red", "green", "blue", "yellow", "orange", "purple", "pink", "brown", "black", "white", "gray", "cyan")
)
_PREDICATES = COLOURS | frozenset(SIZE_WORDS)  # attributes that can stand behind "is"
_SAY_SIZE_PROB = 0.15
_THREE_OBJECTS_PROB = 0.4
_NEXT_TO_MAX_GAP_PX = 8
_NEXT_TO_PROB = 0.4


@dataclass(frozen=True)
class SceneObject:
    """One object as it ended up in the picture."""

    plan: ObjectPlan
    box: Box  # of its visible pixels
    region: int  # index of its own box in the record's regions


@dataclass(frozen=True)
class Mention:
    scene_object: SceneObject
    attribute: str  # the one the sentence uses

    @property
    def noun(self) -> str:
        return self.scene_object.plan.noun


class SentenceWriter:
    """Collects text and, along with it, where nouns, attributes and relations stand."""

    def __init__(self) -> None:
        self._text = ""
        self._nouns: dict[int, tuple[Mention, Span]] = {}
        self._attributes: dict[int, tuple[Mention, Span]] = {}
        self._relations: list[tuple[Mention, str, Span, Mention]] = []

    def say(self, text: str) -> SentenceWriter:
        self._text += text
        return self

    def _span(self, text: str) -> Span:
        start = len(self._text)
        self._text += text
        return (start, start + len(text))

    def noun(self, mention: Mention) -> SentenceWriter:
        self._nouns[id(mention)] = (mention, self._span(mention.noun))
        return self

    def attribute(self, mention: Mention) -> SentenceWriter:
        self._attributes[id(mention)] = (mention, self._span(mention.attribute))
        return self

    def the(self, mention: Mention) -> SentenceWriter:
        """Writes "the brown dog"."""
        return self.say("the ").attribute(mention).say(" ").noun(mention)

    def a(self, mention: Mention) -> SentenceWriter:
        """Writes "a brown dog", "an orange ring"."""
        return self.say(article(mention.attribute) + " ").attribute(mention).say(" ").noun(mention)

    def relation(self, subject: Mention, word: str, other: Mention) -> SentenceWriter:
        self._relations.append((subject, word, self._span(word), other))
        return self

    def finish(self, objects: Sequence[SceneObject]) -> Caption:
        """Returns the sentence with a capital and a full stop, and its phrases grounded in the regions of `objects`."""
        text = self._text[0].upper() + self._text[1:] + "."
        phrases: list[Phrase] = []
        for key, (mention, noun_span) in self._nouns.items():
            same_noun = [o for o in objects if o.plan.noun == mention.noun]
            regions = tuple(sorted(o.region for o in same_noun))
            phrases.append(Phrase((mention.noun,), (noun_span,), regions))
            if key in self._attributes:
                alike = tuple(sorted(o.region for o in same_noun if mention.attribute in o.plan.attributes))
                spans = (noun_span, self._attributes[key][1])
                phrases.append(Phrase((mention.noun, mention.attribute), spans, alike))
        for subject, word, span, other in self._relations:
            spans3 = (self._nouns[id(subject)][1], span, self._nouns[id(other)][1])
            phrases.append(Phrase((subject.noun, word, other.noun), spans3))
        return Caption(text, tuple(phrases))


def article(word: str) -> str:
    """Returns the indefinite article of a word, by its spelling."""
    sounds_like_consonant = word.startswith(("eu", "uni", "us", "one"))
    return "an" if word[0] in "aeiou" and not sounds_like_consonant else "a"


def relations(first: Box, second: Box) -> list[str]:
    """Returns how the first box lies to the second: one or two directions (y grows downwards), "next to" when near."""
    dx = (first[0] + first[2] - second[0] - second[2]) / 2
    dy = (first[1] + first[3] - second[1] - second[3]) / 2
    words = []
    if abs(dx) * 1.3 >= abs(dy) and dx != 0:
        words.append("left of" if dx < 0 else "right of")
    if abs(dy) * 1.3 >= abs(dx) and dy != 0:
        words.append("above" if dy < 0 else "below")
    gap_x = max(first[0] - second[2], second[0] - first[2], 0)
    gap_y = max(first[1] - second[3], second[1] - first[3], 0)
    if max(gap_x, gap_y) <= _NEXT_TO_MAX_GAP_PX or not words:
        words.append("next to")
    return words


def _draw_relation(rng: np.random.Generator, first: Mention, second: Mention) -> str:
    words = relations(first.scene_object.box, second.scene_object.box)
    if "next to" in words and len(words) > 1:
        if rng.random() < _NEXT_TO_PROB:
            return "next to"
        words.remove("next to")
    return words[rng.integers(len(words))]


Pattern = Callable[[SentenceWriter, Sequence[Mention], np.random.Generator], object]


def _plain(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    return w.a(m[0]).say(" ").relation(m[0], _draw_relation(rng, m[0], m[1]), m[1]).say(" ").a(m[1])


def _there_is(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    return _plain(w.say("there is "), m, rng)


def _statement(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    return w.the(m[0]).say(" is ").relation(m[0], _draw_relation(rng, m[0], m[1]), m[1]).say(" ").the(m[1])


def _place_first(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    word = _draw_relation(rng, m[0], m[1])
    return w.relation(m[0], word, m[1]).say(" ").a(m[1]).say(" there is ").a(m[0])


def _pronoun(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    word = _draw_relation(rng, m[1], m[0])
    return w.a(m[0]).say(", and ").relation(m[1], word, m[0]).say(" it ").a(m[1])


def _predicate(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    if m[0].attribute not in _PREDICATES:
        return _plain(w, m, rng)
    word = _draw_relation(rng, m[0], m[1])
    return w.say("the ").noun(m[0]).say(" ").relation(m[0], word, m[1]).say(" ").the(m[1]).say(" is ").attribute(m[0])


def _both(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    return w.a(m[0]).say(" and ").a(m[1]).say(" can be seen")


def _list_of_three(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    return w.a(m[0]).say(", ").a(m[1]).say(" and ").a(m[2])


def _two_relations(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    _statement(w, m, rng)
    return w.say(" and ").relation(m[0], _draw_relation(rng, m[0], m[2]), m[2]).say(" ").the(m[2])


def _relation_and_third(w: SentenceWriter, m: Sequence[Mention], rng: np.random.Generator) -> object:
    return _plain(w.say("a picture of ").a(m[2]).say(" and of "), m, rng)


TWO_OBJECT_PATTERNS: tuple[Pattern, ...] = (
    _plain,
    _there_is,
    _statement,
    _place_first,
    _pronoun,
    _predicate,
    _both,
)
THREE_OBJECT_PATTERNS: tuple[Pattern, ...] = (_list_of_three, _two_relations, _relation_and_third)


def write_caption(rng: np.random.Generator, objects: Sequence[SceneObject], rule: SplitRule) -> Caption:
    """Writes a sentence about 2 or 3 of the objects; in a held-out scene about the first two, by their concepts."""
    num_mentions = 3 if len(objects) > 2 and rng.random() < _THREE_OBJECTS_PROB else 2
    picked = [int(i) for i in rng.permutation(len(objects))[:num_mentions]]
    if not rule.is_train:
        picked = [0, 1] + ([int(rng.integers(2, len(objects)))] if num_mentions == 3 else [])
    elif objects[0].plan.noun == objects[1].plan.noun and not {0, 1} & set(picked):
        picked[0] = int(rng.integers(2))  # twins are there to be told apart: the caption speaks of one at least
    mentions = []
    for index in rng.permutation(picked):
        plan = objects[int(index)].plan
        keeps_concept = plan.size == "medium" or (not rule.is_train and index < 2)
        says_size = rng.random() < _SAY_SIZE_PROB and not keeps_concept and rule.may_say((plan.noun, plan.size))
        mentions.append(Mention(objects[int(index)], plan.size if says_size else plan.attribute))
    patterns = TWO_OBJECT_PATTERNS if num_mentions == 2 else THREE_OBJECT_PATTERNS
    writer = SentenceWriter()
    patterns[int(rng.integers(len(patterns)))](writer, mentions, rng)
    return writer.finish(objects)
