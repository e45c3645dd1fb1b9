"""What a CUDA build of torch does above its operations: choice of kernels, pinned memory, streams, events and graphs.

All of it stands in for what a build without CUDA lacks or does otherwise, while FakeCuda counts:

- dropout is one kernel that keeps a mask, and attention with a mask is the memory-efficient kernel with a padded bias.
- `torch.tensor(..., device="cuda")` makes a tensor of the host and copies it, which waits.
- Memory is pinned where `pin_memory` says so; what is sliced from pinned memory is pinned.
- Streams and events do nothing, but `synchronize` of any of them is a wait.
- What runs inside `torch.cuda.graph(graph)` is captured; `graph.replay()` is one operation with all its kernels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

CAPABILITY = (9, 0)  # of an H100 or H200
CUDA = torch.device("cuda:0")  # with its number: a build without CUDA cannot tell which is the current one
BIAS_ALIGNMENT = 16  # numbers of a row of attention's bias


class PinnedMemory:
    """Remembers which memory of the host is pinned."""

    def __init__(self) -> None:
        self._storages: dict[int, Any] = {}  # kept, so that no other memory gets their addresses

    def remember(self, tensor: Tensor, is_pinned: bool = True) -> Tensor:
        """Returns the tensor, whose memory counts as pinned from now on."""
        if is_pinned and tensor.numel():
            storage = tensor.untyped_storage()
            self._storages[storage.data_ptr()] = storage
        return tensor

    def holds(self, tensor: Tensor) -> bool:
        """Returns whether a tensor of the host lies in pinned memory."""
        return tensor.untyped_storage().data_ptr() in self._storages


class _CudaMemory(TorchFunctionMode):
    """Pins memory and makes tensors as a CUDA build does."""

    def __init__(self, pinned: PinnedMemory) -> None:
        super().__init__()
        self.pinned = pinned

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tuple(map(_with_number, args)), {name: _with_number(v) for name, v in (kwargs or {}).items()}
        if func is Tensor.cuda:
            func, args = Tensor.to, (args[0], CUDA)
        if func is Tensor.tolist and _is_cuda(args[0]):  # one copy of all values
            return args[0].cpu().tolist()
        if func in (torch.tensor, torch.as_tensor) and _names_cuda(kwargs.get("device")):
            device = kwargs.pop("device")
            return func(*args, **kwargs).to(device)
        if func is Tensor.pin_memory:
            return self.pinned.remember(args[0].clone())
        if func is Tensor.is_pinned:
            return self.pinned.holds(args[0])
        if kwargs.pop("pin_memory", False):
            return self.pinned.remember(func(*args, **kwargs))
        return func(*args, **kwargs)


def _chosen(on_cuda: Callable[..., Tensor], elsewhere: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Returns a function that takes CUDA's kernels for a tensor of the device."""

    def choose(input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return (on_cuda if _is_cuda(input) else elsewhere)(input, *args, **kwargs)

    return choose


def _is_cuda(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == "cuda"


def _with_number(value: Any) -> Any:
    """Gives a device without a number that of the one device."""
    if isinstance(value, torch.device) or (isinstance(value, str) and value.partition(":")[0] == "cuda"):
        return CUDA if torch.device(value).type == "cuda" else value
    return value


def _names_cuda(device: Any) -> bool:
    return device is not None and torch.device(device).type == "cuda"


def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if not training or p == 0 or not input.numel():
        return input
    out: Tensor = torch.native_dropout(input, p, True)[0]
    return out


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention by the kernels of CUDA: flash in half precision without a mask, else the memory-efficient one."""
    assert not enable_gqa, "no kernel of this package takes groups of queries"
    if attn_mask is None and query.dtype in (torch.float16, torch.bfloat16):
        flash = torch.ops.aten._scaled_dot_product_flash_attention
        out: Tensor = flash(query, key, value, dropout_p, is_causal, False, scale=scale)[0]
        return out
    bias = None
    if attn_mask is not None:
        bias = attn_mask
        if attn_mask.dtype == torch.bool:
            bias = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(~attn_mask, float("-inf"))
        num_keys = key.shape[-2]
        bias = F.pad(bias, (0, -num_keys % BIAS_ALIGNMENT))[..., :num_keys]
        bias = bias.expand(*query.shape[:-1], num_keys)
    efficient = torch.ops.aten._scaled_dot_product_efficient_attention
    out = efficient(query, key, value, bias, True, dropout_p, is_causal, scale=scale)[0]
    return out


class _Stream:
    """A stream or an event: it orders work of the device, and only `synchronize` stops the host."""

    def __init__(self, wait: Callable[[str], None], *_: Any, **__: Any) -> None:
        self._wait = wait

    def synchronize(self) -> None:
        self._wait("a stream or event that the host waits for")

    def record_event(self, event: Any = None) -> Any:
        return _Stream(self._wait) if event is None else event

    def wait_stream(self, stream: Any) -> None: ...

    def wait_event(self, event: Any) -> None: ...

    def record(self, stream: Any = None) -> None: ...

    def wait(self, stream: Any = None) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: Any) -> float:
        return 1.0

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: Any) -> None: ...


@contextmanager
def as_cuda_build(
    pinned: PinnedMemory,
    wait: Callable[[str], None],
    capture: Callable[[list[Any]], AbstractContextManager[None]],
    replay: Callable[[list[Any]], None],
) -> Iterator[None]:
    """While inside, torch's functions behave as on a CUDA build.

    Args:
        wait: gets the reason of each wait of a stream, an event or the whole device.
        capture, replay: fill a graph's list of operations, and execute it.
    """

    class Graph:
        def __init__(self, *_: Any, **__: Any) -> None:
            self.operations: list[Any] = []

        def replay(self) -> None:
            replay(self.operations)

        def reset(self) -> None:
            self.operations.clear()

        def pool(self) -> tuple[int, int]:
            return 0, 0

    stream = _Stream(wait)

    def make_stream(*_: Any, **__: Any) -> _Stream:
        return _Stream(wait)

    replaced = {
        "_lazy_init": lambda: None,  # torch looks for a driver at the first "cuda"
        "is_available": lambda: True,
        "get_device_capability": lambda device=None: CAPABILITY,
        "current_device": lambda: 0,
        "device": lambda device: nullcontext(),
        "synchronize": lambda device=None: wait("the host waits for the whole device"),
        "current_stream": lambda device=None: stream,
        "default_stream": lambda device=None: stream,
        "stream": lambda stream: nullcontext(stream),
        "Stream": make_stream,
        "Event": make_stream,
        "CUDAGraph": Graph,
        "graph": lambda graph, *_, **__: capture(graph.operations),
        "graph_pool_handle": lambda: (0, 0),
        "is_current_stream_capturing": lambda: False,
    }
    with ExitStack() as stack:
        for name, value in replaced.items():
            stack.enter_context(patch.object(torch.cuda, name, value))
        # put in place of torch's, because a mode is off in the backward pass, where a checkpoint calls them again
        stack.enter_context(patch.object(F, "dropout", _chosen(_dropout, F.dropout)))
        stack.enter_context(patch.object(torch, "dropout", _chosen(_dropout, torch.dropout)))
        attention = _chosen(_attention, F.scaled_dot_product_attention)
        stack.enter_context(patch.object(F, "scaled_dot_product_attention", attention))
        stack.enter_context(_CudaMemory(pinned))
        yield
