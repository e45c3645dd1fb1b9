"""An encoder as one graph of torch.compile: it serves batches of any lengths, with the states and gradients of eager.

Most tests trace and differentiate the graph, but let torch compute it (`aot_eager`), which takes no C++ compiler.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.utils import counters

from mvptr_ds.model import compiled_layers, kernels
from mvptr_ds.model.attention import SegmentAttention
from mvptr_ds.model.compiled_layers import attention_of_each
from mvptr_ds.model.encoder import Encoder, EncoderSizes
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.sequence_index import SequenceIndex

# three batches; in the first no two sizes are the same, since torch.compile takes those for one number
LENGTHS = ((25, 17, 3), (11, 2, 0, 9, 4), (1, 30, 8))
no_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_encoder(num_layers: int = 2, dropout: float = 0.0) -> Encoder:
    torch.manual_seed(0)
    return Encoder(num_layers, EncoderSizes(20, 2, 40, 1e-12, dropout, dropout))


def states_and_gradients(encoder: Encoder, lengths: tuple[int, ...], all_rows: bool = False) -> list[Tensor]:
    """States of every other row, and the gradients of inputs and weights by them."""
    weight = next(encoder.parameters())
    generator = torch.Generator().manual_seed(len(lengths))
    rows, weights = (torch.randn(sum(lengths), 20, generator=generator).to(weight) for _ in range(2))
    given, needed_K = rows.requires_grad_(), torch.arange(0, sum(lengths), 2, device=rows.device)
    states = encoder(Packed(given, lengths), None if all_rows else needed_K).rows
    return [states, *torch.autograd.grad((states * weights).sum(), [given, *encoder.parameters()])]


@pytest.mark.parametrize(("checkpointing", "backend"), [(False, "aot_eager"), (True, "eager")])
def test_one_graph_serves_batches_of_any_size(checkpointing: bool, backend: str) -> None:
    eager, compiled = make_encoder().double(), make_encoder().double()
    compiled.compile_layers(backend)
    compiled.activation_checkpointing = checkpointing
    for lengths in LENGTHS:
        found, wanted = (states_and_gradients(encoder, lengths) for encoder in (compiled, eager))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)  # float64 rounding
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_graph_for_all_rows_is_another_one() -> None:
    """That the graphs are counted at all: an encoder without needed rows, and encoders beside each other."""
    encoders = [make_encoder(1) for _ in range(2)]
    for encoder in encoders:
        encoder.compile_layers("eager")
        for all_rows in (False, True):
            states_and_gradients(encoder, LENGTHS[0], all_rows)
    assert counters["stats"]["unique_graphs"] == 4


@pytest.mark.timeout(600)  # a C++ compiler, on a machine that may be busy
def test_compiled_layers_give_the_same_states_and_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the backend that runs use, with oneDNN's products, whatever their size."""
    monkeypatch.setattr(kernels, "_LARGE_PRODUCT", 0)
    monkeypatch.setattr(kernels, "_MKL_IS_FAST", False)
    monkeypatch.setattr(torch._inductor.config, "compile_threads", 1)
    eager, compiled = make_encoder(1), make_encoder(1)
    compiled.compile_layers()
    found, wanted = (states_and_gradients(encoder, LENGTHS[1]) for encoder in (compiled, eager))
    for mine, other in zip(found, wanted, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-5, atol=1e-6 * max(1.0, other.abs().max().item()))


def test_padded_attention_within_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on CUDA where no kernel for packed sequences serves."""
    padded = kernels.Choice("attention", kernels.SDPA_PADDED, "a test")
    monkeypatch.setattr(kernels, "attention", lambda *_: padded)
    eager, compiled = make_encoder(1).double(), make_encoder(1).double()
    compiled.compile_layers("eager")
    for lengths in LENGTHS:
        found, wanted = (states_and_gradients(encoder, lengths) for encoder in (compiled, eager))
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert counters["stats"]["unique_graphs"] == 1


def test_without_any_row_nothing_is_compiled() -> None:
    encoder = make_encoder(1)
    encoder.compile_layers("eager")
    assert encoder(Packed(torch.zeros(0, 20), (0, 0))).rows.shape == (0, 20)
    assert not counters["stats"]


def test_dropout_is_drawn_anew_and_as_the_seed_says() -> None:
    encoder = make_encoder(1, dropout=0.3)
    encoder.compile_layers("aot_eager")

    def run(seed: int) -> list[Tensor]:
        torch.manual_seed(seed)
        return states_and_gradients(encoder, LENGTHS[0])

    first = run(1)
    torch.testing.assert_close(run(1), first, rtol=0, atol=0)
    assert not torch.equal(run(2)[0], first[0])
    encoder.activation_checkpointing = True  # the backward pass draws the same masks again
    torch.testing.assert_close(run(1), first, rtol=1e-5, atol=1e-5)
    encoder.eval()
    assert torch.equal(run(1)[0], run(2)[0])


# --- attention as an operation


def example() -> tuple[Tensor, Tensor]:
    index = SequenceIndex((3, 0, 5, 1))
    qkv = torch.randn(9, 3, 2, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return qkv.requires_grad_(), index.on(torch.device("cpu"), "offsets")


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_the_gradient_of_attention(dropout: float) -> None:
    qkv, offsets = example()
    seed = torch.tensor([5]) if dropout else None
    assert torch.autograd.gradcheck(lambda given: attention_of_each(given, offsets, dropout, seed), (qkv,))
    torch.library.opcheck(attention_of_each, (qkv, offsets, dropout, seed))


def test_attention_is_that_of_a_call_a_sequence() -> None:
    qkv, offsets = example()
    wanted = SegmentAttention(SequenceIndex((3, 0, 5, 1)), qkv.device).each(qkv, 0.0)
    found = attention_of_each(qkv, offsets, 0.0, None)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-14)  # float64 rounding


def test_attention_drops_out_the_share_that_it_says() -> None:
    """The values are ones, and a query's probabilities add up to one: what is left is the share that is kept."""
    qkv = torch.randn(4000, 3, 2, 4, generator=torch.Generator().manual_seed(0))
    qkv[:, 2] = 1.0
    offsets = torch.arange(0, 4001, 10, dtype=torch.int32)
    out = attention_of_each(qkv, offsets, 0.25, torch.tensor([1]))
    assert out.mean().item() == pytest.approx(1.0, abs=0.02) and out.std() > 0.1
    assert not torch.equal(out[:10], out[10:20])  # another mask for each sequence
    other = attention_of_each(qkv, offsets, 0.25, torch.tensor([2]))
    assert not torch.equal(out, other)


def test_a_function_has_code_of_its_own() -> None:
    """Else all encoders share one limit of graphs."""
    copies = [compiled_layers._with_own_code(compiled_layers._run_traced) for _ in range(2)]
    assert copies[0].__code__ is not copies[1].__code__


@pytest.mark.gpu
@no_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_layers_on_a_gpu(dtype: torch.dtype) -> None:
    """Whatever kernel of attention serves there."""
    options: dict[str, Any] = {"device": "cuda", "dtype": dtype}
    sizes = EncoderSizes(64, 4, 128, 1e-12, 0.0, 0.0)
    found = []
    for is_compiled in (False, True):
        torch.manual_seed(0)
        encoder = Encoder(2, sizes).to(**options)
        if is_compiled:
            encoder.compile_layers()
        for lengths in LENGTHS:
            rows = torch.randn(sum(lengths), 64, generator=torch.Generator().manual_seed(1)).to(**options)
            given = rows.requires_grad_()
            states = encoder(Packed(given, lengths)).rows
            found.append((states, torch.autograd.grad(states.square().sum(), given)[0]))
    tolerance = 1e-4 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(found[3:], found[:3], rtol=tolerance, atol=tolerance)
    assert counters["stats"]["unique_graphs"] == 1
