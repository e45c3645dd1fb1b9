"""Which tile of the attention kernels each packed sequence fits in: decided on the host, where the lengths are.

    lengths 5, 90, 0, 33, 20    ->    tile 32: sequences 0, 4    tile 64: 3    tile 128: 1    (2 has no row)

Legend: B sequences, S sequences of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .sequence_index import TILE_SIZES, SequenceIndex

MAX_LENGTH = TILE_SIZES[-1]


@dataclass(frozen=True)
class AttentionTiles:
    """The sequences of a packed batch, by the tile that holds one.

    Attributes:
        lengths: of the sequences, in the order of their rows, on the host.
        offsets: int32 [B + 1] on the device, the first row of each sequence, and behind them the number of rows.
        sequences: for each tile size that occurs the numbers of its sequences, int32 [S] on the device.
    """

    lengths: tuple[int, ...]
    offsets: Tensor
    sequences: dict[int, Tensor]

    @classmethod
    def of(cls, lengths: Sequence[int], device: torch.device) -> AttentionTiles:
        """Sorts sequences into tiles. Raises ValueError where one has more than 128 rows."""
        return cls.of_index(SequenceIndex(tuple(lengths)), device)

    @classmethod
    def of_index(cls, index: SequenceIndex, device: torch.device) -> AttentionTiles:
        """Returns the tiles of an index, whose arrays may be there already. Raises ValueError as `of`."""
        longest = max(index.lengths, default=0)
        if longest > MAX_LENGTH:
            raise ValueError(f"a sequence of {longest} rows; these kernels take at most {MAX_LENGTH}")
        tiles = {size: index.on(device, f"tile{size}") for size in TILE_SIZES}
        sequences = {size: numbers_S for size, numbers_S in tiles.items() if len(numbers_S)}
        return cls(index.lengths, index.on(device, "offsets"), sequences)
