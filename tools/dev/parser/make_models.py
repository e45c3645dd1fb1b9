"""Makes the models of the default phrase parser: captions -> trees by spaCy -> tagger, parser, lemmas.

models/tagger.json         weights of NLTK's averaged perceptron tagger, words that have one tag, tags
models/dependencies.npz    int8 weights of the dependency parser with its transitions and tags
models/lemmas.json         class of forms -> form -> lemma, where the rules of spelling are wrong
models/about.json          how they were made, and how well they do on trees that they were not trained on
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import random
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from nltk.tag.perceptron import PerceptronTagger

from mvptr_ds.corpus.concepts.backends import DEPENDENCIES_NAME, LEMMAS_NAME, TAGGER_NAME, SpacyBackend
from mvptr_ds.corpus.concepts.dependency import DependencyParser, Model
from mvptr_ds.corpus.concepts.lemmas import CLASS_OF_TAG, PLURAL, by_rule
from mvptr_ds.user_io.atomic import replacing
from tools.dev.parser.parser_trainer import ParserTrainer, quantised
from tools.dev.parser.training_trees import TrainingTree, annotate

logger = logging.getLogger(__name__)

ABOUT_NAME = "about.json"
_MIN_TAG_WEIGHT = 0.4  # of the tagger; what is smaller changes less than one tag in 10,000
_PUNCTUATION = frozenset([".", ",", ":", "HYPH", "``", "''", "-LRB-", "-RRB-"])
# what lemminflect says otherwise; plural-only words stay what they are
_LEMMAS = {
    "leaves": "leaf",
    "media": "media",
    "graffiti": "graffiti",
    **{word: word for word in ["fries", "clothes", "shorts", "pants", "scissors", "electronics", "jeans", "tights"]},
}


@dataclass(frozen=True)
class Settings:
    """What the models are trained on and how; the defaults made the shipped ones."""

    num_captions: int = 120_000
    num_held_out: int = 2_000
    num_rows: int = 2**18  # rows of the parser's weights, a power of two
    margin: float = 30.0  # the right transition must win by this many weights
    explore: float = 0.9  # how often training follows its own choice, from the second epoch on
    num_tagger_epochs: int = 4
    num_parser_epochs: int = 6
    seed: int = 0


def make_models(captions: Sequence[str], folder: Path, settings: Settings) -> dict[str, Any]:
    """Trains all models, writes them into `folder` and returns what about.json says."""
    order = list(captions)
    random.Random(settings.seed).shuffle(order)
    trees = annotate(order[: settings.num_captions + settings.num_held_out])
    held_out, trees = trees[: settings.num_held_out], trees[settings.num_held_out :]
    tagger = train_tagger(trees, settings)
    # a tagger that has seen a caption is too sure of its tags; the parser must learn from the tags it will get
    half = len(trees) // 2
    first, second = train_tagger(trees[:half], settings), train_tagger(trees[half:], settings)
    tags = [*_tags(second, trees[:half]), *_tags(first, trees[half:])]
    model = train_parser(trees, tags, settings)
    about = {
        "settings": asdict(settings),
        "num_trained_on": len(trees),
        "made_with": {name: importlib.metadata.version(name) for name in ("spacy", "lemminflect", "nltk", "numpy")},
        "silver": SpacyBackend().version,
        "held_out": measure(tagger, model, held_out),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TAGGER_NAME, json.dumps(_tagger_content(tagger), separators=(",", ":"), sort_keys=True))
    _write(folder / LEMMAS_NAME, json.dumps(lemma_table(trees), indent=0, sort_keys=True) + "\n")
    _write(folder / ABOUT_NAME, json.dumps(about, indent=1) + "\n")
    model.save(folder / DEPENDENCIES_NAME)
    return about


def train_tagger(trees: Sequence[TrainingTree], settings: Settings) -> PerceptronTagger:
    """Trains NLTK's tagger, then rounds its weights and drops the small ones."""
    random.seed(settings.seed)  # NLTK shuffles with the global generator
    tagger = PerceptronTagger(load=False)
    tagger.train(
        [list(zip(sentence.words, sentence.tags, strict=True)) for sentence in trees if sentence.words],
        nr_iter=settings.num_tagger_epochs,
    )
    # what remains after rounding is what is shipped, and what the parser is trained with
    for feature, weights in list(tagger.model.weights.items()):
        kept = {tag: round(weight, 1) for tag, weight in weights.items() if abs(weight) >= _MIN_TAG_WEIGHT}
        if kept:
            tagger.model.weights[feature] = kept
        else:
            del tagger.model.weights[feature]
    return tagger


def _tagger_content(tagger: PerceptronTagger) -> dict[str, Any]:
    return {"tags": sorted(tagger.classes), "frequent": tagger.tagdict, "weights": tagger.model.weights}


def _tags(tagger: PerceptronTagger, trees: Sequence[TrainingTree]) -> list[list[str]]:
    return [[tag for _, tag in tagger.tag(sentence.words)] for sentence in trees]


def train_parser(trees: Sequence[TrainingTree], tags: Sequence[Sequence[str]], settings: Settings) -> Model:
    """Trains on the words and `tags`, towards the heads and labels of `trees`."""
    trainer = ParserTrainer(trees, settings.num_rows, settings.margin, settings.seed)
    for epoch in range(settings.num_parser_epochs):
        # without a first round of weights its own choices lead nowhere
        right = trainer.epoch(trees, tags, settings.explore if epoch else 0.0, f"parser epoch {epoch + 1}")
        logger.info("epoch %d: %.4f of the transitions are right", epoch + 1, right)
    return trainer.model._replace(weights_HC=quantised(trainer.averaged()))


def lemma_table(trees: Sequence[TrainingTree]) -> dict[str, dict[str, str]]:
    """Returns the forms of the captions whose lemma in lemminflect's dictionary does not follow from the spelling."""
    import lemminflect

    counts: Counter[tuple[str, str]] = Counter()
    for sentence in trees:
        for word, tag in zip(sentence.words, sentence.tags, strict=True):
            if tag in CLASS_OF_TAG and word.isascii():
                counts[CLASS_OF_TAG[tag], word.lower()] += 1
    table: dict[str, dict[str, str]] = defaultdict(dict)
    for kind, form in sorted(counts):
        known = lemminflect.getAllLemmas(form, upos="NOUN" if kind == PLURAL else "VERB")
        lemma = _LEMMAS.get(form) if kind == PLURAL else None
        lemma = lemma or next((found[0].lower() for found in known.values()), "")
        if lemma and lemma != by_rule(form, kind):
            table[kind][form] = lemma
    return dict(table)


def measure(tagger: PerceptronTagger, model: Model, trees: Sequence[TrainingTree]) -> dict[str, float]:
    """Returns the shares of right tags, right heads (UAS), and right heads with the right label (LAS).

    Punctuation does not count in the last two.
    """
    tags = _tags(tagger, trees)
    found = DependencyParser(model).parse([sentence.words for sentence in trees], tags)
    counts: Counter[str] = Counter()
    for sentence, found_tags, tree in zip(trees, tags, found, strict=True):
        for index, tag in enumerate(sentence.tags):
            counts["tokens"] += 1
            counts["tag"] += tag == found_tags[index]
            if tag not in _PUNCTUATION:
                head = sentence.heads[index] == tree.heads[index]
                counts.update(words=1, uas=head, las=head and sentence.labels[index] == tree.labels[index])
    words, tokens = max(1, counts["words"]), max(1, counts["tokens"])
    rates = {"tag_accuracy": counts["tag"] / tokens, "uas": counts["uas"] / words, "las": counts["las"] / words}
    return {name: round(value, 4) for name, value in rates.items()}


def _write(path: Path, content: str) -> None:
    with replacing(path) as partial:
        partial.write_text(content, encoding="utf-8")
