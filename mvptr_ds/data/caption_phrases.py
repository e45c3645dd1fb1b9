"""Chooses the phrases of a caption that take part in training, with the characters that give each away."""

from __future__ import annotations

from dataclasses import dataclass, field

from mvptr_ds.data.phrase_words import words_said
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Spans


@dataclass
class CaptionPhrases:
    """The phrases of a caption that get a slot, in the order of the caption's list."""

    indices: list[int] = field(default_factory=list)  # in the vocabulary
    spans: list[Spans] = field(default_factory=list)  # characters of the caption that say each of them
    slots: list[int | None] = field(default_factory=list)  # for every phrase of the caption's list, its slot or None
    num_dropped: int = 0  # not in the vocabulary, or not found in the caption's text


def phrases_with_slots(caption: Caption, vocab: PhraseVocab, most: int) -> CaptionPhrases:
    """Returns the first `most` phrases of a caption that the vocabulary knows.

    A phrase without spans is searched in the text. It is left out where it is not found: its words could not be masked.
    A phrase that the list holds twice gets two slots.
    """
    out = CaptionPhrases()
    for phrase in caption.phrases:
        index, slot = vocab.index_of(phrase.tuple), None
        if index is None:
            out.num_dropped += 1
        elif len(out.indices) < most:
            spans = words_said(caption.text, phrase)
            if spans is None:
                out.num_dropped += 1
            else:
                slot = len(out.indices)
                out.indices.append(index)
                out.spans.append(spans)
        out.slots.append(slot)
    return out
