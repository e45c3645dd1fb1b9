"""Sequences of different lengths, one behind the other: what the encoders run on instead of padded slots.

    lengths 2, 0, 3    ->    rows a0 a1 | | c0 c1 c2

Lengths are numbers of the host (they come with the batch), so indices are made there and nothing waits for a device
(sequence_index.py).

Legend: N rows of all sequences, B sequences, L slots of the longest, x what a row holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from .gather import pick_rows, place_rows, split_rows
from .sequence_index import JoinIndex, SequenceIndex, on_device, ranges


@dataclass(frozen=True)
class Packed:
    """Rows [N, ...] of any dtype (ids, features, states), and how many of them each sequence has.

    Args:
        index: index arrays of these lengths, where they are there already.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    index: SequenceIndex = field(default=None, compare=False, repr=False)  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.index is None:
            object.__setattr__(self, "index", SequenceIndex(self.lengths))
        if self.rows.shape[0] != sum(self.lengths):
            raise ValueError(f"{self.rows.shape[0]} rows for sequences of {sum(self.lengths)} together")

    def __len__(self) -> int:
        return len(self.lengths)

    @property
    def starts(self) -> np.ndarray:
        """The first row of each sequence, int64 [B], on the host."""
        return np.cumsum([0, *self.lengths])[:-1]

    def like(self, rows: Tensor) -> Packed:
        """Returns other rows of the same sequences."""
        return Packed(rows, self.lengths, self.index)

    def to(self, device: torch.device, dtype: torch.dtype | None = None) -> Packed:
        return self.like(self.rows.to(device, dtype))

    def positions(self) -> Tensor:
        """Returns the place of each row in its sequence, int64 [N]."""
        return self.index.on(self.rows.device, "positions")

    def firsts(self) -> Tensor:
        """Returns slot 0 of every sequence, [B, ...]."""
        assert all(self.lengths), "an empty sequence has no slot 0"
        return pick_rows(self.rows, self.index.on(self.rows.device, "starts"))

    def take(self, wanted: Sequence[int]) -> Packed:
        """Returns the sequences `wanted`, in that order; one may be taken several times."""
        lengths = np.array(self.lengths, dtype=np.int64)[list(wanted)]
        index_M = on_device(ranges(self.starts[list(wanted)], lengths), self.rows.device)
        return Packed(self.rows.index_select(0, index_M), tuple(lengths.tolist()))

    def split(self, num: int) -> tuple[Packed, Packed]:
        """Returns the first `num` sequences, and the others."""
        num_rows = sum(self.lengths[:num])
        return Packed(self.rows[:num_rows], self.lengths[:num]), Packed(self.rows[num_rows:], self.lengths[num:])

    def owners(self) -> Tensor:
        """Returns the sequence of each row, int64 [N]."""
        return self.index.on(self.rows.device, "owners")

    # --- the padded form

    @classmethod
    def of_padded(cls, slots_BLx: Tensor, lengths: Sequence[int], index: SequenceIndex | None = None) -> Packed:
        """Returns the first `lengths[b]` slots of every row of [B, L, ...].

        Args:
            index: of these lengths, where it is there already; the result keeps it.
        """
        if slots_BLx.shape[0] != len(lengths) or max(lengths, default=0) > slots_BLx.shape[1]:
            raise ValueError(f"lengths {list(lengths)} for slots of shape {tuple(slots_BLx.shape)}")
        index = SequenceIndex(tuple(lengths)) if index is None else index
        if slots_BLx.shape[1] == (max(lengths, default=1) or 1):  # as `padded` gives them
            rows_N = index.on(slots_BLx.device, "slots")
        else:
            starts = np.arange(len(lengths)) * slots_BLx.shape[1]
            rows_N = on_device(ranges(starts, np.array(lengths, dtype=np.int64)), slots_BLx.device)
        return cls(slots_BLx.flatten(0, 1).index_select(0, rows_N), index.lengths, index)

    def mask(self) -> Tensor:
        """Returns where the padded form has a row, bool [B, L]; L is one at least."""
        return self.index.on(self.rows.device, "mask")

    def padded(self, fill: float = 0) -> Tensor:
        """Returns the padded form [B, L, ...], with `fill` behind the rows of each sequence."""
        longest = max(self.lengths, default=1) or 1
        out_Xx = self.rows.new_full((len(self) * longest, *self.rows.shape[1:]), fill)
        out_Xx.index_copy_(0, self.index.on(self.rows.device, "slots"), self.rows)
        return out_Xx.unflatten(0, (len(self), longest))

    def unpadded(self, slots_BLx: Tensor) -> Packed:
        """Undoes `padded`, for any values [B, L, ...] in its slots."""
        return Packed.of_padded(slots_BLx, self.lengths, self.index)


def concat(parts: Sequence[Packed]) -> Packed:
    """Returns the sequences of all parts, one part behind the other."""
    return Packed(torch.cat([part.rows for part in parts]), sum((part.lengths for part in parts), ()))


def unconcat(whole: Packed, parts: Sequence[Packed]) -> list[Packed]:
    """Undoes `concat` of sequences as long as those of `parts`."""
    rows = whole.rows.split([len(part.rows) for part in parts])
    return [part.like(of_part) for part, of_part in zip(parts, rows, strict=True)]


def join(
    first: Packed, second: Packed, pairs: Sequence[tuple[int, int]] | None = None, index: JoinIndex | None = None
) -> Packed:
    """Pairs of sequences as one each: `first[a]` and behind it `second[b]` (default: those of the same number).

    Args:
        index: of both lengths, without `pairs`, where it is there already.
    """
    if index is None:
        index = JoinIndex(first.index, second.index, None if pairs is None else tuple(pairs))
    device, lengths = first.rows.device, index.sequences.lengths
    if index.pairs is not None:
        rows = torch.cat([first.rows, second.rows]).index_select(0, index.on(device, "joined"))
        return Packed(rows, lengths, index.sequences)
    rows = place_rows([first.rows, second.rows], [index.on(device, "firsts"), index.on(device, "seconds")])
    return Packed(rows, lengths, index.sequences)


def unjoin(joined: Packed, first_lengths: Sequence[int], index: JoinIndex | None = None) -> tuple[Packed, Packed]:
    """Undoes `join`: the first `first_lengths[b]` rows of every sequence, and the rest."""
    if index is None:
        rests = tuple(whole - own for whole, own in zip(joined.lengths, first_lengths, strict=True))
        index = JoinIndex.of(first_lengths, rests)
    device = joined.rows.device
    first, second = split_rows(joined.rows, [index.on(device, "firsts"), index.on(device, "seconds")])
    return Packed(first, index.first.lengths, index.first), Packed(second, index.second.lengths, index.second)
