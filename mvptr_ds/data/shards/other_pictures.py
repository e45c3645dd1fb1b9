"""Shows every record the picture of another one: a control for what a model reads off the texts alone.

Worked example, three records whose pictures go round a circle that the seed draws, 0 -> 2 -> 1 -> 0:

    record              0       1       2
    captions            of 0    of 1    of 2
    picture             of 2    of 0    of 1    mode picture: with its size, regions, tags and features
    boxes               of 0    of 1    of 2    mode contents: the boxes stay, what they show is of the other
"""

from __future__ import annotations

import hashlib
import io
import tokenize
from collections.abc import Collection
from dataclasses import replace
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from mvptr_ds.data.schema import Record
from mvptr_ds.data.shards.index import ByteRange, RecordLocation, SampleIndex
from mvptr_ds.data.shards.sidecars import without_region_references
from mvptr_ds.data.shards.tar_writer import npy_bytes
from mvptr_ds.errors import DataError
from mvptr_ds.streams import Stream, generator

_NPY_ERRORS = (OSError, ValueError, EOFError, SyntaxError, OverflowError, TypeError, MemoryError, tokenize.TokenError)

Mode = Literal["picture", "contents"]


class OtherPictures(SampleIndex):
    """Gives the samples of an index, in its order, each with the picture of another record.

    Args:
        mode: "picture" exchanges all that is seen: size, regions with their tags, features and image. "contents" leaves
            size and boxes, takes the tags away, and exchanges what the boxes show: the image, and the features, whose
            rows are repeated or cut to the number of the boxes.
        seed: equal seeds give equal pictures, in every run.

    Raises:
        DataError: there is one record alone, or some are texts without a picture.
    """

    _CACHES = ("_other_N",)

    def __init__(self, index: SampleIndex, mode: Mode, seed: int = 0) -> None:
        if index.num_records < 2:
            raise DataError("there is one record alone, so no other picture: take more, or leave pictures as they are")
        if index.num_text_only_samples:
            raise DataError(
                f"{index.num_text_only_samples} of {len(index)} samples are texts without a picture, so none can be "
                "exchanged: take them out, or set data.permute_pictures=null"
            )
        self.index, self.mode, self._seed = index, mode, seed
        self.num_records = index.num_records
        self.num_samples = index.num_samples
        self.num_text_only_samples = 0
        self.num_image_only_samples = index.num_image_only_samples
        self.tags = index.tags if mode == "picture" else {}
        self.fingerprint = hashlib.sha256(f"{index.fingerprint} {mode} {seed}".encode()).hexdigest()
        self._init_caches()

    def _init_caches(self) -> None:
        # one circle through all records: none is its own neighbour, and each picture is shown once
        circle_N = generator(Stream.OTHER_PICTURES, self._seed).permutation(self.num_records).astype(np.uint32)
        self._other_N = np.empty_like(circle_N)
        self._other_N[circle_N] = np.roll(circle_N, -1)

    def _rows_path(self) -> Path:
        return self.index._rows_path()

    def other(self, record: int) -> int:
        """Returns the number of the record whose picture a record is shown with."""
        return int(self._other_N[record])

    def locate(self, sample: int) -> RecordLocation:
        return self.index.locate(sample)

    def samples_of(self, record: int) -> range:
        return self.index.samples_of(record)

    def place(self, record: int, caption: int = 0) -> RecordLocation:
        return self.index.place(record, caption)

    def read(self, place: RecordLocation) -> tuple[Record, dict[str, bytes]]:
        return self._with_other(place, *self.index.read(place))

    def read_sample(self, place: RecordLocation) -> tuple[Record, dict[str, bytes]]:
        return self._with_other(place, *self.index.read_sample(place))

    def describe(self, place: RecordLocation) -> tuple[Record, Collection[str]]:
        record, own_names = self.index.describe(place)
        other, names = self.index.describe(self._place_of_other(place))
        return self._merged(record, other), _names(own_names, names)

    def _place_of_other(self, place: RecordLocation) -> RecordLocation:
        return self.index.place(self.other(place.record))

    def _with_other(
        self, place: RecordLocation, record: Record, members: dict[str, bytes]
    ) -> tuple[Record, dict[str, bytes]]:
        other_place = self._place_of_other(place)
        try:
            other, other_members = self.index.read(other_place)
            out = {
                name: members[name] if name == "json" else other_members[name]
                for name in _names(members, other_members)
            }
            num_rows = len(record.regions)
            if self.mode == "contents" and num_rows and "npy" in out:
                out["npy"] = _with_num_rows(out["npy"], num_rows)
        except (DataError, OSError) as error:
            key = self.index.key_of(other_place)
            raise DataError(f"the picture of {key!r}, which is shown in its place: {error}") from error
        return self._merged(record, other), out

    def _merged(self, record: Record, other: Record) -> Record:
        if self.mode == "contents":
            return replace(record, regions=tuple(msgspec.structs.replace(region, tag="") for region in record.regions))
        return replace(
            record,
            width=other.width,
            height=other.height,
            captions=tuple(without_region_references(caption) for caption in record.captions),
            regions=other.regions,
            extractor=other.extractor,
        )

    def region_extractors(self) -> set[str]:
        return self.index.region_extractors()

    def key_hashes(self) -> np.ndarray:
        return self.index.key_hashes()

    def key_of(self, place: RecordLocation) -> str:
        return self.index.key_of(place)

    @property
    def read_ahead_bytes(self) -> int:
        return self.index.read_ahead_bytes

    def remote_extents(self, sample: int) -> list[ByteRange]:
        first_of_other = self.index.samples_of(self.other(self.index.locate(sample).record))[0]
        return [*self.index.remote_extents(sample), *self.index.remote_extents(first_of_other)]


def _names(own: Collection[str], other: Collection[str]) -> list[str]:
    """Returns the extensions of a record's members: its own json, and all else of the other one."""
    return [*(name for name in own if name == "json"), *(name for name in other if name != "json")]


def _with_num_rows(npy: bytes, num_rows: int) -> bytes:
    """Repeats or cuts the rows of an npy member [R, F]; one without rows stays as it is."""
    try:
        rows_RF = np.load(io.BytesIO(npy), allow_pickle=False)
    except _NPY_ERRORS as error:
        raise DataError(f"the npy member cannot be read: {error}; write it with numpy.save, float16 [R, F]") from error
    if rows_RF.ndim != 2 or not len(rows_RF):  # refused where the sample is built
        return npy
    return npy_bytes(rows_RF[np.arange(num_rows) % len(rows_RF)])
