"""Collates samples into a Batch with named fields, padded to the longest of the batch.

Legend: B samples of a batch, T text slots, G tag slots, R regions, F feature size, H W image size.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

IGNORE = -100  # label of a slot that is not predicted


class BadSample(NamedTuple):
    """A sample that cannot be used: its place in the run and on the disk, and the reason."""

    position: int  # place in the run, where a substitute stands for it
    shard: str
    key: str  # `?` where it cannot be read either
    byte: int  # of the shard, where the record begins
    caption: int
    reason: str
    passes: bool = False  # whether the reason may pass by itself

    def __str__(self) -> str:
        return f"{self.shard}, key {self.key!r}, byte {self.byte}, caption {self.caption}: {self.reason}"


@dataclass
class Sample:
    """One image-text pair after masking, unpadded (numpy). Lengths T, G, R are this sample's own."""

    text_ids_T: np.ndarray  # int64 rows of the embedding table: [CLS] tokens phrases [SEP], masked
    phrase_mask_T: np.ndarray  # bool, the slots that hold a phrase
    mlm_labels_T: np.ndarray  # int64 wordpiece, or IGNORE
    phrase_labels_T: np.ndarray  # int64 index into the phrase vocabulary, or IGNORE
    tag_ids_G: np.ndarray  # int64 [CLS] tags [SEP], masked
    tag_labels_G: np.ndarray  # int64 wordpiece, or IGNORE
    region_geometry_R6: np.ndarray  # float32 x1/W y1/H x2/W y2/H w/W h/H
    # float16 or float32, as stored; None where regions are pooled from the image; without regions F may be any
    region_features_RF: np.ndarray | None
    image_3HW: np.ndarray | None  # uint8; None when features are given
    image_index: int  # number of the record among those of all sources: equal for captions of one image
    position: int  # place of the sample in the run (epoch x samples + position in the epoch)
    num_oov_phrases: int  # phrases dropped: not in the vocabulary, or their words are not found in the caption
    num_phrases: int  # phrases kept
    bad: tuple[BadSample, ...] = ()  # samples for which this one is the substitute
    source: int = 0  # number of the source it comes from
    labels: dict[str, Any] = field(default_factory=dict)  # what the task makes of those of the caption
    tags_in_text_T: np.ndarray | None = None  # bool, slots of the text that hold tags; None: there are none

    @property
    def num_bad(self) -> int:
        return len(self.bad)


@dataclass
class Batch:
    """One micro-batch of a rank. Masks are True where a slot is real."""

    text_ids_BT: Tensor  # int64
    text_mask_BT: Tensor  # bool
    phrase_mask_BT: Tensor  # bool
    mlm_labels_BT: Tensor  # int64
    phrase_labels_BT: Tensor  # int64
    tag_ids_BG: Tensor  # int64
    tag_mask_BG: Tensor  # bool
    tag_labels_BG: Tensor  # int64
    region_geometry_BR6: Tensor  # float32
    region_mask_BR: Tensor  # bool
    region_features_BRF: Tensor | None  # float16, or float32 where a sample's are
    images_B3HW: Tensor | None  # uint8, memory format channels_last
    image_index_B: Tensor  # int64
    position_B: Tensor  # int64
    num_oov_phrases_B: Tensor  # int64
    num_phrases_B: Tensor  # int64
    num_bad_B: Tensor  # int64
    source_B: Tensor  # int64
    text_lengths: tuple[int, ...]  # real slots of each sample; on the host, so that reading them waits for no device
    tag_lengths: tuple[int, ...]
    region_lengths: tuple[int, ...]
    bad: tuple[BadSample, ...] = ()  # of all samples, in their order
    labels: tuple[dict[str, Any], ...] = ()  # of each sample, what the task makes of those of the caption
    tags_in_text_BT: Tensor | None = None  # bool; None: no text has any

    def to(self, device: torch.device, non_blocking: bool = False) -> Batch:
        """Returns the batch with its tensors on a device."""
        return self._map(lambda t: t.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Batch:
        """Returns the batch in pinned memory (DataLoader looks for this name)."""
        return self._map(lambda t: t.pin_memory())

    def _map(self, function) -> Batch:  # type: ignore[no-untyped-def]
        values = (getattr(self, f.name) for f in fields(self))
        return Batch(*(function(v) if isinstance(v, Tensor) else v for v in values))

    def __len__(self) -> int:
        return self.text_ids_BT.shape[0]


def _pad(rows: Sequence[np.ndarray], fill: float, dtype: np.dtype | None = None) -> Tensor:
    # at least one slot, even where no sample has regions: kernels differ in what they make of no slot at all
    longest = max(1, *(len(row) for row in rows))
    shape = (len(rows), longest, *rows[0].shape[1:])
    dtype = dtype or rows[0].dtype
    out = np.full(shape, fill, dtype) if fill else np.zeros(shape, dtype)  # zeros are the kernel's, not written twice
    for padded, row in zip(out, rows, strict=True):
        padded[: len(row)] = row
    return torch.from_numpy(out)


def _mask(rows: Sequence[np.ndarray]) -> Tensor:
    lengths_B = np.array([len(row) for row in rows])
    return torch.from_numpy(np.arange(max(1, int(lengths_B.max()))) < lengths_B[:, None])


def _pad_features(rows: Sequence[np.ndarray]) -> Tensor:
    """Pads features to [B, R, F]; a sample without regions does not know F."""
    feature_dim = max(row.shape[1] for row in rows)
    dtype = np.result_type(*{row.dtype for row in rows})
    return _pad([row if len(row) else row.reshape(0, feature_dim) for row in rows], 0.0, dtype)


def _stack(images: Sequence[np.ndarray]) -> Tensor:
    """Stacks images to uint8 [B, 3, H, W] in memory format channels_last, as decoders give them."""
    _, height, width = images[0].shape
    out_BHW3 = np.empty((len(images), height, width, 3), dtype=np.uint8)
    np.stack([image_3HW.transpose(1, 2, 0) for image_3HW in images], out=out_BHW3)
    return torch.from_numpy(out_BHW3).permute(0, 3, 1, 2)


def collate(samples: list[Sample]) -> Batch:
    """Pads text, tags and regions to the longest of the batch, and to one slot at least (word row 0 is [PAD])."""
    features = [s.region_features_RF for s in samples]
    images = [s.image_3HW for s in samples]
    tags_in_text = [s.tags_in_text_T for s in samples if s.tags_in_text_T is not None]
    return Batch(
        text_ids_BT=_pad([s.text_ids_T for s in samples], 0),
        text_mask_BT=_mask([s.text_ids_T for s in samples]),
        phrase_mask_BT=_pad([s.phrase_mask_T for s in samples], False),
        mlm_labels_BT=_pad([s.mlm_labels_T for s in samples], IGNORE),
        phrase_labels_BT=_pad([s.phrase_labels_T for s in samples], IGNORE),
        tag_ids_BG=_pad([s.tag_ids_G for s in samples], 0),
        tag_mask_BG=_mask([s.tag_ids_G for s in samples]),
        tag_labels_BG=_pad([s.tag_labels_G for s in samples], IGNORE),
        region_geometry_BR6=_pad([s.region_geometry_R6 for s in samples], 0.0),
        region_mask_BR=_mask([s.region_geometry_R6 for s in samples]),
        region_features_BRF=None if features[0] is None else _pad_features([f for f in features if f is not None]),
        images_B3HW=None if images[0] is None else _stack([image for image in images if image is not None]),
        image_index_B=torch.tensor([s.image_index for s in samples]),
        position_B=torch.tensor([s.position for s in samples]),
        num_oov_phrases_B=torch.tensor([s.num_oov_phrases for s in samples]),
        num_phrases_B=torch.tensor([s.num_phrases for s in samples]),
        num_bad_B=torch.tensor([s.num_bad for s in samples]),
        source_B=torch.tensor([s.source for s in samples]),
        text_lengths=tuple(len(s.text_ids_T) for s in samples),
        tag_lengths=tuple(len(s.tag_ids_G) for s in samples),
        region_lengths=tuple(len(s.region_geometry_R6) for s in samples),
        bad=tuple(bad for s in samples for bad in s.bad),
        labels=tuple(s.labels for s in samples),
        tags_in_text_BT=None if not tags_in_text else _pad(tags_in_text, False),
    )
