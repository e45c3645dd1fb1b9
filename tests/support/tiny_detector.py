"""Small object detectors with random weights, saved as transformers saves them: what the tests of regions run."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers

NAMES = ("N/A", "Dog", "traffic_light", "Cabinet/shelf")
NUM_QUERIES = 8
HIDDEN = 16


def save_detector(kind: str, folder: Path, seed: int = 0) -> Path:
    """Writes a model of a few thousand weights and its processor: `detr` (padded pictures with a mask, softmax over
    classes and no object, as YOLOS), `yolos` (no mask) or `rt_detr` (one size, sigmoid)."""
    torch.manual_seed(seed)
    model, processor = {"detr": _detr, "yolos": _yolos, "rt_detr": _rt_detr}[kind]()
    with torch.no_grad():  # as they begin, all queries say the same
        for name, weight in model.named_parameters():
            if "detection_tokens" in name or "query_position" in name:
                weight.normal_()
            elif "encoder_attn.q_proj.weight" in name:
                weight.normal_(std=3.0)
            elif any(part in name for part in ("bbox", "class", "score")) and weight.ndim == 2:
                torch.nn.init.xavier_uniform_(weight)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def fix_heads(folder: Path, box: tuple[float, float, float, float], class_number: int, logit: float) -> None:
    """Rewrites a saved `yolos` so that all queries say the same: `box` (centre and sides, 0..1) and one class."""
    model = transformers.AutoModelForObjectDetection.from_pretrained(folder)
    with torch.no_grad():
        last = model.bbox_predictor.layers[-1]
        last.weight.zero_()
        last.bias.copy_(torch.logit(torch.tensor(box)))
        last = model.class_labels_classifier.layers[-1]
        last.weight.zero_()
        last.bias.zero_()
        last.bias[class_number] = logit
    model.save_pretrained(folder)


def _labels() -> dict[str, dict]:
    return {"id2label": dict(enumerate(NAMES)), "label2id": {name: number for number, name in enumerate(NAMES)}}


def _detr() -> tuple[transformers.PreTrainedModel, transformers.DetrImageProcessorPil]:
    backbone = transformers.ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 16], depths=[1, 1, 1, 1], layer_type="basic", out_features=["stage4"]
    )
    config = transformers.DetrConfig(
        use_timm_backbone=False,
        use_pretrained_backbone=False,
        backbone_config=backbone,
        backbone=None,
        d_model=HIDDEN,
        num_queries=NUM_QUERIES,
        encoder_layers=1,
        decoder_layers=1,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        **_labels(),
    )
    size = {"shortest_edge": 64, "longest_edge": 128}
    return transformers.DetrForObjectDetection(config), transformers.DetrImageProcessorPil(size=size)


def _yolos() -> tuple[transformers.PreTrainedModel, transformers.YolosImageProcessorPil]:
    config = transformers.YolosConfig(
        hidden_size=HIDDEN,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        image_size=[64, 96],
        patch_size=16,
        num_detection_tokens=NUM_QUERIES,
        use_mid_position_embeddings=False,
        **_labels(),
    )
    size = {"shortest_edge": 64, "longest_edge": 128}
    return transformers.YolosForObjectDetection(config), transformers.YolosImageProcessorPil(size=size)


def _rt_detr() -> tuple[transformers.PreTrainedModel, transformers.RTDetrImageProcessorPil]:
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8,
        hidden_sizes=[8, 8, 16, 16],
        depths=[1, 1, 1, 1],
        layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=HIDDEN,
        encoder_in_channels=[8, 16, 16],
        d_model=HIDDEN,
        num_queries=NUM_QUERIES,
        decoder_in_channels=[HIDDEN] * 3,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        num_denoising=0,
        **_labels(),
    )
    processor = transformers.RTDetrImageProcessorPil(size={"height": 64, "width": 64})
    return transformers.RTDetrForObjectDetection(config), processor
