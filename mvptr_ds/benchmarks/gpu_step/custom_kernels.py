"""How kernels of the project's own are counted: Triton's launches, and operations of `torch.library`.

A kernel that torch does not know is counted without any registration, as one operation with one launch whose bytes are
those of all its tensors, each once:

- An operation of `torch.library.custom_op` or `triton_op` is dispatched like those of ATen, so it needs nothing but the
  `register_fake` that torch.compile asks for, too. Its results are what it writes.
- `kernel[grid](...)` of a `triton.jit` function is not executed while a step is counted. Its tensor arguments count.
  Where its name begins with `_`, that of its file stands before it, unless it is the same: `residual_norm_forward`.

Where that is wrong, whoever counts says so, once, by the kernel's name (own_kernels.py says it of ours):

    register_kernel("layer_norm_backward", launches=2, count_bytes=lambda tensors: 3 * size_of(tensors[0]))

A kernel that overwrites its input reads and writes it, and one that reads a mask of 1 row in 8 reads less than all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

from torch import Tensor
from torch.utils._pytree import tree_leaves

from mvptr_ds.benchmarks.gpu_step.operation_costs import Cost, size_of
from mvptr_ds.benchmarks.gpu_step.recording import OTHER
from mvptr_ds.model.installed import triton_lacks

Tensors = Sequence[Tensor]
OWN_KERNELS = "mvptr_ds.model.triton_kernels"
TRITON_LAUNCHERS = (
    ("triton.runtime.jit", "JITFunction"),
    ("triton.runtime.autotuner", "Autotuner"),
    ("triton.runtime.interpreter", "InterpretedFunction"),
)


@dataclass(frozen=True)
class CustomKernel:
    """How a kernel of our own is counted; see `register_kernel`."""

    kind: str
    launches: int
    count_bytes: Callable[[Tensors], int]
    count_flops: Callable[[Tensors], int]


def _all_once(tensors: Tensors) -> int:
    return sum(map(size_of, tensors))


_KERNELS: dict[str, CustomKernel] = {}
_DEFAULT = CustomKernel(OTHER, 1, _all_once, lambda _: 0)


def register_kernel(
    name: str,
    *,
    kind: str = OTHER,
    launches: int = 1,
    count_bytes: Callable[[Tensors], int] = _all_once,
    count_flops: Callable[[Tensors], int] = lambda _: 0,
) -> None:
    """Says how a kernel is counted from now on.

    Args:
        name: of the Triton function, or of the operation with its namespace, such as `mvptr::gelu`.
        kind: recording.PRODUCT, ATTENTION or OTHER; bytes of the first two are not counted as outside.
        count_bytes, count_flops: get the kernel's tensors, those of an operation's results behind its arguments. Whole
            numbers are there, floating ones exist as shapes alone.
    """
    _KERNELS[name] = CustomKernel(kind, launches, count_bytes, count_flops)


def is_registered(name: str) -> bool:
    """Returns whether `register_kernel` has been called for a name."""
    return name in _KERNELS


def custom_cost(name: str, tensors: Tensors) -> Cost:
    """Returns the cost of a kernel of our own."""
    kernel = _KERNELS.get(name, _DEFAULT)
    return Cost(kernel.kind, kernel.count_bytes(tensors), kernel.count_flops(tensors), kernel.launches)


@contextmanager
def triton_launches(record: Callable[[str, list[Tensor]], None]) -> Iterator[None]:
    """While inside, a Triton kernel that is launched is recorded instead, where Triton is installed.

    Args:
        record: gets the function's name and its tensor arguments.
    """

    def run(self: Any, *args: Any, grid: Any = None, warmup: bool = False, **kwargs: Any) -> None:
        function = self
        while hasattr(function, "fn") and not hasattr(function, "__name__"):  # an autotuner holds the function
            function = function.fn
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        name, file = function.__name__, function.fn.__module__.rpartition(".")[2]
        record(file + name if name.startswith("_") and name != f"_{file}" else name.removeprefix("_"), tensors)

    with ExitStack() as stack:
        for module, name in () if triton_lacks(OWN_KERNELS) else TRITON_LAUNCHERS:
            launcher = getattr(import_module(module), name, None)
            if launcher is not None:
                stack.enter_context(patch.object(launcher, "run", run))
        yield
