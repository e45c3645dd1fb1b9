"""Numbers of rows that come again: how many an encoder computes for those that its sequences have.

Some kernels are made for one number of rows and kept: oneDNN's products on a CPU, CUDA graphs. The sequences of a batch
have a number of their own each time. So the encoder computes a few rows more, up to the next bucket. They belong to
sequences that nobody reads, behind the real ones.

    lengths 5, 9, 7: 21 rows    ->    bucket of 32 rows    ->    lengths 5, 9, 7, 9, 2
"""

from __future__ import annotations

from collections.abc import Sequence

_SMALLEST_STEP = 16
_BUCKETS_OF_A_DOUBLING = 32  # from one power of two to the next: at most 1 / 32 of the rows are too many


def bucket_of(num_rows: int) -> int:
    """Returns the number of rows to compute for `num_rows`: at most 1 / 32 more, or the next multiple of 16."""
    step = max(_SMALLEST_STEP, (1 << num_rows.bit_length() - 1) // _BUCKETS_OF_A_DOUBLING) if num_rows else 1
    return -(-num_rows // step) * step


def filled_up(lengths: Sequence[int]) -> tuple[int, ...]:
    """Returns the lengths, and behind them those of sequences that fill the bucket, none longer than the longest."""
    num_rows = sum(lengths)
    missing, longest = bucket_of(num_rows) - num_rows, max(lengths, default=0)
    whole, rest = divmod(missing, longest) if missing else (0, 0)
    return (*lengths, *(longest,) * whole, *(rest,) * (rest > 0))
