"""Trains the dependency parser of mvptr_ds/corpus/concepts/dependency.py on trees that another parser made.

Legend: that file's, and L sentences that one update learns from.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

import numpy as np

from mvptr_ds.corpus.concepts.dependency import LEFT, RIGHT, SHIFT, DependencyParser, Model, States, batches
from mvptr_ds.corpus.concepts.templates import feature_rows, make_multipliers
from mvptr_ds.user_io.progress import progress_bar
from tools.dev.parser.training_trees import TrainingTree

MAX_PRUNED = 3  # of 127
RARE = 20  # a label seen less often is "dep"


class Oracle:
    """Counts the right arcs that each transition makes unreachable. Source: Goldberg and Nivre, 2013."""

    def __init__(self, states: States, trees: Sequence[TrainingTree], transitions: dict[tuple[int, str], int]) -> None:
        shape = states.heads_BN.shape
        self.states = states
        self.heads_BN = np.full(shape, -1)
        self.label_2BN = np.zeros((2, *shape), dtype=np.int64)  # the right transition for LEFT and RIGHT
        for row, sentence in enumerate(trees):
            size = len(sentence.words)
            for index, (head, label) in enumerate(zip(sentence.heads, sentence.labels, strict=True)):
                self.heads_BN[row, index] = size if head == index else head
                for side, kind in enumerate((LEFT, RIGHT)):
                    self.label_2BN[side, row, index] = transitions.get((kind, label), transitions[kind, "dep"])
        self._index_N = np.arange(shape[1])

    def costs(self, kinds_C: np.ndarray) -> np.ndarray:
        """Returns int64 [B, C]: right arcs that each transition would lose in each state."""
        states = self.states
        rows_B, front_B = states.rows_B, states.front_B
        s0, s1 = states.top(0), states.top(1)
        head_s0, head_b0 = self.heads_BN[rows_B, s0], self.heads_BN[rows_B, front_B]
        in_buffer_BN = self._index_N >= front_B[:, None]
        on_stack_BN = (self._index_N < front_B[:, None]) & (states.heads_BN < 0)
        lost = ((self.heads_BN == s0[:, None]) & in_buffer_BN).sum(1)
        left = lost + (head_s0 == s1) + (head_s0 > front_B)
        right = lost + (head_s0 >= front_B)
        shift = ((self.heads_BN == front_B[:, None]) & on_stack_BN).sum(1)
        shift += (head_b0 >= 0) & (head_b0 != s0) & on_stack_BN[rows_B, head_b0]
        costs_BC = np.stack([shift, left, right], axis=1)[:, kinds_C]
        number_C = np.arange(len(kinds_C))
        for side, kind, head in ((0, LEFT, front_B), (1, RIGHT, s1)):
            wrong_label_BC = number_C != self.label_2BN[side, rows_B, s0][:, None]
            costs_BC += wrong_label_BC & (kinds_C == kind) & (head_s0 == head)[:, None]
        return costs_BC


def transitions_of(trees: Sequence[TrainingTree]) -> tuple[np.ndarray, list[str]]:
    """Returns the kinds and labels of the transitions that the annotations need."""
    counts: Counter[tuple[int, str]] = Counter()
    for sentence in trees:
        for index, (head, label) in enumerate(zip(sentence.heads, sentence.labels, strict=True)):
            counts[LEFT if head > index or head == index else RIGHT, label] += 1
    kept = {pair for pair, count in counts.items() if count >= RARE} | {(LEFT, "dep"), (RIGHT, "dep")}
    pairs = [(SHIFT, ""), *sorted(kept)]
    return np.array([kind for kind, _ in pairs], dtype=np.int8), [label for _, label in pairs]


class ParserTrainer:
    """An averaged perceptron over the transitions of many sentences at once."""

    def __init__(self, trees: Sequence[TrainingTree], num_rows: int, margin: float, seed: int) -> None:
        kinds_C, labels = transitions_of(trees)
        tags = sorted({tag for sentence in trees for tag in sentence.tags})
        weights_HC = np.zeros((num_rows, len(labels)), dtype=np.float32)
        self.model = Model(weights_HC, make_multipliers(seed), kinds_C, labels, tags)
        self.transitions = {(int(kind), label): c for c, (kind, label) in enumerate(zip(kinds_C, labels, strict=True))}
        self.margin = margin
        self.rng = np.random.default_rng(seed)
        self.parser = DependencyParser(self.model)
        self._totals_HC = np.zeros_like(weights_HC)  # update x its step, for the average
        self._step = 1

    def epoch(self, trees: Sequence[TrainingTree], tags: Sequence[Sequence[str]], explore: float, desc: str) -> float:
        """Trains on each sentence once; returns the share of transitions that cost nothing."""
        num_right = num_all = 0
        for chosen in progress_bar(list(self._batches(trees)), desc=desc):
            right, made = self._learn([trees[i] for i in chosen], [tags[i] for i in chosen], explore)
            num_right, num_all = num_right + right, num_all + made
        return num_right / max(1, num_all)

    def _batches(self, trees: Sequence[TrainingTree]) -> Iterator[list[int]]:
        order = self.rng.permutation(len(trees))
        groups = []
        for start in range(0, len(order), 4096):
            window = order[start : start + 4096]
            found = batches([len(trees[i].words) for i in window])
            groups += [[int(window[i]) for i in group[half::4]] for group in found for half in range(4)]
        for number in self.rng.permutation(len(groups)):
            if groups[number]:
                yield groups[number]

    def _learn(self, trees: list[TrainingTree], tags: list[Sequence[str]], explore: float) -> tuple[int, int]:
        model = self.model
        states = self.parser.states([sentence.words for sentence in trees], tags)
        oracle = Oracle(states, trees, self.transitions)
        num_right = num_all = 0
        active_B = states.unfinished()
        while active_B.any():
            rows_BT = feature_rows(states.atoms(), model.multipliers_TA, len(model.weights_HC))
            scores_BC = model.weights_HC[rows_BT].sum(axis=1)
            allowed_BC = states.allowed(model.kinds_C)
            costs_BC = np.where(allowed_BC, oracle.costs(model.kinds_C), 10**6)
            best_BC = allowed_BC & (costs_BC == costs_BC.min(axis=1, keepdims=True))
            good_B = np.where(best_BC, scores_BC, -np.inf).argmax(axis=1)
            bad_B = np.where(allowed_BC & ~best_BC, scores_BC, -np.inf).argmax(axis=1)
            gap_B = scores_BC[states.rows_B, good_B] - scores_BC[states.rows_B, bad_B]
            has_bad_B = (allowed_BC & ~best_BC).any(axis=1)
            learn = np.flatnonzero(active_B & has_bad_B & (gap_B <= self.margin))
            self._update(rows_BT[learn], good_B[learn], bad_B[learn])
            wrong_B = has_bad_B & (gap_B <= 0)
            num_right, num_all = num_right + int((active_B & ~wrong_B).sum()), num_all + int(active_B.sum())
            follow_B = self.rng.random(len(good_B)) < explore
            states.apply(np.where(wrong_B & follow_B, bad_B, good_B), model.kinds_C, active_B)
            active_B = states.unfinished()
        return num_right, num_all

    def _update(self, rows_LT: np.ndarray, good_L: np.ndarray, bad_L: np.ndarray) -> None:
        for chosen_L, sign in ((good_L, 1.0), (bad_L, -1.0)):
            column_LT = np.broadcast_to(chosen_L[:, None], rows_LT.shape)
            np.add.at(self.model.weights_HC, (rows_LT, column_LT), sign)
            np.add.at(self._totals_HC, (rows_LT, column_LT), sign * self._step)
        self._step += 1

    def averaged(self) -> np.ndarray:
        """Returns float32 [H, C]: the mean of the weights over all updates."""
        return self.model.weights_HC - self._totals_HC / self._step


def quantised(weights_HC: np.ndarray) -> np.ndarray:
    """Returns int8 [H, C], scaled so that one weight in 10,000 of those that are not 0 is clipped.

    The smallest become 0: they change no figure that we measure, and the file shrinks by a quarter.
    """
    sizes = np.abs(weights_HC[weights_HC != 0])
    scale = 127 / float(np.quantile(sizes, 0.9999)) if sizes.size else 1.0
    rounded_HC = np.clip(np.rint(weights_HC * scale), -127, 127).astype(np.int8)
    rounded_HC[np.abs(rounded_HC) <= MAX_PRUNED] = 0
    return rounded_HC
