"""Evaluates a model on a split and returns one report, for `eval.py` and for the trainer at intervals.

Legend: C captions, I images, P phrases, R regions.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mvptr_ds.builders import NOTHING_MASKED, SampleNeeds, evaluation_samples
from mvptr_ds.config import Config, EvalConfig
from mvptr_ds.config_stages import MaskingConfig
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.evaluation.encode import (
    EncodedSplit,
    encode_images,
    evaluating,
    permute_regions,
    read_split,
    without_tags,
)
from mvptr_ds.evaluation.folds import reranked_recalls, score_folds
from mvptr_ds.evaluation.grounding import (
    AskedPhrase,
    GroundedPhrase,
    ground,
    list_phrases,
    score_grounding,
    similarities,
    size_bounds,
)
from mvptr_ds.evaluation.matching import cross_with_own, score_matching
from mvptr_ds.evaluation.recovery import recover_concepts
from mvptr_ds.evaluation.retrieval import chance_recalls, recalls
from mvptr_ds.model.mvptr import Mvptr

MCR_NEEDS = SampleNeeds(
    pairs=False, masking=MaskingConfig(word_prob=0.0, phrase_prob=0.5, tag_prob=0.5), phrase_labels=True
)
_CROSS_BATCHES = 4  # a cross pass has no word heads, so it takes more samples at once


@dataclass
class Evaluation:
    report: dict[str, Any]
    grounded: list[GroundedPhrase]  # states of the uni-modal encoders, with tags


def evaluate_model(
    model: Mvptr, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device, seed: int = 0
) -> dict[str, Any]:
    """Returns the report of `evaluate_split` alone."""
    return evaluate_split(model, vocabs, config, index, device, seed).report


def evaluate_split(
    model: Mvptr, vocabs: Vocabs, config: Config, index: SampleIndex, device: torch.device, seed: int = 0
) -> Evaluation:
    """Evaluates retrieval, re-ranking, grounding, ITM and MCR, then again without tags and with permuted regions.

    Shares are fractions of 1, and None where nothing was asked. The model keeps its mode, and the global random state
    is not touched. The report:

        num_scenes, num_captions, num_tags, chance (of retrieval), wall_s
        retrieval, rerank      t2i_r1 ... i2t_r10
        grounding              of `uni` and `cross` states: accuracy, chance, n, noun, attribute, by_size,
                               attribute_among_one_noun; accuracy and chance of `uni` once more on top
        mcr, itm
        folds                  retrieval and rerank as means over parts of eval.fold_images images, where that is set
        without_tags           retrieval, rerank, grounding with all tags withheld. Without any tags, as above
        permuted_regions       retrieval, grounding with all tags withheld and the regions shuffled: must be chance

    Args:
        seed: seed of the permutation of the regions.

    Raises:
        DataError: a sample of the split cannot be read.
    """
    started = time.perf_counter()
    size = config.eval.batch_size
    with evaluating(model):
        given = read_split(model, index, evaluation_samples(config, vocabs, index, NOTHING_MASKED), size, device)
        withheld = without_tags(given, vocabs.words.cls_id, vocabs.words.sep_id)
        masking = evaluation_samples(config, vocabs, index, MCR_NEEDS)
        mcr = recover_concepts(model, given, index, masking, size, device)
        split = encode_images(model, given, size, device)
        asked, num_without_slot = list_phrases(split, index, vocabs.phrases)
        tagged = _Setting(model, split, asked, num_without_slot, config.eval, device)
        num_tags = given.num_tags
        untagged = tagged.on(encode_images(model, withheld, size, device)) if num_tags else tagged
        permuted = tagged.on(encode_images(model, permute_regions(withheld, seed), size, device))
        report: dict[str, Any] = {
            "num_scenes": index.num_records,
            "num_captions": len(index),
            "num_tags": num_tags,
            "chance": chance_recalls(split.image_of_C, index.num_records),
            "retrieval": tagged.retrieval(),
            "rerank": tagged.rerank(),
            "grounding": tagged.grounding(),
            "mcr": mcr,
            "itm": score_matching(model, split, tagged.own_pairs()[0], _CROSS_BATCHES * size, device),
            "without_tags": {
                "retrieval": untagged.retrieval(),
                "rerank": untagged.rerank(),
                "grounding": untagged.grounding(),
            },
            "permuted_regions": {"retrieval": permuted.retrieval(), "grounding": permuted.grounding()},
        }
        if config.eval.fold_images:
            report["folds"] = tagged.folds(config.eval.fold_images)
        grounded = ground(similarities(split, asked), asked)
    report["wall_s"] = {"evaluation": round(time.perf_counter() - started, 1)}
    return Evaluation(report, grounded)


class _Setting:
    """Computes the scores of one encoding of a split: with tags, without, or with permuted regions."""

    def __init__(
        self,
        model: Mvptr,
        split: EncodedSplit,
        asked: Sequence[AskedPhrase],
        num_without_slot: int,
        config: EvalConfig,
        device: torch.device,
    ) -> None:
        self.model, self.split, self.asked, self.num_without_slot = model, split, asked, num_without_slot
        self.config, self.device = config, device
        self.batch_size = _CROSS_BATCHES * config.batch_size
        self._own: tuple[Tensor, Tensor] | None = None

    def on(self, split: EncodedSplit) -> _Setting:
        """Returns the same phrases on another encoding."""
        return _Setting(self.model, split, self.asked, self.num_without_slot, self.config, self.device)

    def own_pairs(self) -> tuple[Tensor, Tensor]:
        """Returns `cross_with_own`, computed once."""
        if self._own is None:
            self._own = cross_with_own(self.model, self.split, self.asked, self.batch_size, self.device)
        return self._own

    def retrieval(self) -> dict[str, float]:
        return recalls(self.split.sim_CI, self.split.image_of_C)

    def rerank(self) -> dict[str, float]:
        top_k = self.config.rerank_top_k
        return reranked_recalls(self.model, self.split, top_k, self.batch_size, self.device)

    def folds(self, num_images: int) -> dict[str, Any]:
        top_k = self.config.rerank_top_k
        return score_folds(self.model, self.split, num_images, top_k, self.batch_size, self.device)

    def grounding(self) -> dict[str, Any]:
        uni = score_grounding(similarities(self.split, self.asked), self.asked)
        cross = score_grounding(self.own_pairs()[1], self.asked)
        top = {name: uni[name] for name in ("accuracy", "chance", "n")}
        rest = {"num_without_slot": self.num_without_slot, "size_bounds": size_bounds(self.asked)}
        return {**top, **rest, "uni": uni, "cross": cross}


def flatten_scores(report: Mapping[str, Any]) -> dict[str, float]:
    """Returns the shares of a report under flat keys for logs, such as `eval/grounding/uni/accuracy`.

    Counts, bounds and times do not change while training and are left out. Values of None are left out too.
    """
    return dict(_flatten("eval", {name: part for name, part in report.items() if name != "wall_s"}))


def _flatten(prefix: str, part: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for name, value in part.items():
        if isinstance(value, Mapping):
            yield from _flatten(f"{prefix}/{name}", value)
        elif isinstance(value, float):
            yield f"{prefix}/{name}", value
