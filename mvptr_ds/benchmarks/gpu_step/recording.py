"""What is counted: the operations of a step on the device, its waits for the device, and its copies to it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

PRODUCT, ATTENTION, COPY, OTHER = "product", "attention", "copy", "other"
FORWARD, BACKWARD = "forward", "backward"


@dataclass(frozen=True)
class Place:
    """Where an operation is called from: a pass, a part of the model, and a line of the package."""

    phase: str  # FORWARD or BACKWARD
    part: str  # one of parts.PARTS
    line: str  # such as model/packed.py:137; `autograd` where no line of the package is running


@dataclass(frozen=True)
class Operation:
    """One operation that the host dispatches to the device.

    Attributes:
        kind: PRODUCT, ATTENTION, COPY (from the host) or OTHER.
        bytes: read from and written to the device's memory.
        flops: of products and attention; a multiplication and an addition count as two.
        launches: kernels, by the table of operation_costs.py.
        is_odd: a product with rows that are no multiple of 16 bytes: of 8 numbers of bf16.
        model_s: seconds that its kernels take by roofline.py. They are modelled, never timed.
    """

    name: str
    kind: str
    place: Place
    bytes: int
    flops: int = 0
    launches: int = 1
    is_odd: bool = False
    model_s: float = 0.0


@dataclass(frozen=True)
class Wait:
    """One place where the host stops until the device has done all its work."""

    reason: str
    place: Place


@dataclass(frozen=True)
class Copy:
    """One copy from the host's memory to the device's. From pageable memory the driver may wait as well."""

    bytes: int
    is_pinned: bool
    place: Place


@dataclass
class Recording:
    """Everything that was counted, in order."""

    operations: list[Operation] = field(default_factory=list)
    waits: list[Wait] = field(default_factory=list)
    copies: list[Copy] = field(default_factory=list)

    def clear(self) -> None:
        """Forgets everything that was counted so far."""
        for entries in (self.operations, self.waits, self.copies):
            entries.clear()

    def of(self, phase: str | None = None, part: str | None = None, kind: str | None = None) -> Iterator[Operation]:
        """Yields the operations of a pass, a part and a kind; None: of all."""
        for operation in self.operations:
            place = operation.place
            wanted = ((phase, place.phase), (part, place.part), (kind, operation.kind))
            if all(asked in (None, found) for asked, found in wanted):
                yield operation

    @property
    def bytes_outside(self) -> int:
        """Bytes of everything but products and attention."""
        return sum(operation.bytes for operation in self.operations if operation.kind not in (PRODUCT, ATTENTION))

    @property
    def odd_fraction(self) -> float:
        """The share of the products' FLOPs that falls on odd ones; 0 without products."""
        products = list(self.of(kind=PRODUCT))
        odd = sum(product.flops for product in products if product.is_odd)
        return odd / max(1, sum(product.flops for product in products))

    @property
    def num_pageable(self) -> int:
        """Copies from memory that is not pinned."""
        return sum(not copy.is_pinned for copy in self.copies)

    def count(self, key: Callable[[Operation], str]) -> Counter[str]:
        """Counts the operations by any key, such as `lambda operation: operation.name`."""
        return Counter(map(key, self.operations))
