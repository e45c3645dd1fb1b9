"""Triton's kernels against plain torch in float64: by Triton's interpreter on a CPU, and as they are on a GPU.

The interpreter runs a kernel's own code on CPU tensors, program after program, so shapes are small. conftest.py turns
it on where there is no GPU. What it does not see: compilation (test_compile_kernels.py), races, speed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mvptr_ds.model.attention_tiles import AttentionTiles
from mvptr_ds.model.gather import RowGather, gather_rows
from mvptr_ds.model.triton_kernels import reference

triton = pytest.importorskip("triton", reason="triton is not installed")
from mvptr_ds.model.triton_kernels import bias_gelu, residual_norm, short_attention, sum_rows, word_log_p  # noqa: E402

ON_CPU = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the interpreter is off where there is a GPU")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])]
pytestmark = [pytest.mark.parametrize("device", DEVICES), pytest.mark.timeout(120)]
EPS = 1e-12  # the model's
CLOSE = 1e-5  # float32: of the largest number of a tensor
# |error| / |wanted| where tensors are in half precision: three roundings on the path, each at most 2**-8 of bfloat16
# (the interpreter cuts off, a GPU rounds: half of that), or 2**-11 of float16
HALF = {torch.bfloat16: 8e-3, torch.float16: 1e-3}


def drawn(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def outputs(
    function: Callable[..., Tensor],
    inputs: Sequence[Any],
    to_out: Tensor,
    device: str,
    dtype: torch.dtype | None = None,
) -> list[Tensor]:
    """Answer and gradients of the float inputs, float64 on the CPU; `dtype`: what inputs are converted to."""
    given = [moved(value, device, dtype) for value in inputs]
    leaves = [value for value in given if isinstance(value, Tensor) and value.requires_grad]
    out = function(*given)
    found = [out, *torch.autograd.grad(out, leaves, to_out.to(device, dtype or to_out.dtype).to(out.dtype))]
    return [value.detach().double().cpu() for value in found]


def moved(value: Any, device: str, dtype: torch.dtype | None) -> Any:
    if not isinstance(value, Tensor):
        return value
    is_float = value.is_floating_point()
    return value.detach().to(device, dtype if is_float else None, copy=True).requires_grad_(is_float)


def assert_same(function: str, module: Any, inputs: Sequence[Any], to_out: Tensor, device: str) -> None:
    """Kernel and reference agree; float32 to 1e-5 of the largest number, bfloat16 to its roundings."""
    found = outputs(getattr(module, function), inputs, to_out, device)
    assert_close(found, outputs(getattr(reference, function), inputs, to_out, "cpu", torch.float64), to_out.dtype)


def assert_close(found: list[Tensor], wanted: list[Tensor], dtype: torch.dtype, tolerance: float = CLOSE) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.shape == other.shape
        if dtype in HALF:
            assert float((one - other).norm()) <= HALF[dtype] * float(other.norm())
        elif other.numel():
            torch.testing.assert_close(one, other, rtol=0, atol=tolerance * max(1.0, float(other.abs().max())))


# --- dropout, residual, LayerNorm


def norm_inputs(num_rows: int, num_columns: int, p: float, dtype: torch.dtype, has_bias: bool, call: int) -> list[Any]:
    vectors = [0.1 * drawn(seed, num_columns, dtype=dtype) for seed in range(3)]
    x_ND, residual_ND = (drawn(seed, num_rows, num_columns, dtype=dtype) for seed in (3, 4))
    seed_1 = torch.tensor([2**33 + 17])
    return [x_ND, vectors[0] if has_bias else None, residual_ND, 1 + vectors[1], vectors[2], seed_1, call, p, EPS]


@pytest.mark.parametrize(
    ("num_rows", "num_columns", "p", "has_bias"),
    [(3, 768, 0.1, True), (1, 40, 0.5, False), (7, 33, 0.1, True), (5, 64, 0.0, True), (0, 16, 0.1, True)],
)
def test_dropout_add_norm(num_rows: int, num_columns: int, p: float, has_bias: bool, device: str) -> None:
    inputs = norm_inputs(num_rows, num_columns, p, torch.float32, has_bias, 5)
    assert_same("dropout_add_norm", residual_norm, inputs, drawn(9, num_rows, num_columns), device)


def test_dropout_add_norm_in_half_precision(device: str) -> None:
    inputs = norm_inputs(6, 256, 0.1, torch.bfloat16, True, 5)
    assert_same("dropout_add_norm", residual_norm, inputs, drawn(9, 6, 256, dtype=torch.bfloat16), device)


def test_sums_over_more_rows_than_programs(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that no multiple of the programs divides, and a last program without any row."""
    monkeypatch.setattr(residual_norm, "_MAX_PROGRAMS", 4)
    inputs = norm_inputs(6, 16, 0.5, torch.float32, True, 0)  # two rows a program: the fourth has none
    assert_same("dropout_add_norm", residual_norm, inputs, drawn(9, 6, 16), device)
    monkeypatch.setattr(bias_gelu, "_MAX_STRIPES", 2)
    assert_same("bias_gelu", bias_gelu, [drawn(0, 35, 12), drawn(1, 12)], drawn(2, 35, 12), device)


def test_rows_that_are_not_contiguous(device: str) -> None:
    inputs = norm_inputs(4, 24, 0.1, torch.float32, True, 1)
    inputs[0] = drawn(3, 24, 4).T
    assert_same("dropout_add_norm", residual_norm, inputs, drawn(9, 24, 4).T, device)


# --- bias, GELU


@pytest.mark.parametrize(("num_rows", "num_columns"), [(1, 300), (19, 33), (0, 8)])
def test_bias_gelu(num_rows: int, num_columns: int, device: str) -> None:
    inputs = [2 * drawn(0, num_rows, num_columns), drawn(1, num_columns)]
    assert_same("bias_gelu", bias_gelu, inputs, drawn(2, num_rows, num_columns), device)


def test_bias_gelu_in_half_precision(device: str) -> None:
    half = torch.bfloat16
    inputs = [2 * drawn(0, 9, 64, dtype=half), drawn(1, 64, dtype=half)]
    assert_same("bias_gelu", bias_gelu, inputs, drawn(2, 9, 64, dtype=half), device)


# --- attention


def attention_inputs(lengths: Sequence[int], num_heads: int, size: int, p: float, device: str) -> list[Any]:
    tiles = AttentionTiles.of(lengths, torch.device(device))
    return [drawn(0, sum(lengths), 3, num_heads, size), tiles, torch.tensor([99]), 3, p]


def assert_same_attention(inputs: list[Any], device: str, tolerance: float = CLOSE) -> None:
    """As `assert_same`; tiles are on one device."""
    to_out = drawn(1, *inputs[0][:, 0].shape, dtype=inputs[0].dtype)
    found = outputs(short_attention.short_attention, inputs, to_out, device)
    on_cpu = AttentionTiles.of(inputs[1].lengths, torch.device("cpu"))
    plain = [inputs[0], on_cpu, *inputs[2:]]
    wanted = outputs(reference.short_attention, plain, to_out, "cpu", torch.float64)
    assert_close(found, wanted, to_out.dtype, tolerance)


@pytest.mark.parametrize(
    ("lengths", "num_heads", "size", "p"),
    [
        ((5, 1, 0, 32), 2, 64, 0.1),  # tile 32, with a single row and an empty sequence
        ((33, 7, 64), 1, 24, 0.5),  # tile 64 beside tile 32, heads of no power of two
        ((65, 128, 40), 1, 8, 0.1),  # tile 128: two blocks of keys
        ((90, 3), 1, 16, 0.0),
    ],
)
def test_short_attention(lengths: tuple[int, ...], num_heads: int, size: int, p: float, device: str) -> None:
    assert_same_attention(attention_inputs(lengths, num_heads, size, p, device), device)


@pytest.mark.parametrize("lengths", [(), (0, 0)])
def test_short_attention_without_rows(lengths: tuple[int, ...], device: str) -> None:
    assert_same_attention(attention_inputs(lengths, 2, 16, 0.1, device), device)


@pytest.mark.parametrize("dtype", HALF)
def test_short_attention_in_half_precision(dtype: torch.dtype, device: str) -> None:
    if dtype == torch.bfloat16 and device == "cpu":
        pytest.skip("the interpreter multiplies the bits of bfloat16 as integers (tl.dot of triton 3.7)")
    inputs = attention_inputs((18, 40), 1, 64, 0.1, device)
    inputs[0] = inputs[0].to(dtype)
    assert_same_attention(inputs, device)


def test_large_scores_do_not_overflow(device: str) -> None:
    inputs = attention_inputs((70,), 1, 16, 0.0, device)
    inputs[0][:, :2] *= 30  # scores up to some thousand: exp() of them is infinite, and float32 has steps of 1e-4 there
    assert_same_attention(inputs, device, 1e-3)


# --- words


@pytest.mark.parametrize(("num_rows", "num_columns", "num_valid"), [(5, 4112, 4101), (3, 5000, 5000), (1, 48, 33)])
def test_word_nll(num_rows: int, num_columns: int, num_valid: int, device: str) -> None:
    labels_K = torch.arange(num_rows) * 7 + num_valid - 1 - 7 * (num_rows - 1)  # the last one is the last word
    inputs = [3 * drawn(0, num_rows, num_columns), labels_K, num_valid]
    assert_same("word_nll", word_log_p, inputs, drawn(1, num_rows), device)


def test_word_nll_in_half_precision(device: str) -> None:
    inputs = [3 * drawn(0, 4, 320, dtype=torch.bfloat16), torch.tensor([0, 5, 299, 7]), 300]
    to_out = drawn(1, 4)
    found = outputs(word_log_p.word_nll, inputs, to_out, device)
    wanted = outputs(reference.word_nll, inputs, to_out, "cpu", torch.float64)
    assert_close(found[:1], wanted[:1], torch.float32, 1e-6)  # float32 from the very logits
    assert_close(found[1:], wanted[1:], torch.bfloat16)


def test_word_log_p_of_pairs(device: str) -> None:
    """A row without a pair, a word asked twice of one row, a last row without any."""
    rows_M, words_M = torch.tensor([0, 0, 2, 2, 2, 3]), torch.tensor([5, 5, 1, 698, 3, 0])
    inputs = [drawn(0, 5, 704), rows_M, words_M, 699]
    assert_same("word_log_p", word_log_p, inputs, drawn(1, 6), device)


@pytest.mark.parametrize("num_rows", [0, 3])
def test_word_log_p_without_pairs(num_rows: int, device: str) -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert_same("word_log_p", word_log_p, [drawn(0, num_rows, 32), none, none, 30], drawn(1, 0), device)


@pytest.mark.parametrize("padding", [float("nan"), float("-inf"), 1e4])
def test_nothing_reads_padded_columns(padding: float, device: str) -> None:
    logits_KC = drawn(0, 2, 48).to(device)
    logits_KC[:, 40:] = padding
    labels_K = torch.tensor([3, 39], device=device)
    logits_KC.requires_grad_()
    nll_K = word_log_p.word_nll(logits_KC, labels_K, 40)
    torch.testing.assert_close(nll_K, reference.word_nll(logits_KC, labels_K, 40))
    (gradient_KC,) = torch.autograd.grad(nll_K.sum(), logits_KC)
    assert bool((gradient_KC[:, 40:] == 0.0).all()) and bool(gradient_KC.isfinite().all())


def test_the_gradient_takes_the_memory_of_the_logits_once(device: str) -> None:
    logits_KC = drawn(0, 2, 48).to(device).requires_grad_()
    nll_K = word_log_p.word_nll(logits_KC, torch.tensor([3, 39], device=device), 40)
    (gradient_KC,) = torch.autograd.grad(nll_K.sum(), logits_KC, retain_graph=True)
    assert gradient_KC.data_ptr() == logits_KC.data_ptr()
    with pytest.raises(RuntimeError, match="replaced by their gradient"):
        torch.autograd.grad(nll_K.sum(), logits_KC)


# --- gathers


@pytest.mark.parametrize(
    ("index", "num_rows"),
    [((2, 0, 1), 3), ((2, 0, 0), 4), ((0,), 1), ((), 2), ((), 0), ((3, 1), 5)],
    ids=["permutation", "repeated", "one", "none", "empty", "some"],
)
def test_gather_rows(index: tuple[int, ...], num_rows: int, device: str) -> None:
    gather = RowGather.of(np.array(index, dtype=np.int64), num_rows, torch.device(device))
    assert (gather.starts_N1 is None) == (sorted(index) == list(range(num_rows)))
    rows_ND, to_out_MD = drawn(0, num_rows, 3, 7), drawn(1, len(index), 3, 7)
    wanted = outputs(lambda rows: rows[torch.tensor(index, dtype=torch.int64)], [rows_ND], to_out_MD, "cpu")
    for made in (sum_rows.sum_rows, reference.sum_rows):
        found = outputs(lambda rows, made=made: gather_rows(rows, gather, made), [rows_ND], to_out_MD, device)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def test_sums_of_half_precision_are_rounded_once(device: str) -> None:
    """4,096 + 5 x 8: bfloat16 has steps of 32 there, and each addition alone would be lost."""
    rows_MD = torch.tensor([[4096.0], *[[8.0]] * 5], dtype=torch.bfloat16, device=device)
    places_M, starts_N1 = torch.arange(6, device=device), torch.tensor([0, 6], device=device)
    assert sum_rows.sum_rows(rows_MD, starts_N1, places_M).item() == 4128.0


def test_a_row_that_is_not_there_is_refused(device: str) -> None:
    with pytest.raises(ValueError, match="rows 0 to 3 are picked of 3"):
        RowGather.of(np.array([0, 3]), 3, torch.device(device))


# --- all of them


def test_the_same_bits_twice(device: str) -> None:
    half = torch.bfloat16
    gather = RowGather.of(np.array([1, 0, 1, 1]), 3, torch.device(device))
    tiles = AttentionTiles.of((18, 3), torch.device(device))
    calls: list[tuple[Callable[..., Tensor], list[Any], Tensor]] = [
        (residual_norm.dropout_add_norm, norm_inputs(5, 40, 0.1, half, True, 0), drawn(1, 5, 40)),
        (bias_gelu.bias_gelu, [drawn(0, 5, 40, dtype=half), drawn(1, 40, dtype=half)], drawn(2, 5, 40)),
        (
            lambda qkv, seed: short_attention.short_attention(qkv, tiles, seed, 0, 0.1),
            [drawn(0, 21, 3, 1, 16, dtype=half), torch.tensor([4])],
            drawn(1, 21, 1, 16),
        ),
        (word_log_p.word_nll, [drawn(0, 2, 32, dtype=half), torch.tensor([1, 9]), 30], drawn(1, 2)),
        (lambda rows: gather_rows(rows, gather, sum_rows.sum_rows), [drawn(0, 3, 8, dtype=half)], drawn(1, 4, 8)),
    ]
    for function, inputs, to_out in calls:
        first, second = (outputs(function, inputs, to_out, device) for _ in range(2))
        assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_another_call_drops_other_elements(device: str) -> None:
    first, other = (
        residual_norm.dropout_add_norm(
            *(moved(value, device, None) for value in norm_inputs(2, 64, 0.5, torch.float32, False, call))
        )
        for call in (0, 1)
    )
    assert not torch.equal(first, other)


NORM = norm_inputs(2, 16, 0.1, torch.float32, True, 0)
QKV, SEED = drawn(0, 2, 3, 1, 16), torch.tensor([0])


@pytest.mark.parametrize(
    ("message", "inputs"),
    [
        ("expected \\[rows, columns\\]", [NORM[0][0], *NORM[1:]]),
        ("the residual is torch.bfloat16", [*NORM[:2], NORM[2].bfloat16(), *NORM[3:]]),
        ("weight has shape \\[15\\]; expected \\[16\\]", [*NORM[:3], NORM[3][1:], *NORM[4:]]),
        ("dropout of 1.0", [*NORM[:7], 1.0, EPS]),
        ("at most 8192 fit", norm_inputs(1, 8200, 0.1, torch.float32, False, 0)),
    ],
)
def test_rows_that_do_not_fit_are_refused(message: str, inputs: list[Any], device: str) -> None:
    with pytest.raises(ValueError, match=message):
        residual_norm.dropout_add_norm(*(moved(value, device, None) for value in inputs))


@pytest.mark.parametrize(
    ("message", "qkv", "length"),
    [
        ("2 rows for sequences of 3", QKV, 3),
        ("expected \\[rows, 3, heads, size\\]", QKV[:, :2], 2),
        ("heads of 136 columns", drawn(0, 2, 3, 1, 136), 2),
    ],
)
def test_sequences_that_do_not_fit_are_refused(message: str, qkv: Tensor, length: int, device: str) -> None:
    tiles = AttentionTiles.of((length,), torch.device(device))
    with pytest.raises(ValueError, match=message):
        short_attention.short_attention(qkv.to(device), tiles, SEED.to(device), 0, 0.1)


@pytest.mark.parametrize(
    ("message", "function", "inputs"),
    [
        ("bias has shape", bias_gelu.bias_gelu, [NORM[0], NORM[1][1:]]),
        ("labels for logits", word_log_p.word_nll, [NORM[0], torch.tensor([1]), 16]),
        ("17 words in logits", word_log_p.word_nll, [NORM[0], torch.tensor([1, 2]), 17]),
        ("rows of shape", word_log_p.word_log_p, [NORM[0], torch.tensor([1]), torch.tensor([1, 2]), 16]),
        ("expected \\[rows, columns\\]", sum_rows.sum_rows, [NORM[0][0], torch.tensor([0]), torch.tensor([0])]),
    ],
)
def test_other_inputs_that_do_not_fit_are_refused(
    message: str, function: Callable[..., Tensor], inputs: list[Any], device: str
) -> None:
    with pytest.raises(ValueError, match=message):
        function(*(moved(value, device, None) for value in inputs))


def test_tiles_of_sequences(device: str) -> None:
    tiles = AttentionTiles.of((5, 90, 0, 33, 20, 64, 32, 128), torch.device(device))
    found = {size: numbers.tolist() for size, numbers in tiles.sequences.items()}
    assert found == {32: [0, 4, 6], 64: [3, 5], 128: [1, 7]}
    assert tiles.offsets.tolist() == [0, *itertools.accumulate(tiles.lengths)]
    with pytest.raises(ValueError, match="a sequence of 129 rows"):
        AttentionTiles.of((1, 129), torch.device(device))
