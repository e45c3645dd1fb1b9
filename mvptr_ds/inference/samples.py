"""Texts and pictures as the samples that an evaluation makes of a shard's records.

Legend: T text slots, R regions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
from PIL import Image

from mvptr_ds.builders import sample_sizes
from mvptr_ds.config import Config
from mvptr_ds.data.collate import IGNORE, Sample
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.phrases import PhraseTuple, Vocabs
from mvptr_ds.data.schema import Caption, Phrase, Record
from mvptr_ds.errors import DataError
from mvptr_ds.inference.pictures import Picture, Seen, rgb_of, see

logger = logging.getLogger(__name__)
MASK = "[MASK]"
_STAND_IN = "something"  # what the parser reads in the place of a mask
_VISIBLE = {"jpg": b""}  # tells the builder that there is something to see
_NO_DRAWS = np.random.default_rng(0)  # nothing is drawn: all probabilities are 0

FindRegions = Callable[[Image.Image], Picture]
FindPhrases = Callable[[Sequence[str]], Sequence[Sequence[Phrase]]]


class SampleMaker:
    """Makes the samples of one model.

    Args:
        find_phrases: finds the phrases of texts for which none are given.
        find_regions: finds the regions of a picture for which none are given. None: the cells of a grid.
        tags_in_text: whether the tags of all regions also stand behind the text of a pair.
    """

    def __init__(
        self,
        vocabs: Vocabs,
        config: Config,
        find_phrases: FindPhrases,
        find_regions: FindRegions | None,
        tags_in_text: bool = False,
    ) -> None:
        self.words, self.find_phrases, self.find_regions = vocabs.words, find_phrases, find_regions
        options = replace(sample_sizes(config), tags_in_text=tags_in_text)
        self._builder = SampleBuilder(vocabs.words, vocabs.phrases, options)
        self._needs_pixels, self._image_size = config.visual.source == "image", config.visual.image_size

    def captions(self, texts: Sequence[str], phrases: Sequence[Sequence[PhraseTuple]] | None) -> list[Caption]:
        """Returns texts with their phrases: given ones without spans, which are then looked for in the text."""
        if phrases is None:
            found = self.find_phrases([text.replace(MASK, _STAND_IN) for text in texts])
            return [Caption(text, tuple(_beside_masks(text, said))) for text, said in zip(texts, found, strict=True)]
        if len(phrases) != len(texts):
            raise DataError(f"{len(texts)} texts, and phrases of {len(phrases)}: give those of each text")
        return [
            Caption(text, tuple(Phrase(tuple(words), ()) for words in said))
            for text, said in zip(texts, phrases, strict=True)
        ]

    def of_text(self, caption: Caption) -> Sample:
        """Returns the sample of a text without a picture; `[MASK]` in it is the masked word."""
        sample = self._begin(caption, Record("", 1, 1, ()), {})
        if MASK not in caption.text:
            return sample
        # the tokenizer takes [MASK] for three pieces
        pieces, ids_T, is_phrase_T = (
            self.words.encode(MASK)[0],
            sample.text_ids_T.tolist(),
            sample.phrase_mask_T.tolist(),
        )
        out, is_phrase, place = [], [], 0
        while place < len(ids_T):
            is_mask = ids_T[place : place + len(pieces)] == pieces and not is_phrase_T[place]
            out.append(self.words.mask_id if is_mask else ids_T[place])
            is_phrase.append(is_phrase_T[place])
            place += len(pieces) if is_mask else 1
        none_T = np.full(len(out), IGNORE)
        return replace(
            sample,
            text_ids_T=np.array(out, dtype=np.int64),
            phrase_mask_T=np.array(is_phrase, dtype=bool),
            mlm_labels_T=none_T,
            phrase_labels_T=none_T,
        )

    def of_pair(self, caption: Caption, seen: Seen) -> Sample:
        """Returns the sample of a text beside a picture, as the evaluation of a task makes it."""
        return self._with_visual(self._begin(caption, seen.record, _VISIBLE), seen)

    def see(self, picture: Picture, number: int, num: int) -> Seen:
        """Reads picture `number` of `num`. Raises DataError, which says which one, where it cannot be read."""
        try:
            if picture.boxes is None and self.find_regions is not None and picture.image is not None:
                picture = replace(self.find_regions(rgb_of(picture.image)), image=picture.image)
            return see(picture, self._image_size, self._needs_pixels)
        except DataError as error:
            raise DataError(f"picture {number} of {num}: {error}") from error

    def of_picture(self, seen: Seen) -> Sample:
        """Returns the sample of a picture without a text."""
        sample = self._builder.begin(seen.record, _VISIBLE, 0, 0, 0, _NO_DRAWS)
        return self._with_visual(sample, seen)

    def boxes_of(self, seen: Seen) -> list[tuple[float, float, float, float]]:
        """Returns the boxes of a picture's regions in pixels, cut at its edges, also the cells of its grid."""
        width, height = seen.record.width, seen.record.height
        corners_R4 = self.of_picture(seen).region_geometry_R6[:, :4].tolist()
        return [(x1 * width, y1 * height, x2 * width, y2 * height) for x1, y1, x2, y2 in corners_R4]

    def _begin(self, caption: Caption, record: Record, members: Mapping[str, bytes]) -> Sample:
        """Returns the sample without what is seen; a text that is cut is warned of."""
        sample = self._builder.begin(replace(record, captions=(caption,)), members, 0, 0, 0, _NO_DRAWS)
        is_word_T = ~sample.phrase_mask_T
        if sample.tags_in_text_T is not None:
            is_word_T &= ~sample.tags_in_text_T
        num_pieces, num_kept = len(self.words.encode(caption.text)[0]), int(is_word_T.sum()) - 2
        if num_kept < num_pieces:
            logger.warning("a text is cut to %d of its %d wordpieces: %.60r ...", num_kept, num_pieces, caption.text)
        return sample

    def _with_visual(self, sample: Sample, seen: Seen) -> Sample:
        most = self._builder.options.max_regions
        sample.region_geometry_R6 = sample.region_geometry_R6[:most]
        sample.image_3HW = seen.image_3HW
        sample.region_features_RF = None if seen.features_RF is None else seen.features_RF[:most]
        return sample


def _beside_masks(text: str, found: Sequence[Phrase]) -> Iterator[Phrase]:
    """Yields the phrases that touch no mask, found in a text with stand-ins, with spans of the text with masks."""
    masks, start = [], text.find(MASK)
    while start >= 0:
        masks.append(start)
        start = text.find(MASK, start + 1)
    shift = len(MASK) - len(_STAND_IN)
    stand_ins = [place - number * shift for number, place in enumerate(masks)]

    def moved(place: int) -> int:
        return place + shift * sum(stand_in < place for stand_in in stand_ins)

    for phrase in found:
        if not any(b < at + len(_STAND_IN) and at < e for b, e in phrase.spans for at in stand_ins):
            yield Phrase(phrase.tuple, tuple((moved(begin), moved(end)) for begin, end in phrase.spans))
