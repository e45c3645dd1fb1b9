"""Which tile of the attention kernels each packed sequence fits in: decided on the host, where the lengths are.

    lengths 5, 90, 0, 33, 20    ->    tile 32: sequences 0, 4    tile 64: 3    tile 128: 1    (2 has no row)

Legend: B sequences, S sequences of a tile.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

TILE_SIZES = (32, 64, 128)
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
        """Sorts sequences into tiles; one copy to the device, which nothing waits for.

        Raises:
            ValueError: a sequence has more than 128 rows.
        """
        longest = max(lengths, default=0)
        if longest > MAX_LENGTH:
            raise ValueError(f"a sequence of {longest} rows; these kernels take at most {MAX_LENGTH}")
        lengths_B = np.array(lengths, dtype=np.int32)
        tile_B = np.searchsorted(TILE_SIZES, lengths_B)
        chosen = {size: np.flatnonzero((tile_B == t) & (lengths_B > 0)) for t, size in enumerate(TILE_SIZES)}
        offsets = np.concatenate([[0], np.cumsum(lengths_B)])
        parts = [offsets, *chosen.values()]
        packed = torch.from_numpy(np.concatenate(parts).astype(np.int32)).to(device, non_blocking=True)
        on_device = packed.split([len(part) for part in parts])
        sequences = {size: part for size, part in zip(chosen, on_device[1:], strict=True) if len(part)}
        return cls(tuple(lengths), on_device[0], sequences)
