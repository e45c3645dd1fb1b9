"""LAMB on ordinary parameters against a reference; on ZeRO's partitions: tests/distributed/test_lamb_ranks.py."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from mvptr_ds.optim.lamb import Lamb
from mvptr_ds.optim.optimizer import parameter_groups
from tests.support.lamb_reference import BETA1, BETA2, DECAY, EPS, Reference

SHAPES = ((5, 3), (7,), (1,), (2, 3, 2, 2), (4, 4))
RATES = (0.01, 0.03, 0.02, 0.0, 0.01)


def parameters(dtype: torch.dtype, device: str = "cpu") -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in SHAPES]
    tensors[-1].zero_()  # a matrix of zeros: its ratio is 1, or it would never move
    return [nn.Parameter(tensor.to(device, dtype)) for tensor in tensors]


def build(tensors: list[nn.Parameter]) -> Lamb:
    groups = parameter_groups([(str(n), p) for n, p in enumerate(tensors)], DECAY)
    return Lamb(groups, lr=RATES[0], betas=(BETA1, BETA2), eps=EPS)


def gradients(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(100 + step)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0**-n for n, shape in enumerate(SHAPES)]


def give(optimizer: Lamb, tensors: list[nn.Parameter], step: int) -> None:
    for group in optimizer.param_groups:
        group["lr"] = RATES[step]
    for parameter, gradient in zip(tensors, gradients(step), strict=True):
        parameter.grad = gradient.to(parameter)


def take(optimizer: Lamb, tensors: list[nn.Parameter], step: int) -> None:
    give(optimizer, tensors, step)
    optimizer.step()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_each_tensor_moves_as_the_paper_says(dtype: torch.dtype, tolerance: float) -> None:
    tensors = parameters(dtype)
    reference, optimizer, first = Reference(list(tensors)), build(tensors), [p.detach().clone() for p in tensors]
    for step, rate in enumerate(RATES):
        take(optimizer, tensors, step)
        reference.step(gradients(step), rate)
        for ours, theirs in zip(tensors, reference.weights, strict=True):
            torch.testing.assert_close(ours.detach().double(), theirs, rtol=tolerance, atol=tolerance)
    assert all(float((p.detach() - before).abs().max()) > 1e-3 for p, before in zip(tensors, first, strict=True))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("counts_on", ["cuda", "cpu"])
def test_on_a_gpu_as_on_a_cpu(counts_on: str) -> None:
    """Also with the steps counted on the host, where DeepSpeed leaves a checkpoint's count; neither waits."""
    ours, theirs = parameters(torch.float32, "cuda"), parameters(torch.float32)
    optimizers = build(ours), build(theirs)
    for step in range(len(RATES)):
        take(optimizers[1], theirs, step)
        give(optimizers[0], ours, step)
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizers[0].step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for state in optimizers[0].state.values():
            state["step"] = state["step"].to(counts_on)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.detach().cpu(), other.detach(), rtol=1e-5, atol=1e-6)


def test_a_matrix_moves_by_its_norm_times_the_learning_rate() -> None:
    """Whatever the gradient's size; what has one dimension moves as by Adam."""
    for size in (1e-3, 1e3):
        matrix, bias = nn.Parameter(torch.full((3, 3), 2.0)), nn.Parameter(torch.full((3,), 2.0))
        optimizer = Lamb([matrix, bias], lr=0.1, weight_decay=0.0)
        matrix.grad, bias.grad = torch.eye(3) * size, torch.full((3,), size)
        optimizer.step()
        assert float((matrix.detach() - 2.0).norm()) == pytest.approx(0.1 * 6.0, rel=1e-5)
        torch.testing.assert_close(bias.detach(), torch.full((3,), 1.9), rtol=1e-4, atol=0)


def test_what_has_no_gradient_stays() -> None:
    first, second = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([first, second], lr=0.1)
    second.grad = torch.ones(2, 2)
    optimizer.step()
    assert torch.equal(first, torch.ones(2, 2)) and not torch.equal(second, torch.ones(2, 2))
    assert first not in optimizer.state
    second.grad = None
    optimizer.step()
    assert optimizer.state[second]["step"] == 1


def test_a_resumed_one_goes_on_to_the_bit() -> None:
    straight, stopped = parameters(torch.float32), parameters(torch.float32)
    optimizer, before = build(straight), build(stopped)
    for step in range(len(RATES)):
        take(optimizer, straight, step)
    for step in range(2):
        take(before, stopped, step)
    after = build(stopped)
    after.load_state_dict(before.state_dict())
    for step in range(2, len(RATES)):
        take(after, stopped, step)
    assert all(torch.equal(one, two) for one, two in zip(straight, stopped, strict=True))


def test_the_norms_of_large_tensors() -> None:
    """float32's own sum is 1e-4 off here, so that ranks which share a tensor would differ from one that has it."""
    generator = torch.Generator().manual_seed(0)
    large = nn.Parameter(torch.randn(4000, 1000, generator=generator))
    before = large.detach().double()
    optimizer = Lamb([large], lr=0.1, weight_decay=0.0)
    large.grad = torch.ones_like(large)
    optimizer.step()
    moved = float((large.detach().double() - before).norm())
    assert moved == pytest.approx(0.1 * float(before.norm()), rel=1e-6)


def test_a_closure_gives_the_loss() -> None:
    weight = nn.Parameter(torch.ones(2, 2))
    optimizer = Lamb([weight], lr=0.1)

    def loss() -> Tensor:
        value = weight.square().sum()
        value.backward()
        return value

    assert optimizer.step(loss).item() == 4.0 and weight.square().sum().item() < 4.0
