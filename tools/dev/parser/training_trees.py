"""The trees that the parser learns from: captions of COCO, tagged and parsed by spaCy."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mvptr_ds.corpus.concepts.backends import SpacyBackend, normalised
from mvptr_ds.corpus.concepts.tokens import token_spans
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.progress import progress_bar

logger = logging.getLogger(__name__)

_CHUNK = 2048


class TrainingTree(NamedTuple):
    """A caption with tags, heads (a root is its own) and dependency labels, one of each a word."""

    words: list[str]
    tags: list[str]
    heads: list[int]
    labels: list[str]


def read_captions(paths: Sequence[Path], exclude: Path | None) -> list[str]:
    """Returns the captions of COCO annotation files, each once, sorted.

    Those in `exclude` (JSON lines with a "caption") are left out, and so are all other captions of their images.

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


def annotate(captions: Sequence[str]) -> list[TrainingTree]:
    """Returns spaCy's tags and trees, without captions in capitals throughout, which spaCy reads badly."""
    backend = SpacyBackend()
    out = []
    for start in progress_bar(range(0, len(captions), _CHUNK), desc="annotate"):
        texts = captions[start : start + _CHUNK]
        spans = [token_spans(text) for text in texts]
        for text, found, annotation in zip(texts, spans, backend.annotate(texts, spans), strict=True):
            words = [text[begin:end] for begin, end in found]
            if normalised(words) == words:
                out.append(TrainingTree(words, *annotation))
    return out
