"""The random numbers of dropout in torch: the same as those of the kernels (philox_bits.py), bit for bit.

A number is a function of the seed and of where it is used, so the backward pass draws it again, and no mask is kept:

    key            the seed, 64 bits
    counter        (group of 8 columns, row, call, place): four words of 32 bits
    one draw       four words of 32 bits, halved: 8 numbers of 16 bits, for the 8 columns of the group
    an element is  kept where its number >= round(p x 65,536)

`call` tells the uses within a step apart, `place` the kinds of use: 0 for rows of states, 1 + head for attention, whose
`row` is 128 x sequence + query. A new seed for each step gives new numbers, as a key of Philox does.

16 bits round p to 1/65,536: 0.1 becomes 0.100006. `keep_scale` makes up for what is really dropped, so that the
expectation is exact. A draw costs as much as 25 bytes of memory traffic, so one draw a column would cost more than the
rest of a kernel.

Legend: N rows, D columns, B sequences, H heads, L rows of the longest sequence.

Source: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3 (Philox 4x32, 10 rounds).
"""

from __future__ import annotations

import torch
from torch import Tensor

COLUMNS_OF_A_DRAW = 8
ROWS_OF_A_SEQUENCE = 128  # more than a sequence of short_attention.py has
_NUM_LEVELS = 65536
_WORD = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
_NUM_ROUNDS = 10


def drop_threshold(p: float) -> int:
    """Returns the smallest number of 16 bits that is kept. Raises ValueError for p outside [0, 1)."""
    threshold = round(p * _NUM_LEVELS)
    if not 0.0 <= p < 1.0 or threshold == _NUM_LEVELS:
        raise ValueError(f"dropout of {p}; expected at least 0 and less than 1")
    return threshold


def keep_scale(p: float) -> float:
    """Returns what a kept element is multiplied with: 1 / (1 - p), with the p that 16 bits can hold."""
    return _NUM_LEVELS / (_NUM_LEVELS - drop_threshold(p))


def keep_rows(seed_1: Tensor, call: int, num_rows: int, num_columns: int, p: float) -> Tensor:
    """Returns which elements of rows of states are kept, bool [N, D].

    Args:
        seed_1: int64 [1].
        call: which use of the step it is, below 2**31.
    """
    return _keep(seed_1, call, torch.arange(num_rows, device=seed_1.device), 0, num_columns, p)


def keep_attention(seed_1: Tensor, call: int, num_sequences: int, num_heads: int, longest: int, p: float) -> Tensor:
    """Returns which probabilities of attention are kept, bool [B, H, L, L]: queries, then keys. Arguments as above."""
    first_BHL = torch.arange(num_sequences, device=seed_1.device)[:, None, None] * ROWS_OF_A_SEQUENCE
    row_BHL = first_BHL + torch.arange(longest, device=seed_1.device)
    head_H1 = torch.arange(num_heads, device=seed_1.device)[:, None]
    return _keep(seed_1, call, row_BHL, 1 + head_H1, longest, p)


def _keep(seed_1: Tensor, call: int, row_x: Tensor, place_x: Tensor | int, num_columns: int, p: float) -> Tensor:
    num_groups = -(-num_columns // COLUMNS_OF_A_DRAW)
    group_G = torch.arange(num_groups, device=seed_1.device)
    place = place_x[..., None] if isinstance(place_x, Tensor) else place_x
    words = philox(seed_1, (group_G, row_x[..., None], call, place))
    halves_xG42 = torch.stack([torch.stack([word & 0xFFFF, word >> 16], -1) for word in words], -2)
    return halves_xG42.flatten(-3)[..., :num_columns] >= drop_threshold(p)


def philox(seed_1: Tensor, counter: tuple[Tensor | int, Tensor | int, Tensor | int, Tensor | int]) -> list[Tensor]:
    """Returns the four words of Philox 4x32-10 at a counter, int64 below 2**32, in the shape its words broadcast to."""
    key = [seed_1 & _WORD, (seed_1 >> 32) & _WORD]
    words = list(torch.broadcast_tensors(*(torch.as_tensor(word, device=seed_1.device) for word in counter)))
    for _ in range(_NUM_ROUNDS):
        high, low = zip(*(_product(words[2 * i], _MULTIPLIERS[i]) for i in range(2)), strict=True)
        words = [high[1] ^ words[1] ^ key[0], low[1], high[0] ^ words[3] ^ key[1], low[0]]
        key = [(part + step) & _WORD for part, step in zip(key, _KEY_STEPS, strict=True)]
    return words


def _product(word: Tensor, multiplier: int) -> tuple[Tensor, Tensor]:
    """Returns both words of a product of two: in halves, since int64 has no room for 64 bits without a sign."""
    middle = word * (multiplier >> 16) + ((word * (multiplier & 0xFFFF)) >> 16)
    return middle >> 16, (word * multiplier) & _WORD  # the lower word is right although the product wraps around
