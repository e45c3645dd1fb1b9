"""The recorded keyword arguments of the published code as a Batch, and states in its slots.

Legend: B samples, T text slots, G tag slots, R regions, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mvptr_ds.data.collate import IGNORE, Batch
from mvptr_ds.model.packed import Packed

_NOT_PREDICTED = -1  # the published code's label of a slot that is not predicted


def make_batch(
    inputs: Mapping[str, Tensor], feature_dim: int, dtype: torch.dtype, labels: Sequence[dict[str, Any]] = ()
) -> Batch:
    """Returns the recorded keyword arguments as a Batch.

    Args:
        inputs: by keyword; without masked labels nothing is to be predicted, and without `phrase_index` no slot counts
            as a phrase.
        labels: of each sample, for a downstream task.
    """
    num_tags = inputs["input_ids_b"].shape[1]
    text_ids_BT, tag_ids_BG = inputs["input_ids_a"], inputs["input_ids_b"]
    visual_mask = inputs["attention_mask_b"].bool()
    features_BRX = inputs["img_feats"].to(dtype)
    num = len(text_ids_BT)
    none_B = torch.zeros(num, dtype=torch.int64)
    segments_BT = inputs.get("token_type_ids_a")

    def masked(name: str, ids_BL: Tensor) -> Tensor:
        given = inputs.get(name)
        if given is None:
            return torch.full_like(ids_BL, IGNORE)
        given = given[:, : ids_BL.shape[1]]
        return torch.where(given == _NOT_PREDICTED, IGNORE, given)

    def lengths(mask: Tensor) -> tuple[int, ...]:
        return tuple(mask.sum(1).tolist())

    return Batch(
        text_ids_BT=text_ids_BT,
        text_mask_BT=inputs["attention_mask_a"].bool(),
        phrase_mask_BT=_phrase_mask(inputs),
        mlm_labels_BT=masked("masked_lm_labels_a", text_ids_BT),
        phrase_labels_BT=torch.full_like(text_ids_BT, IGNORE),
        tag_ids_BG=tag_ids_BG,
        tag_mask_BG=visual_mask[:, :num_tags],
        tag_labels_BG=masked("masked_lm_labels_b", tag_ids_BG),
        region_geometry_BR6=features_BRX[..., feature_dim:],
        region_mask_BR=visual_mask[:, num_tags:],
        region_features_BRF=features_BRX[..., :feature_dim],
        images_B3HW=None,
        image_index_B=torch.arange(num),
        position_B=torch.arange(num),
        num_oov_phrases_B=none_B,
        num_phrases_B=none_B,
        num_bad_B=none_B,
        source_B=none_B,
        text_lengths=lengths(inputs["attention_mask_a"]),
        tag_lengths=lengths(visual_mask[:, :num_tags]),
        region_lengths=lengths(visual_mask[:, num_tags:]),
        labels=tuple(labels),
        tags_in_text_BT=segments_BT.bool() if segments_BT is not None and segments_BT.any() else None,
    )


def _phrase_mask(inputs: Mapping[str, Tensor]) -> Tensor:
    text_ids_BT, range_B2 = inputs["input_ids_a"], inputs.get("phrase_index")
    if range_B2 is None:
        return torch.zeros_like(text_ids_BT, dtype=torch.bool)
    slots_T = torch.arange(text_ids_BT.shape[1])
    return (slots_T >= range_B2[:, :1]) & (slots_T < range_B2[:, 1:])


def in_slots(states: Packed, num_slots: int) -> Tensor:
    """Returns states [B, num_slots, D], zero behind those of each sample."""
    padded = states.padded()
    return F.pad(padded, (0, 0, 0, num_slots - padded.shape[1]))


def masks(batch: Batch) -> dict[str, Tensor]:
    """Returns where the published states are of real slots, by their names."""
    return {
        "txt_encoder": batch.text_mask_BT,
        "vis_encoder": torch.cat([batch.tag_mask_BG, batch.region_mask_BR], 1),
        "sequence_output": torch.cat([batch.text_mask_BT, batch.region_mask_BR], 1),
    }
