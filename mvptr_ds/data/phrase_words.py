"""Finds where a caption says the words of a phrase: these are lemmas, and the caption has inflected forms.

`wrong_spans` serves validation. `words_said` serves training: it returns all characters that would give a masked phrase
away, whatever its spans are.

Spans of another caption, of a text that was changed afterwards, or counted in bytes or tokens must be caught. Any
inflection must pass. So a span must hold whole words, and its word must begin like the lemma (two letters: dogs - dog,
holding - hold), or have its letters but for the vowels (men - man, held - hold), or be one of the few English forms
that do neither (is - be, mice - mouse).
"""

from __future__ import annotations

import functools
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

from mvptr_ds.data.schema import Phrase, Spans, Words

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
_APOSTROPHES = "'’"
_UNSEEN = frozenset(["Mn", "Cc", "Cf"])  # accents, zero-width and other marks: categories that the word table drops
_WITHIN_WORDS = _UNSEEN | {"Mc", "Me"}
_MORE_CHARS = 4  # by which an inflected form is longer than its lemma ("carrying")
_MAX_SAID_CHARS = 200  # of spans whose check is remembered
_VOWELS = dict.fromkeys(map(ord, "aeiou"))


def is_form_of(text: str, lemma: str) -> bool:
    """Tells whether `text`, as it stands in a caption, can be the words of `lemma`."""
    forms, lemmas = plain(text).split(), plain(lemma).split()
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
    return not _cuts_at_end(text, end)


def _cuts_a_word(text: str, at: int) -> bool:
    if not (0 < at < len(text) and text[at].isalnum() and text[at - 1].isalnum()):
        return False
    return text[at] < _FIRST_WITHOUT_SPACES and text[at - 1] < _FIRST_WITHOUT_SPACES


def _cuts_at_end(text: str, end: int) -> bool:
    # "isn't" is two words to many tokenizers
    return _cuts_a_word(text, end) and text[end : end + 3].lower() != "n't"


def wrong_spans(text: str, phrase: Phrase) -> str | None:
    """Says what is wrong between a phrase's words and its spans; None when all is well.

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
    """Tells whether the parts, one after the other, are forms of the words."""
    if len(parts) == len(words):
        return all(map(is_form_of, parts, words))
    forms = plain(" ".join(parts)).split()
    lemmas = plain(" ".join(words)).split()
    return len(forms) == len(lemmas) and all(map(_is_form, forms, lemmas))


def words_said(text: str, phrase: Phrase) -> Spans | None:
    """Returns the characters of a caption that give a phrase away: its own spans where they say its words.

    Else these are the whole words that the spans touch, and every place where the caption says a word that they do not
    say. None where that cannot be told: the phrase has no spans, and one of its words is not found.
    """
    if _are_usual(text, phrase):
        return phrase.spans
    spans = [_widened(text, start, end) for start, end in phrase.spans]
    forms = [plain(form) for start, end in spans for form in text[start:end].split()]
    places = []
    for word, number in Counter(word for part in phrase.tuple for word in part.split()).items():
        if sum(_is_form(form, plain(word)) for form in forms) < number:
            found = _places(text, word)
            if not (found or spans):
                return None
            places += found
    return tuple(sorted({*spans, *places})) or None


def _are_usual(text: str, phrase: Phrase) -> bool:
    """Tells whether the spans are whole words and say the phrase; written for speed: it runs for every phrase."""
    num_chars, text_len = 0, len(text)
    for start, end in phrase.spans:
        num_chars += end - start
        is_doubtful = (start and text[start - 1].isalnum()) or (end < text_len and text[end].isalnum())
        if is_doubtful and (_cuts_a_word(text, start) or _cuts_at_end(text, end)):
            return False
    if num_chars > _MAX_SAID_CHARS or len(phrase.spans) > MAX_SPANS:
        return False
    return _are_said(tuple([text[start:end] for start, end in phrase.spans]), phrase.tuple)


@functools.lru_cache(maxsize=1 << 15)
def _are_said(parts: tuple[str, ...], words: Words) -> bool:
    return bool(parts) and any(_says(order, words) for order in itertools.permutations(parts))


def _widened(text: str, start: int, end: int) -> tuple[int, int]:
    """Returns the range with the rest of the words that it cuts."""
    while _cuts_a_word(text, start):
        start -= 1
    while _cuts_at_end(text, end):
        end += 1
    return start, end


def plain(text: str) -> str:
    """Returns a word as the word table has it: lower case, without accents and invisible characters; never empty."""
    if text.isascii():
        return text.lower()
    kept = [c for c in unicodedata.normalize("NFD", text.lower()) if unicodedata.category(c) not in _UNSEEN]
    return "".join(kept) or text


def _places(text: str, word: str) -> list[tuple[int, int]]:
    """Returns where a caption says a word: its likely forms, and where there are none, all possible forms."""
    found = [match.span() for match in re.finditer(re.escape(word), text, re.IGNORECASE)]
    likely = [(start, end) for start, end in found if not (_cuts_a_word(text, start) or _cuts_a_word(text, end))]
    lemma = plain(word)
    likely += [span for span, form in _tokens(text) if form == lemma or _is_inflected(form, lemma)]
    return likely or [span for span, form in _tokens(text) if _is_form(form, lemma)]


@functools.lru_cache(maxsize=1)
def _tokens(text: str) -> list[tuple[tuple[int, int], str]]:
    """Splits a text into words and clitics ("'s"), in the form of `plain`, each with its characters."""
    out = []
    start = 0
    for is_word, run in itertools.groupby(text, _is_of_a_word):
        end = start + len("".join(run))
        if is_word:
            out.append(((start, end), plain(text[start:end])))
        if start and is_word and text[start - 1] in _APOSTROPHES:
            out.append(((start - 1, end), plain(text[start - 1 : end])))
        start = end
    return out


def _is_of_a_word(character: str) -> bool:
    return character.isalnum() or (not character.isascii() and unicodedata.category(character) in _WITHIN_WORDS)


def _is_inflected(form: str, lemma: str) -> bool:
    if (lemma, form) in _IRREGULAR:
        return True
    if len(lemma) < 3 or len(form) > len(lemma) + _MORE_CHARS:
        return False
    stem = lemma[:-1] if lemma[-1] in "ey" else lemma
    bones = form.translate(_VOWELS)
    return form.startswith(stem) or (form[0] == lemma[0] and len(bones) > 1 and bones == lemma.translate(_VOWELS))
