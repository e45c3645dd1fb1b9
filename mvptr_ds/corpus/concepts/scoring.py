"""Measures how well the phrases of a parser match known tuples, for `mvptr phrases --score`."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvptr_ds.data.schema import Phrase, Words
from mvptr_ds.errors import DataError

_EXPECTED = '{"caption": "...", "tuples": [["dog"], ["dog", "brown"], ["dog", "cat", "chase"]]}'
KINDS = {1: "object", 2: "attribute", 3: "relation"}  # by the number of words


@dataclass(frozen=True)
class Known:
    """A caption with its tuples, relations as (subject, relation, object)."""

    caption: str
    tuples: frozenset[Words]


@dataclass
class Score:
    """Counts of tuples by their number of words; `errors` lists captions with extra and missing tuples."""

    right: Counter[int] = field(default_factory=Counter)
    extra: Counter[int] = field(default_factory=Counter)
    missing: Counter[int] = field(default_factory=Counter)
    errors: list[tuple[str, list[Words], list[Words]]] = field(default_factory=list)

    def f1(self, *kinds: int) -> float:
        """Returns the micro F1 of the kinds; 1 where there is nothing to find and nothing was found."""
        right = sum(self.right[kind] for kind in kinds)
        wrong = sum(self.extra[kind] + self.missing[kind] for kind in kinds)
        return 2 * right / (2 * right + wrong) if right or wrong else 1.0

    def to_json(self) -> dict[str, float]:
        out = {"f1": self.f1(*KINDS)}
        out.update({f"{name}_f1": self.f1(kind) for kind, name in KINDS.items()})
        return {name: round(value, 4) for name, value in out.items()}

    def lines(self, num_examples: int) -> Iterator[str]:
        """Yields a table of the kinds, then captions with errors, spread over the file."""
        yield f"{'kind':<10}{'F1':>8}{'precision':>11}{'recall':>8}{'right':>8}{'extra':>8}{'missing':>8}"
        for name, kinds in [("all", tuple(KINDS)), *((name, (kind,)) for kind, name in KINDS.items())]:
            right, extra, missing = (sum(c[k] for k in kinds) for c in (self.right, self.extra, self.missing))
            precision, recall = right / max(1, right + extra), right / max(1, right + missing)
            f1 = self.f1(*kinds)
            yield f"{name:<10}{f1:>8.4f}{precision:>11.4f}{recall:>8.4f}{right:>8}{extra:>8}{missing:>8}"
        step = max(1, len(self.errors) // num_examples) if num_examples else 1
        for caption, extra_tuples, missing_tuples in self.errors[::step][:num_examples]:
            yield caption
            yield from (f"    extra    {' | '.join(words)}" for words in extra_tuples)
            yield from (f"    missing  {' | '.join(words)}" for words in missing_tuples)


def read_known(path: Path) -> list[Known]:
    """Reads JSON lines {"caption", "tuples"}, relations written (subject, object, relation) as SPICE orders them.

    Raises:
        DataError: it is not a file or holds no line; or naming the line that is not of this kind.
    """
    if not path.is_file():
        raise DataError(f"{path} is not a file; give one of {_EXPECTED} a line")
    out = []
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                content = json.loads(line)
                out.append(Known(content["caption"], frozenset(map(_in_our_order, content["tuples"]))))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise DataError(f"{path}, line {number}: {error!r}; expected {_EXPECTED}") from error
    if not out:
        raise DataError(f"{path} holds no captions; expected {_EXPECTED} a line")
    return out


def _in_our_order(words: Sequence[Any]) -> Words:
    lowered = [word.lower() for word in words]
    if len(lowered) not in KINDS:
        raise ValueError(f"a tuple of {len(lowered)} words")
    return tuple(lowered) if len(lowered) < 3 else (lowered[0], lowered[2], lowered[1])


def score(known: Iterable[Known], found: Iterable[Sequence[Phrase]]) -> Score:
    """Compares sets of lower-cased tuples, caption by caption."""
    out = Score()
    for caption, phrases in zip(known, found, strict=True):
        ours = {tuple(word.lower() for word in phrase.tuple) for phrase in phrases}
        extra, missing = ours - caption.tuples, caption.tuples - ours
        for counter, tuples in ((out.right, ours & caption.tuples), (out.extra, extra), (out.missing, missing)):
            counter.update(map(len, tuples))
        if extra or missing:
            out.errors.append((caption.caption, sorted(extra), sorted(missing)))
    return out
