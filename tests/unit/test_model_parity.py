"""The model alone against the published code's recorded tensors (float64), at positions that are not padding."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from mvptr_ds.model.convert import config_from_reference, from_reference
from mvptr_ds.model.embeddings import TAG_SEGMENT, TEXT_SEGMENT
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed
from tests.support.pack import pack

PARITY = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
# Rounding of float64 over six layers of hidden 32 stays below 1e-13; the attention mask's exp(-10000) is exactly 0.
TOLERANCE = 1e-9

pytestmark = pytest.mark.skipif(not PARITY.is_dir(), reason="no ../shared/parity beside the repository")


@pytest.fixture(scope="module")
def expected() -> dict[str, Tensor]:
    return load_file(PARITY / "expected.safetensors")


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def results(request: pytest.FixtureRequest) -> dict[str, Tensor]:
    """Every tensor of the forward pass, with the masks under `valid.*`."""
    weights, inputs = load_file(PARITY / "weights.safetensors"), load_file(PARITY / "inputs.safetensors")
    config = config_from_reference(json.loads((PARITY / "config.json").read_text()), weights)
    assert config.tie_word_heads
    config.tie_word_heads = request.param
    model = Mvptr(config)
    model.load_state_dict(from_reference(weights, config))
    model = model.double().eval()

    text_mask = inputs["attention_mask_a"].bool()
    visual_mask = inputs["attention_mask_b"].bool()
    num_tags = inputs["input_ids_b"].shape[1]
    tag_mask, region_mask = visual_mask[:, :num_tags], visual_mask[:, num_tags:]
    out: dict[str, Tensor] = {"valid.text": text_mask, "valid.visual": visual_mask}
    with torch.no_grad():
        out["embeddings_text"] = model.embeddings(pack(inputs["input_ids_a"]), TEXT_SEGMENT).padded()
        out["embeddings_tags"] = model.embeddings(pack(inputs["input_ids_b"]), TAG_SEGMENT).padded()
        features_BRX = inputs["img_feats"]
        every = model.embed_regions(pack(features_BRX[..., :-6]), None, pack(features_BRX[..., -6:])).padded()
        out["img_embedding"] = every
        text = model.encode_text(pack(inputs["input_ids_a"], text_mask))
        tags, seen = model.encode_visual(pack(inputs["input_ids_b"], tag_mask), pack(every, region_mask))
        out["txt_encoder"] = slots(text, text_mask)
        out["vis_encoder"] = torch.cat([slots(tags, tag_mask), slots(seen, region_mask)], dim=1)
        out["sim_mat"] = model.text_global(text) @ model.visual_global(tags).T
        cross_text, cross_regions = model.encode_cross(text, seen)
        cross_text_BTD = slots(cross_text, text_mask)
        out["sequence_output"] = torch.cat([cross_text_BTD, slots(cross_regions, region_mask)], dim=1)
        out["pooled"] = model.pool(cross_text)
        out["itm_logits"] = model.itm_logits(out["pooled"])
        out["tag_mlm_logits"] = model.tag_logits(slots(tags, tag_mask)[inputs["masked_lm_labels_b"][:, :num_tags] >= 0])
        out["text_mlm_logits"] = model.token_logits(cross_text_BTD[inputs["masked_lm_labels_a"] >= 0])
    return out


def slots(states: Packed, mask: Tensor) -> Tensor:
    """Padded to the recorded number of slots."""
    padded = states.padded()
    return F.pad(padded, (0, 0, 0, mask.shape[1] - padded.shape[1]))


def _largest_difference(actual: Tensor, wanted: Tensor) -> float:
    assert actual.shape == wanted.shape
    assert actual.dtype == wanted.dtype == torch.float64
    return (actual - wanted).abs().max().item()


@pytest.mark.parametrize(
    "name",
    ["embeddings_text", "embeddings_tags", "img_embedding", "sim_mat", "pooled", "tag_mlm_logits", "text_mlm_logits"],
)
def test_whole_tensors_agree(name: str, results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert _largest_difference(results[name], expected[name]) < TOLERANCE


@pytest.mark.parametrize("name", ["txt_encoder", "vis_encoder", "sequence_output"])
def test_encoder_states_agree_where_not_padding(
    name: str, results: dict[str, Tensor], expected: dict[str, Tensor]
) -> None:
    text, visual = results["valid.text"], results["valid.visual"]
    num_regions = results["img_embedding"].shape[1]
    cross = torch.cat([text, visual[:, -num_regions:]], dim=1)
    valid = {"txt_encoder": text, "vis_encoder": visual, "sequence_output": cross}[name]
    assert valid.sum() < valid.numel()
    assert _largest_difference(results[name][valid], expected[name][valid]) < TOLERANCE


def test_itm_head_on_the_matching_pairs_agrees(results: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    num_pairs = len(results["itm_logits"])
    assert _largest_difference(results["itm_logits"], expected["itm_logits"][:num_pairs]) < TOLERANCE
