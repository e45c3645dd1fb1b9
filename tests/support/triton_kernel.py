"""A kernel of Triton, which can only be imported where Triton is installed; no test executes it."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def add_one(given, out, num, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(given + at, mask=at < num) + 1, mask=at < num)
