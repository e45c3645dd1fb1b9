"""Several tensors as one block of bytes: sent to another process, pinned, or copied to a device in one piece.

A value is anything made of dataclasses, tuples, lists and dicts with tensors inside. What it shares stays shared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")
_ALIGNMENT = 64  # bytes


class Part(NamedTuple):
    """The place and layout of a tensor among the bytes of a block."""

    start: int
    dtype: torch.dtype
    shape: torch.Size
    stride: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """Returns the tensor as a view of the block, uint8."""
        num_bytes = self.shape.numel() * self.dtype.itemsize
        return whole[self.start : self.start + num_bytes].view(self.dtype).as_strided(self.shape, self.stride)


def num_bytes(value: Any) -> int:
    """Returns the size of a block that holds the tensors of a value."""
    total = 0

    def count(tensor: Tensor) -> Tensor:
        nonlocal total
        total += _room(tensor)
        return tensor

    _mapped(value, Tensor, count)
    return total


def write(value: Any, allocate: Callable[[int], Tensor]) -> tuple[Tensor, Any]:
    """Writes the tensors of a value into a new block; returns the block and the value with a `Part` for each tensor.

    Args:
        allocate: makes a block of so many bytes, uint8.
    """
    written: list[tuple[Part, Tensor]] = []
    end = 0

    def place(tensor: Tensor) -> Part:
        nonlocal end
        # a dense tensor keeps its strides (channels_last, too); a view gets dense ones, its own reach further
        stride = torch.empty_like(tensor, device="meta").stride()
        part = Part(end, tensor.dtype, tensor.shape, stride)
        end += _room(tensor)
        written.append((part, tensor))
        return part

    with_parts = _mapped(value, Tensor, place)
    whole = allocate(end)
    for part, tensor in written:
        part.of(whole).copy_(tensor)
    return whole, with_parts


def read(with_parts: Any, whole: Tensor) -> Any:
    """Undoes `write`: every tensor is a view of the block."""
    return _mapped(with_parts, Part, lambda part: part.of(whole))


def pinned(value: T) -> T:
    """Returns a value in pinned memory, copied in one piece where it lies in one block."""
    return _moved(value, lambda whole: whole.pin_memory())


def to_device(value: T, device: torch.device) -> T:
    """Returns a value with its tensors on a device, by one copy that nothing waits for; itself where they are there.

    On CUDA the copy comes from pinned memory: a value that is no block yet is written there first.
    """
    if device.type == "cpu":
        return value
    return _moved(value, lambda whole: whole.to(device, non_blocking=True))


def _moved(value: T, move: Callable[[Tensor], Tensor]) -> T:
    whole = _block_of(value)
    if whole is None:
        whole, with_parts = write(value, _pinned_bytes)
    else:
        with_parts = _mapped(value, Tensor, _part_of)
    moved: T = read(with_parts, move(whole))
    return moved


def _pinned_bytes(size: int) -> Tensor:
    return torch.empty(size, dtype=torch.uint8, pin_memory=torch.cuda.is_available())


def _block_of(value: Any) -> Tensor | None:
    """The bytes in which all tensors of a value lie, where it is one block; else None."""
    storages: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        storages.setdefault(tensor.untyped_storage().data_ptr(), tensor)
        return tensor

    _mapped(value, Tensor, note)
    if len(storages) != 1:
        return None
    (tensor,) = storages.values()
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())


def _part_of(tensor: Tensor) -> Part:
    start = int(tensor.storage_offset()) * tensor.itemsize
    return Part(start, tensor.dtype, tensor.shape, tensor.stride())


def _room(tensor: Tensor) -> int:
    return -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT


def _mapped(value: Any, leaf: type, change: Callable[[Any], Any], done: dict[int, Any] | None = None) -> Any:
    """Returns the value with `change` of each leaf in its place; each object is mapped once."""
    done = {} if done is None else done
    if id(value) in done:
        return done[id(value)]
    if isinstance(value, leaf):
        found = change(value)
    elif is_dataclass(value) and not isinstance(value, type):
        found = copy.copy(value)
        for name, held in vars(value).items():
            object.__setattr__(found, name, _mapped(held, leaf, change, done))
    elif isinstance(value, dict):
        found = {key: _mapped(held, leaf, change, done) for key, held in value.items()}
    elif type(value) in (tuple, list) and value and not isinstance(value[0], int):
        found = type(value)(_mapped(held, leaf, change, done) for held in value)
    else:
        return value
    done[id(value)] = found
    return found
