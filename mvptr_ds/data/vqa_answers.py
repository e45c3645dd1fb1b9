"""The answers of VQA v2: how they are normalised, the soft scores of training, and the official accuracy.

The rules are those of the public evaluation code, with its slips, since published numbers were made with it:

- An apostrophe and a colon are kept, and a period in front of a digit is: `it's`, `10:30`, `3.5`.
- Other punctuation becomes a space, or nothing where a space stands beside it or a number has a comma: `1,000`.
- `none` is 0 and `zero` to `ten` are digits, articles fall out, and `dont` becomes `don't`.

The accuracy normalises the prediction in full. The annotators' answers lose their punctuation alone, and only where
they disagree: `The dog` never equals the prediction `dog`, and `w/o` is never hit where all ten wrote it.
"""

from __future__ import annotations

import functools
import re
from collections import Counter
from collections.abc import Iterator, Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_MOST_PERIODS = 32  # the official code passes a flag of this value where re.sub takes the number of replacements
_ARTICLES = frozenset({"a", "an", "the"})
_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_DIGITS = {"none": "0", **{word: str(number) for number, word in enumerate(_NUMBER_WORDS)}}
# Endings, and the words that the official list writes with them. A word that is another word without its apostrophe,
# such as `we're`, is not in the list.
_CONTRACTED = {
    "n't": ("ai are ca could did does do had has have is might must need ought sha should was were wo would"),
    "'ve": "could might must not should they we what where who would you",
    "'d": "he how it someone something there they where who you",
    "'ll": "how it somebody someone something they what who why you",
    "'s": "he how somebody someone that there what when where who why",
    "'re": "there they what why you",
    "n't've": "could had might should would",
    "'d've": "he it she somebody someone something there they we who you",
}
_CONTRACTED_WHOLE = "ma'am o'clock 'twas y'all y'all'll y'all'd've 'ow's'at"
_FEWEST_SHARED = 4  # answers from which an answer's share of them says how right it is


def _contractions() -> Iterator[tuple[str, str]]:
    """Yields each contraction without one of its apostrophes, and as it is written."""
    whole = [word + ending for ending, words in _CONTRACTED.items() for word in words.split()]
    for right in [*whole, *_CONTRACTED_WHOLE.split()]:
        for at in (found.start() for found in re.finditer("'", right)):
            yield right[:at] + right[at + 1 :], right
    yield "somebody'd", "somebodyd"  # turned round in the official list


_CONTRACTIONS = dict(_contractions())


@functools.lru_cache(maxsize=1 << 16)  # most of ten million answers are among a few thousand
def normalise(answer: str) -> str:
    """Returns an answer as the official evaluation writes a prediction; "" where nothing but articles is left."""
    words = _without_punctuation(answer.replace("\n", " ").replace("\t", " ").strip()).lower().split()
    words = [_DIGITS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _without_punctuation(text: str) -> str:
    out, number_with_comma = text, _COMMA_IN_NUMBER.search(text) is not None
    for mark in _PUNCTUATION:
        if mark in text:
            beside_space = f"{mark} " in text or f" {mark}" in text
            out = out.replace(mark, "" if beside_space or number_with_comma else " ")
    return _PERIOD.sub("", out, count=_MOST_PERIODS)


def soft_scores(answers: Sequence[str]) -> dict[str, float]:
    """Returns the score of each normalised answer, in the order in which they first come.

    The score is the accuracy that the answer would have against these answers: of ten, .3, .6, .9 and 1 where one, two,
    three, and four or more give it. Fewer than four answers are all taken for right, with a score of 1. An answer that
    is empty after it was normalised has none.
    """
    counts = Counter(normalise(answer) for answer in answers)
    total = len(answers)

    def score(count: int) -> float:
        if total < _FEWEST_SHARED:
            return 1.0
        return round((count * min(1, (count - 1) / 3) + (total - count) * min(1, count / 3)) / total, 6)

    return {answer: score(count) for answer, count in counts.items() if answer}


def official_accuracy(prediction: str, annotations: Sequence[str]) -> float:
    """Returns the official accuracy of one prediction, from 0 to 1.

    It is the mean over the sets that leave one of the annotators' answers out: a third for each equal answer that is
    left, at most 1.

    Args:
        prediction: as a model writes it.
        annotations: the annotators' answers as they stand in the data, ten in VQA v2.

    Raises:
        ValueError: there are no annotations.
    """
    if not annotations:
        raise ValueError("a question has no annotations; the accuracy needs the answers of the annotators")
    disagree = len(set(annotations)) > 1
    given = [_without_punctuation(answer) if disagree else answer for answer in annotations]
    num_equal = given.count(normalise(prediction))
    total = len(given)
    left = num_equal * min(1, (num_equal - 1) / 3) + (total - num_equal) * min(1, num_equal / 3)
    return left / total
