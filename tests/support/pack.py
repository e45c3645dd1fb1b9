"""Padded test inputs -> packed sequences."""

from __future__ import annotations

from torch import Tensor

from mvptr_ds.model.packed import Packed


def pack(slots_BLx: Tensor, mask_BL: Tensor | None = None) -> Packed:
    """The slots that the mask (True first, then False) leaves, all without one."""
    num, longest = slots_BLx.shape[:2]
    return Packed.of_padded(slots_BLx, [longest] * num if mask_BL is None else mask_BL.sum(1).tolist())
