"""Evaluates phrase grounding: which region of its own image is most similar to a phrase, and is it a right one.

Legend: C captions, I images, T text slots, P phrases, R regions, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.data.caption_phrases import phrases_with_slots
from mvptr_ds.data.dataset import read_sample_record
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Numbers, Phrase, Record
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.evaluation.encode import EncodedSplit

SIZES = ("small", "medium", "large")  # thirds of the phrases by the area of the box they name
_CHUNK = 4096  # phrases whose regions are gathered at once


@dataclass(frozen=True)
class AskedPhrase:
    """Holds a (noun) or (noun, attribute) phrase of a caption that has a slot, on an image with boxes."""

    caption: int  # sample number
    slot: int
    phrase: Phrase
    same_noun: Numbers  # the regions whose tag is the phrase's noun
    area_frac: float  # share of the picture of the largest box that the phrase names, 0 without one


@dataclass(frozen=True)
class GroundedPhrase:
    """Holds a phrase of a caption and the region that the model finds for it."""

    caption: int  # sample number
    phrase: Phrase
    region: int  # number in the record

    @property
    def right(self) -> bool | None:
        """Returns whether the record names this region for the phrase, or None where it names none."""
        return self.region in self.phrase.regions if self.phrase.regions else None


def list_phrases(split: EncodedSplit, index: SampleIndex, vocab: PhraseVocab) -> tuple[list[AskedPhrase], int]:
    """Returns the phrases to ground, by caption and slot, and how many with ground truth have no slot.

    Phrases without a slot are not in the vocabulary, are not said by their caption, or did not fit the sequence.
    Relations are left out. Images without boxes are too, since the cells of a grid are no regions of the record.
    """
    asked: list[AskedPhrase] = []
    num_without_slot = 0
    for caption in range(len(split.text_CTD)):
        slots = torch.nonzero(split.phrase_mask_CT[caption]).flatten().tolist()
        record, number = read_sample_record(index, caption)
        own = record.captions[number]
        chosen = phrases_with_slots(own, vocab, most=len(slots))
        for phrase, place in zip(own.phrases, chosen.slots, strict=True):
            slot = None if place is None else slots[place]
            if not record.regions or len(phrase.tuple) > 2:
                continue
            if slot is None:
                num_without_slot += bool(phrase.regions)
                continue
            same_noun = tuple(r for r, region in enumerate(record.regions) if region.tag == phrase.tuple[0])
            asked.append(AskedPhrase(caption, slot, phrase, same_noun, _area_frac(record, phrase)))
    return asked, num_without_slot


def _area_frac(record: Record, phrase: Phrase) -> float:
    boxes = (record.regions[r].box for r in phrase.regions)
    return max(((x2 - x1) * (y2 - y1) for x1, y1, x2, y2 in boxes), default=0.0) / (record.width * record.height)


def similarities(split: EncodedSplit, asked: Sequence[AskedPhrase]) -> Tensor:
    """Returns the cosines of each phrase's state and its image's regions, by the uni-modal encoders.

    Returns:
        float32 [P, R], -inf where there is no region.
    """
    captions_P, slots_P = torch.tensor([[a.caption, a.slot] for a in asked], dtype=torch.int64).view(-1, 2).unbind(1)
    parts = [torch.empty(0, split.regions_IRD.shape[1])]
    for captions, slots in zip(captions_P.split(_CHUNK), slots_P.split(_CHUNK), strict=True):
        images = split.image_of_C[captions]
        parts.append(cosines(split.text_CTD[captions, slots], split.regions_IRD[images], split.region_mask_IR[images]))
    return torch.cat(parts)


def cosines(phrases_PD: Tensor, regions_PRD: Tensor, region_mask_PR: Tensor) -> Tensor:
    """Returns float32 [P, R]: cosines of a row's phrase state and its image's regions, -inf without a region."""
    phrases_PD, regions_PRD = F.normalize(phrases_PD.float(), dim=-1), F.normalize(regions_PRD.float(), dim=-1)
    return (regions_PRD @ phrases_PD.unsqueeze(-1)).squeeze(-1).masked_fill(~region_mask_PR, float("-inf"))


def ground(sim_PR: Tensor, asked: Sequence[AskedPhrase]) -> list[GroundedPhrase]:
    """Returns the most similar region of every phrase."""
    best = sim_PR.argmax(-1).tolist() if len(asked) else []
    return [GroundedPhrase(a.caption, a.phrase, region) for a, region in zip(asked, best, strict=True)]


def score_grounding(sim_PR: Tensor, asked: Sequence[AskedPhrase]) -> dict[str, Any]:
    """Returns accuracy, chance and number of phrases: all, by kind, by size, and attributes among one noun's boxes.

    A phrase is right when one of the boxes it names is more similar than every other one. A tie or NaN is wrong.
    Chance is the share of the named boxes among those to choose from. Phrases without ground truth are not counted. A
    named box that the model does not see (`data.max_regions`) cannot be found.

    Args:
        sim_PR: -inf where there is no region.
    """
    truth = [i for i, a in enumerate(asked) if a.phrase.regions]
    asked, sim_PR = [asked[i] for i in truth], sim_PR[truth]
    seen_PR = sim_PR != float("-inf")
    named_PR = _as_mask([a.phrase.regions for a in asked], sim_PR) & seen_PR
    noun_PR = _as_mask([a.same_noun for a in asked], sim_PR) & seen_PR
    kind_P = torch.tensor([len(a.phrase.tuple) for a in asked], dtype=torch.int64)
    area_P = torch.tensor([a.area_frac for a in asked], dtype=torch.float64)
    right_P, chance_P = _right(sim_PR, named_PR, seen_PR)
    every_P = torch.ones_like(right_P)
    # a choice among one noun's boxes exists only where some are right and some are not
    choice_P = (kind_P == 2) & (named_PR & noun_PR).any(1) & (noun_PR & ~named_PR).any(1)
    out: dict[str, Any] = _share(right_P, chance_P, every_P)
    out["noun"] = _share(right_P, chance_P, kind_P == 1)
    out["attribute"] = _share(right_P, chance_P, kind_P == 2)
    bounds = size_bounds(asked)
    third_P = torch.bucketize(area_P, torch.tensor(bounds, dtype=torch.float64)) if bounds else kind_P
    out["by_size"] = {name: _share(right_P, chance_P, third_P == i) for i, name in enumerate(SIZES)}
    out["attribute_among_one_noun"] = _share(*_right(sim_PR, named_PR, noun_PR), choice_P)
    return out


def size_bounds(asked: Sequence[AskedPhrase]) -> list[float]:
    """Returns the two area shares that divide phrases into thirds: small <= first < medium <= second."""
    area = [a.area_frac for a in asked if a.phrase.regions]
    if not area:
        return []
    return torch.quantile(torch.tensor(area, dtype=torch.float64), torch.tensor([1 / 3, 2 / 3]).double()).tolist()


def _as_mask(numbers: Sequence[Numbers], like_PR: Tensor) -> Tensor:
    mask_PR = torch.zeros(like_PR.shape, dtype=torch.bool)
    for row_R, regions in zip(mask_PR, numbers, strict=True):
        row_R[[r for r in regions if r < len(row_R)]] = True  # regions beyond were cut and are not seen by the model
    return mask_PR


def _right(sim_PR: Tensor, named_PR: Tensor, among_PR: Tensor) -> tuple[Tensor, Tensor]:
    """Returns whether a named region wins among `among_PR`, bool [P], and its chance, float64 [P]."""
    named_PR = named_PR & among_PR
    if not sim_PR.shape[1]:
        return torch.zeros(len(sim_PR), dtype=torch.bool), torch.zeros(len(sim_PR), dtype=torch.float64)
    best_named_P = sim_PR.masked_fill(~named_PR, float("-inf")).amax(1)
    best_other_P = sim_PR.masked_fill(named_PR | ~among_PR, float("-inf")).amax(1)
    return best_named_P > best_other_P, named_PR.sum(1).double() / among_PR.sum(1).clamp(min=1).double()


def _share(right_P: Tensor, chance_P: Tensor, which_P: Tensor) -> dict[str, Any]:
    num = int(which_P.sum())
    if not num:
        return {"accuracy": None, "chance": None, "n": 0}
    return {"accuracy": float(right_P[which_P].double().mean()), "chance": float(chance_P[which_P].mean()), "n": num}
