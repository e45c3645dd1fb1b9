"""Whether the spans of a phrase hold its words, which are lemmas where the caption has inflected forms.

What is to be caught are spans of another caption, of a text that was changed afterwards, or counted in bytes or tokens.
What must pass is any inflection. Hence a span must hold whole words, and its word must begin like the lemma (two
letters: dogs - dog, holding - hold), or have its letters but for the vowels (men - man, held - hold), or be one of the
few English forms that do neither (is - be, mice - mouse).
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from mvptr_ds.data.schema import Phrase

MAX_SPANS = 6  # of one phrase; all their orders are tried
_FORMS = {
    "be": "am is are was were been being 's ’s 're 'm",
    "go": "went",
    "eat": "ate",
    "buy": "bought",
    "teach": "taught",
    "get": "gotten",
    "wear": "worn",
    "tear": "torn",
    "bear": "born borne",
    "wake": "woken",
    "weave": "woven",
    "seek": "sought",
    "see": "saw",
    "sell": "sold",
    "tell": "told",
    "lie": "lay lain lying",
    "die": "dying",
    "tie": "tying",
    "have": "'s ’s ' ’ 've 'd my your his her its our their whose",
    "will": "'ll would",
    "mouse": "mice",
    "louse": "lice",
    "good": "better best",
    "well": "better best",
    "bad": "worse worst",
    "far": "further furthest",
    "much": "more most",
    "many": "more most",
    "little": "less least",
}
_IRREGULAR = {(lemma, form) for lemma, forms in _FORMS.items() for form in forms.split()}
_FIRST_WITHOUT_SPACES = "\u2e80"  # from here on are the scripts of East Asia, which write words without a gap
_VOWELS = dict.fromkeys(map(ord, "aeiou"))


def is_form_of(text: str, lemma: str) -> bool:
    """Whether `text`, as it stands in a caption, can be the words of `lemma`."""
    forms, lemmas = text.lower().split(), lemma.lower().split()
    if len(forms) != len(lemmas):
        forms, lemmas = forms[:1], lemmas[:1]
    return bool(forms and lemmas) and all(map(_is_form, forms, lemmas))


def _is_form(form: str, lemma: str) -> bool:
    if form == lemma or (lemma, form) in _IRREGULAR:
        return True
    if len(lemma) > 1 and form[:2] == lemma[:2]:
        return True
    if len(lemma) == 1:
        return form.startswith(lemma)
    bones = form.translate(_VOWELS)
    return form[0] == lemma[0] and len(bones) > 1 and bones == lemma.translate(_VOWELS)


def _is_whole(text: str, start: int, end: int) -> bool:
    if text[start].isspace() or text[end - 1].isspace() or _cuts_a_word(text, start):
        return False
    # "isn't" is two words to many tokenizers
    return not _cuts_a_word(text, end) or text[end : end + 3].lower() == "n't"


def _cuts_a_word(text: str, at: int) -> bool:
    return 0 < at < len(text) and all(c.isalnum() and c < _FIRST_WITHOUT_SPACES for c in text[at - 1 : at + 1])


def wrong_spans(text: str, phrase: Phrase) -> str | None:
    """What is wrong between a phrase's words and its spans; None when all is well.

    The spans may stand in any order. There is one a word of the tuple, or more where one has several parts that stand
    apart ("ride down" in "rides a horse down the road").
    """
    if not len(phrase.tuple) <= len(phrase.spans) <= MAX_SPANS:
        return f"phrase {phrase.tuple} has {len(phrase.spans)} spans, expected one a word"
    found = [text[start:end] for start, end in phrase.spans]
    for (start, end), part in zip(phrase.spans, found, strict=True):
        if not _is_whole(text, start, end):
            return f"phrase {phrase.tuple}: span {start, end} is {part!r}, which is not whole words of {text[:80]!r}"
    if not any(_says(order, phrase.tuple) for order in itertools.permutations(found)):
        return f"phrase {phrase.tuple} has spans of the words {found}"
    return None


def _says(parts: Sequence[str], words: Sequence[str]) -> bool:
    """Whether the parts, one after the other, are forms of the words."""
    if len(parts) == len(words):
        return all(map(is_form_of, parts, words))
    forms = " ".join(parts).lower().split()
    lemmas = " ".join(words).lower().split()
    return len(forms) == len(lemmas) and all(map(_is_form, forms, lemmas))
