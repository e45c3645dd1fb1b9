"""What was counted, as a table by part of the model and as one JSON object."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence

from mvptr_ds.benchmarks.gpu_step.engine_step import EngineCounts
from mvptr_ds.benchmarks.gpu_step.parts import PARTS
from mvptr_ds.benchmarks.gpu_step.recording import ATTENTION, BACKWARD, COPY, FORWARD, OTHER, PRODUCT, Operation
from mvptr_ds.benchmarks.gpu_step.step import StepCounts

KINDS = (PRODUCT, ATTENTION, COPY, OTHER)
NUM_LINES = 12  # lines of code that a list shows at most
COLUMNS = f"{'ops':>6}{'launches':>9}{'GB outside':>11}{'modelled ms':>12}"


def as_json(counts: StepCounts, engine: EngineCounts | None) -> dict[str, float | None]:
    """Returns the totals; those of the engine are None where it was not counted."""
    recording = counts.recording
    return {
        "ops": len(recording.operations),
        "engine_ops": None if engine is None else engine.operations,
        "waits": len(recording.waits),
        "engine_waits": None if engine is None else engine.waits.total(),
        "copies_to_device": len(recording.copies),
        "pageable_copies": recording.num_pageable,
        "gb_outside": round(recording.bytes_outside / 1e9, 3),
        "odd_side_frac": round(recording.odd_fraction, 4),
    }


def table(title: str, counts: StepCounts, engine: EngineCounts | None) -> str:
    """Returns the tables by part and by kind, and the lines of code behind waits and copies."""
    recording = counts.recording
    lengths, products = counts.lengths, sum(product.flops for product in recording.of(kind=PRODUCT))
    num_tags = lengths.visual - lengths.regions
    total_s = sum(operation.model_s for operation in recording.operations)
    lines = [
        title,
        f"{lengths.text:.0f} text rows, {num_tags:.0f} tag rows, {lengths.regions:.0f} regions, "
        f"{counts.num_trained / 1e6:.1f} M trained numbers in {counts.num_tensors} tensors",
        f"{counts.flops / 1e12:.2f} TFLOP of the model; products: {products / 1e12:.2f} TFLOP counted, "
        f"{counts.product_flops / 1e12:.2f} needed",
        "",
        f"{'part':26}{FORWARD:>16}{'':22}{BACKWARD:>16}",
        f"{'':26}{COLUMNS}{COLUMNS}",
    ]
    for part in PARTS:
        cells = [_cells(list(recording.of(phase, part))) for phase in (FORWARD, BACKWARD)]
        lines.append(f"{part:26}{''.join(cells)}")
    whole = [_cells(list(recording.of(phase))) for phase in (FORWARD, BACKWARD)]
    lines += [f"{'in all':26}{''.join(whole)}", "", f"{'kind':26}{COLUMNS}"]
    lines += [f"{kind:26}{_cells(list(recording.of(kind=kind)))}" for kind in KINDS]
    lines += [
        "",
        f"kernels: {1e3 * total_s:.1f} ms back to back, modelled for an H200 and not timed",
        f"products with rows that are no multiple of 16 bytes: {recording.odd_fraction:.1%} of the products' FLOPs",
        *_list("waits for the device", (f"{w.place.line}  {w.reason}" for w in recording.waits)),
        *_list(
            f"copies to the device, {sum(copy.bytes for copy in recording.copies) / 1e6:.1f} MB",
            (f"{c.place.line}  {'pinned' if c.is_pinned else 'pageable'}" for c in recording.copies),
        ),
    ]
    return "\n".join([*lines, *([] if engine is None else _engine_lines(engine)), ""])


def _cells(operations: Sequence[Operation]) -> str:
    launches, outside = sum(o.launches for o in operations), [o for o in operations if o.kind in (COPY, OTHER)]
    num_bytes, model_s = sum(o.bytes for o in outside), sum(o.model_s for o in operations)
    return f"{len(operations):6}{launches:9}{num_bytes / 1e9:11.3f}{1e3 * model_s:12.3f}"


def _list(title: str, entries: Iterable[str]) -> list[str]:
    found = Counter(entries)
    most = found.most_common(NUM_LINES)
    rest = [f"  {len(found) - len(most)} lines more"] if len(found) > len(most) else []
    return [f"{title}: {found.total()}", *(f"  {number:4} x {entry}" for entry, number in most), *rest]


def _engine_lines(engine: EngineCounts) -> list[str]:
    return [
        "",
        f"DeepSpeed: {engine.hooks} operations in hooks, {engine.step} behind the backward pass, for "
        f"{engine.num_tensors} tensors",
        *_list("DeepSpeed's waits for the device", engine.waits.elements()),
        *_list("DeepSpeed's operations", engine.lines.elements()),
    ]
