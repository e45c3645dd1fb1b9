"""Parses many sentences at a time with a greedy arc-hybrid dependency parser.

A state is a stack, a buffer and the arcs so far. s0 s1 s2 are the top of the stack, b0 b1 b2 the front of the buffer;
the root stands at the end of the buffer. Every token costs two transitions:

    SHIFT     b0 moves onto the stack
    LEFT(l)   s0 becomes a dependent of b0 with label l and leaves the stack
    RIGHT(l)  s0 becomes a dependent of s1 with label l and leaves the stack

The next one is the best of all that are allowed by a linear score over hashed features. Source: arc-hybrid system and
its dynamic oracle, Goldberg and Nivre (TACL 2013).

Legend: B sentences in a batch, N tokens of the longest + 2 (root, nothing), A atoms, T templates, C transitions,
H rows of weights.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from mvptr_ds.corpus.concepts.templates import feature_rows
from mvptr_ds.user_io.atomic import replacing

BATCH_SIZE = 128  # sentences side by side: enough to hide numpy's overhead, few enough for the cache
MAX_BATCH_TOKENS = 128 * BATCH_SIZE
SHIFT, LEFT, RIGHT = 0, 1, 2


class HeadsAndLabels(NamedTuple):
    """Heads (a root is its own) and labels of one sentence."""

    heads: list[int]
    labels: list[str]


def word_id(word: str) -> int:
    """Returns a number that is the same on every machine and in every process, unlike hash()."""
    return zlib.crc32(word.lower().encode("utf-8", "surrogatepass")) + 2


class Model(NamedTuple):
    weights_HC: np.ndarray  # int8 as shipped, float32 while it is trained
    multipliers_TA: np.ndarray  # uint64: a template's atoms times these, summed; the high bits are the row
    kinds_C: np.ndarray  # SHIFT, LEFT or RIGHT
    labels: list[str]  # of the transitions
    tags: list[str]

    def save(self, path: Path) -> None:
        """Writes a file that holds plain arrays only; equal models give equal bytes."""
        with replacing(path) as partial, partial.open("wb") as out:
            np.savez_compressed(
                out,
                weights=self.weights_HC,
                multipliers=self.multipliers_TA,
                kinds=self.kinds_C,
                labels=np.array(self.labels),
                tags=np.array(self.tags),
            )

    @classmethod
    def load(cls, path: Path) -> Model:
        with np.load(path, allow_pickle=False) as content:
            return cls(
                content["weights"],
                content["multipliers"],
                content["kinds"],
                [str(label) for label in content["labels"]],
                [str(tag) for tag in content["tags"]],
            )


class States:
    """The states of B sentences between two transitions."""

    def __init__(self, words: Sequence[Sequence[int]], tags: Sequence[Sequence[int]], nouns: frozenset[int]) -> None:
        size_B = np.array([len(sentence) for sentence in words])
        num, longest = len(words), int(size_B.max(initial=0))
        self.size_B = size_B  # also the index of the root
        self.nothing = longest + 1  # index of the token that is not there
        shape = (num, longest + 2)
        self.words_BN = np.zeros(shape, dtype=np.int64)
        self.tags_BN = np.zeros(shape, dtype=np.int64)
        self.next_noun_BN = np.full(shape, self.nothing)
        for row, (word_ids, tag_ids) in enumerate(zip(words, tags, strict=True)):
            self.words_BN[row, : len(word_ids)] = word_ids
            self.tags_BN[row, : len(tag_ids)] = tag_ids
            self._mark_nouns(row, tag_ids, nouns)
        rows = np.arange(num)
        self.rows_B = rows
        self.words_BN[rows, size_B] = 1
        self.tags_BN[rows, size_B] = 1
        self.heads_BN = np.full(shape, -1)
        self.labels_BN = np.zeros(shape, dtype=np.int64)  # transition that made the arc
        self.left_BN = np.full(shape, self.nothing)  # outermost dependents
        self.right_BN = np.full(shape, self.nothing)
        self.num_left_BN = np.zeros(shape, dtype=np.int64)
        self.num_right_BN = np.zeros(shape, dtype=np.int64)
        self.stack_BN = np.full((num, longest + 4), self.nothing)  # three below the bottom, so that s2 is always there
        self.depth_B = np.zeros(num, dtype=np.int64)
        self.front_B = np.zeros(num, dtype=np.int64)

    def _mark_nouns(self, row: int, tag_ids: Sequence[int], nouns: frozenset[int]) -> None:
        following = self.nothing
        for index in range(len(tag_ids) - 1, -1, -1):
            self.next_noun_BN[row, index] = following
            # the head of a compound is its last noun
            if tag_ids[index] in nouns and (index + 1 == len(tag_ids) or tag_ids[index + 1] not in nouns):
                following = index

    def unfinished(self) -> np.ndarray:
        """Returns bool [B]: whether a state has a transition to make."""
        return (self.depth_B > 0) | (self.front_B < self.size_B)

    def top(self, number: int) -> np.ndarray:
        """Returns int64 [B]: token s0, s1 or s2."""
        return self.stack_BN[self.rows_B, self.depth_B + 2 - number]

    def front(self, number: int) -> np.ndarray:
        """Returns int64 [B]: token b0, b1, ...; behind the root there is nothing."""
        index_B = self.front_B + number
        return np.where(index_B <= self.size_B, index_B, self.nothing)

    def atoms(self) -> np.ndarray:
        """Returns int64 [B, A]: the atoms that the templates combine, in the order of ATOMS."""
        rows_B = self.rows_B
        s0, s1, s2 = self.top(0), self.top(1), self.top(2)
        b0, b1, b2, b3 = self.front(0), self.front(1), self.front(2), self.front(3)
        bn = self.next_noun_BN[rows_B, b0]
        s0l, s1l = self.left_BN[rows_B, s0], self.left_BN[rows_B, s1]
        s0r, s1r = self.right_BN[rows_B, s0], self.right_BN[rows_B, s1]
        b0l = self.left_BN[rows_B, b0]
        row_1B = rows_B[None]
        after = np.where(s0 < self.size_B, s0 + 1, self.nothing)
        before = np.where((b0 > 0) & (b0 < self.nothing), b0 - 1, self.nothing)
        words = self.words_BN[row_1B, np.stack([s0, s1, s2, b0, b1, b2, bn])]
        tags = self.tags_BN[row_1B, np.stack([s0, s1, s2, b0, b1, b2, bn, b3])]
        labels = self.labels_BN[row_1B, np.stack([s0l, s0r, s1l, s1r, b0l])]
        child_tags = self.tags_BN[row_1B, np.stack([s0l, s0r, s1r, b0l])]
        child_words = self.words_BN[row_1B, np.stack([s0r, s1r])]
        counts = np.stack(
            [
                self.num_left_BN[rows_B, s0],
                self.num_right_BN[rows_B, s0],
                self.num_right_BN[rows_B, s1],
                self.num_left_BN[rows_B, b0],
                np.minimum(b0 - s0, 6),
                np.minimum(s0 - s1, 6),
            ]
        )
        edge = self.tags_BN[row_1B, np.stack([after, before])]
        return np.concatenate([words, tags, labels, child_tags, child_words, counts, edge]).T

    def allowed(self, kinds_C: np.ndarray) -> np.ndarray:
        """Returns bool [B, C]: which transitions each state allows."""
        shift_B = self.front_B < self.size_B
        table_B3 = np.stack([shift_B, self.depth_B > 0, self.depth_B > 1], axis=1)
        return table_B3[:, kinds_C]

    def apply(self, transition_B: np.ndarray, kinds_C: np.ndarray, active_B: np.ndarray) -> None:
        """Makes one transition in each active state."""
        kind_B = kinds_C[transition_B]
        shift = np.flatnonzero(active_B & (kind_B == SHIFT))
        self.stack_BN[shift, self.depth_B[shift] + 3] = self.front_B[shift]
        reduce = np.flatnonzero(active_B & (kind_B != SHIFT))
        left = kind_B[reduce] == LEFT
        dependent = self.stack_BN[reduce, self.depth_B[reduce] + 2]
        head = np.where(left, self.front_B[reduce], self.stack_BN[reduce, self.depth_B[reduce] + 1])
        self.heads_BN[reduce, dependent] = head
        self.labels_BN[reduce, dependent] = transition_B[reduce] + 1
        for chosen, outermost_BN, counts_BN in (
            (left, self.left_BN, self.num_left_BN),
            (~left, self.right_BN, self.num_right_BN),
        ):
            outermost_BN[reduce[chosen], head[chosen]] = dependent[chosen]
            counts_BN[reduce[chosen], head[chosen]] += 1
        self.depth_B[reduce] -= 1
        self.depth_B[shift] += 1
        self.front_B[shift] += 1


def batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Yields the indices of sentences of similar length, in groups that suit the cache and the memory."""
    batch: list[int] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        if len(batch) == BATCH_SIZE or (batch and (len(batch) + 1) * lengths[index] > MAX_BATCH_TOKENS):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


class DependencyParser:
    """Parses words and tags into heads and labels."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._tag_ids = {tag: number for number, tag in enumerate(model.tags, start=2)}
        self._nouns = frozenset(number for tag, number in self._tag_ids.items() if tag.startswith("NN"))
        self._word_ids: dict[str, int] = {}

    def states(self, words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> States:
        """Sentences before their first transition."""
        tag_ids = [[self._tag_ids.get(tag, 0) for tag in sentence] for sentence in tags]
        return States([[word_id(word) for word in sentence] for sentence in words], tag_ids, self._nouns)

    def parse(self, words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]]) -> list[HeadsAndLabels]:
        """Returns the tree of each sentence; sentences of similar length are parsed together."""
        found: dict[int, HeadsAndLabels] = {}
        for chosen in batches([len(sentence) for sentence in words]):
            states = self.states([words[i] for i in chosen], [tags[i] for i in chosen])
            self._run(states)
            for row, index in enumerate(chosen):
                found[index] = self.tree(states, row)
        return [found[index] for index in range(len(words))]

    def _run(self, states: States) -> None:
        model = self.model
        num_rows = len(model.weights_HC)
        active_B = states.unfinished()
        while active_B.any():
            rows_BT = feature_rows(states.atoms(), model.multipliers_TA, num_rows)
            scores_BC = model.weights_HC[rows_BT].sum(axis=1, dtype=np.int32)
            scores_BC[~states.allowed(model.kinds_C)] = np.iinfo(np.int32).min
            states.apply(scores_BC.argmax(axis=1), model.kinds_C, active_B)
            active_B = states.unfinished()

    def tree(self, states: States, row: int) -> HeadsAndLabels:
        size = int(states.size_B[row])
        heads = states.heads_BN[row, :size].tolist()
        made_by = states.labels_BN[row, :size].tolist()
        labels = ["ROOT" if head == size else self.model.labels[t - 1] for head, t in zip(heads, made_by, strict=True)]
        return HeadsAndLabels([index if head == size else head for index, head in enumerate(heads)], labels)
