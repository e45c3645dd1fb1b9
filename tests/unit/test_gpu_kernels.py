"""The kernels of CUDA against plain attention in float64, and the packed execution against the padded one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from mvptr_ds.model import kernels
from mvptr_ds.model.attention import _KERNELS, SegmentAttention
from mvptr_ds.model.packed import Packed
from mvptr_ds.model.sequence_index import SequenceIndex
from tests.support.tiny_models import tiny_model

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
LENGTHS = (7, 1, 64, 20, 33)
HALF = (torch.float16, torch.bfloat16)
TOLERANCE = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of values around 1


def inputs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(sum(LENGTHS), 3, 4, 64, generator=generator)
    weights = torch.randn(sum(LENGTHS), 4, 64, generator=generator)
    return rows.to("cuda", dtype), weights.to("cuda", dtype)


def states_and_gradients(attend: Any, rows: Tensor, weights: Tensor) -> list[Tensor]:
    rows = rows.detach().requires_grad_()
    out = attend(rows)
    return [out.double().cpu(), torch.autograd.grad((out * weights).sum(), rows)[0].double().cpu()]


def installed(implementation: str) -> None:
    if implementation == kernels.FLASH_ATTN:
        pytest.importorskip("flash_attn", reason="flash_attn is not installed")
    if implementation == kernels.TORCH_FLASH and not kernels._has_varlen():
        pytest.skip(f"torch {torch.__version__} has no varlen_attn")


@pytest.mark.parametrize(
    ("implementation", "dtype"),
    [
        *((kernels.SDPA_EACH, dtype) for dtype in TOLERANCE),
        *((kernels.SDPA_PADDED, dtype) for dtype in TOLERANCE),
        *((kernels.TORCH_FLASH, dtype) for dtype in HALF),
        *((kernels.FLASH_ATTN, dtype) for dtype in HALF),
    ],
    ids=lambda value: str(value).replace("torch.", "").replace(" ", "_"),
)
def test_every_kernel_attends_within_each_sequence(implementation: str, dtype: torch.dtype) -> None:
    installed(implementation)
    rows, weights = inputs(dtype)
    segments = SegmentAttention(SequenceIndex(LENGTHS), rows.device)
    found = states_and_gradients(lambda given: _KERNELS[implementation](segments, given, 0.0), rows, weights)
    plain = SegmentAttention(SequenceIndex(LENGTHS), torch.device("cpu"))
    wanted = states_and_gradients(lambda given: plain.each(given, 0.0), rows.double().cpu(), weights.double().cpu())
    torch.testing.assert_close(found, wanted, rtol=0, atol=TOLERANCE[dtype])


def test_half_precision_takes_flash_without_waiting_for_the_device() -> None:
    """Lengths are on the host, so an encoder asks the device for nothing."""
    installed(kernels.TORCH_FLASH)
    model = tiny_model(hidden_size=64, num_attention_heads=1).to("cuda", torch.bfloat16).eval()
    assert kernels.attention(model.device, torch.bfloat16, 0.0, 64).implementation != kernels.SDPA_PADDED
    ids = Packed(torch.randint(0, 30, (30,)).cuda(), (9, 5, 16))
    model.encode_text(ids)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.no_grad():
            model.encode_text(ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_dropout_of_attention_keeps_the_mean() -> None:
    rows, _ = inputs(torch.bfloat16)
    segments = SegmentAttention(SequenceIndex((64, 61)), rows.device)
    kept = segments(rows, 0.0).float()
    mean = torch.stack([segments(rows, 0.3).float() for _ in range(200)]).mean(0)
    assert not torch.equal(mean, kept)
    assert (mean - kept).abs().mean().item() < 0.1 * kept.abs().mean().item()


def test_apex_normalises_as_torch() -> None:
    if kernels.layer_norm(torch.device("cuda")).implementation != kernels.APEX_NORM:
        pytest.skip(kernels.layer_norm(torch.device("cuda")).reason)
    for dtype, tolerance in TOLERANCE.items():
        norm = kernels.LayerNorm(64, eps=1e-12).to("cuda", dtype)
        x = torch.randn(9, 64, device="cuda", dtype=dtype)
        torch.testing.assert_close(norm(x), torch.nn.LayerNorm.forward(norm, x), rtol=0, atol=tolerance)
