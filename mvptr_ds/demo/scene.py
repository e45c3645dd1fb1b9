"""Makes one demo scene, a pure function of (seed, split, number): plans, draws, places and describes its objects.

Legend: H W image size.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from PIL import Image

from mvptr_ds.data.schema import Record, Region
from mvptr_ds.demo.captions import Box, SceneObject, write_caption
from mvptr_ds.demo.plan import Catalogue, Kind, ObjectPlan, SplitRule, plan_objects

IMAGE_SIZE_PX = 128
JPEG_QUALITY = 90
MAX_OVERLAP = 0.12  # of the smaller of two boxes
TWO_CAPTIONS_FRACTION = 0.2
PART_TAG = "part"
SPLITS = ("train", "held_out")


class Source(Protocol):
    """What draws: a catalogue of kinds, sprites of them, and backgrounds."""

    catalogue: Catalogue

    def sprite(self, kind: Kind, size_px: float, rng: np.random.Generator) -> np.ndarray:
        """Returns a sprite, uint8 [h, w, 4]: RGBA with straight alpha, cropped; h x w is about size_px squared."""
        ...

    def background(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Returns a background, uint8 [H, W, 3], and its noun."""
        ...

    def region_features(self, scenes: Sequence[Scene]) -> list[np.ndarray] | None:
        """Returns float [R, F] for each scene, a row for each region; None when the source has images only."""
        ...


@dataclass(frozen=True)
class Scene:
    key: str
    image_HW3: np.ndarray  # uint8
    owner_HW: np.ndarray  # int8, the object that a pixel shows, -1 for the background
    objects: tuple[SceneObject, ...]
    record: Record

    def jpeg(self) -> bytes:
        buffer = io.BytesIO()
        Image.fromarray(self.image_HW3).save(buffer, "JPEG", quality=JPEG_QUALITY)
        return buffer.getvalue()


def make_scene(source: Source, rule: SplitRule, number: int) -> Scene:
    """Draws scene `number` of the rule's split."""
    split = 0 if rule.is_train else 1
    rng = np.random.default_rng([rule.seed, split, number])
    plans = plan_objects(rng, source.catalogue, rule)
    background_HW3, background_name = source.background(rng)
    sprites = [source.sprite(plan.kind, plan.size_px, rng) for plan in plans]
    corners = _place(rng, sprites)
    plans, sprites = plans[: len(corners)], sprites[: len(corners)]
    image_HW3, owner_HW = compose(background_HW3, sprites, corners, rng.permutation(len(sprites)))
    boxes = [_visible_box(owner_HW, index) for index in range(len(plans))]
    regions, own_regions = _regions(rng, plans, boxes, background_name)
    objects = tuple(SceneObject(p, b, r) for p, b, r in zip(plans, boxes, own_regions, strict=True))
    num_captions = 2 if rng.random() < TWO_CAPTIONS_FRACTION else 1
    captions = tuple(write_caption(rng, objects, rule) for _ in range(num_captions))
    key = f"{SPLITS[split]}-{number:06d}"
    return Scene(key, image_HW3, owner_HW, objects, Record(key, IMAGE_SIZE_PX, IMAGE_SIZE_PX, captions, tuple(regions)))


def _place(rng: np.random.Generator, sprites: Sequence[np.ndarray]) -> list[tuple[int, int]]:
    """Returns the upper left corners (x, y) of sprites that overlap little, without the last ones for lack of room."""
    for num_sprites in range(len(sprites), 1, -1):
        for _ in range(12):
            boxes: list[Box] = []
            for sprite in sprites[:num_sprites]:
                box = _free_box(rng, sprite.shape[1], sprite.shape[0], boxes)
                if box is None:
                    break
                boxes.append(box)
            if len(boxes) == num_sprites:
                return [(box[0], box[1]) for box in boxes]
    raise AssertionError(f"two sprites of {[s.shape for s in sprites[:2]]} do not fit {IMAGE_SIZE_PX} px")


def _free_box(rng: np.random.Generator, width: int, height: int, others: Sequence[Box]) -> Box | None:
    for _ in range(30):
        x = int(rng.integers(0, IMAGE_SIZE_PX - width + 1))
        y = int(rng.integers(0, IMAGE_SIZE_PX - height + 1))
        box = (x, y, x + width, y + height)
        if all(overlap(box, o) <= MAX_OVERLAP * min(width * height, area(o)) for o in others):
            return box
    return None


def area(box: Box) -> int:
    return (box[2] - box[0]) * (box[3] - box[1])


def overlap(first: Box, second: Box) -> int:
    """Returns the common area of two boxes in pixels."""
    width = min(first[2], second[2]) - max(first[0], second[0])
    height = min(first[3], second[3]) - max(first[1], second[1])
    return max(width, 0) * max(height, 0)


def compose(
    background_HW3: np.ndarray,
    sprites: Sequence[np.ndarray],
    corners: Sequence[tuple[int, int]],
    paint_order: Sequence[int] | np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    """Pastes sprites onto the background.

    Returns:
        the picture, uint8 [H, W, 3], and which object each pixel shows, int8 [H, W], -1 for the background.
    """
    canvas = background_HW3.astype(np.float32)
    owner_HW = np.full(background_HW3.shape[:2], -1, dtype=np.int8)
    for index in paint_order:
        sprite, (x, y) = sprites[index], corners[index]
        window = (slice(y, y + sprite.shape[0]), slice(x, x + sprite.shape[1]))
        alpha = sprite[:, :, 3:].astype(np.float32) / 255
        canvas[window] += alpha * (sprite[:, :, :3] - canvas[window])
        owner_HW[window][sprite[:, :, 3] >= 128] = index
    return np.rint(canvas).astype(np.uint8), owner_HW


def crop_to_opaque(sprite: np.ndarray) -> np.ndarray:
    """Cuts a sprite [h, w, 4] to the pixels that it will own (alpha of at least one half)."""
    opaque = sprite[:, :, 3] >= 128
    rows, columns = np.flatnonzero(opaque.any(1)), np.flatnonzero(opaque.any(0))
    return sprite[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _visible_box(owner_HW: np.ndarray, index: int) -> Box:
    visible = owner_HW == index
    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
    return (int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1)


def _regions(
    rng: np.random.Generator, plans: Sequence[ObjectPlan], boxes: Sequence[Box], background_name: str
) -> tuple[list[Region], list[int]]:
    """Returns the objects' boxes with distractors among them, shuffled, and where each object's own box went."""
    num_regions = int(rng.integers(max(6, len(boxes) + 1), 11))
    num_distractors = num_regions - len(boxes)
    num_parts = int(rng.integers(0, min(3, num_distractors) + 1))
    found = [(box, plan.noun, rng.uniform(0.6, 1.0)) for box, plan in zip(boxes, plans, strict=True)]
    for _ in range(num_parts):
        found.append((_part_box(rng, boxes[int(rng.integers(len(boxes)))]), PART_TAG, rng.uniform(0.2, 0.7)))
    for _ in range(num_distractors - num_parts):
        found.append((_background_box(rng, boxes), background_name, rng.uniform(0.2, 0.8)))
    order = rng.permutation(num_regions)
    regions = []
    for i in order:
        (x1, y1, x2, y2), tag, score = found[i]
        regions.append(Region((float(x1), float(y1), float(x2), float(y2)), tag, round(float(score), 3)))
    return regions, [int(r) for r in np.argsort(order)[: len(boxes)]]


def _part_box(rng: np.random.Generator, box: Box) -> Box:
    """Returns a box of 40 to 60 % of the object's sides at one of its corners or edges."""
    sides = []
    for start, end in ((box[0], box[2]), (box[1], box[3])):
        length = max(2, round((end - start) * rng.uniform(0.4, 0.6)))
        first = start + int(rng.integers(0, 3)) * max(end - start - length, 0) // 2
        sides.append((first, min(first + length, end)))
    return (sides[0][0], sides[1][0], sides[0][1], sides[1][1])


def _background_box(rng: np.random.Generator, boxes: Sequence[Box]) -> Box:
    """Returns a box that shows mostly background: the best of a few random ones."""
    best: Box | None = None
    best_share = 2.0
    for _ in range(12):
        width, height = (int(v) for v in rng.integers(16, 61, size=2))
        x, y = int(rng.integers(0, IMAGE_SIZE_PX - width + 1)), int(rng.integers(0, IMAGE_SIZE_PX - height + 1))
        box = (x, y, x + width, y + height)
        share = sum(overlap(box, other) for other in boxes) / area(box)
        if share < best_share:
            best, best_share = box, share
        if share < 0.15:
            break
    assert best is not None
    return best
