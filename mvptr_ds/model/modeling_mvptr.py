"""MVPTR as transformers knows models: padded tensors in, a `ModelOutput` out. `AutoModel` loads it from a folder.

Legend: B pairs, L token slots, P phrases, G tag slots, R regions, T text slots (tokens and phrases), D hidden,
F feature size.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.generic import ModelOutput

from .mvptr import Mvptr
from .packed import Packed

_EMPTY_TAGS = 2  # [CLS] and [SEP]


@dataclass
class MvptrOutput(ModelOutput):
    """What a forward pass gives; what was not asked for is None.

    Attributes:
        text_embeds, image_embeds: global states of length 1, float32 [B, D].
        match_logits: [B, 2] of each text with the image of the same number; class 0 is a match.
        text_states: of the text encoder, float [B, T, D], and `text_mask`, bool [B, T].
        phrase_mask: bool [B, T], the slots that hold a phrase.
        region_states: of the visual encoder, float [B, R, D], and `region_mask`, bool [B, R].
        cross_text_states, cross_region_states: the same behind the cross encoder.
    """

    text_embeds: Tensor | None = None
    image_embeds: Tensor | None = None
    match_logits: Tensor | None = None
    text_states: Tensor | None = None
    text_mask: Tensor | None = None
    phrase_mask: Tensor | None = None
    region_states: Tensor | None = None
    region_mask: Tensor | None = None
    cross_text_states: Tensor | None = None
    cross_region_states: Tensor | None = None


class MvptrModel(Mvptr):
    """The model of `Mvptr` with a forward pass over padded tensors, such as `MvptrProcessor` makes."""

    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        phrase_ids: Tensor | None = None,
        tag_ids: Tensor | None = None,
        tag_attention_mask: Tensor | None = None,
        pixel_values: Tensor | None = None,
        region_features: Tensor | None = None,
        boxes: Tensor | None = None,
        region_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> MvptrOutput | tuple[Tensor, ...]:
        """Encodes texts, images or pairs of both.

        Args:
            input_ids: int64 [B, L], `[CLS] wordpieces [SEP]` as the tokenizer makes them, and its `attention_mask`.
            phrase_ids: int64 [B, P], numbers in the phrase vocabulary, -1 behind the last one.
            tag_ids: int64 [B, G], `[CLS] wordpieces of the object tags [SEP]`, and its `tag_attention_mask`. Without
                tags the image is read as in training with withheld tags.
            pixel_values: float [B, 3, H, W], normalised, or uint8 RGB, which the model normalises itself.
            region_features: float [B, R, F], of a model with `visual_source` features.
            boxes: float [B, R, 4], x1 y1 x2 y2 as shares of width and height. Default: a grid of `grid_size` a side.
            region_mask: bool [B, R], the boxes that are regions. Default: all.

        Raises:
            ValueError: there is neither text nor image, both differ in number, or what the model's visual source needs
                is missing.
        """
        out = MvptrOutput()
        text = None if input_ids is None else self._text(input_ids, attention_mask, phrase_ids, out)
        has_image = pixel_values is not None or region_features is not None
        if text is None and not has_image:
            raise ValueError("there is nothing to encode: give input_ids, or pixel_values or region_features, or both")
        if has_image:
            geometry = self._geometry(pixel_values, region_features, boxes, region_mask)
            regions = self._regions(geometry, pixel_values, region_features)
            tags, regions = self.encode_visual(self._tags(tag_ids, tag_attention_mask, len(geometry)), regions)
            out.image_embeds = self.visual_global(tags)
            out.region_states, out.region_mask = regions.padded(), regions.mask()
            if text is not None:
                if len(text) != len(regions):
                    raise ValueError(f"{len(text)} texts and {len(regions)} images: each text goes with one image")
                cross_text, cross_regions = self.encode_cross(text, regions)
                out.match_logits = self.itm_logits(self.pool(cross_text))
                out.cross_text_states, out.cross_region_states = cross_text.padded(), cross_regions.padded()
        return out if return_dict else out.to_tuple()

    def _text(
        self, input_ids: Tensor, attention_mask: Tensor | None, phrase_ids: Tensor | None, out: MvptrOutput
    ) -> Packed:
        """Encodes texts: the phrases' rows of the table stand between the words and [SEP]."""
        lengths = _lengths(attention_mask, input_ids)
        rows, num_phrases = [], [0] * len(lengths)
        for number, (ids_L, length) in enumerate(zip(input_ids, lengths, strict=True)):
            parts = [ids_L[: length - 1], ids_L[length - 1 : length]]
            if phrase_ids is not None:
                phrases_P = phrase_ids[number][phrase_ids[number] >= 0]
                num_phrases[number] = len(phrases_P)
                if len(phrases_P):
                    parts.insert(1, self.phrase_rows.index_select(0, phrases_P.to(self.phrase_rows.device)))
            rows.append(torch.cat([part.to(self.device) for part in parts]))
        ids = Packed(torch.cat(rows), tuple(len(row) for row in rows))
        text = self.encode_text(ids)
        out.text_embeds = self.text_global(text)
        out.text_states, out.text_mask = text.padded(), text.mask()
        places_T = torch.arange(out.text_mask.shape[1], device=self.device)
        ends_B1 = torch.tensor(ids.lengths, device=self.device)[:, None] - 1
        firsts_B1 = ends_B1 - torch.tensor(num_phrases, device=self.device)[:, None]
        out.phrase_mask = (places_T >= firsts_B1) & (places_T < ends_B1)
        return text

    def _geometry(
        self,
        pixel_values: Tensor | None,
        region_features: Tensor | None,
        boxes: Tensor | None,
        region_mask: Tensor | None,
    ) -> Packed:
        """Returns float32 [N, 6] of all regions: corners and sizes, as shares of the image."""
        given = pixel_values if region_features is None else region_features
        assert given is not None
        if boxes is None:
            if region_features is not None:
                raise ValueError("region_features come with the boxes of their regions: give boxes [B, R, 4]")
            side = self.config.grid_size
            place = torch.arange(side**2, device=self.device)
            corner = torch.stack([place % side, place // side], dim=1)
            boxes = (torch.cat([corner, corner + 1], dim=1) / side).expand(len(given), -1, -1)
        corners_BR4 = boxes.to(self.device, torch.float32).clamp(0.0, 1.0)
        geometry_BR6 = torch.cat([corners_BR4, corners_BR4[..., 2:] - corners_BR4[..., :2]], dim=-1)
        return Packed.of_padded(geometry_BR6, _lengths(region_mask, geometry_BR6[..., 0]))

    def _regions(self, geometry: Packed, pixel_values: Tensor | None, region_features: Tensor | None) -> Packed:
        embedding, config = self.region_embedding, self.config
        if config.visual_source == "features":
            if region_features is None:
                raise ValueError("this model reads region features: give region_features [B, R, F] and boxes")
            features = Packed.of_padded(region_features.to(self.device, torch.float32), geometry.lengths)
            return self.embed_regions(features, None, geometry)
        if pixel_values is None:
            raise ValueError("this model reads pixels: give pixel_values [B, 3, H, W]")
        pixels_B3HW = pixel_values.to(self.device)
        if not pixels_B3HW.is_floating_point():
            return self.embed_regions(None, pixels_B3HW, geometry)
        assert embedding.backbone is not None
        features = embedding.pool(embedding.backbone.feature_map(pixels_B3HW), geometry)
        embedded: Packed = embedding.project(features, geometry)
        return embedded

    def _tags(self, tag_ids: Tensor | None, tag_attention_mask: Tensor | None, num: int) -> Packed:
        if tag_ids is None:
            ends = torch.tensor([self.config.cls_token_id, self.config.sep_token_id], device=self.device)
            return Packed(ends.repeat(num), (_EMPTY_TAGS,) * num)
        return Packed.of_padded(tag_ids.to(self.device), _lengths(tag_attention_mask, tag_ids))


def _lengths(mask_BL: Tensor | None, slots_BL: Tensor) -> list[int]:
    """Returns the number of real slots of each row, which precede the padding."""
    if mask_BL is None:
        return [slots_BL.shape[1]] * len(slots_BL)
    lengths = mask_BL.long().sum(1).tolist()
    if any(not bool(row[:length].all()) for row, length in zip(mask_BL, lengths, strict=True)):
        raise ValueError("a mask has holes: real slots must precede the padding (padding_side is right)")
    return [int(length) for length in lengths]
