"""Items of demo scenes: true of their scenes by an independent look, balanced, and nothing to be read off the words."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import pytest

from mvptr_ds.data.schema import Phrase
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.demo import build
from mvptr_ds.demo.captions import COLOURS
from mvptr_ds.demo.expressions import make_expressions
from mvptr_ds.demo.items import Item, Template
from mvptr_ds.demo.plan import Concept, SplitRule
from mvptr_ds.demo.questions import answer_of, make_questions
from mvptr_ds.demo.relations import OPPOSITE, WAYS, clear_relation
from mvptr_ds.demo.scene import Scene, Source, make_scene
from mvptr_ds.demo.shapes import ShapesSource
from mvptr_ds.demo.statements import make_statements
from mvptr_ds.evaluation.text_prior import TextPrior
from tests.support.demo_truth import meant, things, true_answer, true_label

NUM_TRAIN, NUM_HELD_OUT, SEED = 1500, 2500, 1
Make = Callable[[Sequence[Scene], frozenset[Concept], int], list[Item]]
MAKERS: dict[str, Make] = {"vqa": make_questions, "entailment": make_statements, "referring": make_expressions}


@dataclass
class Drawn:
    """Scenes of both splits, and the texts of the training captions and tags."""

    train: list[Scene]
    held_out: list[Scene]
    known: frozenset[Concept]
    texts: set[str]
    made: dict[tuple[str, str], list[Item]] = field(default_factory=dict)

    def items(self, task: str, split: str) -> list[Item]:
        """Made once: most tests look at the same ones."""
        if (task, split) not in self.made:
            self.made[task, split] = MAKERS[task](getattr(self, split), self.known, 0)
        return self.made[task, split]


def draw(source: Source, num_train: int, num_held_out: int) -> Drawn:
    usage = build._Usage()
    train = [make_scene(source, SplitRule(SEED), number) for number in range(num_train)]
    for scene in train:
        usage.add(scene.record)
    known = usage.known_concepts()
    held_out = [make_scene(source, SplitRule(SEED, known), number) for number in range(num_held_out)]
    return Drawn(train, held_out, known, usage.texts)


@pytest.fixture(scope="module")
def shapes() -> Drawn:
    return draw(ShapesSource(), NUM_TRAIN, NUM_HELD_OUT)


def label_of(item: Item) -> str:
    return str(item.labels["label"]) if "label" in item.labels else answer_of(item)


# --- relations


@pytest.mark.parametrize(
    ("second", "way"),
    [
        ((40, 0, 50, 10), "left of"),
        ((13, 0, 23, 10), "left of"),
        ((12, 0, 22, 10), None),  # no further than 12 pixels
        ((40, 20, 50, 30), None),  # twice as far as down, and no more
        ((41, 20, 51, 30), "left of"),
        ((0, 40, 10, 50), "above"),
        ((40, 40, 50, 50), None),
        ((0, 0, 10, 10), None),
    ],
)
def test_clear_relations(second: tuple[int, int, int, int], way: str | None) -> None:
    first = (0, 0, 10, 10)
    assert clear_relation(first, second) == way
    assert clear_relation(second, first) == (OPPOSITE[way] if way else None)


# --- texts


def test_a_template_knows_where_its_words_stand() -> None:
    template = Template("Is the {x} {way} the {y}?", (("x",), ("y",), ("x", "way", "y")))
    item = template.item(7, "kind", {"label": 1}, x="dog", way="left of", y="cat")
    assert item == Item(
        7,
        "kind",
        "Is the dog left of the cat?",
        (
            Phrase(("dog",), ((7, 10),)),
            Phrase(("cat",), ((23, 26),)),
            Phrase(("dog", "left of", "cat"), ((7, 10), (11, 18), (23, 26))),
        ),
        {"label": 1},
    )
    assert template.fixed_text.split() == ["Is", "the", "the", "?"]
    assert item.caption.labels == {"label": 1, "kind": "kind"}


def test_spans_hold_the_words_of_their_phrases(shapes: Drawn) -> None:
    for task in MAKERS:
        for item in shapes.items(task, "train"):
            for phrase in item.phrases:
                assert [item.text[start:end] for start, end in phrase.spans] == list(phrase.tuple)


# --- by an independent look at the scenes


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize("task", ["vqa", "entailment"])
def test_every_answer_is_the_scenes(shapes: Drawn, split: str, task: str) -> None:
    scenes: list[Scene] = getattr(shapes, split)
    true = true_answer if task == "vqa" else true_label
    items = shapes.items(task, split)
    wrong = [item for item in items if label_of(item) != true(item, scenes[item.scene])]
    assert len(items) > 10_000 and wrong == []


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_expression_means_one_thing_alone(shapes: Drawn, split: str) -> None:
    scenes: list[Scene] = getattr(shapes, split)
    items = shapes.items("referring", split)
    kinds = Counter(item.kind for item in items)
    assert set(kinds) == {"noun", "attribute", "relation_twin", "absolute", "relation_thing"}
    assert kinds["noun"] <= sum(kinds.values()) - kinds["noun"] and min(kinds.values()) > 250
    for item in items:
        scene = scenes[item.scene]
        (thing,) = meant(item, scene)
        assert item.labels["box"] == list(map(float, thing.box))
        num_alike = len(things(scene, thing.plan.noun))
        rivals = {"noun": len(scene.objects), "relation_thing": len(scene.objects) - 1}.get(item.kind, num_alike)
        assert item.labels["rivals"] == rivals >= 2


def test_what_lies_beside_is_asked_where_four_things_or_more_are(shapes: Drawn) -> None:
    asked = [item for item in shapes.items("vqa", "train") if item.kind == "what_relation"]
    assert len(asked) > 100 and min(len(shapes.train[item.scene].objects) for item in asked) == 4


# --- balance


def texts_and_labels(items: Sequence[Item], kind: str) -> dict[str, Counter[str]]:
    found: dict[str, Counter[str]] = defaultdict(Counter)
    for item in items:
        if item.kind == kind:
            found[item.text][label_of(item)] += 1
    return found


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize(
    ("task", "kind", "labels"),
    [
        ("vqa", "exist_noun", ("yes", "no")),
        ("vqa", "exist_attribute", ("yes", "no")),
        ("vqa", "count_noun", ("0", "1", "2")),
        ("entailment", "attribute", ("entailment", "neutral", "contradiction")),
    ],
)
def test_each_text_comes_equally_often_with_each_label(
    shapes: Drawn, split: str, task: str, kind: str, labels: tuple[str, ...]
) -> None:
    found = texts_and_labels(shapes.items(task, split), kind)
    assert len(found) >= 12
    for text, counts in found.items():
        assert set(counts) == set(labels) and len(set(counts.values())) == 1, text


@pytest.mark.parametrize("split", ["train", "held_out"])
@pytest.mark.parametrize(
    ("task", "kind", "labels"),
    [
        ("vqa", "is_relation", ("yes", "no")),
        ("vqa", "where", WAYS),
        ("vqa", "count_all", ("2", "3", "4", "5")),
        ("entailment", "relation", ("entailment", "neutral", "contradiction")),
    ],
)
def test_kinds_of_few_answers_have_each_equally_often(
    shapes: Drawn, split: str, task: str, kind: str, labels: tuple[str, ...]
) -> None:
    items = shapes.items(task, split)
    counts = Counter(label_of(item) for item in items if item.kind == kind)
    assert set(counts) == set(labels) and len(set(counts.values())) == 1 and counts[labels[0]] > 200


def test_of_many_answers_none_is_much_more_frequent_than_the_mean(shapes: Drawn) -> None:
    items = shapes.items("vqa", "train")
    for kind, known in (("colour", COLOURS - {"gray"}), ("colour_relation", COLOURS - {"gray"})):
        counts = Counter(answer_of(item) for item in items if item.kind == kind)
        assert set(counts) == known and max(counts.values()) < 2 * np.mean(list(counts.values()))


def test_relations_are_asked_both_ways_and_denied_of_the_same_pair(shapes: Drawn) -> None:
    items = [item for item in shapes.items("vqa", "train") if item.kind == "is_relation"]
    by_pair: dict[tuple[int, tuple[str, ...]], list[Item]] = defaultdict(list)
    for item in items:
        by_pair[item.scene, tuple(phrase.tuple[0] for phrase in item.phrases[:2])].append(item)
    for pair in by_pair.values():
        assert sorted(map(answer_of, pair)) == ["no", "yes"]
        assert OPPOSITE[pair[0].phrases[2].tuple[1]] == pair[1].phrases[2].tuple[1]
    said = Counter(item.phrases[0].tuple[0] < item.phrases[1].tuple[0] for item in items)
    assert abs(said[True] / len(items) - 0.5) < 0.04  # which of the two is named first is drawn


@pytest.mark.parametrize("task", ["vqa", "entailment"])
def test_words_alone_do_no_better_than_a_guess(shapes: Drawn, task: str) -> None:
    trained, held_out = shapes.items(task, "train"), shapes.items(task, "held_out")
    num_kinds = 0
    for kind in {item.kind for item in held_out}:
        learnt, asked = ([i for i in items if i.kind == kind] for items in (trained, held_out))
        if len(asked) < 400:
            continue
        num_kinds += 1
        prior = TextPrior.fit([i.text for i in learnt], [label_of(i) for i in learnt])
        labels = [label_of(i) for i in asked]
        majority = Counter(labels).most_common(1)[0][1] / len(labels)
        found = prior.accuracy([i.text for i in asked], labels)
        assert found < majority + 0.02, (kind, found, majority)
    assert num_kinds == (9 if task == "vqa" else 2)


# --- splits


def test_held_out_scenes_and_pairs_are_not_among_those_for_training(shapes: Drawn) -> None:
    assert not {s.key for s in shapes.train} & {s.key for s in shapes.held_out}

    def pairs(scene: Scene) -> set[frozenset[Concept]]:
        return {frozenset(pair) for pair in itertools.combinations([o.plan.concept for o in scene.objects], 2)}

    seen = set().union(*map(pairs, shapes.train))
    rule = SplitRule(SEED)
    for scene in shapes.held_out:
        unseen = {pair for pair in pairs(scene) if rule.is_held_out(*pair)}
        assert unseen and not unseen & seen


def test_items_are_a_function_of_scenes_and_seed(shapes: Drawn) -> None:
    for make in MAKERS.values():
        first, again, other = (make(shapes.train[:200], shapes.known, seed) for seed in (3, 3, 4))
        assert first == again != other
        (name,) = {"question_id", "pair_id", "id"} & set(first[0].labels)
        kind = str if name == "pair_id" else int
        assert [item.labels[name] for item in first] == [kind(number) for number in range(len(first))]


def assert_no_word_is_spelled(drawn: Drawn, folder) -> None:  # type: ignore[no-untyped-def]
    path = folder / "word_vocab.txt"
    whole = WordPiece()
    path.write_text("\n".join(build.word_subset(whole, drawn.texts | build.TASK_TEXTS)) + "\n", encoding="utf-8")
    few = WordPiece(str(path))
    texts = {item.text for task in MAKERS for split in ("train", "held_out") for item in drawn.items(task, split)}
    assert len(texts) > 500
    for text in texts:
        assert [few.tokens[row] for row in few.encode(text)[0]] == [whole.tokens[row] for row in whole.encode(text)[0]]


def test_no_word_of_shapes_is_spelled(shapes: Drawn, tmp_path) -> None:  # type: ignore[no-untyped-def]
    assert_no_word_is_spelled(shapes, tmp_path)
    few_scenes = draw(ShapesSource(), 80, 40)
    assert_no_word_is_spelled(few_scenes, tmp_path)


def test_stamps_have_items_of_their_words(stamps_source, tmp_path) -> None:  # type: ignore[no-untyped-def]
    drawn = draw(stamps_source, 600, 200)
    assert_no_word_is_spelled(drawn, tmp_path)
    items = drawn.items("vqa", "train")
    assert {item.kind for item in items} == {
        "exist_noun", "exist_attribute", "count_noun", "count_all", "is_relation", "where", "what_relation",
        "colour_relation",
    }  # fmt: skip  # a stamp's noun fixes its colour, so it is not asked
    for task, true in (("vqa", true_answer), ("entailment", true_label)):
        items = drawn.items(task, "train")
        assert [i for i in items if label_of(i) != true(i, drawn.train[i.scene])] == []
    for item in drawn.items("referring", "train"):
        (thing,) = meant(item, drawn.train[item.scene])
        assert item.labels["box"] == list(map(float, thing.box))
