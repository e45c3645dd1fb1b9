#!/usr/bin/env python3
"""Attention within sequences of different lengths, by every kernel that runs here: time, and how far apart they are.

What `mvptr_ds/model/kernels.py` chooses rests on this. Times are of forward and backward together, the median of
interleaved rounds, on a CPU of one thread's CPU time; `relative error` is that of states and of gradients against
float64. The last line is JSON.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":  # the checkout's package, wherever this is called from
    sys.path[0] = str(Path(__file__).resolve().parents[2])
    from mvptr_ds.user_io.signals import end_on_interrupt

    end_on_interrupt()

import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.model import kernels
from mvptr_ds.model.attention import SegmentAttention
from mvptr_ds.model.sequence_index import SequenceIndex
from mvptr_ds.user_io.progress import progress_bar
from mvptr_ds.user_io.terminal import accept_any_text

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Attend = Callable[[Tensor, float], Tensor]


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, default=16, help="how many; lengths are drawn from 25 to 75 (16)")
    parser.add_argument("--heads", type=int, default=12, help="(12)")
    parser.add_argument("--head-size", type=int, default=64, help="(64)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--dropout", type=float, default=0.0, help="of attention; with it there is no error to tell")
    parser.add_argument("--rounds", type=int, default=10, help="timed ones, after three others (10)")
    return parser.parse_args(argv)


def nested(lengths: tuple[int, ...], offsets: Tensor) -> Attend:
    """Returns a call on a nested jagged tensor, which the package does not use."""

    def attend(qkv_N3HE: Tensor, dropout: float) -> Tensor:
        query, key, value = (
            torch.nested.nested_tensor_from_jagged(
                rows_NHE.contiguous(), offsets.long(), min_seqlen=min(lengths), max_seqlen=max(lengths)
            ).transpose(1, 2)
            for rows_NHE in qkv_N3HE.unbind(1)
        )
        return F.scaled_dot_product_attention(query, key, value, dropout_p=dropout).transpose(1, 2).values()

    return attend


def contenders(lengths: tuple[int, ...], device: torch.device, dtype: torch.dtype, dropout: float) -> dict[str, Attend]:
    """Returns every kernel that can run here."""
    segments = SegmentAttention(SequenceIndex(lengths), device)
    out = {
        kernels.SDPA_EACH: segments.each,
        kernels.SDPA_PADDED: segments.padded,
        "scaled_dot_product_attention on a nested jagged tensor": nested(lengths, segments.offsets),
    }
    chosen = {d: kernels.attention(device, dtype, d, 64).implementation for d in (0.0, dropout)}
    if chosen[0.0] == kernels.TORCH_FLASH and not dropout:
        out[kernels.TORCH_FLASH] = segments.torch_flash
    if chosen[dropout] == kernels.FLASH_ATTN:
        out[kernels.FLASH_ATTN] = segments.flash_attn
    return out


def run(attend: Attend, qkv_N3HE: Tensor, weights: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    given = qkv_N3HE.detach().requires_grad_()
    out = attend(given, dropout)
    return out.detach(), torch.autograd.grad(out, given, weights)[0]


def relative_error(found: Tensor, wanted: Tensor) -> float:
    return float((found.double() - wanted).norm() / wanted.norm())


def main(argv: list[str] | None = None) -> int:
    accept_any_text()
    arguments = parse_arguments(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_num_threads(1)  # several would count their waiting for each other
    dtype, dropout = DTYPES[arguments.dtype], arguments.dropout
    torch.manual_seed(0)
    lengths = tuple(torch.randint(25, 76, (arguments.sequences,)).tolist())
    qkv = torch.randn(sum(lengths), 3, arguments.heads, arguments.head_size, device=device, dtype=torch.float64)
    weights = torch.randn_like(qkv[:, 0])
    attends = contenders(lengths, device, dtype, dropout)
    wanted = run(SegmentAttention(SequenceIndex(lengths), device).each, qkv, weights, 0.0)
    times_ms: dict[str, list[float]] = {name: [] for name in attends}
    inputs = qkv.to(dtype), weights.to(dtype)
    clock = time.perf_counter if device.type == "cuda" else time.process_time
    for number in progress_bar(range(arguments.rounds + 3), desc="rounds"):
        for name, attend in attends.items():
            started_s = clock()
            run(attend, *inputs, dropout)
            if device.type == "cuda":
                torch.cuda.synchronize()
            if number >= 3:
                times_ms[name].append(1e3 * (clock() - started_s))
    name_of_device = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{len(lengths)} sequences, {sum(lengths)} rows, {arguments.dtype}, dropout {dropout}, {name_of_device}\n")
    print(f"{'ms':>9}  {'relative error':>17}  kernel")
    results = {}
    for name, attend in attends.items():
        found = run(attend, *inputs, 0.0)
        errors = [relative_error(f, w) for f, w in zip(found, wanted, strict=True)]
        results[name] = {
            "ms": statistics.median(times_ms[name]),
            "states_error": errors[0],
            "gradients_error": errors[1],
        }
        print(f"{results[name]['ms']:9.2f}  {errors[0]:8.1e} {errors[1]:8.1e}  {name}")
    chosen = kernels.attention(device, dtype, dropout, arguments.head_size)
    print(f"\nchosen: {chosen.implementation} ({chosen.reason})")
    print(json.dumps({"chosen": chosen.implementation, "kernels": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
