"""Answers from the words of a text alone: what a score has to be compared with, since balance is never perfect."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence

import numpy as np

_SMOOTHING = 0.5  # of an occurrence, for every word with every answer


class TextPrior:
    """Naive Bayes on words and pairs of neighbouring words.

    Attributes:
        answers: the answers, most frequent first.
    """

    def __init__(self, answers: Sequence[str], log_prior_A: np.ndarray, log_seldom_A: np.ndarray) -> None:
        self.answers = list(answers)
        self._log_prior_A, self._log_seldom_A = log_prior_A, log_seldom_A
        # feature -> numbers of the answers it came with, and how much likelier it is there than a feature never seen
        self._gains: dict[str, tuple[np.ndarray, np.ndarray]] = {}

    @classmethod
    def fit(cls, texts: Sequence[str], answers: Sequence[str]) -> TextPrior:
        """Counts the features of texts by their answers.

        Raises:
            ValueError: there are no texts, or not as many answers.
        """
        if not texts or len(texts) != len(answers):
            raise ValueError(f"{len(texts)} texts with {len(answers)} answers: give one answer for each of some texts")
        order = [answer for answer, _ in Counter(answers).most_common()]
        number_of = {answer: number for number, answer in enumerate(order)}
        counts: dict[str, Counter[int]] = defaultdict(Counter)
        for text, answer in zip(texts, answers, strict=True):
            for feature in features_of(text):
                counts[feature][number_of[answer]] += 1
        num_texts_A = np.bincount([number_of[answer] for answer in answers]).astype(np.float64)
        num_features_A = np.zeros(len(order))
        for of_feature in counts.values():
            num_features_A[list(of_feature)] += list(of_feature.values())
        log_seldom_A = math.log(_SMOOTHING) - np.log(num_features_A + _SMOOTHING * len(counts))
        prior = cls(order, np.log(num_texts_A / len(texts)), log_seldom_A)
        for feature, of_feature in counts.items():
            times_K = np.fromiter(of_feature.values(), dtype=np.float64)
            prior._gains[feature] = np.array(list(of_feature)), np.log(times_K / _SMOOTHING + 1)
        return prior

    @property
    def majority(self) -> str:
        """The most frequent answer."""
        return self.answers[0]

    def predict(self, text: str) -> str:
        """Returns the likeliest answer; of equals the one that is more frequent. Unknown features are left out."""
        log_A = self._log_prior_A.copy()
        for feature in features_of(text):
            if feature in self._gains:
                numbers_K, gains_K = self._gains[feature]
                log_A += self._log_seldom_A
                log_A[numbers_K] += gains_K
        return self.answers[int(log_A.argmax())]

    def accuracy(self, texts: Iterable[str], answers: Iterable[str]) -> float:
        """Returns the share of texts whose answer is predicted; NaN without any."""
        right = [self.predict(text) == answer for text, answer in zip(texts, answers, strict=True)]
        return sum(right) / len(right) if right else math.nan


def features_of(text: str) -> list[str]:
    """Returns the words of a text in small letters, with its marks as words, and the pairs of neighbours."""
    words = re.findall(r"\w+|[^\w\s]", text.lower())
    return [*words, *(" ".join(pair) for pair in itertools.pairwise(words))]
