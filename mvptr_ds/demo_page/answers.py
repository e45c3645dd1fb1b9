"""What the page answers: pure functions of a trained model, held-out pictures and what somebody typed or uploaded.

Legend: N pictures, D hidden.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mvptr_ds.data.features import read_features
from mvptr_ds.data.pixels import STORED_FORMATS
from mvptr_ds.data.schema import Phrase
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS
from mvptr_ds.errors import DataError
from mvptr_ds.inference import Grounding, Picture, TrainedModel
from mvptr_ds.inference.samples import MASK
from mvptr_ds.user_io.progress import progress_bar

logger = logging.getLogger(__name__)

MAX_SENTENCE_CHARS = 1_000  # a longer text is cut by the model anyway, and the parser would take long
MAX_UPLOAD_BYTES = 32 * 2**20
NUM_SHOWN = 8  # pictures of a search
NUM_RERANKED = 32
NUM_WORDS = 5  # of each mask


@dataclass(frozen=True)
class HeldOut:
    """A held-out picture with the regions and tags of its shards, and its captions."""

    picture: Picture
    captions: tuple[str, ...]


class Found(NamedTuple):
    """A picture that a search found, and the score that put it there."""

    number: int
    score: float


class Search(NamedTuple):
    """The best pictures by each read-out, the best first."""

    by_similarity: list[Found]  # cosine of the global states
    reranked: list[Found]  # ITM probability, of the first NUM_RERANKED by cosine


class ReadOut(NamedTuple):
    """What one read-out gives two captions; None where it has no number, and `note` says why."""

    name: str
    first: float | None
    second: float | None
    note: str = ""

    @property
    def true_one(self) -> int | None:
        """Returns which caption is held for true, 0 or 1; None where both get the same or one gets nothing."""
        if self.first is None or self.second is None or self.first == self.second:
            return None
        return int(self.second > self.first)


def read_held_out(index: SampleIndex, num: int, with_features: bool) -> list[HeldOut]:
    """Reads the first `num` records of a split. A record that cannot be read is left out, and the log says why.

    Args:
        with_features: whether the model reads region features.

    Raises:
        DataError: none can be read.
    """
    out, problem = [], ""
    for number in progress_bar(range(min(num, index.num_records)), desc="read pictures", leave=False):
        try:
            record, members = index.read(index.place(number))
            features_RF = read_features(members, len(record.regions), None) if with_features else None
        except DataError as error:
            problem = f"held-out record {number} is left out: {error}"
            logger.warning("%s", problem)
            continue
        content = next((members[extension] for extension in IMAGE_EXTENSIONS if extension in members), None)
        boxes = [region.box for region in record.regions] or None
        tags = [region.tag for region in record.regions] or None
        size = record.width, record.height
        picture = Picture(content, boxes, tags, features_RF, size)
        out.append(HeldOut(picture, tuple(caption.text for caption in record.captions)))
    if not out:
        raise DataError(f"no held-out picture can be shown; {problem or 'the split is empty'}")
    return out


class Answers:
    """Answers what the page asks. The global states of all held-out pictures are computed at the start.

    Raises:
        DataError: the model can read none of the pictures.
    """

    def __init__(self, trained: TrainedModel, held_out: Sequence[HeldOut]) -> None:
        self._trained = trained
        self.held_out: list[HeldOut] = []
        with_tags, without = [], []
        size = trained.batch_size
        for start in progress_bar(range(0, len(held_out), size), desc="encode pictures", leave=False):
            shown = self._readable(held_out[start : start + size])
            if shown:
                self.held_out += shown
                with_tags.append(trained.embed_image([one.picture for one in shown]))
                without.append(trained.embed_image([without_tags(one.picture) for one in shown]))
        if not self.held_out:
            raise DataError("the model can read none of the held-out pictures; the lines above say why")
        self._globals_ND: dict[bool, Tensor] = {True: torch.cat(with_tags), False: torch.cat(without)}

    def _readable(self, held_out: Sequence[HeldOut]) -> list[HeldOut]:
        out = []
        for one in held_out:
            try:
                self._trained.samples.see(one.picture, 0, 1)
                out.append(one)
            except DataError as error:
                logger.warning("a held-out picture is left out: %s", error)
        return out

    @property
    def has_pictures(self) -> bool:
        """Returns whether there is anything but features to show."""
        return any(one.picture.image is not None for one in self.held_out)

    def picture(self, number: int | None, upload: str | Path | None, with_tags: bool) -> Picture:
        """Returns the picture that was uploaded, else the held-out one of that number.

        Raises:
            DataError: there is neither, or the upload is too large or no picture.
        """
        if upload is not None:
            picture = Picture(_content(Path(upload)))
        elif number is not None and 0 <= number < len(self.held_out):
            picture = self.held_out[number].picture
        else:
            raise DataError("no picture is chosen: choose a held-out one, or upload your own")
        return picture if with_tags else without_tags(picture)

    def search(self, sentence: str, with_tags: bool) -> Search:
        """Returns the held-out pictures that fit a sentence best. Raises DataError where there is none."""
        sentence = checked(sentence)
        similarity_N = self._globals_ND[with_tags] @ self._trained.embed_text(sentence)[0]
        best = similarity_N.topk(min(NUM_RERANKED, len(similarity_N)))
        by_similarity = [Found(*pair) for pair in zip(best.indices.tolist(), best.values.tolist(), strict=True)]
        pictures = [self.picture(one.number, None, with_tags) for one in by_similarity]
        match = self._trained.match(pictures, sentence).tolist()
        reranked = [Found(one.number, chance) for one, chance in zip(by_similarity, match, strict=True)]
        reranked.sort(key=lambda one: one.score, reverse=True)
        return Search(by_similarity[:NUM_SHOWN], reranked[:NUM_SHOWN])

    def ground(self, picture: Picture, sentence: str, states: str) -> list[Grounding]:
        """Returns the phrases of a sentence with the score of every region. Raises DataError where there is none."""
        return self._trained.ground(picture, checked(sentence), states=states)

    def compare(self, picture: Picture, first: str, second: str) -> list[ReadOut]:
        """Returns what each read-out gives two captions of a picture.

        Raises:
            DataError: a caption is empty or too long, both are the same, or the picture cannot be read.
        """
        captions = [checked(first), checked(second)]
        if captions[0] == captions[1]:
            raise DataError("both captions are the same: swap two words in one of them")
        cosines = self._trained.similarity(picture, captions)[0].tolist()
        match = self._trained.match(picture, captions).tolist()
        out = [ReadOut("cosine of the global states", *cosines), ReadOut("matching (ITM), probability", *match)]
        for states, where in (("uni", "uni-modal states"), ("cross", "cross states")):
            means, notes = zip(*(self._mean_of_best(picture, caption, states) for caption in captions), strict=True)
            out.append(
                ReadOut(
                    f"mean over phrases of the best region, {where}", means[0], means[1], next(filter(None, notes), "")
                )
            )
        return out

    def _mean_of_best(self, picture: Picture, caption: str, states: str) -> tuple[float | None, str]:
        try:
            found = self._trained.ground(picture, caption, states=states)
        except DataError:  # the picture was read before, so it is the phrases
            return None, f"no phrase of “{caption}” is in the vocabulary"
        return float(np.mean([one.score for one in found])), ""

    def fill(self, picture: Picture, sentence: str) -> list[list[tuple[str, float]]]:
        """Returns the likeliest words of each mask of a sentence. Raises DataError where it holds none."""
        return self._trained.fill(picture, checked(sentence), top_k=NUM_WORDS)

    def swapped(self, sentence: str) -> str:
        """Returns a sentence with two words of one kind swapped; as it is where it has no two."""
        (caption,) = self._trained.samples.captions([sentence], None)
        return swap_words(sentence, caption.phrases)

    def masked(self, sentence: str) -> str:
        """Returns a sentence with its first noun masked; as it is where none is found."""
        (caption,) = self._trained.samples.captions([sentence], None)
        spans = sorted(phrase.spans[0] for phrase in caption.phrases if len(phrase.tuple) == 1 and phrase.spans)
        return sentence[: spans[0][0]] + MASK + sentence[spans[0][1] :] if spans else sentence


def without_tags(picture: Picture) -> Picture:
    """Returns a picture whose regions have no tags."""
    return replace(picture, tags=None)


def checked(sentence: Any) -> str:
    """Returns a sentence without spaces around it. Raises DataError where it is empty or too long."""
    text = str(sentence or "").strip()
    if not text:
        raise DataError("there is no sentence yet: type one")
    if len(text) > MAX_SENTENCE_CHARS:
        raise DataError(f"the sentence has {len(text):,} characters, at most {MAX_SENTENCE_CHARS:,} are read")
    return text


def swap_words(sentence: str, phrases: Sequence[Phrase]) -> str:
    """Swaps the first two attributes that differ, or nouns with attributes, or nouns; returns the new sentence."""
    nouns = {span for phrase in phrases if len(phrase.tuple) == 1 for span in phrase.spans}
    described = {span for phrase in phrases if len(phrase.tuple) == 2 for span in phrase.spans}
    for spans in (sorted(described - nouns), sorted(described & nouns), sorted(nouns)):
        for begin, end in spans[:1]:
            for other, last in spans[1:]:
                one, two = sentence[begin:end], sentence[other:last]
                if other >= end and one.lower() != two.lower():
                    return f"{sentence[:begin]}{two}{sentence[end:other]}{one}{sentence[last:]}"
    return sentence


def _content(path: Path) -> bytes:
    try:
        if path.stat().st_size > MAX_UPLOAD_BYTES:
            raise DataError(f"the file is larger than {MAX_UPLOAD_BYTES // 2**20} MiB")
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"the upload cannot be read ({error.strerror}): upload a {', '.join(STORED_FORMATS)} file"
        ) from error
