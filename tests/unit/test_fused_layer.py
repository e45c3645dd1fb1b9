"""The model with fused kernels against the model without: same losses, same gradients, same dropped elements.

On a CPU the kernels run in Triton's interpreter, program after program, so models and batches are tiny. What is random
is drawn from the same seeds by the kernels and by their functions in torch (triton_kernels/reference.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from mvptr_ds.config import TaskConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import Batch, collate
from mvptr_ds.model import kernels
from mvptr_ds.model.encoder import Encoder
from mvptr_ds.model.fused_layer import Fused, linear_beside
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.triton_kernels import reference
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from mvptr_ds.tasks.entailment import EntailmentModule
from tests.support.tiny_models import TEXT_SLOTS, sample, tiny_model

triton = pytest.importorskip("triton", reason="triton is not installed")
ON_CPU = pytest.mark.skipif(not triton.knobs.runtime.interpret, reason="the interpreter is off where there is a GPU")
ON_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
DEVICES = [pytest.param("cpu", marks=ON_CPU), pytest.param("cuda", marks=[pytest.mark.gpu, ON_GPU])]
pytestmark = pytest.mark.timeout(120)
WEIGHTS = {
    "stage1": WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mcr_phrases=1.0, mlm=1.0),
    "stage2": WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mlm=1.0, vsc=1.0, wpg=1.0, wpg_cross=1.0, itm=1.0),
    "joint": WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0),
}
CLOSE = {"rtol": 1e-5, "atol": 1e-5}  # float32


def by_triton() -> ModuleType:
    return kernels.triton_module("functions")


def use(patch: pytest.MonkeyPatch, functions: ModuleType | None) -> None:
    """Lets the model take these functions on any device; None: torch's separate kernels."""
    patch.setattr(kernels, "fused_functions", lambda device, dtype: functions)


def small_batch() -> Batch:
    """Two samples; both tags of the first are masked, and each asks both regions of its image."""
    labels = {"class": 1}
    made = [sample(0, 0, 2, 1, 2, 2), sample(1, 1, 1, 1, 0, 1)]
    return collate([replace(one, labels=labels) for one in made])


def losses_and_gradients(task: str, p: float, device: str = "cpu", **execution: Any) -> dict[str, Tensor]:
    """Sums of the losses, and gradients of all weights that they reach, on the CPU."""
    model = tiny_model(hidden_dropout=p, attention_dropout=p)
    model.set_execution("packed", **execution)
    module: Any
    if task == "entailment":
        module = EntailmentModule(model, seed=0).to(device).train()
    else:
        module = PretrainingLosses(
            model, STAGES[task], WEIGHTS[task], TaskConfig(), max_text_slots=TEXT_SLOTS, max_steps=10, seed=0
        )
        module = module.to(device).train()
    torch.manual_seed(7)  # whatever draws seeds or elements begins with it
    batch = small_batch()
    if task == "entailment":
        loss, parts = module(batch, 0)
    else:
        parts = module.sums(batch, RandomDraws.keyed(0, 0, 0, len(batch), TEXT_SLOTS))
        loss = torch.stack([part.sum for part in parts.values()]).sum()
    loss.backward()
    found = {name: part.sum.detach() for name, part in parts.items()} | {"loss": loss.detach()}
    found |= {name: weight.grad for name, weight in module.named_weights() if weight.grad is not None}
    return {name: value.cpu() for name, value in found.items()}


@pytest.mark.parametrize("task", [*STAGES, "entailment"])
def test_without_dropout_the_fused_model_is_the_model(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, None)
    wanted = losses_and_gradients(task, 0.0)
    use(monkeypatch, reference)
    found = losses_and_gradients(task, 0.0)
    assert len(found) > 20
    torch.testing.assert_close(found, wanted, **CLOSE)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("task", "p"), [("stage2", 0.0), *((task, 0.3) for task in (*STAGES, "entailment"))])
def test_the_kernels_compute_the_reference_and_drop_the_same(
    task: str, p: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(monkeypatch, reference)
    wanted = losses_and_gradients(task, p, device)
    use(monkeypatch, by_triton())
    torch.testing.assert_close(losses_and_gradients(task, p, device), wanted, **CLOSE)


# --- dropout


def dropping_encoder(**execution: Any) -> Encoder:
    model = tiny_model(num_text_layers=2, hidden_dropout=0.3, attention_dropout=0.3).train()
    model.set_execution("packed", **execution)
    encoder: Encoder = model.text_encoder
    return encoder


def states_and_gradients(encoder: Encoder) -> list[Tensor]:
    rows = torch.randn(7, 16, generator=torch.Generator().manual_seed(3)).requires_grad_()
    out = encoder(Packed(rows, (4, 0, 3)), torch.tensor([0, 2, 6])).rows
    out.square().sum().backward()
    gradients = [rows.grad, *(weight.grad for weight in encoder.parameters())]
    return [out.detach(), *(gradient.clone() for gradient in gradients if gradient is not None)]


def test_a_layer_that_is_computed_again_drops_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where torch's own random state is not put back, as it need not be for the kernels."""
    use(monkeypatch, reference)
    torch.manual_seed(0)
    kept = states_and_gradients(dropping_encoder())
    assert len(kept) == 26
    torch.manual_seed(0)
    with monkeypatch.context() as patch:
        patch.setattr("mvptr_ds.model.encoder.checkpoint", partial(checkpoint, preserve_rng_state=False))
        again = states_and_gradients(dropping_encoder(activation_checkpointing=True))
    assert all(torch.equal(one, other) for one, other in zip(again, kept, strict=True))


def test_every_run_of_an_encoder_drops_others_and_a_resumed_one_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, reference)
    encoder = dropping_encoder()
    torch.manual_seed(0)
    states_and_gradients(encoder)
    state = torch.get_rng_state()  # what a checkpoint holds (checkpoints/rng.py)
    second, third = (states_and_gradients(encoder)[0] for _ in range(2))
    torch.set_rng_state(state)
    assert torch.equal(states_and_gradients(encoder)[0], second) and not torch.equal(second, third)


def test_layers_and_their_parts_drop_differently(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []

    class Noting:
        """The reference, which notes the call numbers that it gets."""

        bias_gelu = staticmethod(reference.bias_gelu)

        @staticmethod
        def dropout_add_norm(*given: Any) -> Tensor:
            calls.append(given[6])
            return reference.dropout_add_norm(*given)

        @staticmethod
        def short_attention(*given: Any) -> Tensor:
            calls.append(given[3])
            return reference.short_attention(*given)

    use(monkeypatch, Noting)  # type: ignore[arg-type]
    states_and_gradients(dropping_encoder())
    assert sorted(calls) == list(range(6))  # three of each of two layers


def test_evaluation_draws_no_random_number(monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, reference)
    encoder, state = dropping_encoder().eval(), torch.get_rng_state()
    first, second = (states_and_gradients(encoder)[0] for _ in range(2))
    assert torch.equal(first, second) and torch.equal(torch.get_rng_state(), state)


# --- what is chosen


def test_a_long_sequence_takes_the_attention_of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rows = dropping_encoder().eval(), torch.randn(131, 16, generator=torch.Generator().manual_seed(3))
    use(monkeypatch, None)
    wanted = encoder(Packed(rows, (129, 2))).rows
    use(monkeypatch, reference)
    torch.testing.assert_close(encoder(Packed(rows, (129, 2))).rows, wanted, **CLOSE)


def test_compiled_encoders_take_no_fused_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    encoder, rows = dropping_encoder().eval(), torch.randn(5, 16, generator=torch.Generator().manual_seed(3))
    use(monkeypatch, None)
    wanted = encoder(Packed(rows, (3, 2))).rows
    use(monkeypatch, SimpleNamespace())  # type: ignore[arg-type]  # to ask it for any kernel raises
    with pytest.raises(AttributeError):
        encoder(Packed(rows, (3, 2)))
    encoder.compile_layers("eager")
    torch.testing.assert_close(encoder(Packed(rows, (3, 2))).rows, wanted, **CLOSE)


@pytest.mark.parametrize("hindrance", ["autocast", "columns"])
def test_where_the_kernels_do_not_fit_torch_serves(hindrance: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use(monkeypatch, reference)
    rows = torch.zeros(1, 8200 if hindrance == "columns" else 8)
    assert Fused.on(torch.zeros(1, 8), drops=True) is not None
    with torch.autocast("cpu", enabled=hindrance == "autocast"):
        assert Fused.on(rows, drops=True) is None


# --- the product beside the residual


@pytest.mark.parametrize("reads", ["both", "product", "residual"])
def test_linear_beside(reads: str) -> None:
    """As a product and the states themselves, whichever of both a gradient reaches."""
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((3, 4), (5, 4), (5,))]

    def run(function: Callable[..., tuple[Tensor, Tensor]]) -> list[Tensor | None]:
        leaves = [value.clone().requires_grad_() for value in given]
        out_NO, states_ND = function(*leaves)
        total = out_NO.new_zeros(())
        total = total + (out_NO.sin().sum() if reads != "residual" else 0)
        total = total + (states_ND.cos().sum() if reads != "product" else 0)
        return list(torch.autograd.grad(total, leaves, allow_unused=True))

    wanted = run(lambda states, weight, bias: (torch.nn.functional.linear(states, weight, bias), states))
    torch.testing.assert_close(run(linear_beside), wanted)


def test_the_report_names_what_serves() -> None:
    device, half = torch.device("cuda:0"), torch.bfloat16

    def said(execution: str, compiled: bool) -> dict[str, kernels.Choice]:
        lines = kernels.report(device, half, 0.1, 64, execution, compiled, False)
        return {line.operation: line for line in lines}

    row_by_row, eager, compiled = "bias, GELU, dropout, residual", said("packed", False), said("packed", True)
    assert eager[row_by_row].implementation == eager["attention"].implementation == kernels.TRITON
    assert "model.compile=off" in eager[row_by_row].reason and "128 rows" in eager["attention"].reason
    assert compiled[row_by_row].implementation == "torch.compile, a graph of each encoder"
    assert compiled["attention"] == kernels.attention(device, half, 0.1, 64)
    assert "take packed rows" in said("padded", False)[row_by_row].reason
    assert eager["word heads"].implementation == compiled["word heads"].implementation == kernels.TRITON
