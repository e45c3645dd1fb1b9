"""Finds (noun), (noun, attribute) and (subject, relation, object) in a dependency tree.

A woman in a red hat is riding her horse down the road.

    (woman) (hat) (horse) (road)        nouns, but those that another noun narrows down ("tennis ball")
    (hat, red)                          adjectives, participles, nouns before nouns, numbers, what is said with "is"
    (woman, ride, horse)                a verb and its object
    (woman, ride down, road)            a verb and the object of its preposition
    (woman, in, hat)                    a noun and the object of its preposition
    (woman, have, horse)                possession

These are the tuples of SPICE (Anderson et al., ECCV 2016), written from examples of its output; its code was not read.
A word of a tuple comes with the tokens that it stands for. A pronoun stands for the noun that it most likely means.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import NamedTuple

from mvptr_ds.corpus.concepts.pronouns import PLURALS, QUANTITIES, antecedent
from mvptr_ds.corpus.concepts.tree import Tree

HAVE = "have"  # the relation that a possessive says without a verb
A = "a"  # the attribute of what comes in "a couple of", "an assortment of"
# members of "a, b, c and d", prepositions in a row: what goes on for longer is no caption, and pairs would have no end
MAX_COORDINATED = 20

# "on top of" is one preposition, "on the back of" is not
_COMPOUND = frozenset(["in front", "on top", "on side", "in middle", "in back"])
# preposition or adverb, and preposition; of other pairs the second alone is the relation
_PAIRS = frozenset(["next to", "out of", "inside of", "outside of", "close to", "together with", "along with"])

Link = tuple[tuple[int, ...], int]  # tokens of a relation, and its object


class Part(NamedTuple):
    """One word of a tuple, and the tokens that say it."""

    word: str
    tokens: tuple[int, ...]


Found = tuple[Part, ...]


def find_tuples(tree: Tree) -> list[Found]:
    """Returns all tuples of a text in the order nouns, attributes, relations, each once."""
    finder = _Finder(tree)
    found = [*finder.nouns(), *finder.attributes(), *finder.relations()]
    unique: dict[tuple[str, ...], Found] = {}
    for parts in found:
        unique.setdefault(tuple(part.word for part in parts), parts)
    return list(unique.values())


class _Finder:
    def __init__(self, tree: Tree) -> None:
        self.tree = tree
        self.tokens = tree.tokens
        self.quantities = {i: of for i in range(len(self.tokens)) if (of := self._quantity_of(i)) is not None}
        self.mergers = self._compound_prepositions()
        self.meant = [
            index
            for index in range(len(self.tokens))
            if self._is_noun(index) and not self._is_modifier(index) and index not in self.mergers
        ]

    # nouns

    def nouns(self) -> Iterator[Found]:
        for index in range(len(self.tokens)):
            if self._is_noun(index) and not self._is_modifier(index) and not self._narrowed(index):
                yield (self._part(index),)

    def _is_noun(self, index: int) -> bool:
        token = self.tokens[index]
        # "while" at the head of "while in a zoo" is often tagged as the noun that it can be
        return token.tag[:2] == "NN" and token.lemma != "while" and any(map(str.isalpha, token.text))

    def _is_modifier(self, index: int) -> bool:
        """Returns whether the noun narrows another one down ("tennis" of "tennis ball")."""
        token = self.tokens[index]
        for _ in range(MAX_COORDINATED):
            if token.label != "conj":
                break
            token = self.tokens[token.head]
        return token.label in ("compound", "nmod") and self._is_noun(token.head)

    def _narrowed(self, noun: int) -> list[int]:
        """Returns the nouns that narrow one down."""
        return [child for child in self.tree.labelled(noun, "compound", "nmod") if self._is_noun(child)]

    def _part(self, index: int) -> Part:
        return Part(self.tokens[index].lemma, (index,))

    # attributes

    def attributes(self) -> Iterator[Found]:
        for index in range(len(self.tokens)):
            if (self._is_noun(index) and index not in self.quantities) or self.tokens[index].tag[:2] == "JJ":
                yield from self._modifiers(index)
            for subject in self._nominal_subjects(index):
                if self._is_noun(subject):
                    yield from self._predicate(subject, index)
        for index, of in self.quantities.items():
            for child in self.tree.labelled(index, "det"):
                if self.tokens[of].tag in PLURALS and self.tokens[child].lemma in ("a", "an"):
                    yield self._part(of), Part(A, (child,))

    def _modifiers(self, noun: int) -> Iterator[Found]:
        for child in self.tree.children[noun]:
            token = self.tokens[child]
            if token.label == "amod" or (token.label in ("nmod", "compound") and token.tag[:2] != "VB"):
                for other in self._coordinated(child):
                    if token.label == "amod" or other == child or self._is_noun(other):
                        yield self._part(noun), self._part(other)
            elif token.label == "nummod" and self.tokens[noun].tag in PLURALS:
                yield self._part(noun), self._part(child)

    def _predicate(self, subject: int, verb: int) -> Iterator[Found]:
        """Yields the words that a clause without an object says of its subject: "the cat sleeps", "the sky is blue"."""
        token = self.tokens[verb]
        if token.lemma == "be" or token.label == "aux":
            for child in self.tree.labelled(verb, "acomp", "attr"):
                yield self._part(subject), self._part(child)
        elif not self._verb_links(verb):
            yield self._part(subject), self._part(verb)

    # relations

    def relations(self) -> Iterator[Found]:
        for index in range(len(self.tokens)):
            if self._is_noun(index) and index not in self.mergers:
                yield from self._noun_relations(index)
            if self.tree.children[index]:
                yield from self._verb_relations(index)
                yield from self._possession(index)

    def _possession(self, index: int) -> Iterator[Found]:
        for child in self.tree.labelled(index, "poss"):
            owner = self._resolve(child)
            if owner is None or owner == index:
                continue
            case = self.tree.labelled(child, "case")
            said_by = case[0] if case else child
            yield self._part(owner), Part(HAVE, (said_by,)), self._part(index)

    def _noun_relations(self, noun: int) -> Iterator[Found]:
        for words, target in self._prepositions(noun):
            if noun in self.quantities and len(words) == 1 and self.quantities[noun] == target:
                continue
            yield self._part(noun), self._relation(words), self._part(target)

    def _verb_relations(self, verb: int) -> Iterator[Found]:
        token = self.tokens[verb]
        for patient in self._subjects_by_label(verb, "nsubjpass"):
            for agent in self._agents(verb):
                yield self._part(agent), self._relation((verb, *self.tree.labelled(verb, "prt"))), self._part(patient)
        links = self._verb_links(verb)
        if token.lemma == "be" and self.tree.labelled(verb, "expl"):
            # "there is a cat on the sofa" says (cat, on, sofa)
            subjects = self.tree.labelled(verb, "attr")
            links = [(words[1:], target) for words, target in links if len(words) > 1]
        else:
            subjects = self._subjects(verb) if links else []
        for subject in subjects:
            for words, target in links:
                yield self._part(subject), self._relation(words), self._part(target)

    def _agents(self, verb: int) -> list[int]:
        return [t for child in self.tree.labelled(verb, "agent") for _, t in self._preposition(child)]

    def _relation(self, words: tuple[int, ...]) -> Part:
        return Part(" ".join(map(self._relation_word, words)), words)

    def _relation_word(self, index: int) -> str:
        token = self.tokens[index]
        return token.text.lower() if token.label == "prep" else token.lemma

    def _verb_links(self, verb: int) -> list[Link]:
        """Returns the relation tokens and object of every noun that a verb governs."""
        return [(words, target) for words, target in self._governed(verb) if self._is_noun(target)]

    def _governed(self, verb: int) -> Iterator[Link]:
        token = self.tokens[verb]
        particles = tuple(self.tree.labelled(verb, "prt"))
        for child in self.tree.labelled(verb, "dobj", "dative"):
            for target in self._objects(child):
                yield (verb, *particles), target
        for target in self._agents(verb):
            yield (verb, *particles), target
        if token.lemma == "be" and self.tree.labelled(verb, "acomp"):
            return
        for words, target in self._prepositions(verb):
            yield (verb, *particles, *words), target

    def _prepositions(self, head: int) -> Iterator[Link]:
        """Yields the preposition tokens and object of the prepositional phrases that depend on a token."""
        for child in self.tree.children[head]:
            label = self.tokens[child].label
            if label == "prep":
                yield from self._preposition(child)
            elif label == "advmod":
                for inner in self.tree.labelled(child, "prep"):
                    if self._pair(child, inner):
                        yield from (((child, *words), target) for words, target in self._preposition(inner))

    def _pair(self, first: int, second: int) -> bool:
        return f"{self.tokens[first].lemma} {self.tokens[second].lemma}" in _PAIRS

    def _preposition(self, preposition: int) -> Iterator[Link]:
        """Yields the objects of a preposition, also behind a second one ("out of") or its noun ("on top of")."""
        waiting: list[tuple[tuple[int, ...], int]] = [((preposition,), preposition)]
        for _ in range(MAX_COORDINATED):
            if not waiting:
                return
            words, last = waiting.pop()
            for child in self.tree.labelled(last, "pobj", "prep"):
                if self.tokens[child].label == "prep":
                    waiting.append(((*words, child) if self._pair(last, child) else (*words[:-1], child), child))
                elif child in self.mergers:
                    waiting.append(((*words, child, self.mergers[child]), self.mergers[child]))
                else:
                    yield from ((words, target) for target in self._objects(child))

    def _compound_prepositions(self) -> dict[int, int]:
        """Returns the "of" of each noun of a compound preposition ("front" of "in front of")."""
        found = {}
        for index, token in enumerate(self.tokens):
            if token.label == "pobj" and f"{self.tokens[token.head].lemma} {token.lemma}" in _COMPOUND:
                for child in self.tree.labelled(index, "prep"):
                    if self.tokens[child].lemma == "of":
                        found[index] = child
        return found

    # who is meant

    def _objects(self, index: int) -> list[int]:
        return [found for other in self._coordinated(index) if (found := self._object(other)) is not None]

    def _object(self, index: int) -> int | None:
        resolved = self._resolve(index)
        return None if resolved is None else self._counted(resolved)

    def _coordinated(self, index: int) -> list[int]:
        """Returns the token and those that are joined to it by "and", "or" or a comma."""
        return list(islice(self._chain(index), MAX_COORDINATED))

    def _chain(self, index: int) -> Iterator[int]:
        waiting = [index]
        while waiting:
            current = waiting.pop()
            yield current
            waiting += reversed(self.tree.labelled(current, "conj"))

    def _subjects_by_label(self, verb: int, *labels: str) -> list[int]:
        out = []
        for child in self.tree.labelled(verb, *labels):
            token = self.tokens[child]
            if token.tag in ("WDT", "WP"):
                if self.tokens[verb].label == "relcl":
                    out.append(self.tokens[verb].head)
                continue
            for other in self._coordinated(child):
                found = self._object(other)
                if found is not None and self.tokens[found].tag[:2] in ("NN", "JJ"):
                    out.append(found)
        return out

    def _nominal_subjects(self, verb: int) -> list[int]:
        """Subjects of a verb, or of the one that it is joined to ("stands and eats"); participles have none."""
        for _ in range(MAX_COORDINATED):
            own = self._subjects_by_label(verb, "nsubj")
            token = self.tokens[verb]
            if own or token.label != "conj" or token.tag[:2] != "VB":
                return own
            verb = token.head
        return []

    def _subjects(self, verb: int) -> list[int]:
        """Returns the subjects of a verb, also of a participle that depends on its noun ("a man riding")."""
        for _ in range(MAX_COORDINATED):
            own = self._subjects_by_label(verb, "nsubj")
            token = self.tokens[verb]
            if own or token.tag[:2] != "VB" or self.tree.labelled(verb, "nsubj"):
                return own
            if token.label == "acl":
                return [token.head]
            if token.label != "conj" or self.tree.labelled(verb, "auxpass"):
                return []
            verb = token.head
        return []

    def _counted(self, index: int) -> int:
        """Returns the people of "a couple of people"."""
        return self.quantities.get(index, index)

    def _quantity_of(self, index: int) -> int | None:
        token = self.tokens[index]
        if token.text.lower() not in QUANTITIES:
            return None
        for preposition in self.tree.labelled(index, "prep"):
            if self.tokens[preposition].lemma == "of":
                for target in self.tree.labelled(preposition, "pobj"):
                    return target
        return None

    def _resolve(self, index: int) -> int | None:
        """Returns the token itself, or the noun that a pronoun stands for; None where nothing fits."""
        token = self.tokens[index]
        if token.tag not in ("PRP", "PRP$"):
            return index if token.tag[:2] in ("NN", "JJ", "VB", "CD", "FW") else None
        found = antecedent(self.tokens, index, self.meant)
        return None if found is None else self._counted(found)
