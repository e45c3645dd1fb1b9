"""Measures how many slots each sample fills, by which buckets are drawn before the samples are read.

    DIR/lengths-0123456789abcdef.npy    uint8 [samples, 3]: slots of text, slots of tags, regions

The name is a hash of the samples, of the vocabularies and of the caps. To make the file the json of every record is
read once, no features nor pixels. The file is then mapped. Tag noise is left out, and a record that cannot be read
counts as empty: buckets need no more. A sha256 of the lengths stands behind them, because a run with other lengths
would resume in another order. Older versions wrote none.

Legend: N samples.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mvptr_ds.data.caption_phrases import phrases_with_slots
from mvptr_ds.data.dataset import SampleDataset
from mvptr_ds.data.features import SampleBuilder, can_be_seen
from mvptr_ds.data.schema import Caption, Record
from mvptr_ds.data.sequence_layout import num_phrases_that_fit
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing
from mvptr_ds.user_io.progress import progress_bar

logger = logging.getLogger(__name__)
_VERSION = 1
_NO_CAPTION = Caption("")
_MOST = np.iinfo(np.uint8).max


def lengths_path(index: SampleIndex, builder: SampleBuilder, folder: str | Path) -> Path:
    """Returns the path of the lengths of these samples."""
    options = builder.options
    caps = [options.max_tokens, options.max_text_slots, options.max_tag_slots, options.max_regions, options.grid_size]
    caps += [1] if options.tags_in_text else []  # other lengths keep the names that they have
    content = [_VERSION, index.fingerprint, builder.phrases.fingerprint, caps]
    return Path(folder) / f"lengths-{hashlib.sha256(json.dumps(content).encode()).hexdigest()[:16]}.npy"


def sample_lengths(record: Record, visual: bool, builder: SampleBuilder) -> np.ndarray:
    """Counts slots of text, slots of tags and regions of each sample of a record: int64 [N, 3], N at least 1.

    Args:
        visual: whether there is something to see (`can_be_seen`).
    """
    options = builder.options
    num_regions = min(len(record.regions) or (options.grid_size**2 if visual else 0), options.max_regions)
    tags = builder.tags_of(record)
    num_tag_slots = 2 + min(sum(len(builder.pieces_of(tag)) for tag in tags), options.max_tag_slots - 2)
    num_behind = 0
    if options.tags_in_text:
        num_behind = sum(len(builder.pieces_of(region.tag)) for region in record.regions if region.tag)
    out = []
    for caption in record.captions or (_NO_CAPTION,):
        num_tokens = len(builder.words.encode(caption.text)[0])
        most = num_phrases_that_fit(num_tokens, options.max_tokens, options.max_text_slots)
        num_phrases = len(phrases_with_slots(caption, builder.phrases, most).indices)
        num_text_slots = 2 + min(num_tokens, options.max_tokens, options.max_text_slots - 2) + num_phrases
        num_text_slots = min(num_text_slots + num_behind, options.max_text_slots)
        out.append((num_text_slots, num_tag_slots, num_regions))
    return np.array(out)


def measure(index: SampleIndex, builder: SampleBuilder, records: range, show_progress: bool) -> np.ndarray:
    """Measures the samples of these records, which are neighbours: uint8 [N, 3]."""
    out: list[np.ndarray] = []
    for number in progress_bar(records, unit="record", desc="lengths", delay=2.0, disable=not show_progress):
        num_samples = len(index.samples_of(number))
        lengths_N3 = np.zeros((num_samples, 3), dtype=np.int64)
        try:
            record, members = index.describe(index.place(number))
            found_N3 = sample_lengths(record, can_be_seen(record, members), builder)
            lengths_N3[: len(found_N3)] = found_N3[:num_samples]
        except (DataError, OSError):
            pass  # reported when its sample is read
        out.append(np.minimum(lengths_N3, _MOST).astype(np.uint8))
    return np.concatenate(out) if out else np.zeros((0, 3), dtype=np.uint8)


def write_lengths(path: Path, lengths_N3: np.ndarray) -> None:
    """Writes the lengths uint8 [N, 3] and their sha256."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, os.getpid()) as partial, partial.open("wb") as file:
        np.save(file, lengths_N3)
        file.write(hashlib.sha256(lengths_N3.tobytes()).digest())


def lengths_are_there(path: Path, num_samples: int) -> bool:
    """Tells whether the file holds the lengths of so many samples as they were written. Logs one that is damaged."""
    if not path.is_file():
        return False
    try:
        lengths_N3 = np.lib.format.open_memmap(path, mode="r")
        with path.open("rb") as file:
            file.seek(lengths_N3.offset + lengths_N3.nbytes)
            digest = file.read()
        if lengths_N3.dtype != np.uint8 or lengths_N3.shape != (num_samples, 3):
            problem = f"{lengths_N3.dtype} {lengths_N3.shape}, expected uint8 {(num_samples, 3)}"
        elif digest in (b"", hashlib.sha256(lengths_N3.tobytes()).digest()):
            return True
        else:
            problem = "it does not have its checksum"
    except (ValueError, OverflowError) as error:
        problem = str(error)
    logger.warning("%s is damaged (%s): the lengths of the samples are measured again", path, problem)
    return False


class Lengths:
    """Looks up the lengths of samples by their positions in a run.

    Args:
        tables: the mapped file of each source, uint8 [samples, 3], in the order of the sources.
    """

    def __init__(self, dataset: SampleDataset, tables: Sequence[np.ndarray]) -> None:
        self.dataset, self.tables = dataset, tables

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Returns the lengths uint8 [N, 3] at positions int64 [N]."""
        sources_N, numbers_N = self.dataset.numbers_at(positions)
        out = np.empty((len(positions), 3), dtype=np.uint8)
        for source, table in enumerate(self.tables):
            here = sources_N == source
            out[here] = table[numbers_N[here]]
        return out
