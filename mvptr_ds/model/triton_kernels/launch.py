"""How a kernel is started, and what its wrapper checks."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Starts a kernel on the device of its tensors, which need not be the current one; an empty grid starts nothing."""
    if not all(grid):
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def require_rows(name: str, rows_ND: Tensor) -> None:
    """Raises ValueError unless a tensor has two dimensions and a dtype that kernels read."""
    if rows_ND.dim() != 2 or rows_ND.dtype not in FLOATS:
        raise ValueError(f"{name} is {rows_ND.dtype} {list(rows_ND.shape)}; expected [rows, columns] of {FLOATS}")


def require_columns(name: str, vector_D: Tensor, num_columns: int) -> None:
    """Raises ValueError unless a tensor is one row of `num_columns` numbers."""
    if vector_D.shape != (num_columns,):
        raise ValueError(f"{name} has shape {list(vector_D.shape)}; expected [{num_columns}]")
