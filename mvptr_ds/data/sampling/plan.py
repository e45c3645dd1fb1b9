"""The order of a run as a pure function of (seed, epoch, position): no state to save, nothing to replay.

Worked example: 10 samples, blocks of 2, windows of 2 blocks. An epoch starts its numbering at a drawn sample, say 3:

    3 4 | 5 6 | 7 8 | 9 0 | 1 2        blocks of neighbours
    9 0 | 3 4 | 1 2 | 7 8 | 5 6        blocks in drawn order
    [0 4 9 3] [7 2 1 8] [6 5]          samples shuffled inside each window of two blocks

so slow storage is read in runs, and only a permutation of the blocks and a few windows are ever held in memory.
"""

from __future__ import annotations

from collections import OrderedDict

import numpy as np

from mvptr_ds.data.pickling import PicklesWithoutCaches
from mvptr_ds.streams import Stream, generator

_MAX_WINDOWS = 8


class Plan(PicklesWithoutCaches):
    """Tells which sample stands at each position of the run.

    Position g is place `g % num_samples` of epoch `g // num_samples`; every epoch visits every sample once. Batches
    (batches.py) run on over the borders of epochs.

    Raises:
        ValueError: a size is below 1, or the seed is negative.
    """

    _CACHES = ("_blocks", "_windows")

    def __init__(self, num_samples: int, seed: int, block_samples: int = 64, window_blocks: int = 256) -> None:
        sizes = {"num_samples": num_samples, "block_samples": block_samples, "window_blocks": window_blocks}
        for name, size in sizes.items():
            if size < 1:
                raise ValueError(f"{name} is {size}, must be at least 1")
        if seed < 0:
            raise ValueError(f"seed is {seed}, must not be negative")
        self.num_samples = num_samples
        self.seed = seed
        self.block_samples = min(block_samples, num_samples)
        self.window_blocks = window_blocks
        self._num_blocks = num_samples // self.block_samples  # full ones; the rest joins the last window
        self._num_windows = -(-self._num_blocks // window_blocks)
        self._init_caches()

    def _init_caches(self) -> None:
        self._blocks: OrderedDict[int, tuple[int, np.ndarray]] = OrderedDict()
        self._windows: OrderedDict[tuple[int, int], np.ndarray] = OrderedDict()

    def sample_at(self, position: int) -> tuple[int, int]:
        """Returns epoch and sample number at a position of the run."""
        epoch, place = divmod(position, self.num_samples)
        window = min(place // (self.block_samples * self.window_blocks), self._num_windows - 1)
        return epoch, int(self._window(epoch, window)[place - window * self.block_samples * self.window_blocks])

    def samples_at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Returns epochs and sample numbers, int64 [N] each, at positions int64 [N]."""
        positions = np.asarray(positions, dtype=np.int64)
        epochs, places = np.divmod(positions, self.num_samples)
        window_len = self.block_samples * self.window_blocks
        windows = np.minimum(places // window_len, self._num_windows - 1)
        samples = np.empty_like(positions)
        for epoch, window in sorted(set(zip(epochs.tolist(), windows.tolist(), strict=True))):
            here = (epochs == epoch) & (windows == window)
            samples[here] = self._window(epoch, window)[places[here] - window * window_len]
        return epochs, samples

    def _epoch(self, epoch: int) -> tuple[int, np.ndarray]:
        """Returns the first sample of the epoch's numbering, and its blocks in drawn order."""
        if epoch not in self._blocks:
            start = int(generator(Stream.ROTATION, self.seed, epoch).integers(self.num_samples))
            order = generator(Stream.BLOCKS, self.seed, epoch).permutation(self._num_blocks)
            self._blocks[epoch] = (start, order)
            if len(self._blocks) > 2:  # a batch spans two epochs at most, unless the data are tiny
                self._blocks.popitem(last=False)
        return self._blocks[epoch]

    def _window(self, epoch: int, window: int) -> np.ndarray:
        """Returns the samples of a window in their order, int64 [block_samples * window_blocks] (the last differs)."""
        key = (epoch, window)
        if key not in self._windows:
            start, order = self._epoch(epoch)
            blocks = order[window * self.window_blocks : (window + 1) * self.window_blocks]
            numbers = (blocks[:, None] * self.block_samples + np.arange(self.block_samples)).reshape(-1)
            if window == self._num_windows - 1:
                tail = np.arange(self._num_blocks * self.block_samples, self.num_samples)
                numbers = np.concatenate([numbers, tail])
            shuffled = generator(Stream.WINDOW, self.seed, epoch, window).permutation(numbers)
            self._windows[key] = (shuffled + start) % self.num_samples
            if len(self._windows) > _MAX_WINDOWS:
                self._windows.popitem(last=False)
        self._windows.move_to_end(key)
        return self._windows[key]
