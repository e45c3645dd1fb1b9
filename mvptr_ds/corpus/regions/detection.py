"""Turns what a detector found in an image into the regions of its record: named, clipped, best first.

Legend: Q queries (what the detector proposes), N boxes, D size of a query's state.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import numpy as np

from mvptr_ds.data.schema import Region

MIN_BOX_SIDE = 1.0  # pixels; a smaller box shows nothing
_NO_OBJECT = frozenset(("", "n/a", "none", "background", "__background__", "no object", "no-object"))
_NUMBERED = re.compile(r"label_\d+")  # what transformers calls the classes of a model that names none


@dataclass(frozen=True)
class Detections:
    """One picture's queries, each with its best class."""

    boxes_Q4: np.ndarray  # float32, x1 y1 x2 y2 in pixels of the picture, may reach beyond it
    scores_Q: np.ndarray  # float32, 0..1
    tags: tuple[str | None, ...]  # Q of them, by `tag_of`
    states_QD: np.ndarray | None = None  # float32, the last decoder state of each query


@dataclass(frozen=True)
class RegionChoice:
    """Which detections become regions."""

    score_threshold: float = 0.3
    nms_iou: float = 0.5  # of two boxes of one tag that overlap more, the better stays; 1 keeps all
    max_regions: int = 50
    at_least_one: bool = False  # features must have a row: the best query stays whatever its score

    def __post_init__(self) -> None:
        for name in ("score_threshold", "nms_iou"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"{name} is {getattr(self, name)}, expected 0 to 1")
        if self.max_regions < 1:
            raise ValueError(f"max_regions is {self.max_regions}, must be at least 1")


def tag_of(class_name: str) -> str | None:
    """Returns the tag of a detector's class: the first of several names, in lower case, without remarks in parentheses.

    "Handbag/Satchel" is `handbag`, "bow_(weapon)" is `bow`. A class without a name ("LABEL_3") gives an empty tag, one
    that is no object ("N/A", "background") None.
    """
    name = class_name.strip().lower()
    if name in _NO_OBJECT:
        return None
    if _NUMBERED.fullmatch(name):
        return ""
    return " ".join(re.split(r"[/,(]", name.replace("_", " "))[0].split())


def nms(boxes_N4: np.ndarray, scores_N: np.ndarray, groups_N: np.ndarray, max_iou: float, limit: int) -> np.ndarray:
    """Suppresses non-maxima within each group; returns the indices of the boxes that stay, int64, best score first.

    A box goes when a better one of its group (equal number in `groups_N`) overlaps it by more than `max_iou`
    (intersection over union). Equal scores keep their order. At most `limit` stay.
    """
    boxes_N4 = boxes_N4.astype(np.float64)
    areas_N = (boxes_N4[:, 2] - boxes_N4[:, 0]) * (boxes_N4[:, 3] - boxes_N4[:, 1])
    left = np.argsort(-scores_N, kind="stable")
    kept: list[int] = []
    while len(left) and len(kept) < limit:
        best, left = int(left[0]), left[1:]
        kept.append(best)
        corner = np.maximum(boxes_N4[left, :2], boxes_N4[best, :2])
        sides = np.clip(np.minimum(boxes_N4[left, 2:], boxes_N4[best, 2:]) - corner, 0.0, None)
        common = sides[:, 0] * sides[:, 1]
        # a product, not a quotient: boxes without area overlap nothing
        too_near = common > max_iou * (areas_N[left] + areas_N[best] - common)
        left = left[~(too_near & (groups_N[left] == groups_N[best]))]
    return np.array(kept, dtype=np.int64)


def clip_boxes(boxes_N4: np.ndarray, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Clips boxes to the image.

    Returns the boxes, float64 [N, 4] in pixels, and which have sides of at least `MIN_BOX_SIDE`, bool [N].
    """
    clipped_N4 = np.clip(boxes_N4.astype(np.float64), 0.0, [width, height, width, height])
    usable_N: np.ndarray = np.all(clipped_N4[:, 2:] - clipped_N4[:, :2] >= MIN_BOX_SIDE, axis=1)
    return clipped_N4, usable_N


def choose_regions(
    found: Detections, width: int, height: int, choice: RegionChoice
) -> tuple[tuple[Region, ...], np.ndarray]:
    """Returns the regions of a picture of `width` x `height` pixels, best first, and the query of each, int64 [R].

    Boxes are clipped to the picture. Left out: boxes below `MIN_BOX_SIDE`, classes that are no object, scores below
    the threshold, repeats (`nms` among equal tags). With `at_least_one` a picture of which nothing is left gets its
    best query, with the whole picture as its box if no query has a usable one.
    """
    boxes_Q4, usable_Q = clip_boxes(found.boxes_Q4, width, height)
    usable_Q &= np.array([tag is not None for tag in found.tags], dtype=bool)
    queries = np.flatnonzero(usable_Q & (found.scores_Q >= choice.score_threshold))
    if not len(queries) and choice.at_least_one:
        candidates = np.flatnonzero(usable_Q) if usable_Q.any() else np.arange(len(found.tags))
        queries = candidates[[np.argmax(found.scores_Q[candidates])]]
        if not usable_Q.any():
            boxes_Q4[queries] = [0.0, 0.0, width, height]
    tags = [found.tags[query] or "" for query in queries]
    groups = np.unique(tags, return_inverse=True)[1] if tags else np.zeros(0, dtype=np.int64)
    kept = nms(boxes_Q4[queries], found.scores_Q[queries], groups, choice.nms_iou, choice.max_regions)
    regions = []
    for number in kept:
        x1, y1, x2, y2 = (round(float(value), 2) for value in boxes_Q4[queries[number]])
        score = round(float(found.scores_Q[queries[number]]), 4)
        regions.append(Region((x1, y1, x2, y2), tags[number], score))
    return tuple(regions), queries[kept]
