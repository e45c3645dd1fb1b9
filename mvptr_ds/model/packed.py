"""Sequences of different lengths, one behind the other: what the encoders run on instead of padded slots.

    lengths 2, 0, 3    ->    rows a0 a1 | | c0 c1 c2

Lengths are numbers of the host (they come with the batch), so indices are made there and nothing waits for a device.

Legend: N rows of all sequences, B sequences, L slots of the longest, x what a row holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Packed:
    """Rows [N, ...] of any dtype (ids, features, states), and how many of them each sequence has."""

    rows: Tensor
    lengths: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.rows.shape[0] != sum(self.lengths):
            raise ValueError(f"{self.rows.shape[0]} rows for sequences of {sum(self.lengths)} together")

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def starts(self) -> np.ndarray:
        """The first row of each sequence, int64 [B]."""
        return np.cumsum([0, *self.lengths])[:-1]

    def like(self, rows: Tensor) -> Packed:
        """Returns other rows of the same sequences."""
        return Packed(rows, self.lengths)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Packed:
        return self.like(self.rows.to(device, dtype))

    def positions(self) -> Tensor:
        """Returns the place of each row in its sequence, int64 [N]."""
        lengths = np.array(self.lengths, dtype=np.int64)
        return on_device(_ranges(np.zeros_like(lengths), lengths), self.rows.device)

    def firsts(self) -> Tensor:
        """Returns slot 0 of every sequence, [B, ...]."""
        assert all(self.lengths), "an empty sequence has no slot 0"
        return self.rows[on_device(self.starts, self.rows.device)]

    def take(self, wanted: Sequence[int]) -> Packed:
        """Returns the sequences `wanted`, in that order; one may be taken several times."""
        lengths = np.array(self.lengths, dtype=np.int64)[list(wanted)]
        index_M = on_device(_ranges(self.starts[list(wanted)], lengths), self.rows.device)
        return Packed(self.rows.index_select(0, index_M), tuple(lengths.tolist()))

    def split(self, num: int) -> tuple[Packed, Packed]:
        """Returns the first `num` sequences, and the others."""
        num_rows = sum(self.lengths[:num])
        return Packed(self.rows[:num_rows], self.lengths[:num]), Packed(self.rows[num_rows:], self.lengths[num:])

    def owners(self) -> Tensor:
        """Returns the sequence of each row, int64 [N]."""
        return on_device(np.repeat(np.arange(len(self)), self.lengths), self.rows.device)

    # --- the padded form

    @classmethod
    def of_padded(cls, slots_BLx: Tensor, lengths: Sequence[int]) -> Packed:
        """Returns the first `lengths[b]` slots of every row of [B, L, ...]."""
        if slots_BLx.shape[0] != len(lengths) or max(lengths, default=0) > slots_BLx.shape[1]:
            raise ValueError(f"lengths {list(lengths)} for slots of shape {tuple(slots_BLx.shape)}")
        starts = np.arange(len(lengths)) * slots_BLx.shape[1]
        index_N = on_device(_ranges(starts, np.array(lengths, dtype=np.int64)), slots_BLx.device)
        return cls(slots_BLx.flatten(0, 1).index_select(0, index_N), tuple(lengths))

    def mask(self) -> Tensor:
        """Returns where the padded form has a row, bool [B, L]; L is one at least."""
        lengths_B1 = torch.tensor(self.lengths, dtype=torch.int64)[:, None]
        return (torch.arange(max(1, *self.lengths)) < lengths_B1).to(self.rows.device, non_blocking=True)

    def padded(self, fill: float = 0) -> Tensor:
        """Returns the padded form [B, L, ...], with `fill` behind the rows of each sequence."""
        longest = max(1, *self.lengths)
        out_Xx = self.rows.new_full((len(self) * longest, *self.rows.shape[1:]), fill)
        slots_N = _ranges(np.arange(len(self)) * longest, np.array(self.lengths, dtype=np.int64))
        out_Xx = out_Xx.index_copy(0, on_device(slots_N, self.rows.device), self.rows)
        return out_Xx.unflatten(0, (len(self), longest))


def concat(parts: Sequence[Packed]) -> Packed:
    """Returns the sequences of all parts, one part behind the other."""
    return Packed(torch.cat([part.rows for part in parts]), sum((part.lengths for part in parts), ()))


def join(first: Packed, second: Packed, pairs: Sequence[tuple[int, int]] | None = None) -> Packed:
    """Pairs of sequences as one each: `first[a]` and behind it `second[b]` (default: those of the same number)."""
    if pairs is None:
        assert len(first) == len(second), f"{len(first)} sequences beside {len(second)}"
        pairs = [(number, number) for number in range(len(first))]
    chosen_P2 = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    starts = np.stack([first.starts[chosen_P2[:, 0]], len(first.rows) + second.starts[chosen_P2[:, 1]]], axis=1)
    lengths = np.stack(
        [np.array(part.lengths, dtype=np.int64)[chosen_P2[:, side]] for side, part in enumerate((first, second))],
        axis=1,
    )
    index_M = on_device(_ranges(starts.ravel(), lengths.ravel()), first.rows.device)
    rows = torch.cat([first.rows, second.rows]).index_select(0, index_M)
    return Packed(rows, tuple(lengths.sum(1).tolist()))


def unjoin(joined: Packed, first_lengths: Sequence[int]) -> tuple[Packed, Packed]:
    """Undoes `join`: the first `first_lengths[b]` rows of every sequence, and the rest."""
    firsts = np.array(first_lengths, dtype=np.int64)
    rests = np.array(joined.lengths, dtype=np.int64) - firsts
    out = []
    for starts, lengths in ((joined.starts, firsts), (joined.starts + firsts, rests)):
        rows = joined.rows.index_select(0, on_device(_ranges(starts, lengths), joined.rows.device))
        out.append(Packed(rows, tuple(lengths.tolist())))
    return out[0], out[1]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """`start, start + 1, ...` of `length` numbers each, one range behind the other."""
    ends = np.cumsum(lengths)
    return np.repeat(starts - (ends - lengths), lengths) + np.arange(ends[-1] if len(ends) else 0)


def on_device(index: np.ndarray, device: torch.device) -> Tensor:
    """Copies int64 numbers of the host, without waiting for the device."""
    return torch.from_numpy(index.astype(np.int64, copy=False)).to(device, non_blocking=True)
