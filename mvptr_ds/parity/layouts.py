"""Compares how texts, phrases, tags and regions are laid out in slots with the published scripts of the tasks.

The script of referring expressions throws phrases away before it looks them up. That slip is not repeated here, so
its cases are compared without phrases.

Legend: T text slots, G tag slots, R regions.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mvptr_ds.data.collate import Sample
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Phrase, Record, Region
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.model.embeddings import TAG_SEGMENT
from mvptr_ds.parity.comparison import Comparison

_SIDE, _FEATURES = 64, 4  # of the made-up pictures, in pixels, and of their features


def check(comparison: Comparison, file: Path) -> None:
    """Compares ids, masks and segments of every recorded case."""
    words = WordPiece()
    for number, case in enumerate(json.loads(file.read_text(encoding="utf-8"))):
        found = laid_out(case, words)
        for name, slots in found.items():
            comparison.add(f"layout {number} {case['task']} {name}", torch.tensor(case[name]), slots)


def laid_out(case: Mapping[str, Any], words: WordPiece) -> dict[str, Tensor]:
    """Returns the slots of a case, int64, as `SampleBuilder` fills them, padded to the published lengths.

    Args:
        case: `task`, `text`, `phrase_ids`, `tags_listed`, `n_regions` and `lengths` as recorded.
    """
    lengths = case["lengths"]
    num_text, num_tags = lengths["text"] + lengths["phrases"], lengths["tags"]
    sample = _sample(case, words, num_text)
    ids_T, tags_T, ids_G = sample.text_ids_T, sample.tags_in_text_T, sample.tag_ids_G
    num_regions = len(sample.region_geometry_R6)
    segments_T = np.zeros(len(ids_T), dtype=np.int64) if tags_T is None else tags_T.astype(np.int64)
    visual_mask = torch.cat([_padded(np.ones(len(ids_G)), num_tags), _padded(np.ones(num_regions), lengths["regions"])])
    return {
        "input_ids_a": _padded(ids_T, num_text),
        "attention_mask_a": _padded(np.ones(len(ids_T)), num_text),
        "token_type_ids_a": _padded(segments_T, num_text),
        "input_ids_b": _padded(ids_G, num_tags),
        "attention_mask_b": visual_mask,
        "token_type_ids_b": _padded(np.full(len(ids_G), TAG_SEGMENT), num_tags),
    }


def _sample(case: Mapping[str, Any], words: WordPiece, num_text: int) -> Sample:
    lengths, rows = case["lengths"], [] if case["task"] == "re" else case["phrase_ids"]
    # a name for each recorded row, with a place in the text, since the recorded phrases are none of the text's
    names = [(f"row {row}",) for row in rows]
    vocab = PhraseVocab(names, rows, [0] * len(rows), len(words), words.fingerprint)
    options = SampleOptions(
        max_tokens=lengths["text"] - 2,
        max_text_slots=num_text,
        max_tag_slots=lengths["tags"],
        # where a case lists more tags than regions, the regions behind are there for their tags alone
        max_regions=min(lengths["regions"], case["n_regions"]),
        tags_in_text=case["task"] == "vqa",
    )
    caption = Caption(case["text"], tuple(Phrase(name, ((0, 1),)) for name in names))
    num_regions = max(case["n_regions"], len(case["tags_listed"]))
    tags = [*case["tags_listed"], *[""] * num_regions][:num_regions]
    regions = tuple(Region((0.0, 0.0, _SIDE, _SIDE), tag) for tag in tags)
    record = Record("0", _SIDE, _SIDE, (caption,), regions)
    features = io.BytesIO()
    np.save(features, np.zeros((num_regions, _FEATURES), dtype=np.float16))
    builder = SampleBuilder(words, vocab, options)
    return builder.build({"npy": features.getvalue()}, 0, 0, 0, np.random.default_rng(0), record)


def _padded(values: np.ndarray, num_slots: int) -> Tensor:
    return torch.from_numpy(np.pad(values.astype(np.int64), (0, num_slots - len(values))))
