"""Small shards and a model folder with random weights over them, for those who use or export a trained model."""

from __future__ import annotations

import io
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from mvptr_ds.builders import model_config
from mvptr_ds.checkpoints.model_folder import save_model_folder
from mvptr_ds.config import Config, EvalConfig, ModelConfig, VisualConfig, override_config
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.schema import Caption, Extractor, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.model.mvptr import Mvptr

NUM_RECORDS, FEATURES, WIDTH, HEIGHT = 8, 5, 60, 40
NOUNS, COLOURS = ("dog", "car", "tree", "unladylike"), ("red", "blue")


class Untrained(NamedTuple):
    folder: Path  # the model folder
    index: Index  # the shards
    vocabs: Vocabs
    config: Config


def untrained_folder(path: Path, source: str) -> Untrained:
    """Makes both below `path`. `source` is what the model reads: image or features."""
    write_shards(path / "shards", [_item(number) for number in range(NUM_RECORDS)], 5)
    words = WordPiece()
    counts = {(noun,): 9 for noun in NOUNS} | {(noun, colour): 5 for noun in NOUNS[:3] for colour in COLOURS}
    vocabs = Vocabs(words, PhraseVocab.build(counts, words, 1))
    backbone = {"model_type": "convnext", "hidden_sizes": [8], "depths": [1], "num_stages": 1}
    config = Config(
        visual=VisualConfig(
            source="image" if source == "image" else "features",
            feature_dim=FEATURES,
            image_size=32,
            grid_size=3,
            backbone_config=backbone if source == "image" else None,
        ),
        model=ModelConfig(
            hidden_size=16, num_attention_heads=2, intermediate_size=32, num_text_layers=2, num_visual_layers=2,
            num_cross_layers=2, max_positions=40,
        ),
        eval=EvalConfig(batch_size=3, rerank_top_k=3),
    )  # fmt: skip
    config = override_config(config, [f"data.train={path / 'shards'}", f"data.held_out={path / 'shards'}"])
    torch.manual_seed(3)
    model = Mvptr(model_config(config, vocabs))
    model.set_phrase_rows(torch.from_numpy(vocabs.phrases.rows))
    with torch.no_grad():  # larger than at a start, so that states differ by more than rounding
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(6.0)
    save_model_folder(path / "model", model, model.state_dict(), vocabs, config)
    return Untrained(path / "model", ensure_index(path / "shards"), vocabs, config)


def _item(number: int) -> tuple[str, Record, dict[str, bytes]]:
    rng = np.random.default_rng(number)
    noun, colour = NOUNS[number % 4], COLOURS[number % 2]
    text = f"A {colour} {noun} stands beside a {NOUNS[(number + 1) % 4]}."
    start = text.index(noun)
    phrases = (
        Phrase((noun,), ((start, start + len(noun)),)),
        Phrase((noun, colour), ((start, start + len(noun)), (2, 2 + len(colour)))),  # one with "unladylike" is unknown
    )
    corners = rng.uniform(0, 20, (2 + number % 3, 2))
    regions = tuple(
        Region((float(x), float(y), float(x + 25), float(y + 15)), tag)
        for (x, y), tag in zip(corners, ("dog", "red car", "Dog", "tree"), strict=False)
    )
    picture, features = io.BytesIO(), io.BytesIO()
    Image.fromarray(rng.integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)).save(picture, "PNG")
    np.save(features, rng.standard_normal((len(regions), FEATURES)).astype(np.float32))
    record = Record(str(number), WIDTH, HEIGHT, (Caption(text, phrases),), regions, Extractor("test/detector", "1"))
    return f"{number:04d}", record, {"png": picture.getvalue(), "npy": features.getvalue()}
