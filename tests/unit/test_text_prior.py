"""The prior of words alone: features, probabilities worked out by hand, and what it cannot know."""

from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest

from mvptr_ds.evaluation.text_prior import TextPrior, features_of


def test_features_are_words_marks_and_neighbours() -> None:
    assert features_of("Is the dog left?") == [
        "is", "the", "dog", "left", "?", "is the", "the dog", "dog left", "left ?"
    ]  # fmt: skip
    assert features_of("") == [] and features_of("A") == ["a"]


def test_probabilities_by_hand() -> None:
    """Yes has the features a, b, "a b", a, and no has b: (n + .5) / (4 + 3 x .5) for yes, (n + .5) / (1 + 3 x .5)."""
    prior = TextPrior.fit(["a b", "a", "b"], ["yes", "yes", "no"])
    assert prior.answers == ["yes", "no"] and prior.majority == "yes"
    yes = math.log(2 / 3) + math.log(1.5 / 5.5)
    no = math.log(1 / 3) + math.log(1.5 / 2.5)
    assert yes < no and prior.predict("b") == "no"
    assert prior.predict("a") == "yes"  # 2/3 x 2.5/5.5 against 1/3 x .5/2.5
    assert prior.predict("never seen") == "yes"
    assert prior.accuracy(["b", "a", "never"], ["no", "no", "yes"]) == pytest.approx(2 / 3)
    assert math.isnan(prior.accuracy([], []))


def test_it_equals_the_plain_formula_on_random_texts() -> None:
    rng = np.random.default_rng(0)
    texts = [" ".join(rng.choice(list("abcdef"), size=rng.integers(1, 6))) for _ in range(200)]
    answers = rng.choice(["x", "y", "z"], size=200, p=[0.5, 0.3, 0.2]).tolist()
    prior = TextPrior.fit(texts, answers)
    counts = {answer: Counter[str]() for answer in "xyz"}
    for text, answer in zip(texts, answers, strict=True):
        counts[answer].update(features_of(text))
    known = set().union(*counts.values())

    def score(text: str, answer: str) -> float:
        total = sum(counts[answer].values()) + 0.5 * len(known)
        likelihood = sum(math.log((counts[answer][f] + 0.5) / total) for f in features_of(text) if f in known)
        return math.log(answers.count(answer) / 200) + likelihood

    for text in [*texts, "a a a g", "f e d c b a"]:
        assert prior.predict(text) == max("xyz", key=lambda answer: score(text, answer))


def test_answers_must_fit_the_texts() -> None:
    for texts, answers in (([], []), (["a"], [])):
        with pytest.raises(ValueError, match=f"{len(texts)} texts with 0 answers"):
            TextPrior.fit(texts, answers)
