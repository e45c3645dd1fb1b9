"""Finds pictures that two folders of shards share, by the keys of their records."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from mvptr_ds.data.shards.index import SampleIndex

_MOST_NAMED = 5


class SharedKeys(NamedTuple):
    """How many keys two folders share, and the first few of them."""

    num: int
    first: tuple[str, ...]  # in the order of the first folder

    def __str__(self) -> str:
        names = ", ".join(self.first)
        return names if self.num == len(self.first) else f"{names}, ..."


def shared_keys(first: SampleIndex, second: SampleIndex) -> SharedKeys:
    """Returns the records of `first` whose key a record of `second` has, too.

    It compares 64-bit hashes of the keys, which stand in the index. It takes 16 bytes a record of memory, and reads the
    few records that it names. Folders say the same picture by the same key only where both were built with the same
    kind of keys.

    Raises:
        OSError: a shard that holds a record to be named cannot be read.
    """
    shared_N = np.isin(first.key_hashes(), second.key_hashes())
    numbers = np.flatnonzero(shared_N)
    named = tuple(first.key_of(first.place(int(number))) for number in numbers[:_MOST_NAMED])
    return SharedKeys(len(numbers), named)
