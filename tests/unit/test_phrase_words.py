from __future__ import annotations

import pytest

from mvptr_ds.data.phrase_words import is_form_of, words_said, wrong_spans
from mvptr_ds.data.schema import Phrase

INFLECTED = (
    "dogs dog|Dog dog|women woman|men man|children child|people person|feet foot|teeth tooth|mice mouse|geese goose|"
    "knives knife|holding hold|held hold|is be|are be|'s be|was be|riding ride|rode ride|sitting sit|sat sit|ran run|"
    "took take|lying lie|ate eat|went go|bought buy|wore wear|worn wear|gotten get|"
    "goes go|does do|bigger big|best good|hot dogs hot dog|"
    "his have|'s have|standing next to stand next to|T-shirts t-shirt|x x|2 2|oxen ox|pulled up pull"
)
OTHER = "cat dog|brown dog|og dog|a be|by be|on in|horse dog|dog a|man woman|bat cat| dog|next left of|so see"


@pytest.mark.parametrize("pair", INFLECTED.split("|"))
def test_inflected_forms_are_taken(pair: str) -> None:
    assert _takes(pair)


@pytest.mark.parametrize("pair", OTHER.split("|"))
def test_other_words_are_not(pair: str) -> None:
    assert not _takes(pair)


def _takes(pair: str) -> bool:
    """Whether a split of the line into text and lemma at its middle is taken."""
    words = pair.split(" ")
    middle = (len(words) + 1) // 2
    return is_form_of(" ".join(words[:middle]), " ".join(words[middle:]))


TEXT = "A dog isn't chasing the women's red balls."
SOUND = (
    (("dog",), ["dog"]),
    (("woman", "dog"), ["dog", "women"]),
    (("dog", "chase", "ball"), ["dog", "chasing", "balls"]),
    (("ball", "red"), ["balls", "red"]),
    (("be",), ["is"]),
    (("dog", "chase ball", "woman"), ["dog", "chasing", "women", "balls"]),
)


@pytest.mark.parametrize(("words", "parts"), SOUND)
def test_sound_spans_and_every_shift_of_them(words: tuple[str, ...], parts: list[str]) -> None:
    spans = tuple((TEXT.index(part), TEXT.index(part) + len(part)) for part in parts)
    assert wrong_spans(TEXT, Phrase(words, spans)) is None
    for shift in (*range(-4, 0), *range(1, 5)):
        moved = tuple((start + shift, end + shift) for start, end in spans)
        if all(0 <= start < end <= len(TEXT) for start, end in moved):
            assert wrong_spans(TEXT, Phrase(words, moved)) is not None
    for before, behind in ((-1, 0), (1, 0), (0, -1), (0, 1)):
        moved = tuple((start + before, end + behind) for start, end in spans)
        if moved != spans and all(0 <= start < end for start, end in moved) and words != ("be",):
            assert wrong_spans(TEXT, Phrase(words, moved)) is not None


def test_every_word_needs_a_span_of_its_own() -> None:
    assert "7 spans" in str(wrong_spans(TEXT, Phrase(("dog",), ((2, 5),) * 7)))
    assert "0 spans" in str(wrong_spans(TEXT, Phrase(("dog",), ())))
    assert wrong_spans("dogs and cats", Phrase(("dog", "dog"), ((0, 4), (9, 13)))) is not None


def test_scripts_without_spaces_have_no_word_edges() -> None:
    assert wrong_spans("一只棕色的狗", Phrase(("狗",), ((5, 6),))) is None


HIS = "A man rides his two dogs' bike down the café, dogs bark."


@pytest.mark.parametrize(
    ("text", "words", "given", "expected"),
    [
        (HIS, ("dog",), ["dogs"], ["dogs"]),  # sound spans stay as they are, though the word comes again
        (HIS, ("dog",), [], ["dogs", "dogs"]),
        (HIS, ("dog", "two"), ["dogs"], ["two", "dogs"]),
        (HIS, ("man", "ride down", "café"), [], ["man", "rides", "down", "café"]),
        (HIS, ("man", "have", "bike"), ["man", "bike"], ["man", "his", "bike"]),
        (HIS, ("bike",), ["bi"], ["bike"]),
        (HIS, ("bike",), [" "], [" ", "bike"]),
        (HIS, ("bike",), ["rides"], ["rides", "bike"]),
        (HIS, ("person",), ["man"], ["man"]),  # another word for it has a span, and nothing else says it
        (HIS, ("person",), [], None),
        (HIS, ("person", "bike"), ["bike"], ["bike"]),
        (HIS, ("person", "bike"), [], None),
        (HIS, ("cafe",), [], ["café"]),
        ("A dog chased a dog", ("dog", "chase", "dog"), ["dog", "chased"], ["dog", "chased", "dog"]),
        ("A D\u200bO\u00adG and a cafe\u0301", ("dog", "café"), [], ["D\u200bO\u00adG", "cafe\u0301"]),
        ("一只棕色的狗", ("狗", "棕色"), ["狗"], ["棕色", "狗"]),
        ("a close-up of 🐕", ("🐕", "close-up"), [], ["close-up", "🐕"]),
    ],
)
def test_what_gives_a_phrase_away(
    text: str, words: tuple[str, ...], given: list[str], expected: list[str] | None
) -> None:
    spans = tuple((text.index(part), text.index(part) + len(part)) for part in given)
    found = words_said(text, Phrase(words, spans))
    assert (None if found is None else [text[start:end] for start, end in found]) == expected
