"""Which implementation each operation of the model uses, and why: chosen here, reported by `report`.

Everything works with torch alone. On CUDA the kernels of `triton_kernels/` serve where triton is installed, which a
CUDA build of torch brings, and NVIDIA's apex and flash_attn where they are installed.

Legend: K picked rows, C classes, D hidden, x leading dimensions.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
from dataclasses import dataclass
from itertools import islice
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .installed import apex_lacks, flash_attn_lacks, triton_lacks
from .row_buckets import bucket_of

# oneDNN keeps 1,024 products of different sizes if nobody says otherwise, each with 0.3 MB of code. A step has some 80.
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "128")  # read when oneDNN multiplies for the first time

SDPA_EACH = "scaled_dot_product_attention, a call a sequence"
SDPA_PADDED = "scaled_dot_product_attention on rows padded for it alone, with a mask"
TORCH_FLASH = "torch.nn.attention.varlen.varlen_attn"
FLASH_ATTN = "flash_attn.flash_attn_varlen_qkvpacked_func"
APEX_NORM = "apex.normalization.fused_layer_norm"
_APEX_NORMS = ("fused_layer_norm_affine", "mixed_dtype_fused_layer_norm_affine")
TORCH_NORM = "torch.nn.functional.layer_norm"
TRITON = "Triton"
TORCH = "torch"
ONEDNN_LINEAR = "oneDNN's inner product"
TORCH_LINEAR = "torch.nn.functional.linear"
HALF = (torch.float16, torch.bfloat16)
MAX_FUSED_COLUMNS, MAX_FUSED_HEAD = 8192, 128  # columns of a state and of a head that Triton's kernels take
_TRITON_KERNELS = f"{__package__}.triton_kernels"
_LARGE_PRODUCT = 2**22  # multiplications: below, making oneDNN's kernel for new sizes costs more than it gives


def _processor_is_intels(cpuinfo: str = "/proc/cpuinfo") -> bool:
    """Whether the processor is Intel's; where the system does not say, it is not."""
    try:
        with open(cpuinfo, encoding="utf-8", errors="replace") as lines:
            return any(line.startswith("vendor_id") and "GenuineIntel" in line for line in islice(lines, 9))
    except OSError:
        return False


_MKL_IS_FAST = torch.backends.mkl.is_available() and _processor_is_intels()
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
_TILE = 64  # classes of a product on CUDA are a multiple of it
_ALIGNMENT = 8  # numbers of half precision that stand on 16 bytes: what a fast kernel reads at once


@dataclass(frozen=True)
class Choice:
    """One line of the report."""

    operation: str
    implementation: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.implementation} ({self.reason})"


# --- attention within packed sequences


def attention(device: torch.device, dtype: torch.dtype, dropout: float, head_size: int) -> Choice:
    """Returns the kernel of `SegmentAttention` (attention.py bears the calls themselves).

    Where no kernel for sequences of different lengths serves, attention alone is padded: on an H200 one call on a
    nested jagged tensor took 8 times as long (tools/bench/bench_attention.py).
    """
    is_old = device.type == "cuda" and _before_ampere(device)
    return _attention(device.type, dtype, dropout > 0.0, head_size, is_old)


@functools.lru_cache
def _before_ampere(device: torch.device) -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability(device) < (8, 0)


@functools.lru_cache
def _attention(device_type: str, dtype: torch.dtype, drops: bool, head_size: int, is_old: bool) -> Choice:
    name = "attention"
    if device_type != "cuda":
        return Choice(name, SDPA_EACH, f"the device is {device_type}")
    if dtype not in HALF:
        return Choice(name, SDPA_PADDED, f"flash kernels take half precision, this is {_short(dtype)}")
    if is_old:
        return Choice(name, SDPA_PADDED, "flash kernels take Ampere GPUs or newer")
    if head_size % 8 or head_size > 256:
        return Choice(name, SDPA_PADDED, f"flash kernels take heads of 8, 16, ... 256 numbers, these have {head_size}")
    missing = flash_attn_lacks(FLASH_ATTN.rpartition(".")[2])
    if not missing:
        return Choice(name, FLASH_ATTN, "flash_attn is installed")
    if drops:
        return Choice(name, SDPA_PADDED, f"attention drops out, which varlen_attn cannot; {missing}")
    if not _has_varlen():
        return Choice(name, SDPA_PADDED, f"torch {torch.__version__} has no varlen_attn; {missing}")
    return Choice(name, TORCH_FLASH, f"no dropout; {missing}")


def _has_varlen() -> bool:
    return importlib.util.find_spec("torch.nn.attention.varlen") is not None


# --- layer norm


class LayerNorm(nn.LayerNorm):
    """`torch.nn.LayerNorm` over the last dimension, by apex's kernel where that serves; same parameters, same state."""

    def forward(self, input: Tensor) -> Tensor:
        by_torch = torch.compiler.is_compiling() or layer_norm(input.device).implementation == TORCH_NORM
        if by_torch or not input.numel():  # apex's kernel takes no empty grid
            return super().forward(input)
        fused_layer_norm = importlib.import_module("apex.normalization.fused_layer_norm")
        # the plain function wants parameters of the input's dtype, the other one answers in theirs
        same = input.dtype == self.weight.dtype
        normalise = getattr(fused_layer_norm, _APEX_NORMS[0 if same else 1])
        out: Tensor = normalise(input, self.weight, self.bias, torch.Size(self.normalized_shape), self.eps)
        return out.to(input.dtype)


def layer_norm(device: torch.device) -> Choice:
    """Returns the kernel of `LayerNorm`."""
    name = "LayerNorm"
    if device.type != "cuda":
        return Choice(name, TORCH_NORM, f"the device is {device.type}")
    missing = apex_lacks("normalization/fused_layer_norm.py", "fused_layer_norm_cuda", *_APEX_NORMS)
    return Choice(name, TORCH_NORM, missing) if missing else Choice(name, APEX_NORM, "apex is installed")


# --- our own kernels in Triton


def fused(device: torch.device, dtype: torch.dtype) -> Choice:
    """Returns whether the kernels of `triton_kernels/` serve a device and a dtype, or torch's separate ones."""
    name = "fused kernels"
    if device.type != "cuda":
        return Choice(name, TORCH, f"the device is {device.type}")
    if torch.version.hip is not None:
        return Choice(name, TORCH, "these kernels were compiled for NVIDIA's GPUs alone")
    if dtype not in (*HALF, torch.float32):
        return Choice(name, TORCH, f"Triton's kernels do not take {_short(dtype)}")
    if _before_ampere(device):
        return Choice(name, TORCH, "Triton's kernels take Ampere GPUs or newer")
    missing = triton_lacks(_TRITON_KERNELS)
    return Choice(name, TORCH, missing) if missing else Choice(name, TRITON, "triton is installed")


def fused_functions(device: torch.device, dtype: torch.dtype) -> ModuleType | None:
    """Returns the functions of `triton_kernels/functions.py` where `fused` takes them; else None."""
    return triton_module("functions") if fused(device, dtype).implementation == TRITON else None


def triton_module(name: str) -> ModuleType:
    """Imports a file of `triton_kernels/`: not by a statement, so that nothing without triton asks for it."""
    return importlib.import_module(f"{_TRITON_KERNELS}.{name}")


# --- matrix products


class Linear(nn.Linear):
    """`torch.nn.Linear`, by the product that `linear_product` chooses; same parameters, same state."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


class JoiningLinear(Linear):
    """`Linear` of several inputs side by side, and of as many zeros behind them as `aligned_inputs` says."""

    def forward(self, *inputs: Tensor) -> Tensor:
        missing = aligned_inputs(self.in_features, self.weight.device) - self.in_features
        if not missing:
            return without_fill(super().forward(fill_bucket(torch.cat(inputs, dim=-1))), len(inputs[0]))
        zeros = inputs[0].new_zeros(*inputs[0].shape[:-1], missing)
        return linear(torch.cat([*inputs, zeros], dim=-1), F.pad(self.weight, (0, missing)), self.bias)


def linear(input_xI: Tensor, weight_OI: Tensor, bias_O: Tensor | None = None) -> Tensor:
    """Computes `input @ weight.T + bias`, [..., O]."""
    is_small = input_xI.numel() * len(weight_OI) < _LARGE_PRODUCT
    fits = (
        input_xI.shape[-1] == weight_OI.shape[1] and input_xI.dtype == weight_OI.dtype
    )  # else torch says what does not
    choice = linear_product(input_xI.device, input_xI.dtype).implementation
    if is_small or not fits or choice == TORCH_LINEAR or torch.is_autocast_enabled("cpu"):
        return F.linear(input_xI, weight_OI, bias_O)
    out: Tensor = _onednn(input_xI.flatten(0, -2), weight_OI, bias_O)
    return out.unflatten(0, input_xI.shape[:-1])


def linear_gradients(to_out_NO: Tensor, input_NI: Tensor, weight_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Computes the gradients of `linear`'s input [N, I], weight [O, I] and bias [O] from that of its output."""
    return linear(to_out_NO, weight_OI.t()), linear(to_out_NO.t(), input_NI.t()), to_out_NO.sum(0)


def linear_product(device: torch.device, dtype: torch.dtype) -> Choice:
    """Returns the kernel that multiplies in `linear`.

    On CPU torch takes MKL, which leaves AVX-512 unused on processors not Intel's. On those of Intel it is as fast as
    oneDNN, and makes no kernel for each number of rows.
    """
    name = "linear layers"
    if device.type != "cpu" or dtype != torch.float32:
        return Choice(name, TORCH_LINEAR, f"the device is {device.type}, the products are in {_short(dtype)}")
    if _MKL_IS_FAST:
        return Choice(name, TORCH_LINEAR, "MKL uses AVX-512 on a processor of Intel")
    if not _HAS_ONEDNN:
        return Choice(name, TORCH_LINEAR, f"torch {torch.__version__} was built without oneDNN's")
    return Choice(name, ONEDNN_LINEAR, "float32 on a CPU; small ones by torch")


# torch.compile calls it as it is; the name is that of this file, which an exported model may hold a copy of
@torch.library.custom_op(f"{__name__.replace('.', '_')}::onednn_linear", mutates_args=())
def _onednn(input_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(input_NI, weight_OI, bias_O, "none", [], "")
    return out


@_onednn.register_fake
def _(input_NI: Tensor, weight_OI: Tensor, bias_O: Tensor | None) -> Tensor:
    return input_NI.new_empty(input_NI.shape[0], weight_OI.shape[0])


def _onednn_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs[:2])


def _onednn_backward(ctx, to_out_NO: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[no-untyped-def]
    input_NI, weight_OI = ctx.saved_tensors
    of_input, of_weight, of_bias = ctx.needs_input_grad
    return (
        _onednn(to_out_NO, weight_OI.t(), None) if of_input else None,
        _onednn(to_out_NO.t(), input_NI.t(), None) if of_weight else None,
        to_out_NO.sum(0) if of_bias else None,
    )


_onednn.register_autograd(_onednn_backward, setup_context=_onednn_setup)


# --- sizes of matrix products


def aligned_classes(num: int, device: torch.device) -> int:
    """Returns how many classes a product over `num` of them computes: on CUDA a multiple of 64.

    Rows of 30,522 half precision logits begin on no multiple of 16 bytes, and cuBLAS has no fast kernel for them.
    """
    return -(-num // _TILE) * _TILE if _aligns(device) else num


def aligned_inputs(num: int, device: torch.device) -> int:
    """Returns how many inputs a product over `num` of them reads: on CUDA a multiple of 8, for the same reason."""
    return -(-num // _ALIGNMENT) * _ALIGNMENT if _aligns(device) else num


def fills_buckets(device: torch.device) -> bool:
    """Returns whether encoders compute a few rows more, up to numbers that come again (row_buckets.py).

    They do on CPUs, where oneDNN makes a product's kernel for each number of rows, and keeps half of it for ever.
    """
    return device.type == "cpu"


def fill_bucket(rows_Nx: Tensor) -> Tensor:
    """Adds rows of zeros, [N, ...], up to the next bucket, where products want one (`fills_buckets`)."""
    missing = bucket_of(len(rows_Nx)) - len(rows_Nx) if fills_buckets(rows_Nx.device) else 0
    return F.pad(rows_Nx, (0, 0) * (rows_Nx.ndim - 1) + (0, missing)) if missing else rows_Nx


def without_fill(rows_Mx: Tensor, num_rows: int) -> Tensor:
    """Undoes `fill_bucket`; full rows stay what they are, since even the gradient of a whole slice is a copy."""
    return rows_Mx if len(rows_Mx) == num_rows else rows_Mx[:num_rows]


def _aligns(device: torch.device) -> bool:
    return device.type == "cuda"


# --- the embedding table


class TableLookup(torch.autograd.Function):
    """Rows of the table, and its first rows as a matrix for tied heads: one gradient of the table for both.

    Autograd alone writes a gradient of the whole table for each lookup and each head, and adds them up. Here lookups
    give one row each, and the table's gradient is written once. That once is what AdamW wants, which decays every row,
    and what DeepSpeed's ZeRO wants, which copies gradients into flat buckets (docs/performance.md).
    """

    @staticmethod
    def forward(ctx, weight_VD: Tensor, ids_N: Tensor, num_first: int) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(ids_N)
        ctx.num_rows = len(weight_VD)
        ctx.set_materialize_grads(False)
        return weight_VD.index_select(0, ids_N), weight_VD[:num_first]

    @staticmethod
    def backward(ctx, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:  # type: ignore[no-untyped-def]
        to_rows_ND, to_first_WD = grads
        given = to_rows_ND if to_rows_ND is not None else to_first_WD
        if given is None:
            return None, None, None
        total_VD = given.new_empty(ctx.num_rows, given.shape[1])
        num_first = 0
        if to_first_WD is not None:
            num_first = len(to_first_WD)
            total_VD[:num_first] = to_first_WD
        total_VD[num_first:].zero_()
        if to_rows_ND is not None:
            _add_rows(total_VD, ctx.saved_tensors[0], to_rows_ND)
        return total_VD, None, None


def _add_rows(total_VD: Tensor, ids_N: Tensor, rows_ND: Tensor) -> None:
    """Adds each row where its id says. In half precision the rows of one id are summed in float32 first.

    Some ids stand in every sample: their sum, one rounded addition after another, would lose the small ones.
    """
    if total_VD.dtype not in HALF:
        total_VD.index_add_(0, ids_N, rows_ND)
        return
    sorted_N, order_N = ids_N.sort()
    place_N = torch.zeros_like(sorted_N)  # of its id among the different ones; how many there are, nobody asks
    place_N[1:] = (sorted_N[1:] != sorted_N[:-1]).cumsum(0)
    sums_ND = torch.zeros_like(rows_ND, dtype=torch.float32).index_add_(0, place_N, rows_ND[order_N].float())
    ids_N = torch.zeros_like(sorted_N).scatter_(0, place_N, sorted_N)  # beyond them: row 0, to which zero is added
    total_VD.index_add_(0, ids_N, sums_ND.to(total_VD.dtype))


def report(
    device: torch.device,
    dtype: torch.dtype,
    dropout: float,
    head_size: int,
    execution: str,
    compiled: bool,
    checkpointing: bool,
) -> list[Choice]:
    """Returns what each operation of a training step uses.

    Args:
        dropout, head_size: of attention.
    """
    packed, fused_choice = execution == "packed", fused(device, dtype)
    setting = f"model.compile={'encoders' if compiled else 'off'}"
    if compiled and not packed:
        compiled, setting = False, f"{setting} takes packed rows"
    if packed:
        lines = [Choice("padding", "none: valid positions packed", "model.execution=packed")]
        of_packed = attention if compiled else _packed_attention
        lines.append(of_packed(device, dtype, dropout, head_size))
    else:
        lines = [Choice("padding", "to the longest of the batch", f"model.execution={execution}")]
        lines.append(Choice("attention", "scaled_dot_product_attention with a mask", "padded"))
    norm = layer_norm(device)
    if compiled and norm.implementation != TORCH_NORM:
        norm = Choice("LayerNorm", TORCH_NORM, "model.compile=encoders fuses it with its neighbours")
    lines += [
        linear_product(device, dtype),
        norm,
        _row_by_row(fused_choice, packed, compiled, setting),
        _word_heads(device, fused_choice),
        Choice("embedding gradient", "one write of the table", "optimisers and ZeRO take it whole"),
        Choice(
            "activations",
            "computed again in the backward pass" if checkpointing else "kept",
            f"model.activation_checkpointing={str(checkpointing).lower()}",
        ),
    ]
    return lines


def _packed_attention(device: torch.device, dtype: torch.dtype, dropout: float, head_size: int) -> Choice:
    """Of packed sequences: ours for those of at most 128 rows, and beside it what takes longer ones."""
    longer = attention(device, dtype, dropout, head_size)
    if fused(device, dtype).implementation != TRITON:
        return longer
    if head_size > MAX_FUSED_HEAD:
        return Choice(longer.operation, longer.implementation, f"heads have {head_size} numbers; {longer.reason}")
    return Choice(longer.operation, TRITON, f"a batch with more than 128 rows in a sequence: {longer.implementation}")


def _row_by_row(choice: Choice, packed: bool, compiled: bool, setting: str) -> Choice:
    """Of layers: a graph of torch.compile takes the place of Triton's kernels."""
    name = "bias, GELU, dropout, residual"
    if compiled:
        return Choice(name, "torch.compile, a graph of each encoder", setting)
    if not packed:
        reason = setting if choice.implementation != TRITON else f"{setting}; Triton's kernels take packed rows"
        return Choice(name, "torch's separate kernels", reason)
    implementation = TRITON if choice.implementation == TRITON else "torch's separate kernels"
    return Choice(name, implementation, f"{choice.reason}; {setting}")


def _word_heads(device: torch.device, choice: Choice) -> Choice:
    if choice.implementation == TRITON:
        return Choice("word heads", TRITON, "picked rows; the gradient of the logits takes their memory")
    if device.type == "cuda":
        return Choice("word heads", "picked rows, all logits at once", "classes padded to a multiple of 64")
    return Choice("word heads", "picked rows, logits in parts of 64 MiB", "cross entropy in float32")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
