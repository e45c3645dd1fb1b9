"""Fine-tuned checkpoints of the reference, in and out, tensor by tensor; and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import config_from_reference, config_to_reference
from mvptr_ds.model.convert_finetuned import from_finetuned, to_finetuned
from mvptr_ds.model.mvptr import Mvptr
from tests.support.published_states import DIM, NUM_ANSWERS, PUBLISHED, published_checkpoint

FOLDER = Path(__file__).resolve().parents[2].parent / "shared" / "downstream"
FRESH_HEADS = {"token_head", "tag_head"}


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape and torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("kind", PUBLISHED)
def test_every_tensor_comes_back_under_its_name(kind: str) -> None:
    task = kind.split("-")[0]
    state, config_json = published_checkpoint(kind)
    found = from_finetuned(state, config_json, task)
    same(to_finetuned(found.model, found.head, found.config, task), state)
    shapes = {name: tensor.shape for name, tensor in Mvptr(found.config).state_dict().items()}
    assert {name: tensor.shape for name, tensor in found.model.items()} == {
        name: shape for name, shape in shapes.items() if name not in found.fresh
    }
    own = {"retrieval": set(), "vqa": {"itm_head", "logit_scale"}}.get(task, {"itm_head", "logit_scale"})
    assert {name.split(".")[0] for name in found.fresh} == FRESH_HEADS | own


@pytest.mark.skipif(not FOLDER.is_dir(), reason="no ../shared/downstream beside the repository")
@pytest.mark.parametrize(
    ("heads", "task"),
    [("retrieval", "retrieval"), ("vqa", "vqa"), ("vqa_linear", "vqa"), ("ve", "entailment"), ("re", "referring")],
)
def test_the_recorded_weights_come_back(heads: str, task: str) -> None:
    own = load_file(FOLDER / "heads.safetensors")
    own = {n.removeprefix(f"{heads}."): t for n, t in own.items() if n.startswith(f"{heads}.")}
    state = {**load_file(FOLDER / "weights.safetensors"), **own}
    found = from_finetuned(state, json.loads((FOLDER / "config.json").read_text())["reference_config"], task)
    assert found.config.region_norm == (heads == "retrieval")
    same(to_finetuned(found.model, found.head, found.config, task), state)


def test_a_match_is_class_0_here_and_1_there() -> None:
    state, config_json = published_checkpoint("retrieval")
    found = from_finetuned(state, config_json, "retrieval")
    assert torch.equal(found.model["itm_head.weight"][0], state["classifier.weight"][1])
    assert torch.equal(found.model["itm_head.bias"], state["classifier.bias"][[1, 0]])
    assert found.head == {}
    assert torch.equal(found.model["region_embedding.norm.weight"], state["bert.LayerNorm.weight"])


def test_heads_have_our_names_and_the_rows_of_theirs() -> None:
    state, config_json = published_checkpoint("vqa")
    head = from_finetuned(state, config_json, "vqa").head
    assert set(head) == {"dense.weight", "dense.bias", "norm.weight", "norm.bias", "bias", "decoder"}
    assert head["decoder"].shape == (NUM_ANSWERS, DIM)
    assert torch.equal(head["decoder"], state["cls.predictions.decoder.weight"])
    assert torch.equal(head["norm.bias"], state["cls.predictions.transform.LayerNorm.bias"])
    state, config_json = published_checkpoint("entailment")
    head = from_finetuned(state, config_json, "entailment").head
    assert torch.equal(head["weight"], state["classifier.weight"]) and set(head) == {"weight", "bias"}


def test_a_whole_model_leaves_out_what_their_classes_lack() -> None:
    state, config_json = published_checkpoint("entailment")
    found = from_finetuned(state, config_json, "entailment")
    whole = {**Mvptr(found.config).state_dict(), **found.model}
    names = set(to_finetuned(whole, found.head, found.config, "entailment"))
    assert names == set(state) | {"logit_scale"}  # trained before, so that it is kept


@pytest.mark.parametrize(
    ("kind", "change", "said"),
    [
        ("entailment", {"surprise.weight": torch.zeros(2)}, ["extra surprise.weight (2,)"]),
        ("entailment", {"bert.txt_proj": None}, ["missing bert.txt_proj (8, 8)"]),
        ("entailment", {"classifier.bias": None}, ["missing classifier.bias (3,)"]),
        (
            "entailment",
            {"classifier.bias": torch.zeros(2), "classifier.weight": torch.zeros(2, 8)},
            ["classifier.bias has shape (2,), expected (3,)", "classifier.weight has shape (2, 8), expected (3, 8)"],
        ),
        ("referring", {"cls.predictions.bias": torch.zeros(20)}, ["extra cls.predictions.bias (20,)"]),
        ("vqa", {"classifier.weight": torch.zeros(7, 8)}, ["extra classifier.weight (7, 8)"]),
        ("vqa", {"qa_head.bias": torch.zeros(7)}, ["extra qa_head.bias (7,)"]),
        ("retrieval", {"logit_scale": None}, ["missing logit_scale ()"]),
        (
            "retrieval",
            {"bert.LayerNorm.weight": None},
            ["use_img_layernorm is 1, but there is no bert.LayerNorm.weight"],
        ),
    ],
)
def test_what_does_not_fit_is_listed(kind: str, change: dict[str, Tensor | None], said: list[str]) -> None:
    state, config_json = published_checkpoint(kind)
    for name, tensor in change.items():
        if tensor is None:
            del state[name]
        else:
            state[name] = tensor
    with pytest.raises(ValueError) as error:
        from_finetuned(state, config_json, kind)
    assert all(line in str(error.value) for line in said), str(error.value)


def test_other_tasks_and_other_models_are_refused() -> None:
    state, config_json = published_checkpoint("entailment")
    with pytest.raises(ValueError, match="task 'captions' is unknown; choose from retrieval, vqa"):
        from_finetuned(state, config_json, "captions")
    with pytest.raises(ValueError, match="no checkpoint of the published code: num_hidden_layers, "):
        from_finetuned(state, {"model_type": "bert"}, "entailment")
    retrieval, of_retrieval = published_checkpoint("retrieval")
    with pytest.raises(ValueError, match="img_layer_norm_eps is 1e-05, unlike layer_norm_eps"):
        from_finetuned(retrieval, of_retrieval | {"img_layer_norm_eps": 1e-5}, "retrieval")
    pixels = MvptrConfig(visual_source="image", backbone_config={"model_type": "convnext"})
    with pytest.raises(ValueError, match="the reference reads detector features only"):
        to_finetuned({}, {}, pixels, "vqa")


def test_config_json_comes_back() -> None:
    state, config_json = published_checkpoint("retrieval")
    config = config_from_reference(config_json, state)
    assert config_to_reference(config) == config_json
    again: dict[str, Any] = config_from_reference(config_to_reference(config), state).to_dict()
    assert again == config.to_dict()
    config.num_cross_layers = 3
    with pytest.raises(ValueError, match="the encoders have 2, 2, 3 layers"):
        config_to_reference(config)
