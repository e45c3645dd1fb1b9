"""Scores of referring expressions by the boxes of a given detector, as most papers report them.

Legend: R regions, M boxes of the detector.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mvptr_ds.errors import DataError
from mvptr_ds.tasks.boxes import HIT, box_of_best_region, box_of_weighted_regions, overlaps
from mvptr_ds.tasks.downstream import Prediction
from mvptr_ds.user_io.user_files import parse_json, read_text


def load_detections(path: str) -> dict[str, np.ndarray]:
    """Reads boxes by image id, float64 [M, 4] each, as x1 y1 x2 y2.

    The file holds `{"ID": [[x, y, width, height], ...]}`, or a list of objects with `image_id` and `box`.

    Raises:
        DataError: it holds something else.
    """
    content = parse_json(read_text(Path(path)), path)
    by_image: dict[str, list[Any]] = {}
    try:
        if isinstance(content, list):
            for detection in content:
                by_image.setdefault(_image_id(detection["image_id"]), []).append(detection["box"])
        else:
            by_image = {_image_id(name): list(boxes) for name, boxes in content.items()}
        return {name: _corners(boxes) for name, boxes in by_image.items()}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DataError(
            f"referring.detections={path} holds no boxes by image ({error!r}), expected "
            '{"IMAGE_ID": [[x, y, width, height], ...]}'
        ) from error


def _image_id(name: Any) -> str:
    """Returns an image id as records write it: numbers have twelve digits."""
    return f"{int(name):012d}" if str(name).isdigit() else str(name)


def _corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    boxes_M4 = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return np.concatenate([boxes_M4[:, :2], boxes_M4[:, :2] + boxes_M4[:, 2:]], axis=1)


def by_detections(predictions: Sequence[Prediction], detections: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Returns shares of expressions whose box is hit by a box of the detector, chosen in two ways.

    Returns:
        `by_detections` with `upper_bound`, `best_region` (the box that overlaps the chosen region most),
        `weighted_regions` (the box of the highest sum of chances times overlaps), and `num_without_boxes`.
    """
    hits: dict[str, list[float]] = {"upper_bound": [], "best_region": [], "weighted_regions": []}
    num_without = 0
    for prediction in predictions:
        labels = prediction.labels
        boxes_M4 = detections.get(_image_id(labels["image_id"]), np.zeros((0, 4)))
        if not len(boxes_M4):
            num_without += 1
            hit_M, chosen = np.zeros(1), {"best_region": 0, "weighted_regions": 0}
        else:
            hit_M = overlaps(np.array([labels["box"]], dtype=np.float64), boxes_M4)[0] >= HIT
            overlaps_RM = overlaps(labels["boxes"][: len(labels["scores"])], boxes_M4)
            chosen = {
                "best_region": box_of_best_region(int(prediction.answer), overlaps_RM),
                "weighted_regions": box_of_weighted_regions(labels["scores"], overlaps_RM),
            }
        hits["upper_bound"].append(float(hit_M.any()))
        for way, box in chosen.items():
            hits[way].append(float(hit_M[box]))
    shares = {way: sum(of_way) / max(1, len(of_way)) for way, of_way in hits.items()}
    return {"by_detections": {**shares, "num_without_boxes": num_without}}
