"""The random numbers of dropout in Triton: 8 columns a draw of Philox. philox.py says how they are keyed."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def draw_bits(seed, group, row, call, place):
    """Returns 16 random bits for each of the 8 columns of groups: int32 [..., G] -> uint32 [..., G, 2, 2, 2].

    All 8 numbers of a group stay in the registers of one thread, beside the 8 columns that it loads at a time.
    """
    a, b, c, d = tl.philox(seed, group, row, call, place)
    words = tl.join(tl.join(a, c), tl.join(b, d))  # the last two dimensions count a, b, c, d
    return tl.join(words & 0xFFFF, words >> 16)
