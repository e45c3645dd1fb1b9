"""Executes operations as if on a CUDA device, on a build of torch without one, and records what the device would do.

    with FakeCuda() as device:
        loss = module(batch, step).loss
        loss.backward()
    device.recording.operations, device.recording.waits, device.recording.copies

A tensor "on the device" is a `CudaTensor`. To Python it says `cuda:0`, so that the package chooses as it does on a GPU.
To torch's own C++ it is a meta tensor, for which a build without CUDA has all that autograd needs. Floating numbers
exist as shapes alone. Whole numbers and booleans are real: the lengths and indices that shapes depend on are right.
Where they come out of floating numbers (argmax, a comparison), plausible ones take their place.

Only what runs on the device is recorded: no view, no allocation, nothing on the host. Where a CUDA build would stop the
host, there is a wait: a value that the host reads, a result whose size depends on values, a copy that is not
`non_blocking`. Tensors of the host in an operation of the device are an error, as they are on a GPU.

Kernels of the project's own: see custom_kernels.py. Streams, events, graphs and pinned memory: torch_on_cuda.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_unflatten

from mvptr_ds.benchmarks.gpu_step.custom_kernels import custom_cost, is_registered, triton_launches
from mvptr_ds.benchmarks.gpu_step.operation_costs import FREE, PRODUCTS, Cost, cost_of
from mvptr_ds.benchmarks.gpu_step.parts import PartTracker
from mvptr_ds.benchmarks.gpu_step.recording import COPY, FORWARD, Copy, Operation, Place, Recording, Wait
from mvptr_ds.benchmarks.gpu_step.roofline import H200, Roofline
from mvptr_ds.benchmarks.gpu_step.torch_on_cuda import CUDA, PinnedMemory, as_cuda_build

SIZE_DEPENDS_ON_VALUES = {
    "nonzero",
    "masked_select",
    "unique_consecutive",
    "unique_dim",
    "_unique2",
    "repeat_interleave",
}
ATEN = ("aten", "prims")
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}  # take indices of the host, which they copy
HALF_TRUE = {"eq", "isnan", "isinf", "signbit", "isneginf", "isposinf"}  # of floating numbers: seldom true


class CudaTensor(Tensor):
    """A tensor that says it is on CUDA; `held` is its content on the host, or on meta for floating numbers."""

    held: Tensor

    @staticmethod
    def __new__(cls, held: Tensor) -> CudaTensor:
        made: CudaTensor = Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device("meta"),
        )
        made.held = held
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"CudaTensor({tuple(self.shape)}, {self.dtype})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return CUDA

    @property
    def is_cuda(self) -> bool:  # type: ignore[override]
        return True

    @property
    def is_meta(self) -> bool:  # type: ignore[override]
        return False

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise RuntimeError(f"{func} on a tensor of FakeCuda, which is over")


class FakeCuda(TorchDispatchMode):
    """Records the operations, waits and copies of what runs inside.

    Args:
        fail_on_wait: whether a wait is an error, whose stack shows where it comes from.
        roofline: of the GPU whose seconds are modelled.

    Raises:
        RuntimeError: inside, where `fail_on_wait` and the host waits, or where an operation mixes host and device.
    """

    def __init__(self, fail_on_wait: bool = False, roofline: Roofline = H200) -> None:
        super().__init__()
        self.roofline = roofline
        self.recording, self.parts, self.pinned = Recording(), PartTracker(), PinnedMemory()
        self.phase, self.fail_on_wait = FORWARD, fail_on_wait
        self._stack = ExitStack()

    def __enter__(self) -> FakeCuda:
        self._stack.enter_context(as_cuda_build(self.pinned, self.wait, self.capture, self.replay))
        self._stack.enter_context(triton_launches(self._launch_custom))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    # --- what the caller may do besides

    def put(self, tensor: Tensor) -> CudaTensor:
        """Returns a tensor on the device, without recording a copy."""
        return _on_device(tensor)

    def put_weights(self, module: nn.Module) -> None:
        """Puts the parameters and buffers of a module on the device, without recording copies."""
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None:
                    moved = nn.Parameter(_on_device(parameter), parameter.requires_grad)
                    owner._parameters[name] = moved
            for name, buffer in owner._buffers.items():
                if buffer is not None:
                    owner._buffers[name] = _on_device(buffer)

    def wait(self, reason: str) -> None:
        """Records that the host waits for the device."""
        place = self._place()
        self.recording.waits.append(Wait(reason, place))
        if self.fail_on_wait:
            raise RuntimeError(f"{reason}: the host waits for the device at {place.line}")

    @contextmanager
    def capture(self, graph: list[Operation]) -> Iterator[None]:
        """While inside, operations are put into a CUDA graph instead of being executed."""
        executed, self.recording.operations = self.recording.operations, graph
        try:
            yield
        finally:
            self.recording.operations = executed

    def replay(self, graph: Sequence[Operation]) -> None:
        """Records one operation of the host that executes all kernels of a graph."""
        kinds: dict[str, list[Operation]] = {}
        for operation in graph:
            kinds.setdefault(operation.kind, []).append(operation)
        for kind, operations in kinds.items():  # an entry a kind, so that bytes and FLOPs stay where they belong
            odd = [o for o in operations if o.is_odd]
            for some, is_odd in ((odd, True), ([o for o in operations if not o.is_odd], False)):
                if some:
                    self.recording.operations.append(_together("graph", kind, self._place(), some, is_odd))

    # --- every operation of torch comes here

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        on_device = any(isinstance(tensor, CudaTensor) for tensor in tensors)
        asked = kwargs.get("device")
        # C++ takes the device of a result from that of a tensor: for it, ours are on meta
        asks_device = asked is not None and torch.device(asked).type in ("cuda", "meta")
        name = func.overloadpacket.__name__
        if not on_device and not asks_device:
            return func(*args, **kwargs)
        if name == "_to_copy" and asked is not None:
            return self._to_copy(func, args[0], kwargs, asks_device)
        if name == "copy_" and isinstance(args[0], CudaTensor) != isinstance(args[1], CudaTensor):
            return self._copy_between(args[0], args[1], non_blocking=len(args) > 2 and args[2])
        if asked is not None and not asks_device:
            return _made_on_host(func, args, kwargs)  # zeros_like(x, device="cpu")
        if not on_device:
            return self._make(func, name, args, kwargs)
        return self._compute(func, name, args, kwargs, tensors)

    def _make(self, func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> CudaTensor:
        """Makes a tensor on the device from none: zeros, arange."""
        dtype = kwargs.get("dtype")
        if dtype is None:
            whole = name in ("arange", "randint", "randperm") and not any(isinstance(arg, float) for arg in args)
            dtype = torch.int64 if whole else torch.get_default_dtype()
        kwargs.update(device="meta" if dtype.is_floating_point else "cpu", pin_memory=False)
        if "pin_memory" not in {argument.name for argument in func._schema.arguments}:
            del kwargs["pin_memory"]
        with _disable_current_modes():
            made = CudaTensor(func(*args, **kwargs))
        self._record(func, name, args, kwargs, made, [], [made])
        return made

    def _to_copy(self, func: Any, source: Tensor, kwargs: dict[str, Any], asks_device: bool) -> Tensor:
        dtype, non_blocking = kwargs.get("dtype") or source.dtype, bool(kwargs.get("non_blocking"))
        if isinstance(source, CudaTensor) and asks_device:
            if dtype == source.dtype and kwargs.get("memory_format") in (None, torch.preserve_format):
                return CudaTensor(source.held)  # it is there already
            del kwargs["device"]
            return self._compute(func, "_to_copy", (source,), kwargs, [source])
        if asks_device:
            if dtype != source.dtype:
                with _disable_current_modes():
                    source = source.to(dtype)  # on the host, into memory that is not pinned
            self._copied(source, non_blocking)
            return _on_device(source)
        if not non_blocking:  # torch takes pinned memory for the result where it does not wait
            self.wait("a copy to the host")
        assert isinstance(source, CudaTensor)
        with _disable_current_modes():
            return self.pinned.remember(_values_of(source).to(dtype), non_blocking)

    def _copy_between(self, target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
        if isinstance(target, CudaTensor):
            self._copied(source, non_blocking)
            with _disable_current_modes():
                if not target.held.is_meta:
                    target.held.copy_(source)
            return target
        assert isinstance(source, CudaTensor)
        if not (non_blocking and self.pinned.holds(target)):
            self.wait("a copy to the host")
        with _disable_current_modes():
            return target.copy_(_values_of(source))

    def _compute(self, func: Any, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]) -> Any:
        """Computes an operation of the device, of the shapes alone where a floating number takes part."""
        if name == "_local_scalar_dense":
            self.wait("a value that the host reads")
            with _disable_current_modes():
                return 1.0 if args[0].held.is_meta else func(args[0].held)
        args, kwargs, tensors = self._bring_indices(name, args, kwargs, tensors)
        if name in SIZE_DEPENDS_ON_VALUES or (name in INDEXING and _counts_a_mask(name, tensors)):
            self.wait("a result whose size depends on values")
        if name in INDEXING:
            args = (args[0], _without_masks(args[1]), *args[2:])
        shapes_only = any(isinstance(tensor, CudaTensor) and tensor.held.is_meta for tensor in tensors)
        with _disable_current_modes():
            made = _call(func, name, args, kwargs, shapes_only)
        results = _returned(func, args, kwargs, made, name)
        found = [leaf for leaf in tree_leaves(results) if isinstance(leaf, CudaTensor)]
        written = _each_once([*found, *_changed(func, args, kwargs)])
        self._record(func, name, args, kwargs, results, _each_once(tensors), written)
        return results

    def _bring_indices(self, name: str, args: Any, kwargs: Any, tensors: list[Tensor]) -> Any:
        """Copies indices of the host to the device, as torch does, which waits; refuses other tensors of the host."""
        strangers = [t for t in tensors if not isinstance(t, CudaTensor) and t.ndim]
        if not strangers:
            return args, kwargs, tensors
        if name not in INDEXING:
            shapes = ", ".join(str(tuple(tensor.shape)) for tensor in strangers)
            raise RuntimeError(f"{name} of tensors on the device with others on the host, of shape {shapes}")
        moved = {}
        for tensor in strangers:
            self._copied(tensor, non_blocking=False)
            moved[id(tensor)] = _on_device(tensor)
        args, kwargs = tree_map(lambda leaf: moved.get(id(leaf), leaf), (args, kwargs))
        return args, kwargs, [moved.get(id(tensor), tensor) for tensor in tensors]

    # --- the record

    def _place(self) -> Place:
        part, line = self.parts.now()
        return Place(self.phase, part, line)

    def _copied(self, source: Tensor, non_blocking: bool) -> None:
        place, num_bytes = self._place(), source.numel() * source.element_size()
        self.recording.copies.append(Copy(num_bytes, self.pinned.holds(source), place))
        cost = Cost(COPY, num_bytes)
        model_s = self.roofline.kernel_seconds(cost)
        self.recording.operations.append(Operation("copy", COPY, place, num_bytes, model_s=model_s))
        if not non_blocking:
            self.wait("a copy to the device that is not non_blocking")

    def _record(
        self, func: Any, name: str, args: Any, kwargs: Any, results: Any, read: list[Tensor], written: list[Tensor]
    ) -> None:
        place = self._place()  # of views, too: their nodes in the backward pass belong to the same part
        if is_view(func) or name in FREE or not any(tensor.numel() for tensor in written):
            return
        qualified = f"{func.namespace}::{name}"
        with _disable_current_modes():
            given = tree_map(_held, (args, kwargs, results, read, written))
            if is_registered(qualified):
                cost = custom_cost(qualified, [*given[3], *given[4]])
            else:
                cost = cost_of(name, func.overloadpacket, *given)
        sides = _sides(read) if name in PRODUCTS else None
        self._add(name if func.namespace in ATEN else qualified, cost, place, sides)

    def _launch_custom(self, name: str, tensors: list[Tensor]) -> None:
        with _disable_current_modes():
            cost = custom_cost(name, [_held(tensor) for tensor in _each_once(tensors)])
        self._add(name, cost, self._place())

    def _add(self, name: str, cost: Cost, place: Place, sides: tuple[int, int, int] | None = None) -> None:
        model_s = self.roofline.kernel_seconds(cost, sides)
        self.recording.operations.append(
            Operation(name, cost.kind, place, cost.bytes, cost.flops, cost.launches, cost.is_odd, model_s)
        )


def _on_device(tensor: Tensor) -> CudaTensor:
    if isinstance(tensor, CudaTensor):
        return tensor
    with _disable_current_modes():
        tensor = tensor.detach()
        if tensor.dtype.is_floating_point:
            return CudaTensor(tensor.to("meta"))
        return CudaTensor(torch.zeros_like(tensor, device="cpu") if tensor.is_meta else tensor.clone())


def _values_of(source: CudaTensor) -> Tensor:
    """The values that the host gets: ones for floating numbers, which nobody has computed."""
    held = source.held
    return torch.ones(held.shape, dtype=held.dtype) if held.is_meta else held.clone()


def _counts_a_mask(name: str, tensors: Sequence[Tensor]) -> bool:
    """Returns whether indexing finds the places of a mask; to put one number there, torch fills without looking."""
    puts = name != "index"
    indices = tensors[1:-1] if puts else tensors[1:]
    return any(t.dtype in (torch.bool, torch.uint8) for t in indices) and not (puts and tensors[-1].ndim == 0)


def _without_masks(indices: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Returns indices with the places of a mask instead of the mask: on meta it would have no size."""
    found: list[Tensor | None] = []
    for index in indices:
        if isinstance(index, CudaTensor) and index.dtype in (torch.bool, torch.uint8):
            with _disable_current_modes():
                found += [CudaTensor(places) for places in index.held.nonzero().unbind(1)]
        else:
            found.append(index)
    return found


def _made_on_host(func: Any, args: Any, kwargs: Any) -> Any:
    with _disable_current_modes():
        return func(*tree_map(_held, args), **kwargs)


def _held(leaf: Any) -> Any:
    return leaf.held if isinstance(leaf, CudaTensor) else leaf


def _call(func: Any, name: str, args: Any, kwargs: dict[str, Any], shapes_only: bool) -> Any:
    """Calls an operation on what the tensors hold. Whole numbers that come out of shapes alone are made up."""

    def held(leaf: Any) -> Any:
        if isinstance(leaf, CudaTensor):
            return leaf.held.to("meta") if shapes_only else leaf.held
        if isinstance(leaf, Tensor) and shapes_only:
            return leaf.to("meta")
        if isinstance(leaf, torch.device):
            return torch.device("meta" if shapes_only else "cpu")
        return leaf

    leaves, spec = tree_flatten((args, kwargs))
    held_args, held_kwargs = tree_unflatten([held(leaf) for leaf in leaves], spec)
    if shapes_only and name.endswith(("_like", "new_zeros", "new_ones", "new_full")):
        dtype = held_kwargs.get("dtype")
        if dtype is not None and not dtype.is_floating_point:
            return func(*held_args, **{**held_kwargs, "device": torch.device("cpu")})
    made = func(*held_args, **held_kwargs)
    first = next(leaf for leaf in leaves if isinstance(leaf, CudaTensor))
    numbers = (leaf for leaf in (*args[1:], *kwargs.values()) if isinstance(leaf, int) and not isinstance(leaf, bool))
    dim = next(numbers, -1)
    return tree_map(lambda leaf: _plausible(leaf, name, first.shape, dim) if isinstance(leaf, Tensor) else leaf, made)


def _plausible(made: Tensor, name: str, shape: torch.Size, dim: int) -> Tensor:
    """Gives whole numbers and booleans values where an operation has only told their shape."""
    if not made.is_meta or made.dtype.is_floating_point or made.dtype == torch.uint64:  # the last: states of generators
        return made
    if made.dtype == torch.bool:
        return torch.full(made.shape, name not in HALF_TRUE)
    zeros = torch.zeros(made.shape, dtype=made.dtype)
    if not made.numel():
        return zeros
    if name in ("argmax", "argmin", "max", "min", "searchsorted", "multinomial"):  # each row another place
        num = shape[-1] if name in ("searchsorted", "multinomial") or not shape else shape[dim]
        return ((torch.arange(made.numel()) + 1) % num).reshape(made.shape).to(made.dtype)
    if name in ("sort", "argsort", "topk"):  # as they stand
        dim = -1 if name == "topk" else dim
        along = torch.arange(made.shape[dim], dtype=made.dtype)
        return zeros.transpose(dim, -1).add(along).transpose(dim, -1).contiguous()
    return zeros


def _returned(func: Any, args: Any, kwargs: Any, made: Any, name: str) -> Any:
    """The results as tensors on the device; where an operation changes an argument, that very tensor."""
    changed = _changed(func, args, kwargs)
    if changed and any(r.alias_info is not None and r.alias_info.is_write for r in func._schema.returns):
        if len(changed) == 1 or not isinstance(made, (list, tuple)):
            return changed[0] if len(func._schema.returns) == 1 else tuple(changed)
        return tuple(changed)
    return tree_map(lambda leaf: CudaTensor(leaf) if isinstance(leaf, Tensor) else leaf, made)


def _changed(func: Any, args: Any, kwargs: Any) -> list[CudaTensor]:
    """The arguments that an operation writes to."""
    out: list[CudaTensor] = []
    for number, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = args[number] if number < len(args) else kwargs.get(argument.name)
            out += [leaf for leaf in tree_leaves(given) if isinstance(leaf, CudaTensor)]
    return out


def is_view(func: Any) -> bool:
    """Returns whether an operation's results share the memory of its arguments, so that nothing runs."""
    return any(r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns)


def _each_once(tensors: Sequence[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())


def _sides(read: Sequence[Tensor]) -> tuple[int, int, int] | None:
    """Rows, columns and the inner side of a product of two matrices; None for others."""
    matrices = [tensor for tensor in read if tensor.ndim == 2][-2:]
    if len(matrices) < 2 or matrices[0].shape[1] != matrices[1].shape[0]:
        return None
    return matrices[0].shape[0], matrices[1].shape[1], matrices[0].shape[1]


def _together(name: str, kind: str, place: Place, operations: Sequence[Operation], is_odd: bool) -> Operation:
    return Operation(
        name,
        kind,
        place,
        sum(o.bytes for o in operations),
        sum(o.flops for o in operations),
        sum(o.launches for o in operations),
        is_odd,
        sum(o.model_s for o in operations),
    )
