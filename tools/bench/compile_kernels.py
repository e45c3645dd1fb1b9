#!/usr/bin/env python3
"""Compiles the Triton kernels for GPUs that need not be there, and prints what each takes: registers, spills, loads.

The functions of `mvptr_ds/model/triton_kernels` are called on CPU tensors of the base model's sizes. What they would
start is recorded and compiled instead, with the types, constants and alignments that a GPU's tensors would give.
`spilled B` is what does not fit into registers and goes to memory, by ptxas; `wide` are loads of 16 bytes in the PTX,
of all global loads. Nothing is run, so this says nothing of speed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # the checkout's package, wherever this is called from
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import numpy as np
import torch
from torch import Tensor

from mvptr_ds.user_io.terminal import accept_any_text

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
POINTERS = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
    torch.int64: "*i64",
}
LENGTHS = (20, 50, 100)  # a sequence of each tile
WORDS, PADDED_WORDS = 30_522, 30_528


@dataclass(frozen=True)
class Launch:
    """A kernel as it would be started: its arguments in the order of its parameters, and its options."""

    kernel: Any
    args: tuple[Any, ...]
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """File, direction and, of attention, the tile."""
        file = self.kernel.fn.__module__.rpartition(".")[2]
        function = self.kernel.fn.__name__.removeprefix("_")
        return " ".join([file, *([function] if function != file else []), *map(str, self.tile)])

    @property
    def tile(self) -> list[int]:
        return [self.options["QUERIES"]] if "QUERIES" in self.options else []


@dataclass(frozen=True)
class Compiled:
    """What a kernel takes on one architecture."""

    name: str
    arch: int
    warps: int
    registers: int
    spilled_bytes: int
    shared_bytes: int
    wide_loads: int
    loads: int
    tensor_cores: str


def main() -> None:
    accept_any_text()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], help="compute capabilities: 80 A100, 90 H100")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--hidden", type=int, default=768, help="columns of a state; heads have 64")
    parser.add_argument("--unaligned", action="store_true", help="as if no tensor began at a multiple of 16 bytes")
    parser.add_argument("--only", default="", help="kernels whose name holds this")
    args = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)  # what is interpreted is not compiled
    launches = [launch for launch in recorded(DTYPES[args.dtype], args.hidden) if args.only in launch.name]
    rows = [compiled(launch, arch, not args.unaligned) for launch in launches for arch in args.arch]
    print(table(rows))
    print(json.dumps([asdict(row) for row in rows]))


def recorded(dtype: torch.dtype, hidden: int) -> list[Launch]:
    """Every kernel that a step of the base model starts, forward and backward, one of each kind."""
    from mvptr_ds.model.attention_tiles import AttentionTiles
    from mvptr_ds.model.gather import RowGather, gather_rows
    from mvptr_ds.model.triton_kernels import (
        bias_gelu,
        residual_norm,
        short_attention,
        sum_rows,
        sum_stripes,
        word_log_p,
    )

    launches: dict[str, Launch] = {}

    def record(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        launch = Launch(kernel, args, options)
        launches.setdefault(launch.name, launch)

    for module in (bias_gelu, residual_norm, short_attention, sum_rows, sum_stripes, word_log_p):
        module.launch = record  # type: ignore[attr-defined]
    num_rows, device = sum(LENGTHS), torch.device("cpu")

    def states(*shape: int) -> Tensor:
        return torch.zeros(*shape, dtype=dtype, requires_grad=True)

    seed_1, vector_D, wide_bias = torch.zeros(1, dtype=torch.int64), states(hidden), states(4 * hidden)
    x_ND, residual_ND = states(num_rows, hidden), states(num_rows, hidden)
    tiles, repeated = AttentionTiles.of(LENGTHS, device), RowGather.of(np.zeros(3, np.int64), num_rows, device)
    outs = [
        residual_norm.dropout_add_norm(x_ND, vector_D, residual_ND, vector_D, vector_D, seed_1, 7, 0.1, 1e-12),
        bias_gelu.bias_gelu(states(num_rows, 4 * hidden), wide_bias),
        short_attention.short_attention(states(num_rows, 3, hidden // 64, 64), tiles, seed_1, 7, 0.1),
        word_log_p.word_nll(states(4, PADDED_WORDS), torch.zeros(4, dtype=torch.int64), WORDS),
        gather_rows(x_ND, repeated, sum_rows.sum_rows),
    ]
    for out in outs:
        out.backward(torch.zeros_like(out))
    return list(launches.values())


def compiled(launch: Launch, arch: int, aligned: bool) -> Compiled:
    """Compiles a kernel for an architecture and reads what came out."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature, constants, attributes = specialised(launch, aligned)
    source = ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)
    warps = launch.options["num_warps"]
    kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps})
    ptx = kernel.asm["ptx"]
    registers, stack = resources(kernel.asm["cubin"])
    return Compiled(
        name=launch.name,
        arch=arch,
        warps=warps,
        registers=registers,
        spilled_bytes=stack,
        shared_bytes=kernel.metadata.shared,
        wide_loads=len(re.findall(r"ld\.global[^;]*\.v4\.b32", ptx)),
        loads=len(re.findall(r"ld\.global", ptx)),
        tensor_cores=next((name for name in ("wgmma", "mma.sync") if name in ptx), "-"),
    )


def specialised(launch: Launch, aligned: bool) -> tuple[dict[str, str], dict[str, Any], dict[tuple[int, ...], Any]]:
    """Types, constants and alignments of a kernel's parameters, as Triton's JIT tells them from the arguments."""
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    for number, (parameter, value) in enumerate(arguments(launch)):
        is_fixed = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1 and is_fixed):
            signature[parameter.name], constants[parameter.name] = "constexpr", value
        elif isinstance(value, Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
            if aligned and not parameter.do_not_specialize_on_alignment:
                attributes[number,] = [["tt.divisibility", 16]]
        else:
            signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
            if isinstance(value, int) and value % 16 == 0 and is_fixed:
                attributes[number,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def arguments(launch: Launch) -> Iterator[tuple[Any, Any]]:
    """Each parameter of a kernel with its value."""
    for number, parameter in enumerate(launch.kernel.params):
        yield parameter, launch.args[number] if number < len(launch.args) else launch.options[parameter.name]


def resources(cubin: bytes) -> tuple[int, int]:
    """Registers of a thread, and bytes of its stack, which holds what spills: by the cuobjdump that triton brings."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", said)
    assert found is not None, said
    return int(found[1]), int(found[2])


def table(rows: list[Compiled]) -> str:
    """The results as a table of Markdown."""
    lines = ["| kernel | sm | warps | registers | spilled B | shared B | wide / loads | tensor cores |"]
    lines.append("| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |")
    for row in rows:
        numbers = f"{row.arch} | {row.warps} | {row.registers} | {row.spilled_bytes} | {row.shared_bytes}"
        lines.append(f"| {row.name} | {numbers} | {row.wide_loads} / {row.loads} | {row.tensor_cores} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
