"""A model of the time that an operation's kernels take on a GPU. Nothing here was timed with this package's kernels.

Outside products a kernel takes the time of its bytes, or that of an empty kernel. A product is cut into tiles, which
the multiprocessors compute in waves; the best of some tile sizes counts. docs/measurements/gpu.md saw 790 TFLOP/s of a
large product on an H200. The vendor states 132 multiprocessors and 4.8 TB/s for it, of which 3.7 are assumed for
torch's separate kernels. Other GPUs are taken to reach the same shares of what their vendors state. Expect errors of
20 % in sums, and more in single products.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from mvptr_ds.benchmarks.gpu_step.operation_costs import Cost
from mvptr_ds.benchmarks.gpu_step.recording import ATTENTION, COPY, PRODUCT

HOST_BYTES_PER_S, HOST_COPY_S = 25e9, 3e-6  # from the host's memory
KERNEL_S = 2.2e-6  # of a kernel that does nothing
PRODUCT_FLOPS_PER_S = 790e12
ATTENTION_SHARE, SMALL_PRODUCTS_SHARE = 0.29, 0.25  # of the speed of large products
TILE_START_S = 1.5e-6  # prologue and epilogue of a tile
TILES = ((128, 256, 1.0), (128, 128, 0.85), (64, 128, 0.65), (64, 64, 0.4))  # rows, columns, share of the peak
SPLITS, SPLIT_FROM = (1, 2, 4, 8), 4096  # parts of a long inner side, which are then added up


@dataclass(frozen=True)
class Roofline:
    """The bounds of a GPU; those of an H200 by default.

    Attributes:
        product_flops_per_s: that a large matrix product in the training precision reaches.
        bytes_per_s: that torch's separate kernels read and write.
        num_multiprocessors: which compute the tiles of a product side by side.
    """

    product_flops_per_s: float = PRODUCT_FLOPS_PER_S
    bytes_per_s: float = 3.7e12
    num_multiprocessors: int = 132

    def kernel_seconds(self, cost: Cost, sides: tuple[int, int, int] | None = None) -> float:
        """Returns the seconds of an operation's kernels.

        Args:
            sides: of a product of two matrices: rows, columns, and the inner side.
        """
        if cost.kind == COPY:
            return copy_seconds(cost.bytes)
        moving_s = cost.bytes / self.bytes_per_s
        if cost.kind == PRODUCT and sides is not None:
            return max(self.product_seconds(*sides), moving_s)
        if cost.kind == PRODUCT:
            return max(cost.flops / (SMALL_PRODUCTS_SHARE * self.product_flops_per_s), moving_s, KERNEL_S)
        if cost.kind == ATTENTION:
            computing_s = cost.flops / (ATTENTION_SHARE * self.product_flops_per_s)
            return max(computing_s, moving_s) + cost.launches * KERNEL_S
        return max(moving_s, cost.launches * KERNEL_S)

    def product_seconds(self, num_rows: int, num_columns: int, inner: int) -> float:
        """Returns the seconds of a matrix product."""
        best = float("inf")
        for tile_rows, tile_columns, share in TILES:
            tiles = ceil(num_rows / tile_rows) * ceil(num_columns / tile_columns)
            per_s = self.product_flops_per_s / self.num_multiprocessors * share
            for parts in SPLITS if inner >= SPLIT_FROM else SPLITS[:1]:
                waves = ceil(tiles * parts / self.num_multiprocessors)
                tile_s = 2 * tile_rows * tile_columns * inner / parts / per_s + TILE_START_S
                adding_s = 0.0 if parts == 1 else (parts + 1) * num_rows * num_columns * 4 / self.bytes_per_s
                best = min(best, waves * tile_s + KERNEL_S + adding_s)
        return best


H200 = Roofline()


def copy_seconds(num_bytes: int) -> float:
    """Returns the seconds of a copy from the host's memory."""
    return max(num_bytes / HOST_BYTES_PER_S, HOST_COPY_S)
