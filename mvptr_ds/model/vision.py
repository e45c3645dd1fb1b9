"""Regions: a feature vector + 6 geometry numbers each, given or pooled from the image by RoIAlign.

Legend: B samples, R regions, N regions of all samples, F feature size, D hidden, C channels, H W height and width of
a map or image.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from transformers import AutoBackbone, AutoConfig, PretrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from .kernels import JoiningLinear, LayerNorm
from .packed import Packed

try:
    from torchvision.ops import roi_align as _library_roi_align
except (ImportError, RuntimeError, OSError):  # a torchvision built for another torch fails in any of these ways
    _library_roi_align = None

logger = logging.getLogger(__name__)

GEOMETRY_DIM = 6
SAMPLES_PER_BIN = 2  # a side; RoIAlign's sampling_ratio
IMAGE_MEAN = (0.485, 0.456, 0.406)
IMAGE_STD = (0.229, 0.224, 0.225)


def roi_align(map_BCHW: Tensor, boxes_BR4: Tensor, bins: int) -> Tensor:
    """Pools each box of a feature map: float [B, C, H, W], boxes 0..1 (x1 y1 x2 y2) -> [B, R, C * bins * bins].

    `aligned=True, sampling_ratio=2` of torchvision, which does it where it imports cleanly. A box of no size gives the
    map's value at that point; boxes are clipped to the picture. Half precision is computed in float32.
    """
    if map_BCHW.dtype in (torch.float16, torch.bfloat16):
        return roi_align(map_BCHW.float(), boxes_BR4, bins).to(map_BCHW.dtype)
    boxes_BR4 = boxes_BR4.detach().to(map_BCHW.dtype).clamp(0.0, 1.0)
    pool = _roi_align_grid if _library_roi_align is None else _roi_align_library
    return pool(map_BCHW, boxes_BR4, bins)


def _roi_align_library(map_BCHW: Tensor, boxes_BR4: Tensor, bins: int) -> Tensor:
    assert _library_roi_align is not None
    height, width = map_BCHW.shape[-2:]
    scaled_BR4 = boxes_BR4 * boxes_BR4.new_tensor([width, height, width, height])
    pooled = _library_roi_align(map_BCHW, list(scaled_BR4), bins, sampling_ratio=SAMPLES_PER_BIN, aligned=True)
    return pooled.reshape(*boxes_BR4.shape[:2], -1)


def _roi_align_grid(map_BCHW: Tensor, boxes_BR4: Tensor, bins: int) -> Tensor:
    """The same in plain torch: grid_sample at the sampling points, then the mean of each bin's.

    In grid_sample's coordinates (-1..1 over the picture, align_corners=False) the half pixel that `aligned` subtracts
    is already there, and border padding is RoIAlign's clamping, so a point is just `2 * x - 1`.
    """
    num_samples, num_regions = boxes_BR4.shape[:2]
    side = bins * SAMPLES_PER_BIN
    steps_S = (torch.arange(side, dtype=boxes_BR4.dtype, device=boxes_BR4.device) + 0.5) / side
    x1, y1, x2, y2 = (2.0 * boxes_BR4 - 1.0).unsqueeze(-1).unbind(2)
    x_BRS, y_BRS = x1 + (x2 - x1) * steps_S, y1 + (y2 - y1) * steps_S
    grid_BRSS2 = torch.stack(
        [x_BRS[:, :, None, :].expand(-1, -1, side, -1), y_BRS[:, :, :, None].expand(-1, -1, -1, side)], dim=-1
    )
    points = F.grid_sample(
        map_BCHW, grid_BRSS2.flatten(1, 2), mode="bilinear", padding_mode="border", align_corners=False
    )
    pooled = F.avg_pool2d(points, SAMPLES_PER_BIN)  # [B, C, R * bins, bins]
    return pooled.reshape(num_samples, -1, num_regions, bins, bins).transpose(1, 2).flatten(2)


class ImageBackbone(nn.Module):
    """A transformers AutoBackbone from uint8 pixels to its last feature map.

    Batch norm stays in evaluation mode, because DeepSpeed saves rank 0's buffers only; its affine parameters train.
    Frozen, the whole backbone stays in evaluation mode and runs without gradient.
    """

    def __init__(self, config: PretrainedConfig, freeze: bool) -> None:
        super().__init__()
        self.net = AutoBackbone.from_config(config)
        self.num_channels = int(self.net.channels[-1])
        self.freeze = freeze
        if freeze:
            self.net.requires_grad_(False)

    def train(self, mode: bool = True) -> ImageBackbone:
        super().train(mode)
        if self.freeze:
            self.net.eval()
        for module in self.net.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Computes the last feature map, float [B, C, h, w], of uint8 RGB images [B, 3, H, W]."""
        if images_B3HW.dtype != torch.uint8:
            raise ValueError(f"images are {images_B3HW.dtype}, expected uint8 RGB: normalisation happens in the model")
        mean, std = (torch.tensor(v, device=images_B3HW.device).view(3, 1, 1) for v in (IMAGE_MEAN, IMAGE_STD))
        return self.feature_map((images_B3HW.contiguous().float() / 255.0 - mean) / std)

    def feature_map(self, pixels_B3HW: Tensor) -> Tensor:
        """Computes the last feature map, float [B, C, h, w], of normalised images [B, 3, H, W]."""
        pixels_B3HW = pixels_B3HW.to(next(self.net.parameters()).dtype)
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze):
            return self.net(pixels_B3HW).feature_maps[-1]


class RegionEmbedding(nn.Module):
    """(feature, geometry) of each region -> linear, LayerNorm where asked for, dropout.

    Source: the published code, which has the LayerNorm in fine-tuning for retrieval alone.
    """

    def __init__(
        self,
        feature_dim: int,
        hidden_size: int,
        dropout: float,
        backbone: ImageBackbone | None,
        roi_bins: int,
        norm_eps: float | None = None,
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.roi_bins = roi_bins
        self.feature_dim = feature_dim if backbone is None else backbone.num_channels * roi_bins**2
        self.projection = JoiningLinear(self.feature_dim + GEOMETRY_DIM, hidden_size)
        self.norm = None if norm_eps is None else LayerNorm(hidden_size, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Packed | None, images_B3HW: Tensor | None, geometry: Packed) -> Packed:
        """Embeds regions as [N, D], from float features [N, F] or uint8 images [B, 3, H, W], and geometry [N, 6].

        Raises:
            ValueError: when what this model's visual source needs is missing or of another size.
        """
        if self.backbone is not None:
            if images_B3HW is None:
                raise ValueError("visual_source is image, but the batch has no images")
            features = self.pool(self.backbone(images_B3HW), geometry)
        if features is None:
            raise ValueError("visual_source is features, but the batch has no region features")
        return self.project(features, geometry)

    def pool(self, map_BCHW: Tensor, geometry: Packed) -> Packed:
        """Returns the features [N, F] of regions in a feature map."""
        assert self.backbone is not None
        pooled_BRF = roi_align(map_BCHW, geometry.padded()[..., :4], self.roi_bins)
        return geometry.unpadded(pooled_BRF)

    def project(self, features: Packed, geometry: Packed) -> Packed:
        """Embeds features [N, F] and geometry [N, 6] as [N, D]. Raises ValueError for another size F."""
        if features.rows.shape[-1] != self.feature_dim:
            raise ValueError(
                f"region features have {features.rows.shape[-1]} numbers, this model takes {self.feature_dim}: "
                "set region_feature_dim (visual.feature_dim) to the shards' size"
            )
        dtype = self.projection.weight.dtype
        embedded_ND = self.projection(features.rows.to(dtype), geometry.rows.to(dtype))
        return geometry.like(self.dropout(embedded_ND if self.norm is None else self.norm(embedded_ND)))


def backbone_structure(name: str | None, from_scratch: dict[str, Any] | None) -> PretrainedConfig:
    """Returns the transformers config of a backbone given by hub name or folder, or by `{"model_type": ..., ...}`.

    Raises:
        ValueError: for a dict without a known model_type.
    """
    if name is not None:
        return AutoConfig.from_pretrained(name)
    settings = dict(from_scratch or {})
    model_type = settings.pop("model_type", None)
    if model_type not in CONFIG_MAPPING:
        raise ValueError(f"backbone_config.model_type is {model_type!r}, no model type of transformers (e.g. convnext)")
    return CONFIG_MAPPING[model_type](**settings)


def load_backbone_weights(backbone: ImageBackbone, name: str) -> None:
    """Copies the pretrained weights of a hub name or folder into a backbone of the same structure."""
    # AutoBackbone.from_pretrained asks the hub even for a folder, so the class itself loads.
    pretrained, info = type(backbone.net).from_pretrained(name, config=backbone.net.config, output_loading_info=True)
    missing = sorted(info["missing_keys"])
    if missing:
        logger.warning("backbone %s: %d parameters start fresh: %s", name, len(missing), missing)
    backbone.net.load_state_dict(pretrained.state_dict())
