"""Keeps from the parser what the web puts between the words of a caption.

    "Visit www.x.com for caf&eacute; d\u200bogs"  ->  "Visit           for café dogs"

Addresses, file names, tags of HTML and the like become blanks, invisible characters go, and entities of HTML
become what they stand for. Where each character stood is kept, so spans are those of the caption. A caption without
any of it, as COCO's are, is read as it stands.
"""

from __future__ import annotations

import html
import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from mvptr_ds.corpus.concepts.tokens import Span
from mvptr_ds.corpus.concepts.tree import word_set
from mvptr_ds.data.schema import Spans, Words

MAX_CHUNK_CHARS = 200  # of what stands between blanks: a longer one with anything suspect in it is no word
_ENTITY = re.compile(
    r"& ?(?:amp ?; ?)*(?:#[0-9]{1,7}|#[xX][0-9a-fA-F]{1,6}|[A-Za-z][A-Za-z0-9]{1,31}) ?;|"
    r"&(?:amp|lt|gt|quot|nbsp|apos)(?![A-Za-z0-9])"
)
_TAG = re.compile(r"</?[A-Za-z][^<>]{0,300}>|<!--.{0,300}?-->", re.DOTALL)
_CHUNK = re.compile(r"\S+")
_SUSPECT = re.compile(r"[&@#_<\\/]|\.\w|\bwww|\d\d\d")  # all that follows has one of these
_FILE_TYPES = (
    "jpe?g|png|gif|webp|svg|bmp|tiff?|psd|eps|ico|raw|heic|pdf|docx?|xlsx?|pptx?|txt|csv|json|xml|html?|php|aspx?|jsp|"
    "css|js|zip|rar|gz|tar|exe|mp[34]|avi|mov|wmv|mkv|webm|flv|wav|ogg"
)
_DOMAINS = "com|net|org|edu|gov|mil|info|biz|io|co|de|fr|uk|ru|nl|pl|it|jp|cn|au|eu|ch|br"
_PIECES = {
    "e-mail addresses": re.compile(r"(?:mailto:)?[\w.+-]+@[\w-]+(?:\.[\w-]+)+"),
    "web addresses": re.compile(
        r"(?:[A-Za-z][A-Za-z0-9+.-]{1,20}:|(?<![^\s(\[\"'“‘]))//[\w\[][^\s<>\"]*[\w/]|\bwww\d?\.[\w-][^\s<>\"]*[\w/]|"
        rf"(?<![\w.@/-])(?:[\w-]+\.)+(?:(?:com?|net|org|gov|ac)\.[a-z]{{2}}|{_DOMAINS}|{_DOMAINS.upper()}|Com)"
        r"(?![\w-]|\.\w)(?::\d+)?(?:/(?:[^\s<>\"]*[\w/])?)?"
    ),
    "file names": re.compile(
        rf"(?:[A-Za-z]:)?(?:[\w.~-]*[/\\])*[\w()%~-][\w()%~.-]*\.(?i:{_FILE_TYPES})(?![\w-])|[A-Za-z]:\\[\w\\.~-]+"
    ),
    "hashtags and handles": re.compile(r"(?<![\w&])[#@]\w*[^\W\d_]\w*(?:\.\w+)*"),
    "identifiers": re.compile(r"\w*(?:[^\W_]_+|_[^\W_])\w*|\b(?:DSC[NF]?|IMG|MVI|PICT?)-?\d{3,}\w*"),
}
# neither accents nor blanks: marks of direction, joiners, soft hyphens, byte order marks, variants of emoji, fillers
_FILLERS = frozenset("\u034f\u115f\u1160\u3164\uffa0")
_NO_WORDS = word_set("http https www com ftp html href nbsp quot jpg jpeg png")  # what is left of an address
_WORD = re.compile(r"[^\W_]+(?:[-'’.·]+[^\W_]+)*[-'’.]*|['’][^\W_]*")
_COUNT = re.compile(r"[1-9]\d?")
_NUMBERED = re.compile(r"[^\W\d_]{3,}\d+")  # "smiley111", and not "mp3"
_YEARS = re.compile(r"(?:1\d|20)\d\d['’]?s")
_MAX_DIGITS, _MAX_CHANGES, _MAX_WORD_CHARS = 3, 3, 40  # of a word with digits in it ("747s", "r2d2"); of any


@dataclass(frozen=True)
class Readable:
    """A caption as the parser sees it."""

    text: str
    starts: Sequence[int] | None = None  # of each of its characters, in the caption; None: they are the same
    ends: Sequence[int] | None = None
    left_out: Counter[str] = field(default_factory=Counter)  # kind -> pieces

    def original(self, spans: Spans) -> Spans:
        """Characters of the caption."""
        if self.starts is None or self.ends is None:
            return spans
        return tuple([(self.starts[start], self.ends[end - 1]) for start, end in spans])


def readable(caption: str) -> Readable:
    """Returns what the parser sees of a caption, in time linear in its length."""
    if caption.isascii() and not _SUSPECT.search(caption):
        return Readable(caption)
    left_out: Counter[str] = Counter()
    seen = list(_characters(caption, left_out))
    text = list("".join(character for character, _, _ in seen))
    _blank(text, [match.span() for match in _TAG.finditer("".join(text))], "tags of HTML", left_out)
    for match in _CHUNK.finditer("".join(text)):
        start, end = match.span()
        if not _SUSPECT.search(match[0]):
            continue
        if end - start > MAX_CHUNK_CHARS:
            _blank(text, [match.span()], "web addresses" if "//" in match[0] else "identifiers", left_out)
            continue
        for kind, pattern in _PIECES.items():
            found = pattern.finditer("".join(text[start:end]))
            _blank(text, [(start + m.start(), start + m.end()) for m in found], kind, left_out)
    return Readable("".join(text), [start for _, start, _ in seen], [end for _, _, end in seen], left_out)


def _characters(caption: str, left_out: Counter[str]) -> Iterator[tuple[str, int, int]]:
    """Yields each character that the parser sees, with its place in the caption."""
    at = 0
    for match in [*_ENTITY.finditer(caption), None]:
        end = len(caption) if match is None else match.start()
        for place in range(at, end):
            character = _seen(caption[place])
            if character != caption[place]:
                left_out["characters nobody sees, emoji and symbols"] += 1
            if character:
                yield character, place, place + 1
        if match is not None:
            at = match.end()
            meant = _meaning(match[0])
            if meant is None:
                yield from (
                    (character, match.start() + n, match.start() + n + 1) for n, character in enumerate(match[0])
                )
            else:
                left_out["entities of HTML"] += 1
                yield from ((character, *match.span()) for character in meant)


def _meaning(entity: str) -> str | None:
    """Returns the text that an entity stands for, however often it was escaped; None where it is no entity."""
    name = entity.replace(" ", "").removeprefix("&").removesuffix(";")
    while name.startswith("amp;"):
        name = name[4:]
    meant = html.unescape(f"&{name};")
    if meant == f"&{name};":
        return None
    return "".join(_seen(character) for character in meant) or " "


def _seen(character: str) -> str:
    """Returns the character, a blank for a symbol, and nothing for an invisible character."""
    if character.isascii():
        return character if character.isprintable() or character.isspace() else ""
    category = unicodedata.category(character)
    if category in ("Cf", "Cc") or character in _FILLERS or "\ufe00" <= character <= "\ufe0f":
        return " " if character.isspace() else ""
    if category in ("So", "Co", "Cn", "Cs", "Me") or "\U0001f000" <= character <= "\U0001faff":
        return " "
    return character


def _blank(text: list[str], spans: Sequence[Span], kind: str, left_out: Counter[str]) -> None:
    for start, end in spans:
        text[start:end] = " " * (end - start)
        left_out[kind] += 1


def are_words(phrase: Words) -> bool:
    """Returns whether each word of a phrase is a word: it has a letter, and is no part of an address and no identifier.

    A number of one or two digits may count a noun: ("dog", "2").
    """
    if len(phrase) == 2 and _COUNT.fullmatch(phrase[1]):
        phrase = phrase[:1]
    return all(is_word(word) for part in phrase for word in part.split())


def is_word(word: str) -> bool:
    """Returns whether it has a letter, and is no piece of an address and no identifier ("img1234", "1920x1080")."""
    if word.isascii() and word.isalpha():
        return len(word) <= _MAX_WORD_CHARS and word not in _NO_WORDS
    bare = "".join(c for c in word if unicodedata.category(c)[0] != "M")
    if not _WORD.fullmatch(bare) or len(word) > _MAX_WORD_CHARS or not (any(map(str.isalpha, word)) or bare in "'’"):
        return False
    num_digits = sum(map(str.isdigit, word))
    num_changes = sum(a.isdigit() != b.isdigit() for a, b in itertools.pairwise(word))
    if _YEARS.fullmatch(word):
        return True
    return num_digits <= _MAX_DIGITS and num_changes <= _MAX_CHANGES and not _NUMBERED.fullmatch(word)
