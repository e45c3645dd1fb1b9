"""A batch to count a step with: lengths drawn as `mvptr plan` draws them, masked and labelled as the task wants it.

The draws of a seed are always the same, and lengths of text, tags and regions are independent of each other.

Legend: B samples, T text slots, G tag slots, R regions, F feature size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import numpy as np

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.data.collate import IGNORE, Batch, Sample, collate
from mvptr_ds.data.schema import Record, Region
from mvptr_ds.data.task_labels import ENTAILMENT_CLASSES
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.planning.lengths import Ranges

MASK, CLS, SEP = 103, 101, 102  # rows of bert-base-uncased's vocabulary
FIRST_WORD = 1000
IMAGE_SIDE = 600  # pixels of the record that boxes are given in


def draw_batch(
    num: int, config: Config, model: MvptrConfig, needs: SampleNeeds, num_answers: int = 0, seed: int = 0
) -> Batch:
    """Returns a batch on the host.

    Args:
        num: samples, each of another image.
        model: what the rows of words and phrases, and the size of features, are taken from.
        needs: what the task masks and reads; labels are drawn for the four tasks of docs/finetune.md.
        num_answers: rows of the head for answers, where the task has one.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    lengths = {name: rng.integers(low, high + 1, num) for name, (low, high) in asdict(Ranges()).items()}
    return collate(
        [
            _Drawing(rng, config, model, needs, {name: int(drawn[number]) for name, drawn in lengths.items()}).sample(
                number, num_answers
            )
            for number in range(num)
        ]
    )


class _Drawing:
    """One sample."""

    def __init__(
        self, rng: np.random.Generator, config: Config, model: MvptrConfig, needs: SampleNeeds, num: Mapping[str, int]
    ) -> None:
        self.rng, self.config, self.model, self.needs = rng, config, model, needs
        data = config.data
        self.num_tokens, self.num_regions = min(num["tokens"], data.max_tokens), min(num["regions"], data.max_regions)
        self.num_phrases = min(num["phrases"], max(0, data.max_text_slots - 2 - self.num_tokens))
        self.num_tags = min(num["tags"], data.max_tag_slots) - 2

    def sample(self, number: int, num_answers: int) -> Sample:
        model, masking = self.model, self.needs.masking
        words_T = self.rng.integers(FIRST_WORD, model.num_words, self.num_tokens)
        phrases_T = self.rng.integers(model.num_words, max(model.num_rows, model.num_words + 1), self.num_phrases)
        behind = self._tags_in_text()
        text_T = np.concatenate([[CLS], words_T, phrases_T, behind, [SEP]]).astype(np.int64)
        tags_G = np.concatenate([[CLS], self.rng.integers(FIRST_WORD, model.num_words, self.num_tags), [SEP]])
        phrase_mask_T, tags_in_text_T = np.zeros((2, len(text_T)), dtype=bool)
        first_phrase = 1 + self.num_tokens
        phrase_mask_T[first_phrase : first_phrase + self.num_phrases] = True
        tags_in_text_T[len(text_T) - 1 - len(behind) : -1] = True
        is_phrase_T = np.flatnonzero(phrase_mask_T)
        text_T, mlm_labels_T = self._mask(text_T, 1 + np.arange(self.num_tokens), masking.word_prob)
        phrase_labels_T = np.full(len(text_T), IGNORE, dtype=np.int64)
        if self.needs.phrase_labels:
            picked = is_phrase_T[self.rng.random(len(is_phrase_T)) < masking.phrase_prob]
            phrase_labels_T[picked], text_T[picked] = 0, MASK
        tags_G, tag_labels_G = self._mask(tags_G.astype(np.int64), 1 + np.arange(self.num_tags), masking.tag_prob)
        with_images = self.config.visual.source == "image"
        side = self.config.visual.image_size
        return Sample(
            text_ids_T=text_T,
            phrase_mask_T=phrase_mask_T,
            mlm_labels_T=mlm_labels_T,
            phrase_labels_T=phrase_labels_T,
            tag_ids_G=tags_G,
            tag_labels_G=tag_labels_G,
            region_geometry_R6=self.rng.random((self.num_regions, 6), dtype=np.float32),
            region_features_RF=None
            if with_images
            else np.zeros((self.num_regions, model.region_feature_dim), np.float16),
            image_3HW=np.zeros((3, side, side), dtype=np.uint8) if with_images else None,
            image_index=number,
            position=number,
            num_oov_phrases=0,
            num_phrases=self.num_phrases,
            labels=self._labels(number, num_answers),
            tags_in_text_T=tags_in_text_T if self.needs.tags_in_text else None,
        )

    def _tags_in_text(self) -> np.ndarray:
        """One wordpiece for each region, behind the text, where the task wants the tags there."""
        room = self.config.data.max_text_slots - 2 - self.num_tokens - self.num_phrases
        num = min(self.num_regions, max(0, room)) if self.needs.tags_in_text else 0
        return self.rng.integers(FIRST_WORD, self.model.num_words, num)

    def _mask(self, ids_L: np.ndarray, words_K: np.ndarray, prob: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns ids with some of the words masked, and the labels of those."""
        labels_L = np.full(len(ids_L), IGNORE, dtype=np.int64)
        picked = words_K[self.rng.random(len(words_K)) < prob]
        labels_L[picked] = ids_L[picked]
        masked_L = ids_L.copy()
        masked_L[picked] = MASK
        return masked_L, labels_L

    def _labels(self, number: int, num_answers: int) -> dict[str, Any]:
        """What the task makes of labels that would suit any of them."""
        if self.needs.read_labels is None:
            return {}
        box = [50.0 * (1 + number % 4), 50.0, 400.0, 400.0]
        labels = {
            "label": ENTAILMENT_CLASSES[number % len(ENTAILMENT_CLASSES)],
            "answers": {str(number % max(1, num_answers)): 1.0},
            "box": box,
        }
        regions = tuple(Region((box[0], 50.0, 400.0, 300.0 + r), "dog") for r in range(self.num_regions))
        record = Record(str(number), IMAGE_SIDE, IMAGE_SIDE, (), regions)
        return self.needs.read_labels(labels, record)
