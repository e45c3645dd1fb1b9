"""Parses the rows of VinVL's and Oscar's TSV files, behind the image id.

    features.tsv      IMAGE_ID \\t NUM_BOXES \\t BASE64   or   IMAGE_ID \\t {"num_boxes": N, "features": BASE64}
    predictions.tsv   IMAGE_ID \\t {"image_h": H, "image_w": W, "objects": [{"class", "conf", "rect": [x1, y1, x2, y2]},
                      ...]}, or the list of objects alone (Oscar's older labels); an object may bring its own "feature"

BASE64 is float32 [N, F + 6]: the feature of each box, then its geometry, x1/W y1/H x2/W y2/H and its two sides (in
either order; files differ). The geometry is left out of `KEY.npy`: the loader computes it from the box.

Legend: N boxes, F size of a feature.
"""

from __future__ import annotations

import base64
import binascii
import json
from dataclasses import dataclass
from typing import Any

import numpy as np

from mvptr_ds.data.schema import MAX_SIDE_PX

GEOMETRY_DIM = 6
_TOLERANCE = 0.01  # of the picture, and _TOLERANCE_PX: some count pixels from 0 to W - 1, some round
_TOLERANCE_PX = 1.5


class RowError(ValueError):
    """A row that cannot be used; `reason` is what it is counted under."""

    def __init__(self, reason: str, detail: object = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, str(detail)


@dataclass(frozen=True)
class Predictions:
    """The objects of one image."""

    size: tuple[int, int] | None  # width, height
    boxes_N4: np.ndarray  # float64, x1 y1 x2 y2 in pixels
    scores_N: np.ndarray  # float64
    tags: tuple[str, ...]
    features_NF: np.ndarray | None  # float32, where the objects bring them


def parse_predictions(content: bytes) -> Predictions:
    """Parses the second column of predictions.tsv, or of Oscar's older labels.

    Raises:
        RowError: it is not of that layout.
    """
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise RowError("the predictions are not JSON", str(error)) from error
    try:
        size = (int(parsed["image_w"]), int(parsed["image_h"])) if isinstance(parsed, dict) else None
        objects = parsed["objects"] if isinstance(parsed, dict) else list(parsed)
        rects = [[float(value) for value in o["rect"]] for o in objects]
        scores_N = np.array([float(o.get("conf", 1.0)) for o in objects], dtype=np.float64)
        tags = tuple(" ".join(str(o["class"]).lower().split()) for o in objects)
        "".join(tags).encode()  # half of a surrogate pair could not be written
        given = [o["feature"] for o in objects if "feature" in o]
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RowError("the predictions lack a field, or it is of the wrong type", repr(error)) from error
    if size is not None and not all(1 <= side <= MAX_SIDE_PX for side in size):
        raise RowError("the picture's size makes no sense", f"{size[0]:g} x {size[1]:g}")
    if any(len(rect) != 4 for rect in rects):
        raise RowError("a rect is not of four numbers")
    boxes_N4 = np.array(rects, dtype=np.float64).reshape(-1, 4)
    if not np.isfinite(boxes_N4).all() or not np.isfinite(scores_N).all():
        raise RowError("a box or a score is NaN or infinity")
    if given and len(given) != len(objects):
        raise RowError("some objects bring a feature, others do not", f"{len(given)} of {len(objects)}")
    features = [_from_base64(feature) for feature in given]
    if len({len(feature) for feature in features}) > 1:
        raise RowError("the objects' features differ in length")
    return Predictions(size, boxes_N4, scores_N, tags, np.stack(features) if features else None)


def parse_features(content: bytes, feature_dim: int) -> np.ndarray:
    """Parses what follows the image id in features.tsv; returns float32 [N, feature_dim].

    Raises:
        RowError: it is not of either layout, or the numbers are not so many as it says.
    """
    try:
        if content.startswith(b"{"):
            parsed = json.loads(content)
            num_boxes, encoded = int(parsed["num_boxes"]), parsed["features"]
        else:
            number, _, encoded = content.rpartition(b"\t")
            num_boxes = int(number.partition(b"\t")[0])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise RowError("the features lack their number or themselves", repr(error)) from error
    numbers = _from_base64(encoded)
    if len(numbers) != num_boxes * feature_dim:
        raise RowError(
            "the features are not as many numbers as their boxes ask",
            f"{len(numbers)}, not {num_boxes} x {feature_dim}",
        )
    return numbers.reshape(num_boxes, feature_dim)


def _from_base64(encoded: Any) -> np.ndarray:
    """Decodes a float32 vector."""
    try:
        content = base64.b64decode(encoded, validate=True)
        numbers = np.frombuffer(content, dtype="<f4")
    except (binascii.Error, TypeError, ValueError) as error:
        raise RowError("the features are not base64 of float32", str(error)) from error
    if not np.isfinite(numbers).all():
        raise RowError("a feature is NaN or infinity")
    return numbers


def to_float16(features_NF: np.ndarray) -> np.ndarray:
    """Returns the array as float16.

    Raises:
        RowError: a number is too large.
    """
    with np.errstate(over="ignore"):
        half_NF: np.ndarray = features_NF.astype(np.float16)
    if not np.isfinite(half_NF).all():
        raise RowError("a feature is too large for float16", f"{np.abs(features_NF).max():g}")
    return half_NF


def size_from_geometry(boxes_N4: np.ndarray, geometry_N4: np.ndarray | None) -> tuple[int, int]:
    """Returns the width and height of an image from its boxes: the median of pixels over shares at the far corners."""
    if geometry_N4 is None:
        raise RowError("the picture's size is not known: neither predictions nor features tell")
    sizes = []
    for axis in (2, 3):
        usable = geometry_N4[:, axis] > 0.05  # a quotient of two small numbers says little
        ratio = np.median(boxes_N4[usable, axis] / geometry_N4[usable, axis]) if usable.any() else np.nan
        if not np.isfinite(ratio) or not 1 <= round(float(ratio)) <= MAX_SIDE_PX:
            raise RowError("the picture's size is not known: its boxes do not tell")
        sizes.append(round(float(ratio)))
    return sizes[0], sizes[1]


def check_geometry(boxes_N4: np.ndarray, geometry_N4: np.ndarray, width: int, height: int) -> None:
    """Rows of features in another order than the boxes would go unnoticed for ever."""
    size = np.array([width, height, width, height], dtype=np.float64)
    apart = np.abs(np.clip(boxes_N4 / size, 0.0, 1.0) - np.clip(geometry_N4, 0.0, 1.0))
    if not (apart <= _TOLERANCE + _TOLERANCE_PX / size).all():
        raise RowError("boxes and the features' geometry are not of each other", f"{np.max(apart):.3f} apart")
