"""The bounds of a GPU that a step's speed rests on: matrix products of the model's shapes, copies, launches.

Each product is timed forward, for its input's gradient and for its weight's. On a GPU the calls are replayed as a CUDA
graph, so that launching them takes no part.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

REPEATS = 5


@dataclass(frozen=True)
class Shapes:
    """The sizes of the products that are timed.

    Attributes:
        rows: of text, visual and cross encoder, as they are and cut to a multiple of 128.
        layers: (inputs, outputs) of an encoder layer's products.
        words: rows of the word head's weight, without and with padding, and picked words.
        regions: numbers of a region's features, without and with padding, and regions.
        hidden: size of a state.
        copied_bytes: of the copy.
    """

    rows: tuple[int, ...]
    layers: tuple[tuple[int, int], ...]
    words: tuple[tuple[int, ...], int]
    regions: tuple[tuple[int, ...], int]
    hidden: int
    copied_bytes: int


def shapes_of(hidden: int, samples: int, copied_bytes: int) -> Shapes:
    """Returns the shapes of a step of so many samples, of 18 text rows, 50 visual rows and 2 x 53 cross rows each."""
    rows = tuple(n for each in (18, 50, 106) for n in (each * samples + 19, max(128, each * samples // 128 * 128)))
    layers = ((hidden, 3 * hidden), (hidden, hidden), (hidden, 4 * hidden), (4 * hidden, hidden))
    words = (30_522, 30_528, 30_592), max(8, 2 * samples + 37)
    regions = (2_054, 2_056, 2_112), 35 * samples
    return Shapes(rows, layers, words, regions, hidden, copied_bytes)


def measure(shapes: Shapes, device: torch.device, dtype: torch.dtype, say: Callable[[str], None]) -> dict[str, Any]:
    """Returns TFLOP/s of every product, bytes of a copy and microseconds of an operation.

    Args:
        say: gets a line of progress now and then.
    """
    torch.manual_seed(0)
    say("copy and launches")
    found: dict[str, Any] = {
        "copy_tb_per_s": _copy_tb_per_s(shapes.copied_bytes, device),
        "host_us_per_operation": _host_us(device),
    }
    products: dict[str, list[float]] = {}
    for num_rows in shapes.rows:
        say(f"products of {num_rows} rows")
        for inner, out in shapes.layers:
            products[f"layer {num_rows}x{inner}->{out}"] = _tflops(num_rows, inner, out, device, dtype)
    say("products of the word head and of regions")
    for num_words in shapes.words[0]:
        num = shapes.words[1]
        products[f"words {num}x{shapes.hidden}->{num_words}"] = _tflops(num, shapes.hidden, num_words, device, dtype)
    for num_features in shapes.regions[0]:
        num = shapes.regions[1]
        products[f"regions {num}x{num_features}->{shapes.hidden}"] = _tflops(
            num, num_features, shapes.hidden, device, dtype
        )
    found["tflops_forward_input_weight"] = products
    found["tflops_bias_aligned_and_not"] = _bias_off_its_place(shapes, device, dtype)
    return found


def _tflops(num_rows: int, inner: int, out: int, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Returns the speed of a product, of its input's gradient and of its weight's."""
    a_NI, w_OI, d_NO = (
        torch.randn(*shape, device=device, dtype=dtype) for shape in ((num_rows, inner), (out, inner), (num_rows, out))
    )
    bias_O = torch.randn(out, device=device, dtype=dtype)
    calls: tuple[Callable[[], Any], ...] = (
        lambda: F.linear(a_NI, w_OI, bias_O),
        lambda: d_NO @ w_OI,
        lambda: d_NO.t() @ a_NI,
    )
    return [_round(2 * num_rows * inner * out / 1e12 / seconds(call, device)) for call in calls]


def _bias_off_its_place(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> list[float]:
    """Returns the speed of a square product whose bias begins at 16 bytes, and at one number behind them."""
    num_rows, dim = shapes.rows[-1], shapes.hidden
    a_ND, w_DD = (torch.randn(n, dim, device=device, dtype=dtype) for n in (num_rows, dim))
    flat = torch.randn(dim + 8, device=device, dtype=dtype)
    tflop = 2 * num_rows * dim**2 / 1e12
    aligned_D, shifted_D = flat[:dim], flat[1 : 1 + dim]
    aligned_s = seconds(lambda: F.linear(a_ND, w_DD, aligned_D), device)
    shifted_s = seconds(lambda: F.linear(a_ND, w_DD, shifted_D), device)
    return [_round(tflop / aligned_s), _round(tflop / shifted_s)]


def _copy_tb_per_s(num_bytes: int, device: torch.device) -> float:
    source = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _round(2 * num_bytes / 1e12 / seconds(lambda: target.copy_(source), device))


def _host_us(device: torch.device, num: int = 2_000) -> float:
    """Returns the host's time to dispatch an operation of 8 numbers, which no device is waited for in between."""
    few = torch.zeros(8, device=device)
    few.add_(1)
    _wait(device)
    started = time.perf_counter()
    for _ in range(num):
        few.add_(1)
    took_us = 1e6 * (time.perf_counter() - started) / num
    _wait(device)
    return _round(took_us)


def seconds(call: Callable[[], Any], device: torch.device, calls: int = 10) -> float:
    """Returns the median time of a call: on CUDA of one within a replayed graph."""
    for _ in range(3):
        call()
    _wait(device)
    if device.type != "cuda":
        return statistics.median(_host_seconds(call) for _ in range(REPEATS))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    return statistics.median(_device_seconds(graph.replay) for _ in range(REPEATS)) / calls


def _host_seconds(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _device_seconds(call: Callable[[], Any]) -> float:
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    call()
    last.record()
    last.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _round(value: float) -> float:
    return float(f"{value:.4g}")
