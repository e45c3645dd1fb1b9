"""Which kernel serves, the heads over many classes, and the one gradient of the embedding table."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.config import TaskConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.model import kernels
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES
from tests.support.tiny_models import TEXT_SLOTS, tiny_model, whole_batch

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
HALF, FULL = torch.bfloat16, torch.float32
STAND_INS = ("apex", "flash_attn", "amp_C", "fused_layer_norm_cuda")
FLASH_ATTN = "def flash_attn_varlen_qkvpacked_func(): ..."
UNDEFINED = "raise ImportError('amp_C.so: undefined symbol: _ZN3c10\\nand more')"  # as built for another torch


@pytest.fixture(autouse=True)
def _fresh_choices() -> Any:
    """What is installed is looked up once a process; these tests change it."""
    caches = kernels._attention, kernels.apex_lacks, kernels.flash_attn_lacks, kernels.triton_lacks
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()
    for name in [name for name in sys.modules if name.split(".")[0] in STAND_INS]:
        del sys.modules[name]


def installed(folder: Path, monkeypatch: pytest.MonkeyPatch, **files: str) -> None:
    """Importable modules with this content; `__` stands for a folder's slash."""
    for name, content in files.items():
        path = folder / f"{name.replace('__', '/')}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.relative_to(folder).parents[:-1]:
            (folder / parent / "__init__.py").touch()
        path.write_text(content)
    monkeypatch.syspath_prepend(str(folder))


# --- attention


@pytest.mark.parametrize(
    ("device", "dtype", "dropout", "wanted"),
    [
        (CPU, FULL, 0.0, kernels.SDPA_EACH),
        (CPU, HALF, 0.1, kernels.SDPA_EACH),
        (CUDA, FULL, 0.0, kernels.SDPA_PADDED),
        (CUDA, HALF, 0.1, kernels.SDPA_PADDED),
        (CUDA, torch.float16, 0.0, kernels.TORCH_FLASH),
        (CUDA, HALF, 0.0, kernels.TORCH_FLASH),
    ],
)
def test_attention_by_device_dtype_and_dropout(
    device: torch.device, dtype: torch.dtype, dropout: float, wanted: str
) -> None:
    assert kernels.attention(device, dtype, dropout, 64).implementation == wanted


@pytest.mark.parametrize("head_size", [4, 100, 264])
def test_heads_that_flash_kernels_do_not_take(head_size: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, flash_attn=FLASH_ATTN)
    choice = kernels.attention(CUDA, HALF, 0.0, head_size)
    assert choice.implementation == kernels.SDPA_PADDED and f"these have {head_size}" in choice.reason


def test_gpus_before_ampere_get_no_flash_kernel(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, flash_attn=FLASH_ATTN)
    monkeypatch.setattr(kernels, "_before_ampere", lambda device: True)  # as on a V100, where "auto" takes fp16
    choice = kernels.attention(CUDA, torch.float16, 0.0, 64)
    assert choice.implementation == kernels.SDPA_PADDED and "Ampere" in choice.reason


def test_flash_attn_serves_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, flash_attn=FLASH_ATTN)
    assert kernels.attention(CUDA, HALF, 0.1, 64).implementation == kernels.FLASH_ATTN
    assert kernels.attention(CUDA, FULL, 0.1, 64).implementation == kernels.SDPA_PADDED
    assert kernels.attention(CPU, HALF, 0.1, 64).implementation == kernels.SDPA_EACH


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "flash_attn is not installed"),
        # what flash-attn-4 leaves: a folder without a module in it
        ({"flash_attn/cute/interface.py": ""}, "the flash_attn that is installed has no flash_attn_varlen_qkvpacked_f"),
        # version 1 named it otherwise
        ({"flash_attn.py": "def flash_attn_unpadded_qkvpacked_func(): ..."}, "has no flash_attn_varlen_qkvpacked_func"),
        ({"flash_attn.py": UNDEFINED}, "(ImportError: amp_C.so: undefined symbol: _ZN3c10)"),
        ({"flash_attn/__init__.py": "from .flash_attn_interface import x"}, "(ModuleNotFoundError: No module named"),
        ({"flash_attn.py": "import torch; torch.no_such"}, "(AttributeError: module 'torch' has no attribute"),
    ],
)
@pytest.mark.parametrize(("dropout", "wanted"), [(0.0, kernels.TORCH_FLASH), (0.1, kernels.SDPA_PADDED)])
def test_a_flash_attn_that_does_not_serve_is_passed_over(
    files: dict[str, str], reason: str, dropout: float, wanted: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(content)
    monkeypatch.syspath_prepend(str(tmp_path))
    choice = kernels.attention(CUDA, HALF, dropout, 64)
    assert choice.implementation == wanted and reason in choice.reason, choice


# --- our own kernels


def test_triton_serves_where_it_is_installed() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert kernels.fused(CUDA, HALF) == kernels.Choice("fused kernels", kernels.TRITON, "triton is installed")
    assert kernels.triton_module("bias_gelu").bias_gelu.__name__ == "bias_gelu"


@pytest.mark.parametrize(
    ("device", "dtype", "reason"),
    [
        (CPU, HALF, "the device is cpu"),
        (CUDA, torch.float64, "do not take float64"),
        (CUDA, HALF, "triton is not installed"),
    ],
)
def test_without_triton_torch_serves(
    device: torch.device, dtype: torch.dtype, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)  # as where it cannot be found
    choice = kernels.fused(device, dtype)
    assert choice.implementation == kernels.TORCH and reason in choice.reason


def test_gpus_before_ampere_get_no_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_before_ampere", lambda device: True)
    assert "Ampere" in kernels.fused(CUDA, HALF).reason


def test_a_triton_that_cannot_be_imported_is_passed_over(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "triton"]:
        monkeypatch.delitem(sys.modules, name)
    installed(tmp_path, monkeypatch, triton="raise ImportError('libtriton.so: undefined symbol')")
    choice = kernels.fused(CUDA, HALF)
    assert choice.implementation == kernels.TORCH and "(ImportError: libtriton.so: undefined" in choice.reason


# --- layer norm: a stand-in with the signatures of NVIDIA's apex (apex/normalization/fused_layer_norm.py)

APEX = """
import torch
calls = []

def fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    assert input.dtype == weight.dtype == bias.dtype
    return _norm("plain", input, weight, bias, normalized_shape, eps)

def mixed_dtype_fused_layer_norm_affine(input, weight, bias, normalized_shape, eps=1e-6, memory_efficient=False):
    return _norm("mixed", input, weight, bias, normalized_shape, eps).to(weight.dtype)

def _norm(kind, input, weight, bias, normalized_shape, eps):
    calls.append((kind, tuple(input.shape), normalized_shape, eps))
    return torch.nn.functional.layer_norm(input, normalized_shape, weight.to(input.dtype), bias.to(input.dtype), eps)
"""


def test_apex_normalises_where_it_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, apex__normalization__fused_layer_norm=APEX, fused_layer_norm_cuda="")
    choice = kernels.layer_norm(CUDA)
    assert (choice.implementation, choice.reason) == (kernels.APEX_NORM, "apex is installed")
    assert kernels.layer_norm(CPU).implementation == kernels.TORCH_NORM
    monkeypatch.setattr(kernels, "layer_norm", lambda device: choice)  # as if this device were CUDA
    norm = kernels.LayerNorm(6, eps=1e-12)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(norm(x), F.layer_norm(x, (6,), norm.weight, norm.bias, 1e-12))
    assert norm(x.bfloat16()).dtype == torch.bfloat16
    calls = sys.modules["apex.normalization.fused_layer_norm"].calls  # type: ignore[attr-defined]
    assert calls == [(kind, (4, 6), torch.Size([6]), 1e-12) for kind in ("plain", "mixed")]


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "apex is not installed"),
        ({"apex__interfaces": "raise RuntimeError('imported')"}, "the apex that is installed is not NVIDIA's"),
        ({"apex__normalization__fused_layer_norm": APEX}, "apex was built without its CUDA extensions"),
    ],
)
def test_what_is_no_apex(files: dict[str, str], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(tmp_path, monkeypatch, **files)
    choice = kernels.layer_norm(CUDA)
    assert (choice.implementation, choice.reason) == (kernels.TORCH_NORM, reason)
    assert "apex" not in sys.modules  # PyPI's apex is another project: nothing runs it


@pytest.mark.parametrize(
    ("extension", "module", "reason"),
    [
        (UNDEFINED, APEX, "apex is installed, but fused_layer_norm_cuda cannot be imported beside torch"),
        ("", "import torch; torch.no_such", "apex is installed, but apex.normalization.fused_layer_norm cannot be"),
        ("", "def fused_layer_norm_affine(): ...", "has no mixed_dtype_fused_layer_norm_affine"),
    ],
)
def test_an_apex_that_does_not_serve_is_passed_over(
    extension: str, module: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = {"apex__normalization__fused_layer_norm": module, "fused_layer_norm_cuda": extension}
    installed(tmp_path, monkeypatch, **files)
    choice = kernels.layer_norm(CUDA)
    assert choice.implementation == kernels.TORCH_NORM and reason in choice.reason, choice


def test_layer_norm_is_torchs_in_state_and_values() -> None:
    ours, theirs = kernels.LayerNorm(6), torch.nn.LayerNorm(6)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    x = torch.randn(3, 6)
    assert torch.equal(ours(x), theirs(x))


# --- linear layers


@pytest.mark.parametrize(
    ("device", "dtype", "wanted"),
    [
        (CPU, FULL, kernels.ONEDNN_LINEAR),
        (CPU, HALF, kernels.TORCH_LINEAR),
        (CPU, torch.float64, kernels.TORCH_LINEAR),
        (CUDA, FULL, kernels.TORCH_LINEAR),
    ],
)
def test_linear_layers_by_device_and_dtype(
    device: torch.device, dtype: torch.dtype, wanted: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "_MKL_IS_FAST", False)
    assert kernels.linear_product(device, dtype).implementation == wanted


@pytest.mark.parametrize("vendor", ["GenuineIntel", "AuthenticAMD"])
def test_a_processor_of_intel_multiplies_by_mkl(vendor: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    is_intels = kernels._processor_is_intels(str(tmp_path / "cpuinfo"))
    assert is_intels == (vendor == "GenuineIntel") and not kernels._processor_is_intels(str(tmp_path / "none"))
    monkeypatch.setattr(kernels, "_MKL_IS_FAST", is_intels)
    wanted = kernels.TORCH_LINEAR if is_intels else kernels.ONEDNN_LINEAR
    assert kernels.linear_product(CPU, FULL).implementation == wanted


@pytest.mark.parametrize("shape", [(3, 7, 40), (21, 40), (1, 40)])
@pytest.mark.parametrize("with_bias", [True, False])
def test_onednns_products_are_torchs(shape: tuple[int, ...], with_bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[torch.Size] = []
    product = kernels._onednn
    monkeypatch.setattr(kernels, "_LARGE_PRODUCT", 0)
    monkeypatch.setattr(kernels, "_MKL_IS_FAST", False)
    monkeypatch.setattr(kernels, "_onednn", lambda *inputs: (used.append(inputs[0].shape), product(*inputs))[1])
    generator = torch.Generator().manual_seed(len(shape))
    states, weight = (torch.randn(*size, generator=generator).requires_grad_() for size in (shape, (24, 40)))
    bias = torch.randn(24, generator=generator).requires_grad_() if with_bias else None
    inputs = [states, weight, *([bias] if bias is not None else [])]
    out = kernels.linear(states, weight, bias)
    weights = torch.randn(out.shape, generator=generator)
    found = [out, *torch.autograd.grad(out, inputs, weights)]
    doubled = [x.detach().double().requires_grad_() for x in inputs]
    wanted = [F.linear(*doubled)]
    wanted += torch.autograd.grad(wanted[0], doubled, weights.double())
    torch.testing.assert_close(found, [x.float() for x in wanted], rtol=1e-5, atol=1e-5)
    assert len(used) == 3
    # what needs no gradient is not computed
    used.clear()
    kernels.linear(states.detach(), weight, bias).sum().backward()
    assert len(used) == 2 and weight.grad is not None


def test_where_torch_multiplies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small products (making oneDNN's kernel would cost more), empty ones, other dtypes, and under autocast."""

    def refuse(*_: Any) -> Tensor:
        raise AssertionError("oneDNN was asked")

    monkeypatch.setattr(kernels, "_onednn", refuse)
    monkeypatch.setattr(kernels, "_MKL_IS_FAST", False)
    layer = kernels.Linear(2048, 2048)
    assert layer(torch.ones(0, 2048)).shape == (0, 2048) and kernels.Linear(8, 8)(torch.ones(9, 8)).shape == (9, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(torch.ones(4, 2048)).dtype == torch.bfloat16
    assert layer.double()(torch.ones(4, 2048, dtype=torch.float64)).dtype == torch.float64
    with pytest.raises(AssertionError, match="oneDNN was asked"):
        layer.float()(torch.ones(4, 2048))


# --- the embedding table


def test_the_tables_gradient_is_that_of_separate_lookups() -> None:
    model = tiny_model().double()
    table = model.embeddings.word_embeddings.weight
    text, tags = Packed(torch.tensor([3, 31, 3]), (3,)), Packed(torch.tensor([4, 3]), (1, 1))
    weights = [torch.randn(num, 16, dtype=torch.float64) for num in (3, 2, 30, 6)]

    def gradient(*parts: Tensor) -> Tensor:
        total = sum((part * weight).sum() for part, weight in zip(parts, weights, strict=False))
        return torch.autograd.grad(total, table)[0]  # type: ignore[arg-type]

    rows = model.look_up(text, tags, phrases=True)
    assert rows.phrases_PD is not None
    found = gradient(rows.text_ND, rows.tags_ND, rows.words_WD, rows.phrases_PD)
    torch.testing.assert_close(
        found, gradient(table[text.rows], table[tags.rows], table[:30], table[model.phrase_rows]), rtol=0, atol=1e-14
    )
    rows = model.look_up(text, tags)
    assert rows.phrases_PD is None
    only_rows = gradient(rows.text_ND)
    assert only_rows.abs().sum(1).nonzero().flatten().tolist() == [3, 31]
    rows = model.look_up(text, tags)
    only_words = torch.autograd.grad((rows.words_WD * weights[2]).sum(), table)[0]
    assert torch.equal(only_words[:30], weights[2]) and not only_words[30:].any()


def test_a_step_writes_the_tables_gradient_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Source: docs/performance.md; autograd alone wrote one for each of three lookups and two heads."""
    sizes: list[tuple[int, ...]] = []
    backward = kernels.TableLookup.backward

    def counting(ctx: Any, *grads: Tensor | None) -> Any:
        out = backward(ctx, *grads)
        sizes.append(tuple(out[0].shape))
        return out

    monkeypatch.setattr(kernels.TableLookup, "backward", staticmethod(counting))
    weights = WeightsConfig(mcr_tags=1.0, mlm=1.0, mcr_regions=1.0, mcr_phrases=1.0)
    task = PretrainingLosses(
        tiny_model(), STAGES["stage1"], weights, TaskConfig(), max_text_slots=TEXT_SLOTS, max_steps=1, seed=0
    )
    loss = task(whole_batch(), 0).loss
    writers = {type(node).__name__ for node in _graph(loss)} & {"EmbeddingBackward0", "SliceBackward0"}
    loss.backward()
    assert sorted(sizes) == [(16, 16), (16, 16), (36, 16)] and not writers  # two of the position embeddings


def _graph(loss: Tensor) -> set[Any]:
    seen: set[Any] = set()
    todo = [loss.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [parent for parent, _ in node.next_functions]
    return seen


# --- the report


def test_the_report_names_each_operation_once_with_its_reason() -> None:
    lines = kernels.report(CPU, FULL, 0.1, 64, "packed", compiled=False, checkpointing=True)
    assert len({line.operation for line in lines}) == len(lines) == 8
    text = "\n".join(map(str, lines))
    assert "attention: scaled_dot_product_attention, a call a sequence (the device is cpu)" in text
    assert "activations: computed again in the backward pass (model.activation_checkpointing=true)" in text
    padded = kernels.report(CPU, FULL, 0.1, 64, "padded", compiled=True, checkpointing=False)
    assert "padding: to the longest of the batch (model.execution=padded)" in "\n".join(map(str, padded))
    assert "torch's separate kernels (model.compile=encoders takes packed rows)" in "\n".join(map(str, padded))
    compiled = kernels.report(CPU, FULL, 0.1, 64, "packed", compiled=True, checkpointing=False)
    assert "torch.compile, a graph of each encoder (model.compile=encoders)" in "\n".join(map(str, compiled))


def test_half_precision_sums_the_rows_of_one_id_in_float32() -> None:
    """600 times 0.01 onto 4.0: in bfloat16, one after another, nothing would be added."""
    table = torch.zeros(5, 2, dtype=torch.bfloat16, requires_grad=True)
    ids = torch.tensor([3, *[1] * 600, 3])
    weights = torch.full((602, 2), 0.01)
    weights[1] = 4.0
    rows, _ = kernels.TableLookup.apply(table, ids, 0)
    (rows * weights.bfloat16()).sum().backward()
    assert table.grad is not None
    wanted = [0.0, 4.0 + 599 * 0.01, 0.0, 0.02, 0.0]
    torch.testing.assert_close(table.grad[:, 0].float(), torch.tensor(wanted), rtol=0.005, atol=0)  # bfloat16's digits
