"""Self-attention of an encoder layer: over padded slots with a mask, or within each of the packed sequences.

Both take queries, keys and values in one tensor, so that a layer does not know which of them it calls.

Legend: B sequences, L slots of the longest, N rows of all sequences, H heads, E size of a head.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from . import kernels
from .attention_tiles import MAX_LENGTH, AttentionTiles
from .fused_layer import Fused
from .sequence_index import SequenceIndex

# queries, keys and values [..., 3, H, E], dropout, fused kernels where there are some -> [..., H, E]
Attend = Callable[[Tensor, float, Fused | None], Tensor]


class PaddedAttention:
    """Over the slots [B, L], by `scaled_dot_product_attention` with a boolean mask: the readable reference."""

    def __init__(self, mask_BL: Tensor) -> None:
        # A sequence without any real slot has nothing to attend to: some kernels answer NaN, so let it see itself.
        mask_BL = mask_BL | ~mask_BL.any(dim=1, keepdim=True)
        self.mask_B11L = mask_BL[:, None, None, :]

    def __call__(self, qkv_BL3HE: Tensor, dropout: float, fused: Fused | None = None) -> Tensor:
        query, key, value = qkv_BL3HE.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHLE = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask_B11L, dropout_p=dropout)
        return out_BHLE.transpose(1, 2)


class SegmentAttention:
    """Within each of the packed sequences, by the kernel that `kernels.attention` chooses for the device and dtype.

    Where there are fused kernels, they take batches without a sequence of more than 128 rows.

    Args:
        index: of the sequences, in the order of their rows; some may be empty.
    """

    def __init__(self, index: SequenceIndex, device: torch.device) -> None:
        self.index, self.device = index, device
        self.lengths = index.lengths
        self.longest = max(index.lengths, default=0)

    @property
    def offsets(self) -> Tensor:
        """The first row of each sequence, and the number of all rows: int32 [B + 1]."""
        return self.index.on(self.device, "offsets")

    @cached_property
    def _tiles(self) -> AttentionTiles:
        return AttentionTiles.of_index(self.index, self.device)

    def __call__(self, qkv_N3HE: Tensor, dropout: float, fused: Fused | None = None) -> Tensor:
        if not self.longest:
            return qkv_N3HE[:, 0]
        if fused is not None and self.longest <= MAX_LENGTH and qkv_N3HE.shape[-1] <= kernels.MAX_FUSED_HEAD:
            return fused.attention(qkv_N3HE, self._tiles, dropout)
        choice = kernels.attention(qkv_N3HE.device, qkv_N3HE.dtype, dropout, qkv_N3HE.shape[-1])
        return _KERNELS[choice.implementation](self, qkv_N3HE, dropout)

    def each(self, qkv_N3HE: Tensor, dropout: float) -> Tensor:
        """Calls the kernel once for each sequence.

        On a CPU faster than a nested or padded tensor (tools/bench/bench_attention.py).
        """
        out = []
        for qkv_L3HE in qkv_N3HE.split(self.lengths):
            query, key, value = qkv_L3HE.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            out.append(F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)[0].transpose(0, 1))
        return torch.cat(out)

    def padded(self, qkv_N3HE: Tensor, dropout: float) -> Tensor:
        """Pads the rows, calls the kernel once, and takes the rows out again."""
        slots_N, mask_BL = (self.index.on(self.device, name) for name in ("slots", "mask"))
        qkv_X3HE = qkv_N3HE.new_zeros(mask_BL.numel(), *qkv_N3HE.shape[1:]).index_copy_(0, slots_N, qkv_N3HE)
        out_BLHE = self._masked(qkv_X3HE.unflatten(0, mask_BL.shape), dropout)
        return out_BLHE.flatten(0, 1).index_select(0, slots_N)

    @cached_property
    def _masked(self) -> PaddedAttention:
        return PaddedAttention(self.index.on(self.device, "mask"))

    def torch_flash(self, qkv_N3HE: Tensor, dropout: float) -> Tensor:
        """Calls torch's variable-length flash attention, which knows no dropout."""
        from torch.nn.attention.varlen import varlen_attn

        assert not dropout
        query, key, value = qkv_N3HE.unbind(1)
        out = varlen_attn(query, key, value, self.offsets, self.offsets, self.longest, self.longest)
        assert isinstance(out, Tensor)
        return out

    def flash_attn(self, qkv_N3HE: Tensor, dropout: float) -> Tensor:
        """Calls the flash_attn package."""
        # by importlib: transformers takes an import statement in an exported file for a package that must be there
        kernel = importlib.import_module("flash_attn").flash_attn_varlen_qkvpacked_func
        out: Tensor = kernel(qkv_N3HE, self.offsets, self.longest, dropout_p=dropout)
        return out


_KERNELS: dict[str, Callable[[SegmentAttention, Tensor, float], Tensor]] = {
    kernels.SDPA_EACH: SegmentAttention.each,
    kernels.SDPA_PADDED: SegmentAttention.padded,
    kernels.TORCH_FLASH: SegmentAttention.torch_flash,
    kernels.FLASH_ATTN: SegmentAttention.flash_attn,
}
