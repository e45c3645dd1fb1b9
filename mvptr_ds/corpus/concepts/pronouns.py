"""Finds the noun that a pronoun means: in a caption, which is short, mostly the first that fits."""

from __future__ import annotations

from collections.abc import Sequence

from mvptr_ds.corpus.concepts.tree import Token, word_set

PLURALS = ("NNS", "NNPS")
QUANTITIES = word_set("couple pair bunch number lot lots variety assortment")  # "a couple of people" are the people
_THINGS = word_set("it its")
_PERSONS = word_set("he she him her his")
_GROUPS = word_set("they them their")
_PEOPLE = word_set(
    "man woman person people someone somebody boy girl guy lady gentleman child kid baby toddler player skier surfer "
    "skateboarder snowboarder rider biker cyclist batter pitcher catcher chef cook worker officer policeman soldier "
    "student bride groom couple family mother father mom dad son daughter adult male female individual group"
)
_DEPICTIONS = word_set("picture photo photograph image view shot")  # what they show is meant, never they


def antecedent(tokens: Sequence[Token], pronoun: int, nouns: Sequence[int]) -> int | None:
    """Returns the noun of `nouns` (in the order of the text) that a pronoun stands for; None where none fits."""
    word = tokens[pronoun].text.lower()
    before = [noun for noun in nouns if noun < pronoun and tokens[noun].lemma not in _DEPICTIONS]
    singular = [noun for noun in before if tokens[noun].tag not in PLURALS]
    if word in _PERSONS:
        people = [noun for noun in before if tokens[noun].lemma in _PEOPLE]
        ranks = [[noun for noun in people if noun in singular], people, singular]
    elif word in _GROUPS:
        ranks = [[noun for noun in before if _is_group(tokens[noun])], before]
    elif word in _THINGS:
        ranks = [[noun for noun in singular if tokens[noun].lemma not in _PEOPLE]]
    else:
        ranks = []
    return next((rank[0] for rank in ranks if rank), None)


def _is_group(token: Token) -> bool:
    """ "their" may also be said of one person."""
    return token.tag in PLURALS or token.lemma in _PEOPLE or token.text.lower() in QUANTITIES
