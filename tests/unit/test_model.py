"""The model's shapes, masks, tying, saving and parts."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.encoder import Execution
from mvptr_ds.model.mvptr import PARTS, Mvptr
from tests.support.pack import pack

TINY: dict[str, Any] = {
    "num_words": 40,
    "num_rows": 60,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_text_layers": 2,
    "num_visual_layers": 1,
    "num_cross_layers": 2,
    "max_positions": 12,
    "region_feature_dim": 8,
}


def tiny(seed: int = 0, **changes: Any) -> Mvptr:
    torch.manual_seed(seed)
    return Mvptr(MvptrConfig(**{**TINY, **changes})).eval()


def inputs(seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "text_ids": torch.randint(0, 60, (3, 7), generator=generator),
        "text_mask": torch.arange(7) < torch.tensor([[7], [4], [2]]),
        "tag_ids": torch.randint(0, 40, (3, 5), generator=generator),
        "tag_mask": torch.arange(5) < torch.tensor([[5], [3], [2]]),
        "features": torch.randn(3, 4, 8, generator=generator),
        "geometry": torch.rand(3, 4, 6, generator=generator),
        "region_mask": torch.arange(4) < torch.tensor([[4], [1], [2]]),
    }


def forward(model: Mvptr, x: dict[str, Tensor]) -> dict[str, Tensor]:
    text = model.encode_text(pack(x["text_ids"], x["text_mask"]))
    regions = [pack(x[name], x["region_mask"]) for name in ("features", "geometry")]
    tags, seen = model.encode_visual(
        pack(x["tag_ids"], x["tag_mask"]), model.embed_regions(regions[0], None, regions[1])
    )
    cross_text, cross_regions = model.encode_cross(text, seen)
    return {
        "text": text.padded(),
        "tags": tags.padded(),
        "regions": seen.padded(),
        "cross_text": cross_text.padded(),
        "cross_regions": cross_regions.padded(),
        "text_global": model.text_global(text),
        "visual_global": model.visual_global(tags),
        "pooled": model.pool(cross_text),
        "itm": model.itm_logits(model.pool(cross_text)),
        "token": model.token_logits(cross_text.rows),
        "tag": model.tag_logits(tags.rows),
    }


@pytest.mark.parametrize(("tied", "count"), [(True, 198_660_471), (False, 245_542_263)])
def test_base_model_has_the_published_number_of_parameters(tied: bool, count: int) -> None:
    with torch.device("meta"):
        model = Mvptr(MvptrConfig(tie_word_heads=tied))
    assert sum(p.numel() for p in model.parameters()) == count


def test_shapes() -> None:
    shapes = {name: tuple(t.shape) for name, t in forward(tiny(), inputs()).items()}
    assert shapes == {
        "text": (3, 7, 16),
        "tags": (3, 5, 16),
        "regions": (3, 4, 16),
        "cross_text": (3, 7, 16),
        "cross_regions": (3, 4, 16),
        "text_global": (3, 16),
        "visual_global": (3, 16),
        "pooled": (3, 16),
        "itm": (3, 2),
        "token": (13, 40),
        "tag": (10, 40),
    }


def test_what_stands_in_padding_changes_nothing_real() -> None:
    model, x = tiny().double(), inputs()
    before = forward(model, x)
    x["text_ids"] = x["text_ids"].masked_fill(~x["text_mask"], 3)
    x["tag_ids"] = x["tag_ids"].masked_fill(~x["tag_mask"], 3)
    x["features"] = x["features"].masked_fill(~x["region_mask"][..., None], 100.0)
    after = forward(model, x)
    for name, mask in {"cross_text": x["text_mask"], "cross_regions": x["region_mask"], "tags": x["tag_mask"]}.items():
        assert torch.equal(before[name][mask], after[name][mask])


def test_every_kind_of_input_reaches_the_cross_encoder() -> None:
    model = tiny().double()
    base = forward(model, inputs())["cross_text"][0]
    for name, change in {"text_ids": 1, "tag_ids": 1, "features": 1.0, "geometry": 0.1}.items():
        x = inputs()
        x[name] = (x[name] + change) % 40 if name.endswith("ids") else x[name] + change
        assert not torch.allclose(forward(model, x)["cross_text"][0], base, rtol=0, atol=1e-9), name


def test_text_slots_know_their_position_and_regions_do_not() -> None:
    model, x = tiny().double(), inputs()
    full = torch.ones_like(x["text_mask"])
    same = torch.full_like(x["text_ids"], 5)
    text = model.encode_text(pack(same, full)).padded()
    assert not torch.allclose(text[:, 0], text[:, 1], atol=1e-6)
    order = torch.tensor([2, 0, 3, 1])
    regions_BRD = model.embed_regions(pack(x["features"]), None, pack(x["geometry"])).padded()
    tag_ids = pack(x["tag_ids"], x["tag_mask"])
    _, states = model.encode_visual(tag_ids, pack(regions_BRD))
    _, permuted = model.encode_visual(tag_ids, pack(regions_BRD[:, order]))
    torch.testing.assert_close(permuted.padded(), states.padded()[:, order], rtol=0, atol=1e-12)  # float64 rounding


@pytest.mark.parametrize("execution", get_args(Execution))
def test_nothing_to_attend_to_is_finite_also_backwards(execution: str) -> None:
    model, x = tiny(), inputs()
    model.set_execution(execution)
    for name in ("text_mask", "tag_mask", "region_mask"):
        x[name] = x[name].clone()
        x[name][1] = False
    text = model.encode_text(pack(x["text_ids"], x["text_mask"]))
    regions = [pack(x[name], x["region_mask"]) for name in ("features", "geometry")]
    tags, seen = model.encode_visual(
        pack(x["tag_ids"], x["tag_mask"]), model.embed_regions(regions[0], None, regions[1])
    )
    out = [text, tags, seen, *model.encode_cross(text, seen)]
    torch.cat([states.rows.flatten() for states in out]).sum().backward()
    assert all(states.lengths[1] == 0 and states.rows.isfinite().all() for states in out)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_globals_are_normalised_in_float32_also_in_half_precision() -> None:
    model, x = tiny().bfloat16(), inputs()
    out = forward(model, x)
    for name in ("text_global", "visual_global"):
        assert out[name].dtype == torch.float32
        torch.testing.assert_close(out[name].norm(dim=-1), torch.ones(3), rtol=0, atol=1e-6)
    assert forward(tiny().double(), x)["text_global"].dtype == torch.float64


def test_tied_heads_send_gradient_to_word_rows_only() -> None:
    model = tiny()
    logits = model.token_logits(torch.randn(2, 16, generator=torch.Generator().manual_seed(0)))
    logits.square().sum().backward()
    grad = model.embeddings.word_embeddings.weight.grad
    assert grad is not None
    assert (grad[:40].abs().sum(1) > 0).all() and (grad[40:] == 0).all()


def test_untied_heads_do_not_touch_the_embedding() -> None:
    model = tiny(tie_word_heads=False)
    model.tag_logits(torch.randn(2, 16, generator=torch.Generator().manual_seed(0))).square().sum().backward()
    assert model.embeddings.word_embeddings.weight.grad is None
    assert model.tag_head.decoder.grad.abs().sum() > 0 and model.token_head.decoder.grad is None


def test_phrase_logits_read_the_rows_that_were_set() -> None:
    model = tiny(num_phrases=3)
    states = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    with pytest.raises((IndexError, RuntimeError)):
        model.phrase_logits(states)  # rows never set: an error, not the table's last row
    rows = torch.tensor([59, 7, 41])
    model.set_phrase_rows(rows)
    with torch.no_grad():
        model.phrase_head.bias.copy_(torch.tensor([1.0, 2.0, 3.0]))
    hidden = model.phrase_head.norm(torch.nn.functional.gelu(model.phrase_head.dense(states)))
    wanted = hidden @ model.embeddings.word_embeddings.weight[rows].T + torch.tensor([1.0, 2.0, 3.0])
    torch.testing.assert_close(model.phrase_logits(states), wanted)


@pytest.mark.parametrize("rows", [[1, 2], [1, 2, 60], [-1, 2, 3]])
def test_wrong_phrase_rows_are_refused(rows: list[int]) -> None:
    with pytest.raises(ValueError, match="phrase rows"):
        tiny(num_phrases=3).set_phrase_rows(torch.tensor(rows))


def test_no_phrase_head_is_said() -> None:
    with pytest.raises(ValueError, match="num_phrases is 0"):
        tiny().phrase_logits(torch.zeros(1, 16))


@pytest.mark.parametrize("tied", [True, False])
def test_save_and_load(tmp_path: Path, tied: bool) -> None:
    model = tiny(num_phrases=3, num_answers=4, tie_word_heads=tied)
    model.set_phrase_rows(torch.tensor([59, 7, 41]))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").is_file()
    loaded = Mvptr.from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(model.state_dict())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    for name, tensor in forward(model, inputs()).items():
        assert torch.equal(forward(loaded, inputs())[name], tensor), name


def test_initialisation() -> None:
    model = tiny(hidden_size=64, tie_word_heads=False, num_phrases=2)
    assert model.logit_scale.shape == (1,)
    assert model.logit_scale.item() == pytest.approx(math.log(1 / 0.07), rel=1e-6)  # float32
    for name, parameter in model.named_parameters():
        if name == "logit_scale":
            continue
        if "norm" in name and name.endswith("weight"):
            assert (parameter == 1).all(), name
        elif name.endswith("bias"):
            assert (parameter == 0).all(), name
        else:  # the smallest matrix has 2 x 64 entries: its std lies within 5 standard errors, 0.02 * 5 / sqrt(256)
            assert parameter.std().item() == pytest.approx(0.02, abs=0.00625), name


def test_dropout_acts_in_training_only() -> None:
    model, x = tiny(), inputs()
    assert torch.equal(forward(model, x)["itm"], forward(model, x)["itm"])
    model.train()
    torch.manual_seed(0)
    assert not torch.equal(forward(model, x)["itm"], forward(model, x)["itm"])
    still = tiny(hidden_dropout=0.0, attention_dropout=0.0).train()
    assert torch.equal(forward(still, x)["itm"], forward(still, x)["itm"])
    only_attention = tiny(hidden_dropout=0.0, attention_dropout=0.5).train()
    assert not torch.equal(forward(only_attention, x)["itm"], forward(only_attention, x)["itm"])


def test_every_parameter_but_qa_head_belongs_to_one_part() -> None:
    model = tiny(num_phrases=3, num_answers=4, tie_word_heads=False)
    by_part = {part: model.parameters_of([part]) for part in PARTS}
    assert all(by_part.values())
    assert set(by_part.pop("pooler")) < set(by_part["itm"])  # of tasks that read the pooled state alone
    names = [name for part in by_part.values() for name in part]
    everything = [n for n, _ in model.named_parameters() if not n.startswith("qa_head.")]
    assert sorted(names) == sorted(everything)
    assert model.parameters_of(PARTS) == everything
    assert by_part["globals"] == ["text_proj", "visual_proj", "logit_scale"]
    with pytest.raises(ValueError, match="'encoder'"):
        model.parameters_of(["text", "encoder"])


def test_gradients_reach_every_parameter() -> None:
    model, x = tiny(num_phrases=3).train(), inputs()
    model.set_phrase_rows(torch.tensor([59, 7, 41]))
    out = forward(model, x)
    similarity = (out["text_global"] @ out["visual_global"].T * model.logit_scale.exp()).square().sum()
    total = similarity + model.phrase_logits(out["text"][:, 1]).square().sum()
    total = total + sum(out[name].square().sum() for name in ("itm", "token", "tag"))
    total.backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []


def test_too_many_slots_are_refused() -> None:
    with pytest.raises(ValueError, match="13 slots, but max_positions is 12"):
        tiny().encode_text(pack(torch.zeros(1, 13, dtype=torch.int64)))


def test_wrong_or_missing_features_are_refused() -> None:
    model, geometry = tiny(), pack(torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="5 numbers, this model takes 8"):
        model.embed_regions(pack(torch.zeros(1, 2, 5)), None, geometry)
    with pytest.raises(ValueError, match="no region features"):
        model.embed_regions(None, None, geometry)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"num_attention_heads": 3}, "hidden_size 16 is no multiple of 3"),
        ({"num_rows": 39}, "num_rows 39 is below num_words 40"),
        ({"hidden_dropout": 1.0}, "hidden_dropout is 1.0"),
        ({"num_text_layers": 0}, "num_text_layers is 0"),
        ({"visual_source": "video"}, "visual_source is 'video'"),
        ({"visual_source": "image"}, "needs either backbone"),
        ({"initial_temperature": 0.0}, "initial_temperature is 0.0"),
    ],
)
def test_impossible_sizes_are_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        MvptrConfig(**{**TINY, **changes})


def test_all_wrong_sizes_are_named_at_once() -> None:
    with pytest.raises(ValueError, match=r"num_phrases is -1.*roi_bins is 0|roi_bins is 0.*num_phrases is -1"):
        MvptrConfig(**{**TINY, "num_phrases": -1, "roi_bins": 0})
