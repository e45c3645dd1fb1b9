"""Log probabilities of picked classes against log_softmax of all logits: values, gradients, parts, padded classes.

Legend: K rows, C classes, P picked pairs.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.data.collate import Batch
from mvptr_ds.model import kernels, picked_classes
from mvptr_ds.model.kernels import JoiningLinear
from mvptr_ds.model.triton_kernels import reference
from tests.support.tiny_models import tiny_model, whole_batch
from tests.unit.test_task import build

NUM_CLASSES = 11
HALF = torch.bfloat16


def inputs(num: int, dtype: torch.dtype) -> list[Tensor]:
    generator = torch.Generator().manual_seed(num)
    sizes = (num, 5), (NUM_CLASSES, 5), (NUM_CLASSES,)
    return [torch.randn(*size, generator=generator).to(dtype).requires_grad_() for size in sizes]


def pairs(num: int) -> tuple[Tensor, Tensor]:
    """Rows in no order, some with several pairs, one of them twice, others with none."""
    if not num:
        return torch.empty(0, dtype=torch.int64), torch.empty(0, dtype=torch.int64)
    rows_P = torch.tensor([num - 1, 0, 0, num - 1, num // 2])
    return rows_P, torch.tensor([3, 0, 10, 3, 7])


def plainly(hidden: Tensor, weight: Tensor, bias: Tensor, rows_P: Tensor, classes_P: Tensor) -> Tensor:
    logits = F.linear(hidden, weight, bias)
    return (logits.float() if logits.dtype == HALF else logits).log_softmax(-1)[rows_P, classes_P]


@pytest.mark.parametrize("num", [0, 1, 7])
@pytest.mark.parametrize("at_once", [2, 100])
@pytest.mark.parametrize("dtype", [torch.float64, HALF])
def test_picked_pairs(num: int, at_once: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picked_classes, "_LOGITS_AT_ONCE", at_once * NUM_CLASSES)
    given, picked = inputs(num, dtype), pairs(num)
    found, wanted = picked_classes.log_p_of_pairs(*given, *picked), plainly(*given, *picked)
    # bfloat16: the logits are rounded alike in both, the rest is float32
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    weights = torch.linspace(-1, 2, len(found), dtype=found.dtype)
    grads = [torch.autograd.grad((x * weights).sum(), given) for x in (found, wanted)]
    # bfloat16: gradients of logits, and sums of parts, are rounded
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.05)


@pytest.mark.parametrize("num", [0, 1, 7])
def test_fused_pairs_come_in_any_order(num: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "fused_functions", lambda device, dtype: reference)
    given, picked = inputs(num, torch.float64), pairs(num)
    found, wanted = picked_classes.log_p_of_pairs(*given, *picked), plainly(*given, *picked)
    weights = torch.linspace(-1, 2, len(found), dtype=found.dtype)
    grads = [torch.autograd.grad((x * weights).sum(), given) for x in (found, wanted)]
    torch.testing.assert_close((found, *grads[0]), (wanted, *grads[1]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("at_once", [2, 100])
def test_cross_entropy(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(picked_classes, "_LOGITS_AT_ONCE", at_once * NUM_CLASSES)
    given, labels = inputs(7, torch.float64), torch.tensor([0, 10, 4, 4, 9, 1, 2])
    found, wanted = picked_classes.nll(*given, labels), F.cross_entropy(F.linear(*given), labels, reduction="none")
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)
    grads = [torch.autograd.grad(x.sum(), given) for x in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12)


def test_parts_are_as_small_as_they_say(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(kernels, "linear", lambda h, w, b=None: (seen.append(len(h)), F.linear(h, w, b))[1])
    monkeypatch.setattr(kernels, "linear_gradients", lambda g, h, w: (g @ w, g.T @ h, g.sum(0)))
    hidden, weight, bias = inputs(7, torch.float32)
    for at_once, wanted in ((3, [3, 3, 1] * 2), (7, [7])):  # computed again in the backward pass, or kept
        monkeypatch.setattr(picked_classes, "_LOGITS_AT_ONCE", at_once * NUM_CLASSES)
        picked_classes.nll(hidden, weight, bias, torch.zeros(7, dtype=torch.int64)).sum().backward()
        assert seen == wanted
        seen.clear()


@pytest.mark.parametrize("dtype", [torch.float64, HALF])
@pytest.mark.parametrize("num_rows", [NUM_CLASSES, 64])  # of the weight: padded, or with rows of something else behind
def test_padded_classes_get_no_probability_and_no_gradient(
    dtype: torch.dtype, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    hidden, weight, bias = inputs(7, dtype)
    weight = torch.cat([weight.detach(), weight.new_full((num_rows - NUM_CLASSES, 5), 9.0)]).requires_grad_()
    wanted = plainly(hidden, weight[:NUM_CLASSES], bias, *pairs(7))
    monkeypatch.setattr(kernels, "_aligns", lambda device: True)
    found = picked_classes.log_p_of_pairs(hidden, weight, bias, *pairs(7))
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12 if dtype == torch.float64 else 1e-5)
    grads = [torch.autograd.grad(x.sum(), (hidden, weight, bias)) for x in (found, wanted)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-12 if dtype == torch.float64 else 0.05)
    assert not grads[0][1][NUM_CLASSES:].any()


def test_sizes_on_cuda() -> None:
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    sizes = [kernels.aligned_classes(num, cuda) for num in (30_522, 55_529, 64)]
    assert sizes == [30_528, 55_552, 64] and kernels.aligned_inputs(2_054, cuda) == 2_056
    assert kernels.aligned_classes(30_522, cpu) == 30_522 and kernels.aligned_inputs(2_054, cpu) == 2_054


def test_inputs_side_by_side_and_zeros_behind_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = JoiningLinear(5, 3).double()
    parts = torch.randn(4, 2, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    wanted = F.linear(torch.cat(parts, -1), layer.weight, layer.bias)
    for aligns in (False, True):
        monkeypatch.setattr(kernels, "_aligns", lambda device, aligns=aligns: aligns)
        torch.testing.assert_close(layer(*parts), wanted, rtol=0, atol=1e-14)
        (grad,) = torch.autograd.grad(layer(*parts).square().sum(), layer.weight)
        assert grad.shape == (3, 5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("num_rows", [36, 100])  # the table ends within the padded words, or goes on
def test_a_stage_has_the_losses_and_gradients_of_unpadded_products(
    tied: bool, num_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losses_and_gradients(batch: Batch) -> dict[str, Tensor]:
        task = build("stage1", model=tiny_model(num_rows=num_rows, tie_word_heads=tied)).double()
        out = task(batch, 0)
        out.loss.backward()
        grads = {name: p.grad for name, p in task.named_parameters() if p.grad is not None}
        return {name: part.sum for name, part in out.parts.items()} | grads

    wanted = losses_and_gradients(whole_batch())
    monkeypatch.setattr(kernels, "_aligns", lambda device: True)
    torch.testing.assert_close(losses_and_gradients(whole_batch()), wanted, rtol=0, atol=1e-12)
