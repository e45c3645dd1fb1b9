"""Turns the tuples that SPICE wrote (`-detailed`) into phrases with spans.

SPICE reads [{"image_id", "test": caption, "refs": [...]}] and writes, in the same order,
[{"image_id", "test_tuples": [{"tuple": ["dog", "brown"], "truth_value": true}, ...], ...}]. Those of `test` are taken.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from mvptr_ds.corpus.concepts.backends import LEMMAS_NAME, MODELS
from mvptr_ds.corpus.concepts.caption_files import count_phrases, phrases_json
from mvptr_ds.corpus.concepts.lemmas import Lemmatiser
from mvptr_ds.corpus.concepts.spans import is_said_by, to_spans
from mvptr_ds.corpus.concepts.tokens import Span, token_spans
from mvptr_ds.corpus.concepts.web import are_words
from mvptr_ds.corpus.resumable_jobs import Summary, put_in_place
from mvptr_ds.data.schema import Caption, Phrase, Words
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import partial_path

_MAX_PLACES = 8  # of one word that are tried: a caption that says it more often is no caption


def read_spice(source: Path, tuples: Path, lemmatiser: Lemmatiser) -> tuple[list[Caption], Summary]:
    """Returns the captions of SPICE's input with the tuples of its output; what is not said in the caption is dropped.

    Raises:
        DataError: the files are not of this kind, or not of each other.
    """
    inputs, outputs = _read_list(source), _read_list(tuples)
    captions = [str(_field(item, "test", source)) for item in inputs]
    if [item.get("image_id") for item in inputs] != [item.get("image_id") for item in outputs]:
        raise DataError(
            f"{source} and {tuples} do not list the same image_ids in the same order; give SPICE's own input"
        )
    found = [[_words(entry, tuples) for entry in _field(item, "test_tuples", tuples)] for item in outputs]
    summary = Summary()
    swap = _relation_is_last(captions, found, lemmatiser)
    out = []
    for text, all_words in zip(captions, found, strict=True):
        phrases = []
        for words in all_words:
            ordered = (words[0], words[2], words[1]) if swap and len(words) == 3 else words
            phrase = find_phrase(text, ordered, lemmatiser)
            if not are_words(ordered):
                summary.drop("tuple with a word that is none", f"{text[:60]!r}: {words}")
            elif phrase is None:
                summary.drop("tuple whose words the caption does not say", f"{text[:60]!r}: {words}")
            else:
                phrases.append(phrase)
        count_phrases(summary, phrases)
        out.append(Caption(text, tuple(phrases)))
    return out, summary


def import_spice(source: Path, tuples: Path, out: Path) -> Summary:
    """Writes the captions of SPICE's input with the phrases of its output as JSON lines.

    Raises:
        DataError: as read_spice does, or `out` holds something else.
    """
    captions, summary = read_spice(source, tuples, Lemmatiser.load(MODELS / LEMMAS_NAME))
    partial = partial_path(out)
    with partial.open("w", encoding="utf-8") as lines:
        for caption in captions:
            lines.write(json.dumps({"caption": caption.text, "phrases": phrases_json(caption.phrases)}) + "\n")
    put_in_place(partial, out)
    return summary


def find_phrase(text: str, words: Words, lemmatiser: Lemmatiser) -> Phrase | None:
    """Returns the phrase with the spans of its words where they stand closest together; None when one is not there."""
    spans = token_spans(text)
    forms = [text[start:end] for start, end in spans]
    places = [list(itertools.islice(_places(word.split(), forms, lemmatiser), _MAX_PLACES)) for word in words]
    choices = [c for c in itertools.product(*places) if len(set(itertools.chain(*c))) == sum(map(len, c))]
    if not choices:
        return None
    best = min(choices, key=_spread)
    return Phrase(words, tuple(span for place in best for span in to_spans(place, spans)))


def _places(words: Sequence[str], forms: Sequence[str], lemmatiser: Lemmatiser) -> Iterator[tuple[int, ...]]:
    """Yields tokens that say the words one after the other: for each start, always the nearest next one."""
    for start in range(len(forms)):
        place: list[int] = []
        for word in words:
            first = place[-1] + 1 if place else start
            last = len(forms) if place else start + 1
            found = next((i for i in range(first, last) if is_said_by(word, forms[i], lemmatiser)), None)
            if found is None:
                break
            place.append(found)
        if place and len(place) == len(words):
            yield tuple(place)


def _spread(places: Sequence[tuple[int, ...]]) -> tuple[int, int]:
    """Returns how far apart the words stand; among equal choices the order of the tuple decides."""
    firsts = [place[0] for place in places]
    return sum(abs(a - b) for a, b in itertools.pairwise(firsts)), sum(a > b for a, b in itertools.pairwise(firsts))


def _relation_is_last(captions: Sequence[str], tuples: Sequence[Sequence[Words]], lemmatiser: Lemmatiser) -> bool:
    """Returns whether triples are (subject, object, relation): their third word mostly stands before the second."""
    votes = 0
    for text, all_words in zip(captions, tuples, strict=True):
        for words in all_words:
            if len(words) == 3:
                second, third = _first(text, words[1], lemmatiser), _first(text, words[2], lemmatiser)
                if second is not None and third is not None:
                    votes += 1 if third < second else -1
    return votes > 0


def _first(text: str, word: str, lemmatiser: Lemmatiser) -> Span | None:
    phrase = find_phrase(text, (word,), lemmatiser)
    return phrase.spans[0] if phrase is not None else None


def _read_list(path: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if not isinstance(content, list) or not all(isinstance(item, dict) for item in content):
        raise DataError(f"{path} is not a list of objects, as SPICE reads and writes them")
    return content


def _field(item: dict[str, Any], name: str, path: Path) -> Any:
    if name not in item:
        hint = "; run SPICE with -detailed" if name == "test_tuples" else ""
        raise DataError(f"{path}: the entry of image_id {item.get('image_id')!r} has no {name!r}{hint}")
    return item[name]


def _words(entry: Any, path: Path) -> Words:
    words = entry.get("tuple") if isinstance(entry, dict) else None
    if (
        not isinstance(words, list)
        or not 1 <= len(words) <= 3
        or not all(isinstance(w, str) and w.split() for w in words)
    ):
        raise DataError(f'{path}: {entry!r} is not {{"tuple": one to three words}}')
    return tuple(word.lower() for word in words)
