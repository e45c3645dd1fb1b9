"""Boxes of a picture: how far they overlap, and which of a detector's stands for a chosen region.

Legend: R regions, M boxes of a detector.
"""

from __future__ import annotations

import numpy as np

HIT = 0.5  # intersection over union from which a box counts as the one that is meant


def overlaps(boxes_R4: np.ndarray, others_M4: np.ndarray) -> np.ndarray:
    """Returns the intersection over union of boxes x1 y1 x2 y2, float64 [R, M]; 0 where they are apart."""
    first_R14, second_1M4 = boxes_R4[:, None], others_M4[None]
    corner = np.maximum(first_R14[..., :2], second_1M4[..., :2])
    sides = np.clip(np.minimum(first_R14[..., 2:], second_1M4[..., 2:]) - corner, 0.0, None)
    shared_RM = sides[..., 0] * sides[..., 1]
    united_RM = _areas(first_R14) + _areas(second_1M4) - shared_RM
    return np.divide(shared_RM, united_RM, out=np.zeros_like(shared_RM), where=united_RM > 0)


def _areas(boxes_x4: np.ndarray) -> np.ndarray:
    areas: np.ndarray = (boxes_x4[..., 2] - boxes_x4[..., 0]) * (boxes_x4[..., 3] - boxes_x4[..., 1])
    return areas


def box_of_best_region(best: int, overlaps_RM: np.ndarray) -> int:
    """Returns the detector's box that overlaps the best region most."""
    return int(overlaps_RM[best].argmax())


def box_of_weighted_regions(scores_R: np.ndarray, overlaps_RM: np.ndarray) -> int:
    """Returns the detector's box of the highest sum of the regions' scores, weighted by their overlap with it."""
    return int((scores_R @ overlaps_RM).argmax())
