"""Draws objects: a shape in a colour, antialiased, on a softly textured background. It needs no download.

Legend: H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mvptr_ds.demo.plan import Catalogue, Kind
from mvptr_ds.demo.scene import IMAGE_SIZE_PX, Scene, crop_to_opaque

SUPERSAMPLING = 4
Layers = list[tuple[np.ndarray, int]]  # polygons of unit coordinates, painted one after the other with 255 or 0

COLOURS_RGB = {
    "red": (214, 39, 40),
    "green": (38, 148, 60),
    "blue": (36, 82, 208),
    "yellow": (244, 208, 30),
    "orange": (245, 130, 28),
    "purple": (128, 52, 170),
    "pink": (244, 130, 184),
    "brown": (124, 74, 40),
    "black": (28, 28, 32),
    "white": (246, 246, 242),
    "cyan": (40, 196, 208),
}
# Upper and lower colour of each background; none is a colour that an object has.
BACKGROUNDS_RGB = {
    "sky": ((150, 186, 224), (206, 222, 236)),
    "grass": ((150, 178, 120), (116, 150, 92)),
    "sand": ((224, 208, 170), (200, 180, 138)),
    "wall": ((190, 186, 180), (168, 164, 158)),
    "water": ((112, 152, 176), (86, 126, 150)),
    "snow": ((206, 212, 220), (222, 224, 228)),
    "stone": ((134, 132, 130), (108, 106, 106)),
    "wood": ((190, 152, 116), (166, 128, 94)),
}


def _regular(num_corners: int, radius: float = 1.0, turn_rad: float = -np.pi / 2) -> np.ndarray:
    angles = turn_rad + np.arange(num_corners) * 2 * np.pi / num_corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _circle(radius: float = 1.0, x: float = 0.0) -> np.ndarray:
    return _regular(64, radius) + np.array([x, 0.0])


def _star() -> np.ndarray:
    points = np.empty((10, 2))
    points[0::2] = _regular(5)
    points[1::2] = _regular(5, 0.42, -np.pi / 2 + np.pi / 5)
    return points


def _heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 80, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = -(13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t))
    return np.stack([x, y], axis=1) / 17


def _polygon(*points: tuple[float, float]) -> np.ndarray:
    return np.array(points, dtype=float)


SHAPES: dict[str, Layers] = {
    "circle": [(_circle(), 255)],
    "square": [(_polygon((-1, -1), (1, -1), (1, 1), (-1, 1)), 255)],
    "triangle": [(_polygon((0, -1), (1, 0.8), (-1, 0.8)), 255)],
    "star": [(_star(), 255)],
    "heart": [(_heart(), 255)],
    "cross": [
        (_polygon((-0.33, -1), (0.33, -1), (0.33, 1), (-0.33, 1)), 255),
        (_polygon((-1, -0.33), (1, -0.33), (1, 0.33), (-1, 0.33)), 255),
    ],
    "ring": [(_circle(), 255), (_circle(0.52), 0)],
    "diamond": [(_polygon((0, -1), (0.68, 0), (0, 1), (-0.68, 0)), 255)],
    "pentagon": [(_regular(5), 255)],
    "crescent": [(_circle(), 255), (_circle(0.86, 0.48), 0)],
    "arrow": [(_polygon((-1, -0.28), (0.1, -0.28), (0.1, -0.75), (1, 0), (0.1, 0.75), (0.1, 0.28), (-1, 0.28)), 255)],
    "bar": [(_polygon((-1, -0.3), (1, -0.3), (1, 0.3), (-1, 0.3)), 255)],
}


class ShapesSource:
    """Shapes x colours, all drawn with PIL."""

    def __init__(self) -> None:
        self.catalogue = Catalogue([Kind(noun, colour) for noun in SHAPES for colour in COLOURS_RGB])

    def sprite(self, kind: Kind, size_px: float, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 [h, w, 4]: the shape, turned by up to 12 degrees, its colour varied a little and shaded."""
        assert kind.attribute is not None
        angle = np.deg2rad(rng.uniform(-12, 12))
        turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
        layers = [(points @ turn.T, fill) for points, fill in SHAPES[kind.noun]]
        outline = layers[0][0] if len(layers) == 1 else np.concatenate([points for points, fill in layers if fill])
        low, high = outline.min(0), outline.max(0)
        scale = size_px / float(np.sqrt(np.prod(high - low)))
        width, height = (int(np.ceil(v)) + 2 for v in (high - low) * scale)
        mask = Image.new("L", (width * SUPERSAMPLING, height * SUPERSAMPLING))
        draw = ImageDraw.Draw(mask)
        for points, fill in layers:
            pixels = ((points - low) * scale + 1) * SUPERSAMPLING
            draw.polygon([(float(x), float(y)) for x, y in pixels], fill=fill)
        sprite = np.empty((height, width, 4), dtype=np.uint8)
        sprite[:, :, 3] = np.asarray(mask.reduce(SUPERSAMPLING))
        colour = np.array(COLOURS_RGB[kind.attribute]) + rng.uniform(-12, 12, size=3)
        shade = np.linspace(8, -8, height)[:, None, None]
        sprite[:, :, :3] = np.clip(colour + shade, 0, 255)
        return crop_to_opaque(sprite)

    def background(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Returns uint8 [H, W, 3]: a gradient with soft blotches and fine grain."""
        names = list(BACKGROUNDS_RGB)
        name = names[rng.integers(len(names))]
        top, bottom = (np.array(rgb, dtype=np.float32) for rgb in BACKGROUNDS_RGB[name])
        if rng.random() < 0.5:
            top, bottom = bottom, top
        down = np.linspace(0, 1, IMAGE_SIZE_PX, dtype=np.float32)[:, None, None]
        blotches = Image.fromarray(rng.uniform(-14, 14, size=(6, 6)).astype(np.float32))
        soft = np.asarray(blotches.resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.BICUBIC))[:, :, None]
        grain = rng.integers(-6, 7, size=(IMAGE_SIZE_PX, IMAGE_SIZE_PX, 1), dtype=np.int16)
        pixels = top + (bottom - top) * down + soft + grain + rng.uniform(-10, 10, size=3).astype(np.float32)
        return np.clip(pixels, 0, 255).astype(np.uint8), name

    def region_features(self, scenes: Sequence[Scene]) -> None:
        """Returns None: the regions of shapes are pooled from the image."""
        return None
