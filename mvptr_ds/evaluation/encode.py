"""Reads a split once and encodes it: every caption and every image by its own encoder, pairs by the cross encoder.

    read_split -> SplitInput -> (without_tags, permute_regions) -> encode_images -> EncodedSplit -> cross_states

Legend: C captions, I images, T text slots, G tag slots, R regions, D hidden, B pairs of a batch, M pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvptr_ds.data.collate import Batch
from mvptr_ds.data.features import SampleBuilder
from mvptr_ds.data.loader import eval_batches
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives import output_rows
from mvptr_ds.objectives.packed_batch import PackedBatch
from mvptr_ds.streams import Stream, generator
from mvptr_ds.user_io.progress import progress_bar


@dataclass
class SplitInput:
    """Holds a split on the CPU, padded: texts are encoded, and images are ready for the visual encoder."""

    text_CTD: Tensor
    text_mask_CT: Tensor
    phrase_mask_CT: Tensor
    text_global_CD: Tensor
    image_of_C: Tensor  # int64 number of the image that a caption belongs to
    embedded_IRD: Tensor  # regions after the projection of feature and geometry, float32
    region_mask_IR: Tensor
    tag_ids_IG: Tensor
    tag_mask_IG: Tensor

    @property
    def num_tags(self) -> int:
        """Returns the wordpieces of tags over all images. Each image has two more slots, [CLS] and [SEP]."""
        return int(self.tag_mask_IG.sum()) - 2 * len(self.tag_mask_IG)


@dataclass
class EncodedSplit:
    """Holds the states of a whole split on the CPU, padded to its longest. Masks are True where a slot is real."""

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
        """Returns the cosine similarity of the global states, float32."""
        return self.text_global_CD @ self.image_global_ID.T


@dataclass
class CrossStates:
    """Holds a batch of pairs after the cross encoder, on the model's device."""

    rows_B: Tensor  # int64 numbers of the requested pairs, on the CPU
    text: Packed
    regions: Packed


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Sets evaluation mode without gradients. The module leaves in the mode it came in, so training can continue."""
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        model.train(was_training)


def new_images(batch: Batch, seen: int) -> list[int]:
    """Returns the rows of a batch that show an image for the first time. Captions of one image are neighbours.

    Args:
        seen: images of the previous batches.
    """
    numbers = batch.image_index_B.tolist()
    return [i for i, n in enumerate(numbers) if n >= seen and (i == 0 or numbers[i - 1] != n)]


@torch.inference_mode()
def read_split(
    model: Mvptr, index: SampleIndex, samples: SampleBuilder, batch_size: int, device: torch.device
) -> SplitInput:
    """Encodes all captions and embeds the regions of all images.

    Args:
        model: in evaluation mode.
        samples: without masking and tag noise.
    """
    texts: list[list[Tensor]] = []
    images: list[list[Tensor]] = []
    image_of: list[Tensor] = []
    seen = 0
    batches = eval_batches(index, samples, batch_size)
    for batch in progress_bar(batches, total=-(-len(index) // batch_size), desc="encode texts", leave=False):
        new, seen = new_images(batch, seen), int(batch.image_index_B[-1]) + 1
        image_of.append(batch.image_index_B)
        packed = PackedBatch.of(batch, device)
        text = model.encode_text(packed.text_ids)
        masks = batch.text_mask_BT, batch.phrase_mask_BT
        texts.append([t.cpu() for t in (text.padded().float(), *masks, model.text_global(text))])
        if new:
            features, pixels = packed.features, packed.images_B3HW
            embedded = model.embed_regions(
                None if features is None else features.take(new),
                None if pixels is None else pixels[new],
                packed.geometry.take(new),
            )
            rest = embedded.mask(), batch.tag_ids_BG[new], batch.tag_mask_BG[new]
            images.append([t.cpu() for t in (embedded.padded().float(), *rest)])
    text_states, text_masks, phrase_masks, text_globals = (_join(part) for part in zip(*texts, strict=True))
    return SplitInput(
        text_states, text_masks, phrase_masks, text_globals, torch.cat(image_of),
        *(_join(part) for part in zip(*images, strict=True)),
    )  # fmt: skip


def without_tags(split: SplitInput, cls_id: int, sep_id: int) -> SplitInput:
    """Returns the split with all tags withheld. `[CLS] [SEP]` remain, as in training with withheld tags."""
    tag_ids_IG = torch.tensor([cls_id, sep_id]).repeat(len(split.tag_ids_IG), 1)
    return replace(split, tag_ids_IG=tag_ids_IG, tag_mask_IG=torch.ones_like(tag_ids_IG, dtype=torch.bool))


def permute_regions(split: SplitInput, seed: int) -> SplitInput:
    """Returns the split with its regions shuffled among all images. A region keeps its feature with its geometry.

    Every image keeps its number of regions. Shuffling within batches would not suffice: a batch would keep its own
    regions, and retrieval among 500 images would stay above chance.
    """
    real_ND = split.embedded_IRD[split.region_mask_IR]
    order_N = generator(Stream.PERMUTED_REGIONS, seed).permutation(len(real_ND))
    permuted_IRD = torch.zeros_like(split.embedded_IRD)
    permuted_IRD[split.region_mask_IR] = real_ND[torch.from_numpy(order_N)]
    return replace(split, embedded_IRD=permuted_IRD)


@torch.inference_mode()
def encode_images(model: Mvptr, split: SplitInput, batch_size: int, device: torch.device) -> EncodedSplit:
    """Runs the visual encoder over all images."""
    parts: list[list[Tensor]] = []
    numbers = torch.arange(len(split.embedded_IRD)).split(batch_size)
    for images in progress_bar(numbers, desc="encode images", leave=False):
        tag_ids = _pack(split.tag_ids_IG[images], split.tag_mask_IG[images])
        embedded = _pack(split.embedded_IRD[images], split.region_mask_IR[images])
        tags, regions = model.encode_visual(tag_ids.to(device), embedded.to(device, model.dtype))
        parts.append([regions.padded().float().cpu(), model.visual_global(tags).cpu()])
    regions_IRD, image_global_ID = (_join(part) for part in zip(*parts, strict=True))
    missing = split.embedded_IRD.shape[1] - regions_IRD.shape[1]
    regions_IRD = F.pad(regions_IRD, (0, 0, 0, missing))
    return EncodedSplit(
        text_CTD=split.text_CTD,
        text_mask_CT=split.text_mask_CT,
        phrase_mask_CT=split.phrase_mask_CT,
        text_global_CD=split.text_global_CD,
        regions_IRD=regions_IRD,
        region_mask_IR=split.region_mask_IR,
        image_global_ID=image_global_ID,
        image_of_C=split.image_of_C,
    )


def cross_states(
    model: Mvptr,
    split: EncodedSplit,
    captions_M: Tensor,
    images_M: Tensor,
    batch_size: int,
    device: torch.device,
    name: str = "cross",
    firsts_alone: bool = False,
) -> Iterator[CrossStates]:
    """Yields batches of the pairs (captions_M[m], images_M[m]), int64 each, in order.

    Args:
        name: name of the progress bar.
        firsts_alone: whether only slot 0 of the texts is needed. The other states are then zeros.
    """
    for rows in progress_bar(torch.arange(len(captions_M)).split(batch_size), desc=name, leave=False):
        captions, images = captions_M[rows], images_M[rows]
        text = _pack(split.text_CTD[captions], split.text_mask_CT[captions])
        regions = _pack(split.regions_IRD[images], split.region_mask_IR[images])
        needed_K = None
        if firsts_alone:
            marked = output_rows.pair_rows(frozenset({"first"}), text.lengths, regions.lengths)
            firsts_K = output_rows.numbers(marked)
            needed_K = None if firsts_K is None else firsts_K.to(device)
        text, regions = text.to(device, model.dtype), regions.to(device, model.dtype)
        yield CrossStates(rows, *model.encode_cross(text, regions, needed_K=needed_K))


def _pack(slots_BLx: Tensor, mask_BL: Tensor) -> Packed:
    """Packs the real slots, which precede the padding."""
    return Packed.of_padded(slots_BLx, mask_BL.sum(1).tolist())


def _join(parts: tuple[Tensor, ...]) -> Tensor:
    """Concatenates batches, padding dim 1 to the longest, where it differs."""
    longest = max(part.shape[1] for part in parts)
    return torch.cat([F.pad(p, (0, 0) * (p.ndim - 2) + (0, longest - p.shape[1])) for p in parts])
