"""Weights of the reference's pre-training, in and out; from_bert.py takes those of a plain BERT.

The reference's names appear here and in convert_finetuned.py only. Ours -> theirs is one table; QKV is fused here and
three matrices there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr

State = Mapping[str, Tensor]

_WORDS = "embeddings.word_embeddings.weight"
_ENCODERS = {"text_encoder": "txt_encoder", "visual_encoder": "vis_encoder", "cross_encoder": "mul_encoder"}
_HEADS = {"token_head": "cls.predictions", "tag_head": "half_mlm"}
_MODULES = {  # ours -> theirs, each with weight and bias
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "region_embedding.projection": "bert.img_embedding",
    "region_embedding.norm": "bert.LayerNorm",
    "pooler.dense": "bert.pooler.dense",
    "itm_head": "cls.seq_relationship",
}
_TENSORS = {
    _WORDS: "bert.embeddings.word_embeddings.weight",
    "embeddings.position_embeddings.weight": "bert.embeddings.position_embeddings.weight",
    "embeddings.segment_embeddings.weight": "bert.embeddings.token_type_embeddings.weight",
    "text_proj": "bert.txt_proj",
    "visual_proj": "bert.vis_proj",
    "logit_scale": "logit_scale",
}
LAYER_MODULES = {
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_REGION_NORM = "bert.LayerNorm.weight"
_SETTINGS = (  # of config.json
    "num_hidden_layers", "only_word_size", "vocab_size", "hidden_size", "num_attention_heads", "intermediate_size",
    "max_position_embeddings", "hidden_dropout_prob", "attention_probs_dropout_prob", "type_vocab_size",
    "img_feature_dim",
)  # fmt: skip
QKV = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))


def config_from_reference(config_json: Mapping[str, Any], state: State) -> MvptrConfig:
    """Returns our configuration for a checkpoint of the reference: its config.json and its state dict.

    Word heads are tied when the decoders of the state hold the embedding's rows. The qa_head is kept when the state
    has one, and so is the LayerNorm behind the projection of regions.

    Raises:
        ValueError: for a setting that this model does not have, with its value; or one that the configuration lacks.
    """
    _refuse_foreign_settings(config_json, state)
    num_layers = int(config_json["num_hidden_layers"]) // 2
    num_words = int(config_json["only_word_size"])
    words_VD = state[_TENSORS[_WORDS]]
    decoders = [state[name] for name in _decoder_names() if name in state]
    return MvptrConfig(
        num_words=num_words,
        num_rows=int(config_json["vocab_size"]),
        hidden_size=int(config_json["hidden_size"]),
        num_attention_heads=int(config_json["num_attention_heads"]),
        intermediate_size=int(config_json["intermediate_size"]),
        num_text_layers=num_layers,
        num_visual_layers=num_layers,
        num_cross_layers=num_layers,
        max_positions=int(config_json["max_position_embeddings"]),
        hidden_dropout=float(config_json["hidden_dropout_prob"]),
        attention_dropout=float(config_json["attention_probs_dropout_prob"]),
        layer_norm_eps=float(config_json.get("layer_norm_eps", 1e-12)),
        initializer_range=float(config_json.get("initializer_range", 0.02)),
        type_vocab_size=int(config_json["type_vocab_size"]),
        region_feature_dim=int(config_json["img_feature_dim"]) - 6,
        tie_word_heads=all(torch.equal(decoder, words_VD[:num_words]) for decoder in decoders),
        num_answers=state["qa_head.bias"].shape[0] if "qa_head.bias" in state else 0,
        region_norm=_REGION_NORM in state,
    )


def config_to_reference(config: MvptrConfig) -> dict[str, Any]:
    """Returns the content of the reference's config.json for a model; the inverse of `config_from_reference`.

    Raises:
        ValueError: the encoders have different numbers of layers, which the reference cannot say.
    """
    layers = (config.num_text_layers, config.num_visual_layers, config.num_cross_layers)
    if len(set(layers)) > 1:
        raise ValueError(
            f"the encoders have {', '.join(map(str, layers))} layers: the reference has as many in each of them"
        )
    return {
        "only_word_size": config.num_words,
        "vocab_size": config.num_rows,
        "hidden_size": config.hidden_size,
        "num_attention_heads": config.num_attention_heads,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": 2 * layers[0],
        "max_position_embeddings": config.max_positions,
        "hidden_dropout_prob": config.hidden_dropout,
        "attention_probs_dropout_prob": config.attention_dropout,
        "layer_norm_eps": config.layer_norm_eps,
        "img_layer_norm_eps": config.layer_norm_eps,
        "use_img_layernorm": int(config.region_norm),
        "initializer_range": config.initializer_range,
        "type_vocab_size": config.type_vocab_size,
        "img_feature_dim": config.region_feature_dim + 6,
        "hidden_act": "gelu",
    }


def _refuse_foreign_settings(config_json: Mapping[str, Any], state: State) -> None:
    wrong = [] if config_json.get("hidden_act") in ("gelu", None) else [f"hidden_act is {config_json['hidden_act']!r}"]
    if config_json.get("use_img_layernorm") and _REGION_NORM not in state:
        wrong.append(f"use_img_layernorm is {config_json['use_img_layernorm']!r}, but there is no {_REGION_NORM}")
    eps = (float(config_json.get(name, 1e-12)) for name in ("layer_norm_eps", "img_layer_norm_eps"))
    if _REGION_NORM in state and len(set(eps)) == 2:
        wrong.append(f"img_layer_norm_eps is {config_json.get('img_layer_norm_eps')!r}, unlike layer_norm_eps")
    if wrong:
        raise ValueError(f"the checkpoint has what this model has not: {'; '.join(wrong)}")
    missing = [name for name in _SETTINGS if name not in config_json]
    if missing or _TENSORS[_WORDS] not in state:
        missing += [] if _TENSORS[_WORDS] in state else [_TENSORS[_WORDS]]
        raise ValueError(f"this is no checkpoint of the published code: {', '.join(missing)} missing")


def from_reference(state: State, config: MvptrConfig, without: Sequence[str] = ()) -> dict[str, Tensor]:
    """Translates the reference's state dict into that of `Mvptr(config)`; tensors keep their dtype.

    Args:
        without: prefixes of our names that the state must not have; the result has none of them either.

    Raises:
        ValueError: listing every missing, extra and wrongly shaped name at once; or when the model is tied and the
            checkpoint's decoders are not the embedding's rows.
    """
    _refuse_foreign_parts(config)
    shapes = {name: shape for name, shape in our_shapes(config).items() if not name.startswith(tuple(without))}
    expected = to_theirs({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, config)
    compare("the reference's state", state, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    if config.tie_word_heads:
        words_WD = state[_TENSORS[_WORDS]][: config.num_words]
        differing = [n for n in _decoder_names() if n in state and not torch.equal(state[n], words_WD)]
        if differing:
            raise ValueError(
                f"{', '.join(differing)} differ from the word embeddings, so tied word heads would lose them: "
                "set tie_word_heads: false (model.tie_word_heads=false)"
            )
    ours: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        sources = their_names(name)
        tensor = state[sources[0]] if len(sources) == 1 else torch.cat([state[source] for source in sources])
        ours[name] = tensor.reshape(shape).clone()
    return ours


def to_reference(model: Mvptr | State, config: MvptrConfig, drop_phrase_head: bool = False) -> dict[str, Tensor]:
    """Translates a model, or its state dict, into the reference's names, with tied decoders written out.

    The reference has no phrase head: a model that has one is converted only with `drop_phrase_head`.

    Raises:
        ValueError: for parts the reference does not have, or listing missing, extra and wrongly shaped names.
    """
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    if config.num_phrases and drop_phrase_head:
        config = MvptrConfig(**{**config.to_dict(), "num_phrases": 0})
        state = {name: t for name, t in state.items() if name != "phrase_rows" and not name.startswith("phrase_head.")}
    _refuse_foreign_parts(config)
    compare("the model's state", state, our_shapes(config))
    return {name: tensor.detach().clone() for name, tensor in to_theirs(state, config).items()}


def _refuse_foreign_parts(config: MvptrConfig) -> None:
    if config.visual_source != "features":
        raise ValueError(f"visual_source is {config.visual_source!r}: the reference reads detector features only")
    if config.num_phrases:
        raise ValueError(
            f"num_phrases is {config.num_phrases}: the reference has no phrase head; convert with num_phrases 0, "
            "or with drop_phrase_head=True on the way out"
        )


def our_shapes(config: MvptrConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each tensor of `Mvptr(config)`, by its name."""
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Mvptr(config).state_dict().items()}


def to_theirs(ours: State, config: MvptrConfig) -> dict[str, Tensor]:
    """Returns views of our tensors, of all or of some, under the reference's names; tied decoders are written out."""
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        targets = their_names(name)
        theirs.update(zip(targets, tensor.chunk(len(targets)), strict=True))
    if "logit_scale" in theirs:
        theirs["logit_scale"] = theirs["logit_scale"].reshape(())
    if config.tie_word_heads:
        heads = [name for head, name in zip(_HEADS, _decoder_names(), strict=True) if f"{head}.bias" in ours]
        theirs.update({name: ours[_WORDS][: config.num_words] for name in heads})
    return theirs


def _decoder_names() -> list[str]:
    return [f"{theirs}.decoder.weight" for theirs in _HEADS.values()]


def their_names(name: str) -> list[str]:
    """Returns the reference's name of one of our tensors: one name, or three for a fused QKV."""
    if name in _TENSORS:
        return [_TENSORS[name]]
    module, _, kind = name.rpartition(".")
    if module in _MODULES:
        return [f"{_MODULES[module]}.{kind}"]
    part, _, rest = name.partition(".")
    if part in _ENCODERS:
        _, number, layer_module, kind = rest.split(".")
        targets = QKV if layer_module == "qkv" else (LAYER_MODULES[layer_module],)
        return [f"bert.{_ENCODERS[part]}.layer.{number}.{target}.{kind}" for target in targets]
    if part in _HEADS:
        return [f"{_HEADS[part]}.{head_name(rest)}"]
    assert part == "qa_head", name
    return [name]


def head_name(rest: str) -> str:
    """Returns the reference's name of a tensor of a head of masked words, within the head."""
    for ours, theirs in (("dense", "transform.dense"), ("norm", "transform.LayerNorm")):
        if rest.startswith(f"{ours}."):
            return rest.replace(ours, theirs, 1)
    return "decoder.weight" if rest == "decoder" else rest


def compare(what: str, state: State, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raises one ValueError with all missing, extra and wrongly shaped names."""
    lines = [f"missing {name} {expected[name]}" for name in expected if name not in state]
    lines += [f"extra {name} {tuple(state[name].shape)}" for name in state if name not in expected]
    lines += [
        f"{name} has shape {tuple(state[name].shape)}, expected {shape}"
        for name, shape in expected.items()
        if name in state and tuple(state[name].shape) != shape
    ]
    if lines:
        raise ValueError(f"{what} does not fit the configuration:\n  " + "\n  ".join(lines))
