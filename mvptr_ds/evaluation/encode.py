"""Encodes a split once: every caption and every image by its own encoder, for retrieval, re-ranking and grounding.

Legend: C captions, I images, T text slots, R regions, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.loader import eval_batches
from mvptr_ds.data.shards import Index
from mvptr_ds.model.mvptr import Mvptr


@dataclass
class EncodedSplit:
    """States of a whole split on the CPU, padded to its longest; masks are True where a slot is real."""

    text_CTD: Tensor
    text_mask_CT: Tensor
    phrase_mask_CT: Tensor
    text_global_CD: Tensor
    regions_IRD: Tensor
    region_mask_IR: Tensor
    image_global_ID: Tensor
    image_of_C: Tensor  # int64 number of the image that a caption belongs to

    @property
    def sim_CI(self) -> Tensor:
        """Cosine similarity of the global states, float32."""
        return self.text_global_CD @ self.image_global_ID.T


@torch.inference_mode()
def encode_split(
    model: Mvptr, index: Index, samples: SampleBuilder, batch_size: int, device: torch.device
) -> EncodedSplit:
    """Runs both uni-modal encoders over all captions and all images of a split.

    Args:
        samples: without masking and tag noise.
    """
    model.eval()
    texts: list[list[Tensor]] = []
    images: list[list[Tensor]] = []
    image_of: list[Tensor] = []
    seen = 0
    for batch in tqdm(eval_batches(index, samples, batch_size), total=-(-len(index) // batch_size), desc="encode"):
        image_of.append(batch.image_index_B)
        batch = batch.to(device)
        text_BTD = model.encode_text(batch.text_ids_BT, batch.text_mask_BT)
        masks = batch.text_mask_BT, batch.phrase_mask_BT
        texts.append([t.cpu() for t in (text_BTD.float(), *masks, model.text_global(text_BTD))])
        # captions of one image stand side by side: an image is taken with the first of them
        numbers = batch.image_index_B.tolist()
        new = [i for i, n in enumerate(numbers) if n >= seen and (i == 0 or numbers[i - 1] != n)]
        seen = numbers[-1] + 1
        regions_BRD = model.embed_regions(batch.region_features_BRF, batch.images_B3HW, batch.region_geometry_BR6)
        tags_BGD, regions_BRD = model.encode_visual(
            batch.tag_ids_BG, batch.tag_mask_BG, regions_BRD, batch.region_mask_BR
        )
        globals_BD = model.visual_global(tags_BGD)
        images.append([t[new].cpu() for t in (regions_BRD.float(), batch.region_mask_BR, globals_BD)])
    text_states, text_masks, phrase_masks, text_globals = (_join(part) for part in zip(*texts, strict=True))
    regions, region_masks, image_globals = (_join(part) for part in zip(*images, strict=True))
    return EncodedSplit(
        text_states, text_masks, phrase_masks, text_globals, regions, region_masks, image_globals, torch.cat(image_of)
    )


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    """Concatenates batches, padding dim 1 to the longest."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(p, (0, 0) * (p.ndim - 2) + (0, longest - p.shape[1])) for p in parts])
