"""Compares what an evaluation makes of scores: ranks of retrieval, accuracy of answers, boxes of a detector.

Legend: C captions, I images, R regions, M boxes of a detector.
"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvptr_ds.data.vqa_answers import normalise, official_accuracy
from mvptr_ds.evaluation.retrieval import RANKS, put_first, ranks, short_lists
from mvptr_ds.parity.comparison import Comparison
from mvptr_ds.parity.finetuned_cases import Recorded
from mvptr_ds.tasks.boxes import box_of_best_region, box_of_weighted_regions, overlaps
from mvptr_ds.tasks.pair_module import PairModule

_IN_FLOAT32 = 1e-6  # overlaps were recorded in float32


# --- retrieval


def check_retrieval(comparison: Comparison, file: Path) -> None:
    """Compares ranks and recalls by made-up scores, coarse and re-ranked.

    In their protocol an item outside the short list has the rank of its end. Ours ranks it behind the list by its
    coarse score, so that ranks are compared up to the list's length.
    """
    recorded = json.loads(file.read_text(encoding="utf-8"))
    # our evaluation takes cosines and probabilities: both functions keep the order of the recorded scores
    sim_CI = torch.tensor(recorded["coarse_scores"], dtype=torch.float64).T.tanh()
    match_CI = torch.tensor(recorded["fine_scores"], dtype=torch.float64).T.sigmoid()
    image_of_C = torch.arange(recorded["num_images"]).repeat_interleave(recorded["captions_per_image"])
    num_images, num_captions = recorded["top_images"], recorded["top_captions"]
    asked_t2i_CI, asked_i2t_CI = short_lists(sim_CI, num_images, num_captions)
    text_rank_C, image_rank_I = ranks(sim_CI, image_of_C)
    _check_ranks(comparison, "coarse text_to_image", recorded["coarse"]["text_to_image"], text_rank_C)
    _check_ranks(comparison, "coarse image_to_text", recorded["coarse"]["image_to_text"], image_rank_I)
    text_rank_C = ranks(put_first(sim_CI, match_CI, asked_t2i_CI), image_of_C)[0].clamp(max=num_images)
    image_rank_I = ranks(put_first(sim_CI, match_CI, asked_i2t_CI), image_of_C)[1].clamp(max=num_captions)
    _check_ranks(comparison, "reranked text_to_image", recorded["reranked"]["text_to_image"], text_rank_C)
    _check_ranks(comparison, "reranked image_to_text", recorded["reranked"]["image_to_text"], image_rank_I)


def _check_ranks(comparison: Comparison, name: str, expected: dict[str, Any], found: Tensor) -> None:
    comparison.add(f"retrieval {name} ranks", torch.tensor(expected["ranks"]), found)
    for k in RANKS:
        recall = float((found < k).double().mean())
        comparison.number(f"retrieval {name} R@{k}", expected[f"R@{k}"], recall, 1e-12)


# --- answers


def check_accuracy(comparison: Comparison, file: Path) -> None:
    """Compares the official accuracy, overall and by types, in percent of two digits, and normalised answers."""
    recorded = json.loads(file.read_text(encoding="utf-8"))
    of_type: dict[str, list[float]] = defaultdict(list)
    for case in recorded["cases"]:
        accuracy = official_accuracy(case["prediction"], case["answers"])
        for group in ("overall", f"answer_type {case['answer_type']}", f"question_type {case['question_type']}"):
            of_type[group].append(accuracy)
    expected = {"overall": recorded["overall"]}
    for kind in ("answer_type", "question_type"):
        expected |= {f"{kind} {name}": value for name, value in recorded[f"by_{kind}"].items()}
    for group, percent in expected.items():
        accuracies = of_type.get(group)
        found = None if not accuracies else round(100 * sum(accuracies) / len(accuracies), 2)
        comparison.number(f"vqa accuracy {group}", percent, found)
    for answer, wanted in recorded["normalised"].items():
        comparison.text(f"vqa normalised {answer!r}", wanted, normalise(answer))


# --- boxes


def check_boxes(comparison: Comparison, recorded: Recorded) -> None:
    """Compares overlaps of regions with targets, and which of a detector's boxes stands for the best region."""
    boxes, labels = recorded.scalars["re_boxes"], recorded.inputs["re.labels"].double().numpy()
    targets, detected = _corners(boxes["targets_xywh"]), [_corners(of) for of in boxes["detections_xywh"]]
    regions = [np.array(of_sample, dtype=np.float64) for of_sample in boxes["regions"]]
    for number, (regions_R4, target_4) in enumerate(zip(regions, targets, strict=True)):
        expected_R = torch.from_numpy(labels[number][labels[number] >= 0])
        found_R = torch.from_numpy(overlaps(regions_R4, target_4[None])[:, 0])
        comparison.add(f"boxes {number} overlaps of regions", expected_R, found_R, _IN_FLOAT32)
    for case in (case for case in recorded.cases() if f"{case.name}.detections" in recorded.scalars):
        module, batch = recorded.module(case, torch.float64, "packed"), recorded.batch(case, torch.float64)
        assert isinstance(module, PairModule)
        with torch.no_grad():
            logits_BR = module.logits(module.outputs(batch))
        for number, wanted in enumerate(recorded.scalars[f"{case.name}.detections"]):
            scores_R = logits_BR[number, : len(regions[number])].numpy()
            line = f"boxes {case.name} {number}"
            _check_detections(comparison, line, wanted, scores_R, regions[number], detected[number], targets[number])


def _check_detections(
    comparison: Comparison,
    line: str,
    wanted: dict[str, Any],
    scores_R: np.ndarray,
    regions_R4: np.ndarray,
    detected_M4: np.ndarray,
    target_4: np.ndarray,
) -> None:
    overlaps_RM = overlaps(regions_R4, detected_M4)
    with_target_M = overlaps(detected_M4, target_4[None])[:, 0]
    expected_M = torch.tensor(wanted["detection_iou"], dtype=torch.float64)
    comparison.add(f"{line} detection_iou", expected_M, torch.from_numpy(with_target_M), 1e-9)
    best = box_of_best_region(int(scores_R.argmax()), overlaps_RM)
    comparison.number(f"{line} by_best_region", wanted["by_best_region"], float(with_target_M[best]), 1e-9)
    weighted = box_of_weighted_regions(scores_R, overlaps_RM)
    comparison.number(
        f"{line} by_weighted_regions", wanted["by_weighted_regions"], float(with_target_M[weighted]), 1e-9
    )


def _corners(boxes_xywh: list[list[float]]) -> np.ndarray:
    """Returns boxes x y w h as x1 y1 x2 y2."""
    boxes_M4 = np.array(boxes_xywh, dtype=np.float64)
    return np.concatenate([boxes_M4[:, :2], boxes_M4[:, :2] + boxes_M4[:, 2:]], axis=1)
