"""What tools/bench/bench_loader.py reads: synthetic shards of COCO's sizes with detector features, or of photographs.

Captions have 8 to 14 words and 3 phrases each, five to a picture; 10 to 50 regions with 2,048 float16 numbers each; or
a JPEG of 640 x 480 with the statistics of a photograph (1/f spectrum, 160 KB as the mean of COCO).
"""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Phrase, Record, Region
from mvptr_ds.data.shards.tar_writer import npy_bytes
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece

NUM_CAPTIONS, NUM_PHRASES, FEATURE_DIM = 5, 3, 2048
MIN_REGIONS, MAX_REGIONS = 10, 50
WIDTH, HEIGHT, JPEG_QUALITY = 640, 480, 89
RECORDS_PER_SHARD = 100
NOUNS = [
    "man", "woman", "dog", "cat", "horse", "street", "table", "plate", "pizza", "train", "bus", "boat", "beach", "kite",
    "surfboard", "umbrella", "bench", "bicycle", "clock", "giraffe", "zebra", "elephant", "frisbee", "kitchen",
]  # fmt: skip
ADJECTIVES = [
    "brown", "white", "young", "large", "old", "wooden", "red", "small", "black", "green", "yellow", "tall",
]  # fmt: skip
VERBS = ["riding", "holding", "eating", "watching", "near", "under", "beside", "behind", "carrying", "throwing"]
REST = ["a", "the", "on", "in", "of", "with", "and", "some", "two", "very", "that", "is", "at", "his", "through", "to"]

Item = tuple[str, Record, dict[str, bytes]]


def vocabulary(words: WordPiece) -> PhraseVocab:
    """Returns every phrase that the captions hold."""
    counts: dict[tuple[str, ...], int] = {(noun,): 2 for noun in NOUNS}
    counts |= {(noun, adjective): 1 for noun in NOUNS for adjective in ADJECTIVES}
    return PhraseVocab.build(counts, words, 1)


def write(folder: Path, kind: str, num_records: int, num_captions: int = NUM_CAPTIONS) -> None:
    """Shards of `num_records` pictures; kind is features or images."""
    write_shards(folder, items(kind, num_records, num_captions), RECORDS_PER_SHARD)


def items(kind: str, num_records: int, num_captions: int) -> Iterator[Item]:
    rng = np.random.default_rng(0)
    for number in range(num_records):
        captions = tuple(_caption(rng) for _ in range(num_captions))
        regions = tuple(_region(rng) for _ in range(rng.integers(MIN_REGIONS, MAX_REGIONS + 1)))
        if kind == "features":
            # what detectors give after their ReLU: half of it zero
            features = np.maximum(rng.standard_normal((len(regions), FEATURE_DIM), dtype=np.float32), 0)
            members = {"npy": npy_bytes(features.astype(np.float16))}
        else:
            members = {"jpg": photograph(rng)}
        yield f"k{number:08d}", Record(f"{number}", WIDTH, HEIGHT, captions, regions), members


def _caption(rng: np.random.Generator) -> Caption:
    words: list[str] = []
    phrases = []
    for _ in range(NUM_PHRASES):
        adjective, noun, verb = (str(rng.choice(part)) for part in (ADJECTIVES, NOUNS, VERBS))
        filler = [str(word) for word in rng.choice(REST, rng.integers(0, 3))]
        start = sum(len(word) + 1 for word in [*words, *filler])
        spans = ((start, start + len(adjective)), (start + len(adjective) + 1, start + len(adjective) + 1 + len(noun)))
        phrases.append(Phrase((noun, adjective), spans) if rng.random() < 0.5 else Phrase((noun,), spans[1:]))
        words += [*filler, adjective, noun, verb]
    return Caption(" ".join([*words, "here"]) + ".", tuple(phrases))


def _region(rng: np.random.Generator) -> Region:
    x1, y1 = rng.uniform(0, WIDTH - 20), rng.uniform(0, HEIGHT - 20)
    x2, y2 = rng.uniform(x1 + 10, WIDTH), rng.uniform(y1 + 10, HEIGHT)
    box = (round(x1, 2), round(y1, 2), round(x2, 2), round(y2, 2))
    return Region(box, f"{rng.choice(ADJECTIVES)} {rng.choice(NOUNS)}"[-12:].strip(), round(rng.random(), 4))


def photograph(rng: np.random.Generator) -> bytes:
    """Returns a JPEG whose channels share most of a random picture of a 1/f spectrum."""
    amplitude = 1 / np.maximum(np.hypot(np.fft.fftfreq(HEIGHT)[:, None], np.fft.rfftfreq(WIDTH)[None]), 1 / WIDTH)
    spectra = amplitude**1.1 * np.exp(2j * np.pi * rng.random((4, *amplitude.shape)))
    shared, *channels = np.fft.irfft2(spectra, s=(HEIGHT, WIDTH))
    pixels_3HW = np.stack([shared + 0.35 * channel for channel in channels])
    pixels_3HW = (pixels_3HW - pixels_3HW.mean()) / pixels_3HW.std() * 50 + 120
    stream = io.BytesIO()
    pixels_HW3 = np.clip(pixels_3HW, 0, 255).astype(np.uint8).transpose(1, 2, 0)
    Image.fromarray(pixels_HW3).save(stream, "JPEG", quality=JPEG_QUALITY)
    return stream.getvalue()
