"""RoIAlign against hand-computed values and a plain reading of its definition; backbones."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import ConvNextConfig, ConvNextModel

from mvptr_ds.model import vision
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr
from tests.support.pack import pack

CONVNEXT: dict[str, Any] = {"model_type": "convnext", "hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2}
RESNET: dict[str, Any] = {
    "model_type": "resnet",
    "embedding_size": 8,
    "hidden_sizes": [8, 16],
    "depths": [1, 1],
    "layer_type": "basic",
}


def image_model(**changes: Any) -> Mvptr:
    settings: dict[str, Any] = {
        "num_words": 20,
        "num_rows": 20,
        "hidden_size": 16,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_text_layers": 1,
        "num_visual_layers": 1,
        "num_cross_layers": 1,
        "max_positions": 8,
        "visual_source": "image",
        "backbone_config": CONVNEXT,
    }
    torch.manual_seed(0)
    return Mvptr(MvptrConfig(**{**settings, **changes}))


def images(num: int = 2, size: int = 64) -> Tensor:
    return torch.randint(0, 256, (num, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def boxes(num: int = 2, regions: int = 3) -> Tensor:
    corners = torch.rand(num, regions, 4, generator=torch.Generator().manual_seed(1))
    low, high = torch.minimum(corners[..., :2], corners[..., 2:]), torch.maximum(corners[..., :2], corners[..., 2:])
    return torch.cat([low, high, high - low], dim=-1)


def by_definition(map_CHW: Tensor, box_4: Tensor, bins: int) -> Tensor:
    """RoIAlign (aligned, 2 x 2 samples a bin) point by point -> [C * bins * bins]."""
    channels, height, width = map_CHW.shape
    x1, x2 = (box_4[i].item() * width - 0.5 for i in (0, 2))
    y1, y2 = (box_4[i].item() * height - 0.5 for i in (1, 3))
    out = torch.zeros(channels, bins, bins, dtype=map_CHW.dtype)
    for row in range(bins):
        for column in range(bins):
            for i in range(4):
                y = y1 + (y2 - y1) / bins * (row + (i // 2 + 0.5) / 2)
                x = x1 + (x2 - x1) / bins * (column + (i % 2 + 0.5) / 2)
                y, x = min(max(y, 0.0), height - 1.0), min(max(x, 0.0), width - 1.0)
                top, left = min(math.floor(y), height - 1), min(math.floor(x), width - 1)
                bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
                dy, dx = y - top, x - left
                above = map_CHW[:, top, left] * (1 - dx) + map_CHW[:, top, right] * dx
                below = map_CHW[:, bottom, left] * (1 - dx) + map_CHW[:, bottom, right] * dx
                out[:, row, column] += (above * (1 - dy) + below * dy) / 4
    return out.flatten()


@pytest.fixture(params=["grid", "library"])
def pool(request: pytest.FixtureRequest) -> Any:
    if request.param == "grid":
        return vision._roi_align_grid
    if vision._library_roi_align is None:
        pytest.skip("torchvision does not import")
    return vision._roi_align_library


@pytest.mark.parametrize("bins", [1, 2, 3])
def test_roi_align_follows_its_definition(pool: Any, bins: int) -> None:
    generator = torch.Generator().manual_seed(0)
    maps = torch.randn(2, 3, 5, 7, dtype=torch.float64, generator=generator)
    region_boxes = boxes()[..., :4].double()
    region_boxes[0, 0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    region_boxes[1, 2] = torch.tensor([0.9, 0.0, 1.0, 0.05])  # a corner smaller than a cell
    pooled = pool(maps, region_boxes, bins)
    assert pooled.shape == (2, 3, 3 * bins * bins)
    for b in range(2):
        for r in range(3):
            wanted = by_definition(maps[b], region_boxes[b, r], bins)
            torch.testing.assert_close(pooled[b, r], wanted, rtol=0, atol=1e-12)  # float64 rounding


def test_roi_align_by_hand(pool: Any) -> None:
    ramp = torch.arange(4.0).repeat(4, 1)[None, None]  # the value is the column: 0 1 2 3, centres at 1/8 3/8 5/8 7/8
    whole_left_right_point = torch.tensor([[[0, 0, 1, 1], [0, 0, 0.5, 1], [0.5, 0, 1, 1], [0.625, 0.5, 0.625, 0.5]]])
    # columns sampled: 0.5 2.5 | 0 (clamped from 0.0) 1.0 | 2.0 3.0 | 2.0
    torch.testing.assert_close(pool(ramp, whole_left_right_point, 1)[0, :, 0], torch.tensor([1.5, 0.5, 2.5, 2.0]))


def test_degenerate_and_outside_boxes_are_finite() -> None:
    maps = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0), requires_grad=True)
    odd = torch.tensor([[[0.0, 0, 0, 0], [1, 1, 1, 1], [0.5, 0.2, 0.5, 0.9], [-0.5, -3, 2, 1.5]]])
    pooled = vision.roi_align(maps, odd, 2)
    pooled.sum().backward()
    assert pooled.isfinite().all() and maps.grad is not None and maps.grad.isfinite().all()
    whole = vision.roi_align(maps, torch.tensor([[[0.0, 0, 1, 1]]]), 2)
    torch.testing.assert_close(pooled[:, 3], whole[:, 0])  # clipped to the picture


def test_half_precision_pools_in_float32() -> None:
    maps = torch.randn(1, 2, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    pooled = vision.roi_align(maps, boxes(1)[..., :4], 1)
    assert pooled.dtype == torch.bfloat16
    torch.testing.assert_close(pooled, vision.roi_align(maps.float(), boxes(1)[..., :4], 1).bfloat16())


@pytest.mark.parametrize(("backbone", "bins"), [(CONVNEXT, 1), (RESNET, 2)])
def test_regions_come_from_the_image_at_their_box(backbone: dict[str, Any], bins: int) -> None:
    model = image_model(backbone_config=backbone, roi_bins=bins).eval()
    assert model.config.region_feature_dim == 16 * bins**2
    pixels, geometry = images(), boxes()
    regions = model.embed_regions(None, pixels, pack(geometry)).padded()
    assert regions.shape == (2, 3, 16)
    assert not torch.allclose(model.embed_regions(None, 255 - pixels, pack(geometry)).padded(), regions)
    swapped = model.embed_regions(None, pixels.flip(0), pack(geometry.flip(0))).padded()
    torch.testing.assert_close(swapped.flip(0), regions)
    with pytest.raises(ValueError, match="no images"):
        model.embed_regions(pack(torch.zeros(2, 3, 16)), None, pack(geometry))
    with pytest.raises(ValueError, match=r"torch\.float32, expected uint8"):
        model.embed_regions(None, pixels.float(), pack(geometry))


def test_images_are_normalised_as_imagenet() -> None:
    seen: list[Tensor] = []
    backbone = image_model().region_embedding.backbone
    assert backbone is not None
    backbone.net.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    pixel = torch.tensor([0, 128, 255], dtype=torch.uint8).view(1, 3, 1, 1).expand(1, 3, 64, 64)
    backbone(pixel)
    wanted = torch.tensor([-0.485 / 0.229, (128 / 255 - 0.456) / 0.224, (1 - 0.406) / 0.225])
    torch.testing.assert_close(seen[0][0, :, 0, 0], wanted)


def test_backbone_trains() -> None:
    """Regions of red and blue squares are told apart through the backbone's own gradient."""
    model = image_model(backbone_config={**CONVNEXT, "layer_scale_init_value": 1.0}, hidden_dropout=0.0).train()
    pixels = images(8)
    labels = torch.tensor([0.0, 1.0]).repeat(8)
    for n in range(8):
        pixels[n, 0, 8:24, 8:24] = 255  # first region: red
        pixels[n, 2, 40:56, 40:56] = 255  # second region: blue
    geometry = torch.zeros(8, 2, 6)
    geometry[:, 0] = torch.tensor([0.125, 0.125, 0.375, 0.375, 0.25, 0.25])
    geometry[:, 1] = torch.tensor([0.625, 0.625, 0.875, 0.875, 0.25, 0.25])
    backbone = model.region_embedding.backbone
    assert backbone is not None
    trained = list(backbone.parameters())
    optimiser = torch.optim.AdamW(trained, lr=1e-3)
    losses = []
    for _ in range(30):
        # The projection stays as it is and geometry is the same in all images: only the backbone can lower the loss.
        logits = model.embed_regions(None, pixels, pack(geometry)).rows.sum(-1)
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    assert all(p.grad is not None for p in trained)
    assert losses[-1] < 0.5 * losses[0]


def test_batch_norm_stays_frozen_in_training() -> None:
    model = image_model(backbone_config=RESNET, hidden_dropout=0.0).train()
    before = {n: b.clone() for n, b in model.named_buffers()}
    assert any(name.endswith("running_mean") for name in before)
    model.embed_regions(None, images(), pack(boxes())).rows.sum().backward()
    assert all(torch.equal(b, before[n]) for n, b in model.named_buffers())
    affine = [p for n, p in model.named_parameters() if "normalization.weight" in n]
    assert affine and all(p.requires_grad and p.grad is not None for p in affine)


def test_frozen_backbone_has_no_gradient_and_belongs_to_no_part() -> None:
    model = image_model(freeze_backbone=True).train()
    backbone = model.region_embedding.backbone
    assert backbone is not None and not any(module.training for module in backbone.net.modules())
    model.embed_regions(None, images(), pack(boxes())).rows.sum().backward()
    assert all(p.grad is None and not p.requires_grad for p in backbone.parameters())
    projection = "region_embedding.projection"
    assert model.parameters_of(["regions"]) == [f"{projection}.weight", f"{projection}.bias"]
    assert len(image_model().parameters_of(["regions"])) > 2


def test_pretrained_backbone_comes_from_a_folder_once(tmp_path: Path) -> None:
    torch.manual_seed(3)
    settings = {k: v for k, v in CONVNEXT.items() if k != "model_type"}
    source = ConvNextModel(ConvNextConfig(**settings))
    source.save_pretrained(tmp_path / "backbone")
    model = image_model(backbone=str(tmp_path / "backbone"), backbone_config=None)
    taken = model.region_embedding.backbone.net.state_dict()
    shared = [n for n in taken if n in source.state_dict()]
    assert len(shared) > 10 and all(torch.equal(taken[n], source.state_dict()[n]) for n in shared)
    assert model.config.backbone is None and model.config.backbone_origin == str(tmp_path / "backbone")

    model.save_pretrained(tmp_path / "model")
    (tmp_path / "backbone").rename(tmp_path / "gone")  # a saved model needs its own folder only
    loaded = Mvptr.from_pretrained(tmp_path / "model").eval()
    regions = model.eval().embed_regions(None, images(), pack(boxes()))
    assert torch.equal(loaded.embed_regions(None, images(), pack(boxes())).rows, regions.rows)


def test_unknown_backbones_are_refused() -> None:
    with pytest.raises(ValueError, match="model_type is 'convnixt'"):
        image_model(backbone_config={"model_type": "convnixt"})
    with pytest.raises(ValueError, match="not both"):
        image_model(backbone="some/name")
