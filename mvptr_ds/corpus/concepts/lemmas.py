"""Finds the lemma of an inflected word with its tag: a table of exceptions first, then the rules of English spelling.

The table (models/lemmas.json) holds the words of the training captions on which the rules are wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path

PLURAL, FINITE, PROGRESSIVE, PAST = "s", "z", "g", "d"
CLASS_OF_TAG = {
    "NNS": PLURAL,
    "VB": FINITE,
    "VBP": FINITE,
    "VBZ": FINITE,
    "VBG": PROGRESSIVE,
    "VBD": PAST,
    "VBN": PAST,
}
_SIBILANT = re.compile(r"(?:ss|x|zz|ch|sh)es$")
_KEEPS_S = re.compile(r"(?:ss|us|is|'s|^.{0,2})$")
_DOUBLED = re.compile(r"([bcdgkmnprtv])\1$")
# a consonant after one vowel was not doubled, so an "e" was dropped: "rid-ing", "shap-ed"
_ONE_SYLLABLE = re.compile(r"^(?:[^aeiouy]|qu)*[aeiouy][^aeiouwxy]$")
_DROPPED_E = re.compile(
    r"(?:[^aeiou]at|[^aeiou]it|[^aeiou]iz|yz|[vcu]|[rln]s|[^aeiou][aiou]s|dg|rg|[^aeiou]ag|[^aeiou]id|[^aeiou][iu]r|[bdgkptzf]l)$"
)
_VOWEL = re.compile(r"[aeiouy]")


class Lemmatiser:
    """Finds lemmas; `table` maps a class of forms to exceptions, form -> lemma."""

    def __init__(self, table: Mapping[str, Mapping[str, str]]) -> None:
        self._table = table
        self._known: dict[tuple[str, str], str] = {}

    @classmethod
    def load(cls, path: Path) -> Lemmatiser:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def lemma(self, word: str, tag: str) -> str:
        """Returns the lower-case lemma; for a tag that does not inflect, the lower-case word."""
        key = (word, tag)
        found = self._known.get(key)
        if found is None:
            form = word.lower()
            kind = CLASS_OF_TAG.get(tag)
            found = form if kind is None else self._table.get(kind, {}).get(form) or by_rule(form, kind)
            if len(self._known) < 200_000:
                self._known[key] = found
        return found

    def lemmas(self, word: str) -> set[str]:
        """Returns the lemmas that the word could be a form of, whatever its tag."""
        return {self.lemma(word, tag) for tag in ("NN", "NNS", "VBZ", "VBG", "VBD")}


def by_rule(form: str, kind: str) -> str:
    """Returns the lemma that spelling alone suggests."""
    if kind in (PLURAL, FINITE):
        return _without_s(form, kind)
    stem = form.removesuffix("ing" if kind == PROGRESSIVE else "ed")
    if stem == form or not _VOWEL.search(stem):
        return form
    if kind == PAST and stem.endswith("i"):
        return stem[:-1] + "y"
    if _DOUBLED.search(stem):
        return stem[:-1]
    return stem + "e" if _ONE_SYLLABLE.search(stem) or _DROPPED_E.search(stem) else stem


def _without_s(form: str, kind: str) -> str:
    if not form.endswith("s") or _KEEPS_S.search(form):
        return form
    if form.endswith("ies") and len(form) > 4:
        return form[:-3] + "y"
    if _SIBILANT.search(form):
        return form[:-2]
    return form[:-2] if form.endswith("oes") and len(form) > 5 else form[:-1]
