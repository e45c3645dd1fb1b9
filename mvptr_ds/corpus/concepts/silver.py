"""Makes the models that the default parser ships: captions -> trees by spaCy (silver) -> tagger, parser, lemmas.

models/tagger.json         weights of NLTK's averaged perceptron tagger, words that have one tag, tags
models/dependencies.npz    int8 weights of the dependency parser with its transitions and tags
models/lemmas.json         class of forms -> form -> lemma, where the rules of spelling are wrong
models/about.json          how they were made, and how well they do on silver captions that they did not see
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

from mvptr_ds.corpus.concepts.backends import DEPENDENCIES_NAME, LEMMAS_NAME, TAGGER_NAME, SpacyBackend, normalised
from mvptr_ds.corpus.concepts.dependency import DependencyParser, Model
from mvptr_ds.corpus.concepts.lemmas import CLASS_OF_TAG, PLURAL, by_rule
from mvptr_ds.corpus.concepts.tokens import token_spans
from mvptr_ds.corpus.concepts.training import ParserTrainer, Silver, quantised
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing
from mvptr_ds.user_io.progress import progress_bar

logger = logging.getLogger(__name__)

ABOUT_NAME = "about.json"
_CHUNK = 2048
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
    num_captions: int = 120_000
    num_held_out: int = 2_000
    num_rows: int = 2**18  # rows of the parser's weights, a power of two
    margin: float = 30.0  # the right transition must win by this many weights
    explore: float = 0.9  # how often training follows its own choice, from the second epoch on
    num_tagger_epochs: int = 4
    num_parser_epochs: int = 6
    seed: int = 0


def read_captions(paths: Sequence[Path], exclude: Path | None) -> list[str]:
    """Captions of COCO annotation files, each once, without those in `exclude` and all others of the same images.

    `exclude` holds JSON lines with a "caption".

    Raises:
        DataError: a file is not of this kind.
    """
    try:
        annotations = [a for path in paths for a in json.loads(path.read_text(encoding="utf-8-sig"))["annotations"]]
        pairs = [(a["image_id"], str(a["caption"]).strip()) for a in annotations]
        lines = exclude.read_text(encoding="utf-8-sig").splitlines() if exclude is not None else []
        unwanted = {json.loads(line)["caption"].strip().lower() for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"cannot read captions of {[*map(str, paths), str(exclude)]}: {error!r}") from error
    images = {image for image, caption in pairs if caption.lower() in unwanted}
    logger.info("%d captions; %d images left out with all their captions", len(pairs), len(images))
    return sorted({text for image, text in pairs if text and image not in images and text.lower() not in unwanted})


def annotate(captions: Sequence[str]) -> list[Silver]:
    """spaCy's tags and trees; captions in capitals throughout are left out, spaCy reads them badly."""
    backend = SpacyBackend()
    out = []
    for start in progress_bar(range(0, len(captions), _CHUNK), desc="annotate"):
        texts = captions[start : start + _CHUNK]
        spans = [token_spans(text) for text in texts]
        for text, found, annotation in zip(texts, spans, backend.annotate(texts, spans), strict=True):
            words = [text[begin:end] for begin, end in found]
            if normalised(words) == words:
                out.append(Silver(words, *annotation))
    return out


def make_models(captions: Sequence[str], folder: Path, settings: Settings) -> dict[str, Any]:
    """Trains all models, writes them into `folder` and returns what about.json says."""
    order = list(captions)
    random.Random(settings.seed).shuffle(order)
    silver = annotate(order[: settings.num_captions + settings.num_held_out])
    held_out, silver = silver[: settings.num_held_out], silver[settings.num_held_out :]
    tagger = train_tagger(silver, settings)
    # a tagger that has seen a caption is too sure of its tags; the parser must learn from the tags it will get
    half = len(silver) // 2
    first, second = train_tagger(silver[:half], settings), train_tagger(silver[half:], settings)
    tags = [*_tags(second, silver[:half]), *_tags(first, silver[half:])]
    model = train_parser(silver, tags, settings)
    about = {
        "settings": asdict(settings),
        "num_trained_on": len(silver),
        "made_with": {name: importlib.metadata.version(name) for name in ("spacy", "lemminflect", "nltk", "numpy")},
        "silver": SpacyBackend().version,
        "held_out": measure(tagger, model, held_out),
    }
    folder.mkdir(parents=True, exist_ok=True)
    _write(folder / TAGGER_NAME, json.dumps(_tagger_content(tagger), separators=(",", ":"), sort_keys=True))
    _write(folder / LEMMAS_NAME, json.dumps(lemma_table(silver), indent=0, sort_keys=True) + "\n")
    _write(folder / ABOUT_NAME, json.dumps(about, indent=1) + "\n")
    model.save(folder / DEPENDENCIES_NAME)
    return about


def train_tagger(silver: Sequence[Silver], settings: Settings) -> PerceptronTagger:
    random.seed(settings.seed)  # NLTK shuffles with the global generator
    tagger = PerceptronTagger(load=False)
    tagger.train(
        [list(zip(sentence.words, sentence.tags, strict=True)) for sentence in silver if sentence.words],
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


def _tags(tagger: PerceptronTagger, silver: Sequence[Silver]) -> list[list[str]]:
    return [[tag for _, tag in tagger.tag(sentence.words)] for sentence in silver]


def train_parser(silver: Sequence[Silver], tags: Sequence[Sequence[str]], settings: Settings) -> Model:
    """Trains on the words and `tags`, towards the heads and labels of `silver`."""
    trainer = ParserTrainer(silver, settings.num_rows, settings.margin, settings.seed)
    for epoch in range(settings.num_parser_epochs):
        # without a first round of weights its own choices lead nowhere
        right = trainer.epoch(silver, tags, settings.explore if epoch else 0.0, f"parser epoch {epoch + 1}")
        logger.info("epoch %d: %.4f of the transitions are right", epoch + 1, right)
    return trainer.model._replace(weights_HC=quantised(trainer.averaged()))


def lemma_table(silver: Sequence[Silver]) -> dict[str, dict[str, str]]:
    """Forms of the captions whose lemma, as lemminflect's dictionary has it, spelling does not tell."""
    import lemminflect

    counts: Counter[tuple[str, str]] = Counter()
    for sentence in silver:
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


def measure(tagger: PerceptronTagger, model: Model, silver: Sequence[Silver]) -> dict[str, float]:
    """Shares of right tags, heads (UAS), and heads with the right label (LAS), punctuation left out of the last two."""
    tags = _tags(tagger, silver)
    trees = DependencyParser(model).parse([sentence.words for sentence in silver], tags)
    counts: Counter[str] = Counter()
    for sentence, found_tags, tree in zip(silver, tags, trees, strict=True):
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
