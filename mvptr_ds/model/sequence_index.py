"""Index arrays over sequences that lie one behind the other: where a row stands, and where it goes.

All follow from the sequences' lengths, which the host knows. So they are made there, each once: by the loader's
processes for a whole batch (objectives/packed_batch.py), or when somebody asks.

Legend: N rows of all sequences, M rows of joined ones, B sequences, L slots of the longest, S sequences of a tile.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial

import numpy as np
import torch
from torch import Tensor

from .row_buckets import filled_up


@dataclass
class _Arrays:
    """Arrays by name, on one device.

    Attributes:
        arrays: those that are there already.
    """

    arrays: dict[str, Tensor] = field(default_factory=dict, kw_only=True, repr=False)

    def on(self, device: torch.device, name: str) -> Tensor:
        """Returns an array on `device`."""
        found = self.arrays.get(name)
        if found is None or found.device != device:
            found = self.arrays[name] = on_device(self._make(name), device)
        return found

    def prepare(self, *names: str) -> None:
        """Makes arrays on the host ahead."""
        for name in names:
            self.on(_HOST, name)

    def _make(self, name: str) -> np.ndarray:
        raise NotImplementedError


@dataclass
class SequenceIndex(_Arrays):
    """Arrays over sequences of these lengths.

    starts     int64 [B]  the first row of each sequence         owners   int64 [N]  the sequence of each row
    positions  int64 [N]  the place of each row in its sequence  slots    int64 [N]  its place among the slots [B x L]
    offsets    int32 [B + 1]  the starts, and N                  mask     bool [B, L]  slots that hold a row
    filled     bool [B]  sequences that hold a row             lengths  int64 [B]
    tile32     int32 [S]  the sequences of 1 to 32 rows; `tile64` those of 33 to 64, `tile128` those of 65 to 128
    """

    lengths: tuple[int, ...]

    @property
    def in_bucket(self) -> SequenceIndex:
        """The same sequences, and behind them those that fill their bucket (row_buckets.py)."""
        return self if self._filled_up is None else self._filled_up

    @cached_property
    def _filled_up(self) -> SequenceIndex | None:
        """None where the bucket is full: an index that held itself could not be copied."""
        lengths = filled_up(self.lengths)
        return SequenceIndex(lengths) if len(lengths) > len(self.lengths) else None

    def prepare_attention(self, buckets: bool) -> None:
        """Makes on the host ahead what attention reads of the sequences, or of those that fill their bucket, too."""
        (self.in_bucket if buckets else self).prepare(*ATTENTION)

    def _make(self, name: str) -> np.ndarray:
        return _SEQUENCES[name](np.array(self.lengths, dtype=np.int64))


@dataclass
class JoinIndex(_Arrays):
    """Arrays over pairs of sequences as one each.

    joined   int64 [M]  rows of the pairs, among those of the first sequences and behind them the second ones
    firsts   int64 [N]  rows of the first sequences among the joined ones; `seconds` those of the second ones

    Args:
        pairs: which first sequence goes with which second; None: those of the same number.
    """

    first: SequenceIndex
    second: SequenceIndex
    pairs: tuple[tuple[int, int], ...] | None = None

    @classmethod
    def of(cls, first_lengths: Sequence[int], second_lengths: Sequence[int]) -> JoinIndex:
        """Returns the index of sequences of these lengths."""
        return cls(SequenceIndex(tuple(first_lengths)), SequenceIndex(tuple(second_lengths)))

    @cached_property
    def sequences(self) -> SequenceIndex:
        """The joined sequences."""
        first, second = self._lengths
        return SequenceIndex(tuple((first + second).tolist()))

    @property
    def _lengths(self) -> tuple[np.ndarray, np.ndarray]:
        """Of both parts of each pair."""
        first, second = self._of_all
        if self.pairs is None:
            assert len(first) == len(second), f"{len(first)} sequences beside {len(second)}"
            return first, second
        return first[self._chosen_P2[:, 0]], second[self._chosen_P2[:, 1]]

    @property
    def _of_all(self) -> tuple[np.ndarray, np.ndarray]:
        """Lengths of the first sequences, and of the second ones."""
        return np.array(self.first.lengths, dtype=np.int64), np.array(self.second.lengths, dtype=np.int64)

    @property
    def _chosen_P2(self) -> np.ndarray:
        return np.array(self.pairs, dtype=np.int64).reshape(-1, 2)

    def _make(self, name: str) -> np.ndarray:
        first, second = self._lengths
        if name == "joined":
            return self._joined(np.stack([first, second], axis=1))
        starts = _starts(first + second)
        return ranges(starts, first) if name == "firsts" else ranges(starts + first, second)

    def _joined(self, lengths_P2: np.ndarray) -> np.ndarray:
        starts = [_starts(lengths) for lengths in self._of_all]
        if self.pairs is not None:
            starts = [of_side[self._chosen_P2[:, side]] for side, of_side in enumerate(starts)]
        starts[1] = starts[1] + sum(self.first.lengths)
        return ranges(np.stack(starts, axis=1).ravel(), lengths_P2.ravel())


def ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Returns `start, start + 1, ...` of `length` numbers each, one range behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def on_device(values: np.ndarray, device: torch.device) -> Tensor:
    """Copies numbers of the host, without waiting for the device: on CUDA from pinned memory."""
    return to_device(torch.from_numpy(values), device)


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Copies a tensor of the host, as `on_device`."""
    if device.type == "cuda":
        tensor = tensor.pin_memory()  # a copy from other memory may wait
    return tensor.to(device, non_blocking=True)


TILE_SIZES = (32, 64, 128)  # rows that a program of the attention kernels holds
TILES = tuple(f"tile{size}" for size in TILE_SIZES)
ATTENTION = ("offsets", "slots", "mask", *TILES)  # what some kernel of attention reads
_HOST = torch.device("cpu")


def _starts(lengths: np.ndarray) -> np.ndarray:
    return np.cumsum(lengths) - lengths


def _longest(lengths: np.ndarray) -> int:
    return int(lengths.max(initial=1))


def _tile(lengths: np.ndarray, size: int) -> np.ndarray:
    smaller = max((other for other in TILE_SIZES if other < size), default=0)
    return np.flatnonzero((lengths > smaller) & (lengths <= size)).astype(np.int32)


_SEQUENCES: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "starts": _starts,
    "positions": lambda lengths: ranges(np.zeros_like(lengths), lengths),
    "owners": lambda lengths: np.repeat(np.arange(len(lengths)), lengths),
    "slots": lambda lengths: ranges(np.arange(len(lengths)) * _longest(lengths), lengths),
    "offsets": lambda lengths: np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32),
    "mask": lambda lengths: np.arange(_longest(lengths)) < lengths[:, None],
    "filled": lambda lengths: lengths > 0,
    "lengths": lambda lengths: lengths,
    **{f"tile{size}": partial(_tile, size=size) for size in TILE_SIZES},
}
