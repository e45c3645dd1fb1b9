"""Referring expressions (RefCOCO, RefCOCO+, RefCOCOg): which region of the picture an expression means.

Legend: B samples of this rank, N regions of all samples, R regions, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvptr_ds.builders import SampleNeeds
from mvptr_ds.config import Config
from mvptr_ds.config_stages import ReferringConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.other_pictures import Mode
from mvptr_ds.errors import DataError
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.sequence_index import to_device
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.passes import PairPass
from mvptr_ds.tasks.boxes import HIT, overlaps
from mvptr_ds.tasks.detections import by_detections, load_detections
from mvptr_ds.tasks.downstream import Downstream, Prediction, mean_scores
from mvptr_ds.tasks.pair_module import Labels, PairModule, at_least_float32, fresh_linear

BOX = "box"
PADDING = -math.inf  # score of a region that is not there


def read_labels(labels: Mapping[str, Any], record: Record) -> dict[str, Any]:
    """Returns `boxes` of the regions, `overlaps` of each with the box that is meant, `box`, `id`, `image_id`, `kind`.

    Boxes are pixels. `overlaps` and `box` are None where the caption has no box.

    Raises:
        DataError: a box that is none, or a record without regions.
    """
    if not record.regions:
        raise DataError("the record has no regions to choose from; find some with extract_regions (data.sidecars)")
    box, boxes_R4 = labels.get(BOX), np.array([region.box for region in record.regions])
    overlaps_R = None
    if box is not None:
        numbers = isinstance(box, list) and [side for side in box if isinstance(side, int | float)]
        if not numbers or len(box) != 4 or len(numbers) != 4 or not (box[0] < box[2] and box[1] < box[3]):
            raise DataError(f"label {BOX!r} is {box!r}, expected pixels [x1, y1, x2, y2] with x1 < x2 and y1 < y2")
        overlaps_R = overlaps(boxes_R4, np.array([box], dtype=np.float64))[:, 0]
    return {
        "boxes": boxes_R4,
        "overlaps": overlaps_R,
        BOX: box,
        "id": labels.get("id"),
        "image_id": record.image_id,
        "kind": labels.get("kind"),
    }


class ReferringModule(PairModule):
    """Scores each region of a picture against slot 0 of the expression, after the cross encoder.

    The published modes are `cosine`, `dot` and `region`. Source: the published code.
    """

    def __init__(self, model: Mvptr, section: ReferringConfig, seed: int) -> None:
        dim, std, self.score = model.config.hidden_size, model.config.initializer_range, section.score
        head = {"product": nn.Linear(dim, dim), "region": fresh_linear(dim, 1, std, seed)}.get(section.score)
        if section.score == "product":
            assert isinstance(head, nn.Linear)
            nn.init.eye_(head.weight)  # at the start the product of both states
            nn.init.zeros_(head.bias)
        num_layers = section.cross_layers
        if num_layers is not None and num_layers > model.config.num_cross_layers:
            raise ValueError(
                f"referring.cross_layers is {num_layers}, the cross encoder has {model.config.num_cross_layers}"
            )
        settings = {"score": section.score, "cross_layers": num_layers}
        super().__init__(model, "referring", head, settings, reads=("first", "regions"), num_cross_layers=num_layers)

    def logits(self, outputs: PairPass) -> Tensor:
        """Returns a score of each region, padded [B, R] with -inf where there is none."""
        matched = outputs.matched
        first_BD, regions = matched.text.firsts(), matched.regions
        return regions.like(self._scores(first_BD, regions)).padded(PADDING)

    def _scores(self, first_BD: Tensor, regions: Packed) -> Tensor:
        """Returns the scores of all regions, [N], at least float32: products in half precision would tie."""
        if self.score == "region":
            assert self.head is not None
            return at_least_float32(self.head(regions.rows)).squeeze(-1)
        if self.score == "product":
            assert self.head is not None
            first_BD = self.head(first_BD)
        of_text_ND, regions_ND = at_least_float32(first_BD)[regions.owners()], at_least_float32(regions.rows)
        if self.score == "cosine":
            return F.cosine_similarity(of_text_ND, regions_ND, dim=-1)
        products_N = (of_text_ND * regions_ND).sum(-1)
        return products_N if self.score == "dot" else products_N / regions_ND.shape[-1] ** 0.5

    def chances(self, logits_BR: Tensor) -> Tensor:
        """Returns how likely a region is the one that is meant, [B, R]: among all for `product`, else each by itself.

        A region that is not there has 0. Of `cosine` it is the cosine itself, which is trained to be the overlap.
        """
        if self.score == "product":
            return logits_BR.softmax(-1)
        return logits_BR if self.score == "cosine" else logits_BR.sigmoid()

    def loss(self, logits_BR: Tensor, labels: Labels) -> LossSum:
        """Returns the loss of a sample: of `product` one value, of the published modes the mean over its regions."""
        overlaps_BR = padded_overlaps(labels, logits_BR)
        is_region_BR = logits_BR > PADDING
        if self.score == "product":
            return LossSum.of_samples(any_positive(logits_BR, (overlaps_BR >= HIT) & is_region_BR, is_region_BR))
        overlaps_N, logits_N = overlaps_BR[is_region_BR], logits_BR[is_region_BR]
        if self.score == "cosine":
            return LossSum.of((logits_N - overlaps_N) ** 2)
        targets_N = (overlaps_N >= HIT).to(logits_N) if self.score == "dot" else overlaps_N
        return LossSum.of(F.binary_cross_entropy_with_logits(logits_N, targets_N, reduction="none"))

    def head_flops(self, lengths: Lengths, config: MvptrConfig) -> float:
        of_head = lengths.samples * config.hidden_size**2 if self.score == "product" else 0.0
        return 2 * (of_head + lengths.regions * config.hidden_size)


def padded_overlaps(labels: Labels, logits_BR: Tensor) -> Tensor:
    """Returns the overlap of each region with the box that is meant, [B, R], in the dtype of the logits."""
    out_BR = torch.zeros_like(logits_BR, device="cpu")
    for row_R, of_sample in zip(out_BR, labels, strict=True):
        overlaps_R = torch.as_tensor(of_sample["overlaps"])[: len(row_R)]
        row_R[: len(overlaps_R)] = overlaps_R
    return to_device(out_BR, logits_BR.device)


def any_positive(logits_BR: Tensor, positive_BR: Tensor, is_region_BR: Tensor) -> Tensor:
    """Returns -log of the probability that any of the positives is chosen, [B]; 0 for a sample without a positive."""
    has_positive_B = positive_BR.any(-1)
    everything_B = logits_BR.masked_fill(~is_region_BR, PADDING).logsumexp(-1)
    chosen_BR = logits_BR.masked_fill(~(positive_BR | ~has_positive_B[:, None] & is_region_BR), PADDING)
    return torch.where(has_positive_B, everything_B - chosen_BR.logsumexp(-1), 0.0)


class Referring(Downstream):
    """Fine-tunes a pre-trained model to find the region that an expression means."""

    name, best_by = "referring", "eval/referring/score"
    other_pictures: Mode = "contents"  # the boxes stay: else no box would be right
    names_answers = False

    def sample_needs(self, config: Config) -> SampleNeeds:
        return SampleNeeds(labels={BOX: [8, 8, 64, 48]}, read_labels=read_labels)

    def build_module(self, config: Config, model: Mvptr, seed: int) -> ReferringModule:
        return ReferringModule(model, config.referring, seed)

    def build_from(self, settings: Mapping[str, Any], config: Config, model: Mvptr) -> ReferringModule:
        trained = {name: settings[name] for name in ("score", "cross_layers") if name in settings}
        return ReferringModule(model, replace(config.referring, **trained), config.run.seed)

    def predict(self, module: PairModule, batch: Batch) -> Iterator[Prediction]:
        assert isinstance(module, ReferringModule)
        logits_BR = module.logits(module.outputs(batch))
        best_B, chances = logits_BR.argmax(-1).tolist(), module.chances(logits_BR).tolist()
        for best, chances_R, labels in zip(best_B, chances, batch.labels, strict=True):
            written = {"id": labels["id"], "box": labels["boxes"][best].tolist(), "score": chances_R[best]}
            num_seen = min(len(chances_R), len(labels["boxes"]))  # data.max_regions leaves out the others
            of_seen = {
                name: None if labels[name] is None else labels[name][:num_seen] for name in ("boxes", "overlaps")
            }
            seen = {**labels, **of_seen, "scores": np.array(chances_R[:num_seen])}
            yield Prediction(str(best), self.score_of(str(best), labels), seen, written)

    def check_evaluation(self, config: Config) -> None:
        if config.referring.detections is not None:
            load_detections(config.referring.detections)

    def guesses(self, predictions: Sequence[Prediction]) -> dict[str, Any]:
        """Returns what the largest box earns, and any box on average."""

        def scored(score: Callable[[Mapping[str, Any]], float]) -> dict[str, Any] | None:
            return mean_scores(p._replace(score=score(p.labels)) for p in predictions if p.score is not None)

        def largest(labels: Mapping[str, Any]) -> float:
            sides_R2 = labels["boxes"][:, 2:] - labels["boxes"][:, :2]
            return float(labels["overlaps"][sides_R2.prod(1).argmax()] >= HIT)

        return {"largest_box": scored(largest), "any_box": scored(lambda of: float((of["overlaps"] >= HIT).mean()))}

    def details(self, module: PairModule, predictions: Sequence[Prediction], config: Config) -> dict[str, Any]:
        """Returns `upper_bound`: the share of expressions that some region answers; and scores by detector boxes."""
        known = [p for p in predictions if p.score is not None]
        bound = sum(float(p.labels["overlaps"].max() >= HIT) for p in known) / len(known)
        path = config.referring.detections
        return {"upper_bound": bound} | ({} if path is None else by_detections(known, load_detections(path)))

    def known_answer(self, labels: Mapping[str, Any]) -> str | None:
        return None  # a region has no name: there is no majority, and nothing to learn from texts alone

    def score_of(self, answer: str, labels: Mapping[str, Any]) -> float | None:
        return None if labels["overlaps"] is None else float(labels["overlaps"][int(answer)] >= HIT)
