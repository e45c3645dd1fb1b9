"""Measures what a folder's records hold, and the padding to expect, from records drawn over it.

Legend: S samples, 3 the parts of a sample's sequence (text slots, tag slots, regions).
"""

from __future__ import annotations

import contextlib
import functools
import math
import multiprocessing
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mvptr_ds.data.features import SampleOptions
from mvptr_ds.data.schema import Record
from mvptr_ds.data.sequence_layout import layout_tags, layout_text
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.shards.index_format import key_hash
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS, record_key
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.signals import blocked

PARTS = ("text slots", "tag slots", "regions")
_CHUNK_RECORDS = 250
_COVERED = 0.99  # share of the samples that the suggested sizes hold whole

# what reading untrusted bytes may raise; such a record is listed, and the next one is read
RECORD_ERRORS = (OSError, ValueError, TypeError, ArithmeticError)


@dataclass
class Sizes:
    """Lengths of one sample (image-text pair), before anything is cut."""

    num_tokens: int  # wordpieces of the caption
    num_phrases: int
    num_tag_pieces: int  # wordpieces of the record's distinct tags
    num_regions: int  # or the cells of the grid that a picture without boxes gets


@dataclass
class Measures:
    """What the records read so far hold."""

    samples: list[Sizes] = field(default_factory=list)
    regions_per_record: list[int] = field(default_factory=list)
    records: Counter[str] = field(default_factory=Counter)  # "read", "with picture", ... -> records
    tags: Counter[str] = field(default_factory=Counter)  # -> regions
    phrases: Counter[str] = field(default_factory=Counter)  # -> captions' phrases
    bad: list[str] = field(default_factory=list)  # "KEY: reason" of the records that could not be read

    def add(self, other: Measures) -> None:
        for name in ("samples", "regions_per_record", "bad"):
            getattr(self, name).extend(getattr(other, name))
        for name in ("records", "tags", "phrases"):
            getattr(self, name).update(getattr(other, name))


def key_of(index: SampleIndex, number: int) -> str:
    """Returns the key of record `number`; `?` when it cannot be read."""
    place = index.place(number)
    return record_key(place.path, place.offset, place.num_bytes)


def reason(error: Exception) -> str:
    """Returns an error's message, with its type where the message was not written for users."""
    return str(error) if isinstance(error, DataError) else f"{type(error).__name__}: {error}"


def draw_records(index: SampleIndex, num: int, seed: int, stream: int) -> list[int]:
    """Returns the numbers of `num` records (or all, if there are fewer) drawn over the folder, in its order."""
    rng = np.random.default_rng([seed, stream])
    return sorted(rng.choice(index.num_records, min(num, index.num_records), replace=False, shuffle=False).tolist())


def find_records(index: SampleIndex, keys: Sequence[str]) -> list[int]:
    """Returns the numbers of the records with these keys. Raises DataError, naming the keys that no record has."""
    hashes = index.key_hashes()
    found = [np.flatnonzero(hashes == key_hash(key))[:1].tolist() for key in keys]
    missing = [repr(key) for key, numbers in zip(keys, found, strict=True) if not numbers]
    if missing:
        raise DataError(f"no record has the key {', '.join(missing)}; RUN/bad_samples.jsonl and the index name keys")
    return [number for numbers in found for number in numbers]


def measure(index: SampleIndex, words: WordPiece, numbers: Sequence[int], grid_size: int) -> Measures:
    """Reads the records `numbers`; one that cannot be read is listed in `bad`."""
    out = Measures()
    for number in numbers:
        try:
            record, members = index.read(index.place(number))
            _measure_record(out, words, record, members, grid_size)
        except RECORD_ERRORS as error:
            out.bad.append(f"{key_of(index, number)}: {reason(error)}")
    return out


def measure_folder(
    index: SampleIndex, words: WordPiece, numbers: Sequence[int], grid_size: int, num_processes: int
) -> Measures:
    """Runs `measure` with a progress bar; the result does not depend on the number of processes."""
    chunks = [numbers[start : start + _CHUNK_RECORDS] for start in range(0, len(numbers), _CHUNK_RECORDS)]
    work = functools.partial(measure, index, words, grid_size=grid_size)
    total = Measures()
    with contextlib.ExitStack() as stack:
        bar = stack.enter_context(progress_bar(total=len(numbers), unit="record", desc="statistics", delay=1.0))
        parts: Iterable[Measures] = map(work, chunks)
        if num_processes > 1:  # a pool of this kind ends with this process, however that ends
            with blocked([signal.SIGINT]):  # which a terminal sends to all
                pool = stack.enter_context(multiprocessing.get_context("spawn").Pool(num_processes))
            parts = pool.imap(work, chunks)
        for part, chunk in zip(parts, chunks, strict=True):
            total.add(part)
            bar.update(len(chunk))
    return total


def _measure_record(
    out: Measures, words: WordPiece, record: Record, members: Mapping[str, bytes], grid_size: int
) -> None:
    picture = any(extension in members for extension in IMAGE_EXTENSIONS)
    visual = picture or "npy" in members or bool(record.regions)
    num_regions = len(record.regions) or (grid_size**2 if visual else 0)
    # everything that can fail comes before the first count, so that a bad record counts nowhere
    tags = list(dict.fromkeys(region.tag for region in record.regions if region.tag))
    num_tag_pieces = sum(map(len, set(map(tuple, words.encode_words(tags)))))  # "Dog" and "dog" are one
    tokens = [len(words.encode(caption.text)[0]) for caption in record.captions] or [0]
    phrases = [len(caption.phrases) for caption in record.captions] or [0]
    sizes = zip(tokens, phrases, strict=True)
    out.samples += [Sizes(n, p, num_tag_pieces, num_regions) for n, p in sizes]
    out.regions_per_record.append(len(record.regions))
    flags = {
        "read": True,
        "with picture": picture,
        "with features": "npy" in members,
        "without regions": not record.regions,
        "without phrases": not any(phrases),
        "text-only": not visual,
        "image-only": not record.captions,
    }
    out.records.update(name for name, holds in flags.items() if holds)
    out.tags.update(region.tag for region in record.regions)
    out.phrases.update(" · ".join(phrase.tuple) for caption in record.captions for phrase in caption.phrases)


def sequence_lengths(samples: Sequence[Sizes], options: SampleOptions) -> np.ndarray:
    """Returns int64 [S, 3]: text slots, tag slots and regions of each sample as training lays them out.

    Every phrase counts as known.
    """
    rows = []
    for sample in samples:
        # the layout decides by the numbers of ids alone, so any ids do
        text_T, _ = layout_text(
            [0] * sample.num_tokens, [0] * sample.num_phrases, 0, 0, options.max_tokens, options.max_text_slots
        )
        tags_G = layout_tags([0] * sample.num_tag_pieces, 0, 0, options.max_tag_slots)
        rows.append((len(text_T), len(tags_G), min(sample.num_regions, options.max_regions)))
    return np.array(rows, dtype=np.int64).reshape(-1, 3)


def padding(lengths_S3: np.ndarray, maxima: tuple[int, int, int], batch_size: int, seed: int) -> dict[str, float]:
    """Returns the share of padded positions of micro-batches, by how they are padded.

    "fixed": to `maxima`; "longest": each part to the batch's longest (what the collate function does), samples in drawn
    order; "bucketed": the same with neighbours by total length in a batch, so the least that bucketing can reach.
    """
    if not len(lengths_S3):
        return {}
    drawn_S3 = np.random.default_rng([seed, len(lengths_S3)]).permutation(lengths_S3)
    by_length_S3 = drawn_S3[np.argsort(drawn_S3.sum(axis=1), kind="stable")]
    valid = int(lengths_S3.sum())
    return {
        "fixed": 1 - valid / (len(lengths_S3) * sum(maxima)),
        "longest": 1 - valid / _padded_to_longest(drawn_S3, batch_size),
        "bucketed": 1 - valid / _padded_to_longest(by_length_S3, batch_size),
    }


def _padded_to_longest(lengths_S3: np.ndarray, batch_size: int) -> int:
    batches = (lengths_S3[start : start + batch_size] for start in range(0, len(lengths_S3), batch_size))
    return sum(len(batch) * int(batch.max(axis=0).sum()) for batch in batches)


def suggested_sizes(samples: Sequence[Sizes]) -> dict[str, int]:
    """Values of the `data` section that hold 99 % of the samples whole, each by itself."""
    max_tokens = _covering([s.num_tokens for s in samples])
    slots = [2 + min(s.num_tokens, max_tokens) + s.num_phrases for s in samples]
    return {
        "max_tokens": max(1, max_tokens),
        "max_text_slots": max(3, _covering(slots)),
        "max_tag_slots": 2 + _covering([s.num_tag_pieces for s in samples]),
        "max_regions": max(1, _covering([s.num_regions for s in samples])),
    }


def _covering(values: Sequence[int]) -> int:
    return sorted(values)[max(0, math.ceil(_COVERED * len(values)) - 1)] if values else 0


def cut_shares(samples: Sequence[Sizes], options: SampleOptions) -> dict[str, float]:
    """Returns the share of the samples of which these options cut something, by what is cut."""
    num = max(1, len(samples))
    lengths_S3 = sequence_lengths(samples, options)
    whole = [2 + s.num_tokens + s.num_phrases for s in samples]
    return {
        "caption or phrases": sum(w > kept for w, kept in zip(whole, lengths_S3[:, 0].tolist(), strict=True)) / num,
        "tags": sum(2 + s.num_tag_pieces > options.max_tag_slots for s in samples) / num,
        "regions": sum(s.num_regions > options.max_regions for s in samples) / num,
    }
