"""Draws photo cut-outs, the stamps of Debian's `tuxpaint-stamps-default`, on textures; has region features.

Legend: H W image size, R regions, F feature size.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFilter

from mvptr_ds.demo.efficientnet_lite import RegionExtractor
from mvptr_ds.demo.plan import Catalogue, Kind
from mvptr_ds.demo.scene import IMAGE_SIZE_PX, Scene, crop_to_opaque
from mvptr_ds.demo.stamp_words import is_photo, parse_description
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing_folder

logger = logging.getLogger(__name__)

PACKAGE = "tuxpaint-stamps-default"
STAMPS_BELOW = Path("usr/share/tuxpaint/stamps")
CACHE_DIR = Path(".cache") / "tuxpaint-stamps"
MAX_STAMP_PX = 160  # stored side; sprites are smaller
MAX_SPRITE_PX = 100
MIN_COLOURS = 60  # of 32 levels a channel: fewer is a drawing
COLOUR_SHARE = 0.6  # of the pixels, from which on a stamp "is" of a colour
# Stamps whose middle is a surface worth standing on, and its name.
TEXTURES = {
    "stone": ("grave-a", "grave-d", "grave-e", "grave-g", "grave-h", "grave-j", "inukshuk-photo"),
    "fur": ("european-bear", "otter", "capybara", "wildboar", "dog", "ferret", "marmot", "wombat"),
    "wool": ("ram", "sheep"),
    "peel": ("orange_seville", "mandarine", "cherimoya", "avocado", "kiwi", "ginger"),
    "leaves": ("holm_oak", "redlettuce", "lettuce", "broccoli", "xmaswreath"),
    "wood": ("guitar_classical", "walnutBoat", "pepper_grinder", "violin"),
    "metal": ("spade", "home_compost_bin", "garbagecan", "kettle"),
    "petals": ("flower2", "flower5", "bolsom", "marigold", "flower8"),
    "hide": ("elephant", "gnu-stand", "pig_golden", "hippopotamus", "rhino_black"),
    "feathers": ("owl", "chicken_profile", "turkey", "vulture", "helmeted_guineafowl"),
}


def find_stamps() -> Path:
    """Returns the folder of the stamps: MVPTR_STAMPS, the installed package, or a copy fetched into .cache/ (160 MB).

    Raises:
        DataError: MVPTR_STAMPS names no folder, or the package cannot be fetched.
    """
    given = os.environ.get("MVPTR_STAMPS")
    if given:
        folder = Path(os.path.expanduser(given))
        if not folder.is_dir():
            raise DataError(f"MVPTR_STAMPS is {given!r}, which is no folder; unset it or name the folder of the stamps")
        return folder
    for folder in (Path("/") / STAMPS_BELOW, CACHE_DIR / STAMPS_BELOW):
        if folder.is_dir():
            return folder
    return _fetch()


def _fetch() -> Path:
    download = ["apt-get", "download", PACKAGE]
    logger.info("fetching %s (160 MB) into %s", PACKAGE, CACHE_DIR)
    with replacing_folder(CACHE_DIR) as partial:
        done = _run(download, partial)
        if done.returncode != 0 and os.geteuid() == 0:  # the package lists may be missing or stale
            _run(["apt-get", "update"], partial)
            done = _run(download, partial)
        debs = sorted(partial.glob("*.deb"))
        if done.returncode == 0 and debs:
            done = _run(["dpkg-deb", "-x", debs[0].name, "."], partial)
        if done.returncode != 0 or not (partial / STAMPS_BELOW).is_dir():
            raise DataError(
                f"cannot fetch the stamps: {done.stderr.strip()[-300:]}; install {PACKAGE}, or set MVPTR_STAMPS to its "
                f"folder of stamps, or use the source shapes"
            )
        debs[0].unlink()
        shutil.rmtree(CACHE_DIR, ignore_errors=True)
    return CACHE_DIR / STAMPS_BELOW


def _run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=900, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return subprocess.CompletedProcess(command, 1, "", str(error))


@dataclass(frozen=True)
class Stamp:
    path: str
    noun: str
    attribute: str | None
    image: Image.Image  # RGBa: premultiplied, so that scaling lets no colour of hidden pixels in


def load_stamps(folder: Path) -> list[Stamp]:
    """Returns the stamps that are photographs with alpha and whose description tells their noun, sorted by path."""
    stamps = []
    for file in sorted(folder.rglob("*.png")):
        path = file.relative_to(folder).as_posix()
        text = file.with_suffix(".txt")
        if not is_photo(path) or not text.is_file():
            continue
        lines = text.read_text(encoding="utf-8", errors="replace").splitlines()
        words = parse_description(path, lines[0] if lines else "")
        image = _load_photo(file) if words is not None else None
        if words is None or image is None:
            continue
        noun, attribute = words
        if attribute is None:
            attribute = dominant_colour(np.asarray(image.convert("RGBA")))
        stamps.append(Stamp(path, noun, attribute if attribute != noun else None, image))
    return stamps


def _load_photo(file: Path) -> Image.Image | None:
    """Returns the stamp as RGBa of at most MAX_STAMP_PX, cropped; None for drawings and opaque images."""
    with Image.open(file, formats=("PNG",)) as opened:
        if opened.mode not in ("RGBA", "P"):
            return None
        image = opened.convert("RGBA")
    pixels = np.asarray(image)
    opaque = pixels[:, :, 3] >= 128
    levels = (pixels[:, :, :3][opaque] >> 3).astype(np.int32) @ np.array([1, 32, 1024])
    if not 0.08 < opaque.mean() < 0.96 or len(np.unique(levels)) < MIN_COLOURS:
        return None
    image = Image.fromarray(np.ascontiguousarray(crop_to_opaque(pixels))).convert("RGBa")
    scale = min(1.0, MAX_STAMP_PX / max(image.size))
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BOX)


def dominant_colour(pixels: np.ndarray) -> str | None:
    """Returns the colour that COLOUR_SHARE of the opaque pixels of uint8 [h, w, 4] have, or None."""
    opaque = pixels[pixels[:, :, 3] >= 200][:, :3]
    if len(opaque) == 0:
        return None
    hue, saturation, value = np.asarray(Image.fromarray(opaque[None]).convert("HSV"))[0].astype(int).T
    hue_deg = hue * 360 / 255
    gray = saturation < 45
    warm = (hue_deg < 45) | (hue_deg >= 340)
    earthy = (hue_deg >= 12) & (hue_deg < 45) & (value < 170)
    masks = {
        "black": value < 60,
        "white": gray & (value >= 185),
        "gray": gray & (value >= 60) & (value < 185),
        "brown": ~gray & warm & (value >= 60) & (earthy | (saturation < 110)),
        "red": ~gray & ((hue_deg < 14) | (hue_deg >= 340)) & (value >= 100) & (saturation >= 130),
        "orange": ~gray & (hue_deg >= 18) & (hue_deg < 42) & (value >= 180) & (saturation >= 130),
        "yellow": ~gray & (hue_deg >= 45) & (hue_deg < 68) & (value >= 110),
        "green": ~gray & (hue_deg >= 68) & (hue_deg < 165) & (value >= 60),
        "blue": ~gray & (hue_deg >= 185) & (hue_deg < 255) & (value >= 60),
        "purple": ~gray & (hue_deg >= 255) & (hue_deg < 340) & (value >= 60),
    }
    shares = {name: float(mask.mean()) for name, mask in masks.items()}
    best = max(shares, key=lambda name: shares[name])
    return best if shares[best] >= COLOUR_SHARE else None


def opaque_square(image: Image.Image) -> Image.Image:
    """Returns the largest square of an RGBa stamp that is almost wholly opaque, as RGB."""
    pixels = np.asarray(image)
    sums = np.pad((pixels[:, :, 3] >= 250).cumsum(0).cumsum(1), ((1, 0), (1, 0)))
    for side in range(min(image.size), 15, -2):
        covered = sums[side:, side:] - sums[:-side, side:] - sums[side:, :-side] + sums[:-side, :-side]
        if covered.max() >= 0.97 * side * side or side <= 17:
            y, x = np.unravel_index(int(covered.argmax()), covered.shape)
            return image.convert("RGBA").convert("RGB").crop((int(x), int(y), int(x) + side, int(y) + side))
    raise AssertionError(f"stamp of {image.size} px is too small for a texture")


class StampsSource:
    """Cut-outs with jitter on textures that are enlarged pieces of photographs too."""

    def __init__(self) -> None:
        folder = find_stamps()
        stamps = load_stamps(folder)
        if not stamps:
            raise DataError(f"{folder} holds no photographs with descriptions; is it the folder of {PACKAGE}?")
        self.stamps: dict[Kind, list[Stamp]] = {}
        for stamp in stamps:
            self.stamps.setdefault(Kind(stamp.noun, stamp.attribute), []).append(stamp)
        self.catalogue = Catalogue(sorted(self.stamps, key=lambda kind: (kind.noun, kind.attribute or "")))
        by_stem = {Path(stamp.path).stem: stamp for stamp in stamps}
        self.textures = [
            (name, opaque_square(by_stem[stem].image))
            for name, stems in TEXTURES.items()
            for stem in stems
            if stem in by_stem
        ]
        self._extractor: RegionExtractor | None = None

    def sprite(self, kind: Kind, size_px: float, rng: np.random.Generator) -> np.ndarray:
        """Returns uint8 [h, w, 4]: a stamp of the kind, scaled, mirrored at random, brightness and shape varied."""
        choices = self.stamps[kind]
        image = choices[rng.integers(len(choices))].image
        stretch = rng.uniform(0.92, 1.08)
        width, height = image.width * stretch, image.height / stretch
        scale = min(size_px / (width * height) ** 0.5, MAX_SPRITE_PX / max(width, height))
        size = (max(4, round(width * scale)), max(4, round(height * scale)))
        image = image.resize(size, Image.Resampling.BICUBIC, reducing_gap=2.0).convert("RGBA")
        pixels = np.asarray(image).astype(np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        colour = pixels[:, :, :3]
        colour = (colour - 128) * rng.uniform(0.85, 1.15) + 128 * rng.uniform(0.88, 1.12)
        sprite = np.concatenate([np.clip(colour * rng.uniform(0.95, 1.05, size=3), 0, 255), pixels[:, :, 3:]], axis=2)
        return crop_to_opaque(sprite.astype(np.uint8))

    def background(self, rng: np.random.Generator) -> tuple[np.ndarray, str]:
        """Returns uint8 [H, W, 3]: a turned, enlarged, softened piece of a texture, its contrast lowered."""
        name = list(TEXTURES)[rng.integers(len(TEXTURES))]
        choices = [texture for texture_name, texture in self.textures if texture_name == name]
        name, texture = (name, choices[rng.integers(len(choices))]) if choices else self.textures[0]
        side = texture.width * rng.uniform(0.55, 1.0)
        x, y = rng.uniform(0, texture.width - side, size=2)
        box = (float(x), float(y), float(x + side), float(y + side))
        image = texture.resize((IMAGE_SIZE_PX, IMAGE_SIZE_PX), Image.Resampling.BICUBIC, box=box)
        image = image.filter(ImageFilter.GaussianBlur(float(rng.uniform(0.5, 2.0))))
        pixels = np.rot90(np.asarray(image), int(rng.integers(4))).astype(np.float32)
        if rng.random() < 0.5:
            pixels = pixels[:, ::-1]
        mean = pixels.mean((0, 1))
        pixels = mean * rng.uniform(0.85, 1.15) + (pixels - mean) * rng.uniform(0.55, 0.9)
        return np.clip(pixels, 0, 255).astype(np.uint8), name

    def region_features(self, scenes: Sequence[Scene]) -> list[np.ndarray]:
        """Returns float32 [R, F] for each scene: the frozen network's features of its regions."""
        num_threads = torch.get_num_threads()
        torch.set_num_threads(1)  # sums must not depend on how many threads share them
        try:
            if self._extractor is None:
                self._extractor = RegionExtractor()
            boxes = [
                np.array([region.box for region in scene.record.regions], dtype=np.float32) / IMAGE_SIZE_PX
                for scene in scenes
            ]
            return self._extractor(np.stack([scene.image_HW3 for scene in scenes]), boxes)
        finally:
            torch.set_num_threads(num_threads)
