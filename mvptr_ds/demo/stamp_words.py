"""Tells what a stamp shows, (noun, attribute) from its English description, and which stamps are photographs.

The table of exceptions is about Debian's `tuxpaint-stamps-default`: descriptions that are whole sentences or name the
thing in an order that the rule cannot follow, and drawings that lie among the photographs.
"""

from __future__ import annotations

import re

Words = tuple[str, str | None]  # noun, attribute or None

_NOT_PHOTOS = re.compile(
    r"cartoon/|^symbols/|^clothes/(t_|hats/|button)|flags/|roadsigns/|dreydl|planets/|naturalforces/|^seasonal/easter/"
    r"|halloween/(bat|black|ghost|skull|spider)|newyears/|menorah|holiday_candle|inukshuk-outline|/eye\.|arttools/high"
    r"|christmas/(Santa|bow|candy_cane|hard|lamp|santahat|star|stocking|tree|xmas_tp)|sedan_police|pizza|wheel256"
    r"|lightning|^military/(final|fireman)|/hedgehog|rambutan|dishes/(glass|mug)|tophat"
)
# None: cannot be told, left out.
_EXCEPTIONS: dict[str, Words | None] = {
    "helmeted_guineafowl": ("fowl", "helmeted"),
    "bluegroper": ("groper", "blue"),
    "sea_lion": ("seal", None),
    "gnu-baby": ("gnu", "baby"),
    "gnu-baby-stand": ("gnu", "baby"),
    "rabbit-2": ("rabbit", "eared"),
    "wildboar": ("boar", "wild"),
    "apple_granny_smith": ("apple", "green"),
    "apple_sierra_beauty": ("apple", None),
    "broccoli": ("broccoli", None),
    "tomato": ("tomato", "red"),
    "pen_dryerase": ("marker", None),
    "toilet": ("toilet", None),
    "wrench_plumbers": ("wrench", None),
    "cep": ("cep", "red"),
    "cep-2": None,
    "jackolantern_mean": ("lantern", None),
    "beetle": ("car", "vw"),
    "f22_raptor": None,
    "bradley": None,
    "infantry-stryker": None,
    "ww2_german_gun": None,
    "old_naval_shell": None,
    "holly_leaves": None,
    "appooppanthady": None,
    "moon_3qt": ("moon", None),
    "moon_crescent": ("moon", "crescent"),
    "echidna": None,
}
_ARTICLES = frozenset(("a", "an", "the", "another", "our", "your", "very", "some", "two"))
_SIZES = frozenset(("small", "little", "large", "big", "tiny"))  # the scene draws a stamp at any size
_GENERIC = frozenset(("fruit", "plant", "bulb", "root"))  # "an avocado fruit" shows an avocado
_SENTENCE_GOES_ON = re.compile(
    r"[.,;:!?()—]|\s(resembles|lets|is|are|in|with|inside|covered|used|making|called|from)\s"
)
_PLURAL = re.compile(r"(?<![sui])s$")


def is_photo(path: str) -> bool:
    """Returns whether a stamp, by its path below the stamps' folder, is a photograph of one thing."""
    return path.endswith(".png") and _NOT_PHOTOS.search(path) is None


def parse_description(path: str, line: str) -> Words | None:
    """Returns (noun, attribute | None) from the first line of a stamp's text; None when it does not say.

    "A Sumatran tiger." -> ("tiger", "sumatran"); "A head of red lettuce." -> ("lettuce", "red"); sizes do not count.
    """
    stem = path.rsplit("/", 1)[-1].removesuffix(".png")
    if path == "plants/eggplant.png":
        return None
    if stem in _EXCEPTIONS:
        return _EXCEPTIONS[stem]
    text = re.sub("[\"'“”]", "", line)
    text = _SENTENCE_GOES_ON.split(text + " ", maxsplit=1)[0].split(" of ")[-1].lower()
    words = [word for word in text.split() if word not in _ARTICLES]
    if len(words) > 1 and words[-1] in _GENERIC:
        words.pop()
    if not words or len(words) > 5 or any(not re.fullmatch("[a-z]+(-[a-z0-9]+)*", word) for word in words):
        return None
    noun = words[-1]
    if _PLURAL.search(noun):
        return None
    attribute = words[-2] if len(words) > 1 else None
    return noun, None if attribute in _SIZES else attribute
