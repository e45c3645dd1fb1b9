"""Self-attention of an encoder layer: over padded slots with a mask, or within each of the packed sequences.

Both take queries, keys and values in one tensor, so that a layer does not know which of them it calls.

Legend: B sequences, L slots of the longest, N rows of all sequences, H heads, K size of a head.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.model import kernels

Attend = Callable[[Tensor, float], Tensor]  # queries, keys and values [..., 3, H, K], dropout -> [..., H, K]


class PaddedAttention:
    """Over the slots [B, L], by `scaled_dot_product_attention` with a boolean mask: the readable reference."""

    def __init__(self, mask_BL: Tensor) -> None:
        # A sequence without any real slot has nothing to attend to: some kernels answer NaN, so let it see itself.
        mask_BL = mask_BL | ~mask_BL.any(dim=1, keepdim=True)
        self.mask_B11L = mask_BL[:, None, None, :]

    def __call__(self, qkv_BL3HK: Tensor, dropout: float) -> Tensor:
        query, key, value = qkv_BL3HK.permute(2, 0, 3, 1, 4).unbind(0)
        out_BHLK = F.scaled_dot_product_attention(query, key, value, attn_mask=self.mask_B11L, dropout_p=dropout)
        return out_BHLK.transpose(1, 2)


class SegmentAttention:
    """Within each of the packed sequences, by the kernel that `kernels.attention` chooses for the device and dtype.

    Args:
        lengths: of the sequences, in the order of their rows; some may be 0.
    """

    def __init__(self, lengths: tuple[int, ...], device: torch.device) -> None:
        self.lengths = lengths
        self.longest = max(lengths, default=0)
        offsets = torch.zeros(len(lengths) + 1, dtype=torch.int32)
        offsets[1:] = torch.tensor(lengths, dtype=torch.int32).cumsum(0)
        self.offsets = offsets.to(device, non_blocking=True)

    def __call__(self, qkv_N3HK: Tensor, dropout: float) -> Tensor:
        if not self.longest:
            return qkv_N3HK[:, 0]
        choice = kernels.attention(qkv_N3HK.device, qkv_N3HK.dtype, dropout)
        return _KERNELS[choice.implementation](self, qkv_N3HK, dropout)

    def each(self, qkv_N3HK: Tensor, dropout: float) -> Tensor:
        """One call a sequence. On CPU 2 to 4 times as fast as one call on a nested tensor (docs/performance.md)."""
        out = []
        for qkv_L3HK in qkv_N3HK.split(self.lengths):
            query, key, value = qkv_L3HK.permute(1, 2, 0, 3).unsqueeze(1).unbind(0)
            out.append(F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)[0].transpose(0, 1))
        return torch.cat(out)

    def nested(self, qkv_N3HK: Tensor, dropout: float) -> Tensor:
        """One call on a nested tensor: flash kernels in half precision, memory-efficient ones in float32."""
        offsets = self.offsets.to(torch.int64)
        query, key, value = (
            torch.nested.nested_tensor_from_jagged(
                rows_NHK.contiguous(), offsets, min_seqlen=min(self.lengths), max_seqlen=self.longest
            ).transpose(1, 2)
            for rows_NHK in qkv_N3HK.unbind(1)
        )
        out = F.scaled_dot_product_attention(query, key, value, dropout_p=dropout)
        return out.transpose(1, 2).values()

    def torch_flash(self, qkv_N3HK: Tensor, dropout: float) -> Tensor:
        """torch's variable-length flash attention, which knows no dropout."""
        from torch.nn.attention.varlen import varlen_attn

        assert not dropout
        query, key, value = qkv_N3HK.unbind(1)
        out = varlen_attn(query, key, value, self.offsets, self.offsets, self.longest, self.longest)
        assert isinstance(out, Tensor)
        return out

    def flash_attn(self, qkv_N3HK: Tensor, dropout: float) -> Tensor:
        """The flash_attn package."""
        from flash_attn import flash_attn_varlen_qkvpacked_func

        out: Tensor = flash_attn_varlen_qkvpacked_func(qkv_N3HK, self.offsets, self.longest, dropout_p=dropout)
        return out


_KERNELS: dict[str, Callable[[SegmentAttention, Tensor, float], Tensor]] = {
    kernels.SDPA_EACH: SegmentAttention.each,
    kernels.SDPA_NESTED: SegmentAttention.nested,
    kernels.TORCH_FLASH: SegmentAttention.torch_flash,
    kernels.FLASH_ATTN: SegmentAttention.flash_attn,
}
