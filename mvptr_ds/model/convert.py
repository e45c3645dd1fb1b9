"""Weights of other models: the reference's checkpoints in and out, and a plain BERT as a start.

The reference's names appear here only. Ours -> theirs is one table; QKV is fused here and three matrices there.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForPreTraining

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.mvptr import Mvptr

logger = logging.getLogger(__name__)

State = Mapping[str, Tensor]

_HALVED_FROM_LAYERS = 12  # a BERT of at least so many layers gives its upper half to the cross encoder
_WORDS = "embeddings.word_embeddings.weight"
_ENCODERS = {"text_encoder": "txt_encoder", "visual_encoder": "vis_encoder", "cross_encoder": "mul_encoder"}
_HEADS = {"token_head": "cls.predictions", "tag_head": "half_mlm"}
_MODULES = {  # ours -> theirs, each with weight and bias
    "embeddings.norm": "bert.embeddings.LayerNorm",
    "region_embedding.projection": "bert.img_embedding",
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
_LAYER_MODULES = {
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "ffn_in": "intermediate.dense",
    "ffn_out": "output.dense",
    "ffn_norm": "output.LayerNorm",
}
_QKV = tuple(f"attention.self.{name}" for name in ("query", "key", "value"))


# --- the reference's checkpoints


def config_from_reference(config_json: Mapping[str, Any], state: State) -> MvptrConfig:
    """Returns our configuration for a checkpoint of the reference: its config.json and its state dict.

    Word heads are tied when both decoders hold the embedding's rows; the qa_head is kept when the state has one.

    Raises:
        ValueError: for a setting that this model does not have, with its value.
    """
    refused = {"hidden_act": "gelu", "use_img_layernorm": 0}
    wrong = [f"{k} is {config_json[k]!r}" for k, v in refused.items() if config_json.get(k) not in (v, bool(v), None)]
    if wrong:
        raise ValueError(f"this model has only {refused}, the checkpoint's {', '.join(wrong)}")
    num_layers = int(config_json["num_hidden_layers"]) // 2
    num_words = int(config_json["only_word_size"])
    words_VD = state[_TENSORS[_WORDS]]
    decoders = [state[f"{theirs}.decoder.weight"] for theirs in _HEADS.values()]
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
    )


def from_reference(state: State, config: MvptrConfig) -> dict[str, Tensor]:
    """Translates the reference's state dict into that of `Mvptr(config)`; tensors keep their dtype.

    Raises:
        ValueError: listing every missing, extra and wrongly shaped name at once; or when the model is tied and the
            checkpoint's decoders are not the embedding's rows.
    """
    _refuse_foreign_parts(config)
    shapes = _our_shapes(config)
    expected = _to_theirs({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, config)
    _compare("the reference's state", state, {name: tuple(tensor.shape) for name, tensor in expected.items()})
    if config.tie_word_heads:
        words_WD = state[_TENSORS[_WORDS]][: config.num_words]
        differing = [n for n in _decoder_names() if not torch.equal(state[n], words_WD)]
        if differing:
            raise ValueError(
                f"{', '.join(differing)} differ from the word embeddings, so tied word heads would lose them: "
                "set tie_word_heads: false (model.tie_word_heads=false)"
            )
    ours: dict[str, Tensor] = {}
    for name, shape in shapes.items():
        sources = _their_names(name)
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
    _compare("the model's state", state, _our_shapes(config))
    return {name: tensor.detach().clone() for name, tensor in _to_theirs(state, config).items()}


def _refuse_foreign_parts(config: MvptrConfig) -> None:
    if config.visual_source != "features":
        raise ValueError(f"visual_source is {config.visual_source!r}: the reference reads detector features only")
    if config.num_phrases:
        raise ValueError(
            f"num_phrases is {config.num_phrases}: the reference has no phrase head; convert with num_phrases 0, "
            "or with drop_phrase_head=True on the way out"
        )


def _our_shapes(config: MvptrConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Mvptr(config).state_dict().items()}


def _to_theirs(ours: State, config: MvptrConfig) -> dict[str, Tensor]:
    theirs: dict[str, Tensor] = {}
    for name, tensor in ours.items():
        targets = _their_names(name)
        theirs.update(zip(targets, tensor.chunk(len(targets)), strict=True))
    theirs["logit_scale"] = theirs["logit_scale"].reshape(())
    if config.tie_word_heads:
        theirs.update({name: ours[_WORDS][: config.num_words] for name in _decoder_names()})
    return theirs


def _decoder_names() -> list[str]:
    return [f"{theirs}.decoder.weight" for theirs in _HEADS.values()]


def _their_names(name: str) -> list[str]:
    """The reference's name of one of our tensors: one name, or three for a fused QKV."""
    if name in _TENSORS:
        return [_TENSORS[name]]
    module, _, kind = name.rpartition(".")
    if module in _MODULES:
        return [f"{_MODULES[module]}.{kind}"]
    part, _, rest = name.partition(".")
    if part in _ENCODERS:
        _, number, layer_module, kind = rest.split(".")
        targets = _QKV if layer_module == "qkv" else (_LAYER_MODULES[layer_module],)
        return [f"bert.{_ENCODERS[part]}.layer.{number}.{target}.{kind}" for target in targets]
    if part in _HEADS:
        return [f"{_HEADS[part]}.{_head_name(rest)}"]
    assert part == "qa_head", name
    return [name]


def _head_name(rest: str) -> str:
    for ours, theirs in (("dense", "transform.dense"), ("norm", "transform.LayerNorm")):
        if rest.startswith(f"{ours}."):
            return rest.replace(ours, theirs, 1)
    return "decoder.weight" if rest == "decoder" else rest


def _compare(what: str, state: State, expected: Mapping[str, tuple[int, ...]]) -> None:
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


# --- a plain BERT


def load_bert(path_or_name: str) -> dict[str, Tensor]:
    """Returns a BERT checkpoint's state dict (folder or hub name), float32; heads it lacks are left out.

    Raises:
        OSError: from transformers, when there is no such checkpoint.
    """
    loaded: Any = BertForPreTraining.from_pretrained(path_or_name, output_loading_info=True)
    bert, info = loaded
    state = {name: t.float() for name, t in bert.state_dict().items() if name not in set(info["missing_keys"])}
    if info["missing_keys"]:
        logger.info("%s has no %s", path_or_name, sorted(info["missing_keys"]))
    return state


@torch.no_grad()
def init_from_bert(
    model: Mvptr,
    bert_state: State,
    phrase_pieces: Sequence[Sequence[int]] | None = None,
    phrase_rows: Sequence[int] | None = None,
) -> list[str]:
    """Starts a model from a BertModel's state dict (with or without `bert.`, gamma/beta names too); in place.

    Layers: the lower ones to the text and to the visual encoder, those above to the cross encoder. A BERT of 12 or
    more layers is split in the middle; a shorter one is all lower, and then the cross encoder starts fresh. An encoder
    of fewer layers takes the first ones of its share. A phrase with its own row gets the mean of its wordpieces' rows:
    `phrase_pieces` holds the wordpiece ids of each phrase, aligned with `phrase_rows` (the model's own by default).

    Returns what was taken and what starts fresh, one line each.

    Raises:
        ValueError: when sizes differ, naming both, or a phrase has no wordpieces.

    Untied word heads start from the embedding when the BERT has no decoder.
    """
    bert = _normalised_bert(bert_state)
    _check_bert(model, bert)
    report = _init_embeddings(model, bert)
    report += _init_encoders(model, bert)
    if "pooler.dense.weight" in bert:
        _copy_module(model.pooler.dense, bert, "pooler.dense")
        report.append("pooler: from BERT")
    else:
        report.append("pooler: fresh")
    report += _init_word_heads(model, bert)
    if phrase_pieces is not None:
        report.append(_init_phrases(model, phrase_pieces, phrase_rows))
    return report


def _normalised_bert(state: State) -> dict[str, Tensor]:
    """Names without `bert.`, and weight/bias for gamma/beta."""
    names = {n: n.removeprefix("bert.").replace(".gamma", ".weight").replace(".beta", ".bias") for n in state}
    return {new: state[old] for old, new in names.items()}


def _check_bert(model: Mvptr, bert: State) -> None:
    config = model.config
    tables = ("word_embeddings", "position_embeddings", "token_type_embeddings", "LayerNorm")
    needed = [f"embeddings.{table}.weight" for table in tables] + ["encoder.layer.0.attention.self.query.weight"]
    missing = [name for name in needed if name not in bert]
    if missing:
        raise ValueError(f"no BERT: {missing} missing among names such as {sorted(bert)[:3]}")
    num_words, hidden = bert["embeddings.word_embeddings.weight"].shape
    ffn = bert["encoder.layer.0.intermediate.dense.weight"].shape[0]
    pairs = [("hidden_size", hidden, config.hidden_size), ("intermediate_size", ffn, config.intermediate_size)]
    pairs.append(("num_words", num_words, config.num_words))
    wrong = [f"{name} {theirs} in BERT, {ours} in the model" for name, theirs, ours in pairs if theirs != ours]
    if wrong:
        raise ValueError(f"{'; '.join(wrong)}: choose the model's sizes and vocabulary after the BERT it starts from")


def _copy_module(module: nn.Module, bert: State, name: str) -> None:
    for kind in ("weight", "bias"):
        getattr(module, kind).copy_(bert[f"{name}.{kind}"])


def _init_embeddings(model: Mvptr, bert: State) -> list[str]:
    ours = model.embeddings
    tables = (
        (ours.word_embeddings, "word_embeddings"),
        (ours.position_embeddings, "position_embeddings"),
        (ours.segment_embeddings, "token_type_embeddings"),
    )
    report = []
    for table, name in tables:
        rows = bert[f"embeddings.{name}.weight"]
        num_rows = min(len(rows), len(table.weight))
        table.weight[:num_rows].copy_(rows[:num_rows])
        report.append(f"{name}: {num_rows} of {len(table.weight)} rows from BERT")
    _copy_module(ours.norm, bert, "embeddings.LayerNorm")
    return report


def _init_encoders(model: Mvptr, bert: State) -> list[str]:
    num_bert = len({name.split(".")[2] for name in bert if name.startswith("encoder.layer.")})
    num_text, num_visual = model.config.num_text_layers, model.config.num_visual_layers
    num_lower = num_bert // 2 if num_bert >= _HALVED_FROM_LAYERS else num_bert
    num_lower = min(num_bert, max(num_lower, num_text, num_visual))
    shares = (
        ("text", model.text_encoder, 0, num_lower),
        ("visual", model.visual_encoder, 0, num_lower),
        ("cross", model.cross_encoder, num_lower, num_bert),
    )
    report = []
    for name, encoder, start, end in shares:
        pairs = list(zip(encoder.layers, range(start, end), strict=False))
        for layer, number in pairs:
            _copy_layer(layer, bert, f"encoder.layer.{number}.")
        taken = f"BERT's {start}-{start + len(pairs) - 1}" if pairs else "none"
        report.append(f"{name} encoder: {len(pairs)} of {len(encoder.layers)} layers from BERT ({taken})")
    return report


def _copy_layer(layer: nn.Module, bert: State, prefix: str) -> None:
    for kind in ("weight", "bias"):
        getattr(layer.qkv, kind).copy_(torch.cat([bert[f"{prefix}{name}.{kind}"] for name in _QKV]))
    for ours, theirs in _LAYER_MODULES.items():
        _copy_module(getattr(layer, ours), bert, prefix + theirs)


def _init_word_heads(model: Mvptr, bert: State) -> list[str]:
    prefix = "cls.predictions."
    has_head = f"{prefix}transform.dense.weight" in bert
    decoder = bert.get(f"{prefix}decoder.weight", bert["embeddings.word_embeddings.weight"])
    report = []
    for name in _HEADS:
        head: Any = getattr(model, name)
        if has_head:
            _copy_module(head.dense, bert, f"{prefix}transform.dense")
            _copy_module(head.norm, bert, f"{prefix}transform.LayerNorm")
            bias = bert.get(f"{prefix}bias", bert.get(f"{prefix}decoder.bias"))
            if bias is not None:
                head.bias.copy_(bias)
        if head.decoder is not None:
            head.decoder.copy_(decoder)
        report.append(f"{name}: {'from BERT' if has_head else 'fresh transform'}")
    return report


def _init_phrases(model: Mvptr, pieces: Sequence[Sequence[int]], rows: Sequence[int] | None) -> str:
    num_words = model.config.num_words
    if rows is None:
        if not model.config.num_phrases:
            raise ValueError("num_phrases is 0, so the model knows no phrase rows: hand in phrase_rows")
        rows = model.phrase_rows.tolist()
    if len(pieces) != len(rows):
        raise ValueError(f"{len(pieces)} phrases have wordpieces, {len(rows)} have a row")
    weight = model.embeddings.word_embeddings.weight
    own = [number for number, row in enumerate(rows) if row >= num_words]
    for number, ids in _own_phrases(pieces, own, num_words):
        weight[rows[number]] = weight[list(ids)].mean(dim=0)
    return f"phrases: {len(own)} own rows are means of their wordpieces, {len(rows) - len(own)} share a wordpiece's row"


def _own_phrases(
    pieces: Sequence[Sequence[int]], own: Sequence[int], num_words: int
) -> Iterator[tuple[int, Sequence[int]]]:
    for number in own:
        ids = pieces[number]
        if not len(ids) or not 0 <= min(ids) <= max(ids) < num_words:
            raise ValueError(f"phrase {number} has wordpieces {list(ids)}, expected some within 0..{num_words - 1}")
        yield number, ids
