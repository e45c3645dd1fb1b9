"""The parts of the phrase parser without its models: tokens, lemmas, transitions, rules on trees written by hand."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mvptr_ds.corpus.concepts.dependency import DependencyParser, Model, batches
from mvptr_ds.corpus.concepts.lemmas import FINITE, PAST, PLURAL, PROGRESSIVE, Lemmatiser, by_rule
from mvptr_ds.corpus.concepts.rules import find_tuples
from mvptr_ds.corpus.concepts.templates import ATOMS, TEMPLATES
from mvptr_ds.corpus.concepts.tokens import token_spans
from mvptr_ds.corpus.concepts.tree import Token, Tree
from tools.dev.parser.parser_trainer import Oracle, ParserTrainer, quantised
from tools.dev.parser.training_trees import TrainingTree


@pytest.mark.parametrize(
    ("text", "tokens"),
    [
        ("A dog's ball, isn't it?", ["A", "dog", "'s", "ball", ",", "is", "n't", "it", "?"]),
        ("close-up of a t-shirt", ["close", "-", "up", "of", "a", "t", "-", "shirt"]),
        ("red and/or blue", ["red", "and", "/", "or", "blue"]),
        ("Snow. A dog runs..", ["Snow", ".", "A", "dog", "runs", ".."]),
        ("In the U.S. at 3.5 mi.", ["In", "the", "U.S.", "at", "3.5", "mi", "."]),
        ('a sign says "stop"', ["a", "sign", "says", '"', "stop", '"']),
        ("a ``quoted'' \"word''", ["a", "``", "quoted", "''", '"', "word", "''"]),
        ("🙂 a\u00a0dog\t\n", ["🙂", "a", "dog"]),
        ("", []),
        ("   ", []),
    ],
)
def test_tokens(text: str, tokens: list[str]) -> None:
    assert [text[start:end] for start, end in token_spans(text)] == tokens


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=80) | st.text("a '\"`.-/,?é\u3000🙂\x00", max_size=40))
def test_tokens_cover_all_but_space_in_order(text: str) -> None:
    spans = token_spans(text)
    assert all(start < end for start, end in spans)
    assert all(before[1] <= after[0] for before, after in itertools.pairwise(spans))
    gaps = [0, *(place for span in spans for place in span), len(text)]
    assert not any(text[start:end].strip() for start, end in zip(gaps[::2], gaps[1::2], strict=True))


@pytest.mark.parametrize(
    ("kind", "forms"),
    [
        (
            PLURAL,
            "dogs:dog boxes:box glasses:glass benches:bench cities:city horses:horse bus:bus pies:pie potatoes:potato",
        ),
        (PLURAL, "vases:vase sizes:size buildings:building skis:skis"),
        (FINITE, "sits:sit catches:catch flies:fly rides:ride kiss:kiss goes:goe"),
        (PROGRESSIVE, "riding:ride sitting:sit looking:look making:make jumping:jump flying:fly moving:move using:use"),
        (PROGRESSIVE, "decorating:decorate smiling:smile cooking:cook ring:ring"),
        (
            PAST,
            "filled:fill parked:park tried:try stopped:stop baked:bake covered:cover colored:color red:red used:use",
        ),
    ],
)
def test_rules_of_spelling(kind: str, forms: str) -> None:
    for pair in forms.split():
        form, lemma = pair.split(":")
        assert by_rule(form, kind) == lemma


def test_the_table_of_exceptions_comes_first_and_only_inflecting_tags_change() -> None:
    lemmatiser = Lemmatiser({PLURAL: {"men": "man"}, PAST: {"left": "leave"}})
    assert [lemmatiser.lemma("Men", "NNS"), lemmatiser.lemma("LEFT", "VBD")] == ["man", "leave"]
    assert [lemmatiser.lemma("Left", "JJ"), lemmatiser.lemma("Dogs", "NNP")] == ["left", "dogs"]
    assert lemmatiser.lemmas("left") == {"left", "leave"}


def _projective(size: int, rng: random.Random) -> list[int]:
    """Heads of a random projective tree; the root is its own."""
    heads = list(range(size))

    def fill(start: int, end: int, head: int | None) -> None:
        if start < end:
            top = rng.randrange(start, end)
            heads[top] = top if head is None else head
            for low, high in ((start, top), (top + 1, end)):
                at = low
                while at < high:
                    cut = rng.randint(at + 1, high)
                    fill(at, cut, top)
                    at = cut

    fill(0, size, None)
    return heads


def _training_tree(size: int, seed: int) -> TrainingTree:
    rng = random.Random(seed)
    heads = _projective(size, rng)
    labels = ["ROOT" if head == index else rng.choice(["a", "b"]) for index, head in enumerate(heads)]
    return TrainingTree(
        [f"w{rng.randrange(9)}" for _ in heads], [rng.choice(["NN", "IN"]) for _ in heads], heads, labels
    )


def test_the_oracle_finds_every_projective_tree_and_costs_nothing_on_the_way() -> None:
    trees = [_training_tree(size, seed) for seed in range(40) for size in (1, 2, 3, 7, 15)]
    trainer = ParserTrainer(trees, num_rows=64, margin=0, seed=0)
    states = trainer.parser.states([s.words for s in trees], [s.tags for s in trees])
    oracle = Oracle(states, trees, trainer.transitions)
    kinds_C = trainer.model.kinds_C
    steps = 0
    while (active_B := states.unfinished()).any():
        costs_BC = np.where(states.allowed(kinds_C), oracle.costs(kinds_C), 10**6)
        assert (costs_BC.min(axis=1)[active_B] == 0).all()
        states.apply(costs_BC.argmin(axis=1), kinds_C, active_B)
        steps += 1
    assert steps == 2 * 15
    for row, sentence in enumerate(trees):
        tree = trainer.parser.tree(states, row)
        assert (tree.heads, tree.labels) == (sentence.heads, sentence.labels)


def test_costs_are_the_arcs_that_are_lost() -> None:
    """Source: the definition of a dynamic oracle, by trying all that can follow on short sentences."""

    def reachable(trainer: ParserTrainer, sentence: TrainingTree, path: list[int]) -> int:
        """The most right arcs (label included) that a continuation of the path can end with."""
        states = trainer.parser.states([sentence.words], [sentence.tags])
        kinds_C = trainer.model.kinds_C
        for transition in path:
            states.apply(np.array([transition]), kinds_C, np.array([True]))
        if not states.unfinished()[0]:
            heads = trainer.parser.tree(states, 0).heads
            labels = [trainer.model.labels[made_by - 1] for made_by in states.labels_BN[0, : len(heads)]]
            found = zip(heads, labels, sentence.heads, sentence.labels, strict=True)
            return sum((head, label) == (right, name) for head, label, right, name in found)
        options = np.flatnonzero(states.allowed(kinds_C)[0])
        return max(reachable(trainer, sentence, [*path, int(option)]) for option in options)

    rng = random.Random(0)
    for seed in range(6):
        sentence = _training_tree(3, seed)
        trainer = ParserTrainer([sentence] * 20, num_rows=64, margin=0, seed=0)
        kinds_C = trainer.model.kinds_C
        path: list[int] = []
        while True:
            states = trainer.parser.states([sentence.words], [sentence.tags])
            oracle = Oracle(states, [sentence], trainer.transitions)
            for transition in path:
                states.apply(np.array([transition]), kinds_C, np.array([True]))
            if not states.unfinished()[0]:
                break
            best = reachable(trainer, sentence, path)
            options = np.flatnonzero(states.allowed(kinds_C)[0])
            lost = [best - reachable(trainer, sentence, [*path, int(option)]) for option in options]
            assert oracle.costs(kinds_C)[0, options].tolist() == lost
            path.append(int(rng.choice(options)))


def test_training_learns_is_repeatable_and_survives_the_file(tmp_path: Path) -> None:
    sentences = [
        (["a", "dog", "chases", "a", "cat"], ["DT", "NN", "VBZ", "DT", "NN"], [1, 2, 2, 4, 2]),
        (["the", "cat", "sits", "on", "it"], ["DT", "NN", "VBZ", "IN", "PRP"], [1, 2, 2, 2, 3]),
        (["a", "red", "ball"], ["DT", "JJ", "NN"], [2, 2, 2]),
    ]
    labels = [
        ["det", "nsubj", "ROOT", "det", "dobj"],
        ["det", "nsubj", "ROOT", "prep", "pobj"],
        ["det", "amod", "ROOT"],
    ]
    trees = [TrainingTree(*parts, names) for parts, names in zip(sentences, labels, strict=True)] * 20
    words, tags = [s.words for s in trees[:3]], [s.tags for s in trees[:3]]
    models = []
    for _ in range(2):
        trainer = ParserTrainer(trees, num_rows=2**12, margin=5, seed=3)
        rights = [trainer.epoch(trees, [s.tags for s in trees], explore, "test") for explore in (0.0, 0.9, 0.9)]
        assert rights[-1] == 1.0
        models.append(trainer.model._replace(weights_HC=quantised(trainer.averaged())))
    assert np.array_equal(models[0].weights_HC, models[1].weights_HC)
    parsed = DependencyParser(models[0]).parse(words, tags)
    assert [(tree.heads, tree.labels) for tree in parsed] == [(s.heads, s.labels) for s in trees[:3]]

    path = tmp_path / "model.npz"
    models[0].save(path)
    first = path.read_bytes()
    models[1].save(path)
    assert path.read_bytes() == first
    loaded = DependencyParser(Model.load(path))
    assert loaded.parse(words[::-1], tags[::-1]) == parsed[::-1]
    assert loaded.parse([], []) == [] and loaded.parse([[]], [[]]) == [([], [])]


def test_templates_combine_known_atoms_each_once() -> None:
    assert {atom for template in TEMPLATES for atom in template} == set(ATOMS)
    assert len({frozenset(template) for template in TEMPLATES}) == len(TEMPLATES)
    trainer = ParserTrainer([_training_tree(4, 0)], num_rows=64, margin=0, seed=0)
    states = trainer.parser.states([["a", "b"]], [["NN", "IN"]])
    assert states.atoms().shape == (1, len(ATOMS))


def test_batches_hold_every_sentence_once_and_few_long_ones() -> None:
    lengths = [5] * 300 + [9000, 20000, 0]
    found = list(batches(lengths))
    assert sorted(index for batch in found for index in batch) == list(range(303))
    assert [len(batch) for batch in found][-2:] == [1, 1] and max(map(len, found)) == 128


def _tree(*rows: str) -> Tree:
    """Rows "word tag lemma head label", heads counted from 0."""
    parts = [row.split() for row in rows]
    return Tree([Token(word, 0, 1, tag, lemma, int(head), label) for word, tag, lemma, head, label in parts])


def _words(tree: Tree) -> set[str]:
    return {" | ".join(part.word for part in found) for found in find_tuples(tree)}


def test_rules_on_a_passive_with_an_agent() -> None:
    tree = _tree(
        "bread NN bread 2 nsubjpass",
        "is VBZ be 2 auxpass",
        "cut VBN cut 2 ROOT",
        "up RP up 2 prt",
        "by IN by 2 agent",
        "cooks NNS cook 4 pobj",
    )
    assert _words(tree) == {"bread", "cook", "cook | cut up | bread"}


def test_rules_on_a_relative_clause_and_a_verb_joined_by_and() -> None:
    tree = _tree(
        "man NN man 0 ROOT",
        "who WP who 2 nsubj",
        "rides VBZ ride 0 relcl",
        "horses NNS horse 2 dobj",
        "and CC and 2 cc",
        "sings VBZ sing 2 conj",
        "in IN in 5 prep",
        "rain NN rain 6 pobj",
    )
    assert _words(tree) == {"man", "horse", "rain", "man | ride | horse", "man | sing in | rain"}


def test_rules_on_what_is_found_out_of_order_or_without_end() -> None:
    """Lists and chains as long as a text may be: no recursion, and no product of all with all."""
    size = 3000
    listed = Tree(
        [Token("dogs", 0, 1, "NNS", "dog", 0, "ROOT")]
        + [Token(f"n{i}", 0, 1, "NN", f"n{i}", i - 1, "conj") for i in range(1, size)]
    )
    assert len(find_tuples(listed)) == size
    verbs = Tree([Token("run", 0, 1, "VB", "run", max(0, i - 1), "conj") for i in range(size)])
    assert find_tuples(verbs) == []
    cycles = Tree([Token("run", 0, 1, "VB", "run", 0, "conj"), Token("dog", 0, 1, "NN", "dog", 0, "conj")])
    assert _words(cycles) == {"dog"}
    prepositions = Tree(
        [Token("dog", 0, 1, "NN", "dog", 0, "ROOT")]
        + [Token("of", 0, 1, "IN", "of", i - 1, "prep") for i in range(1, size)]
        + [Token("cat", 0, 1, "NN", "cat", size - 1, "pobj")]
    )
    assert _words(prepositions) == {"dog", "cat"}
