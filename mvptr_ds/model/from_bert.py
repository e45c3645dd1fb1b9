"""A plain BERT as a start: which of its weights go where, and what stays fresh."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BertForPreTraining

from mvptr_ds.model.convert import LAYER_MODULES, QKV, State
from mvptr_ds.model.mvptr import Mvptr

logger = logging.getLogger(__name__)

_HALVED_FROM_LAYERS = 12  # a BERT of at least so many layers gives its upper half to the cross encoder
_WORD_HEADS = ("token_head", "tag_head")


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
        getattr(layer.qkv, kind).copy_(torch.cat([bert[f"{prefix}{name}.{kind}"] for name in QKV]))
    for ours, theirs in LAYER_MODULES.items():
        _copy_module(getattr(layer, ours), bert, prefix + theirs)


def _init_word_heads(model: Mvptr, bert: State) -> list[str]:
    prefix = "cls.predictions."
    has_head = f"{prefix}transform.dense.weight" in bert
    decoder = bert.get(f"{prefix}decoder.weight", bert["embeddings.word_embeddings.weight"])
    report = []
    for name in _WORD_HEADS:
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
