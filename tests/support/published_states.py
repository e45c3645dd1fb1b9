"""Small random checkpoints under the published code's names, each tensor unlike all others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

NUM_WORDS, NUM_ROWS, DIM, FFN, LAYERS, POSITIONS, FEATURES, NUM_ANSWERS = 20, 24, 8, 12, 2, 16, 5, 7
# what each class has beside the backbone, as shapes
PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "retrieval": {
        "classifier.weight": (2, DIM),
        "classifier.bias": (2,),
        "logit_scale": (),
        "bert.LayerNorm.weight": (DIM,),
        "bert.LayerNorm.bias": (DIM,),
    },
    "vqa": {
        "cls.predictions.bias": (NUM_ANSWERS,),
        "cls.predictions.decoder.weight": (NUM_ANSWERS, DIM),
        "cls.predictions.transform.dense.weight": (DIM, DIM),
        "cls.predictions.transform.dense.bias": (DIM,),
        "cls.predictions.transform.LayerNorm.weight": (DIM,),
        "cls.predictions.transform.LayerNorm.bias": (DIM,),
    },
    "vqa-linear": {"classifier.weight": (NUM_ANSWERS, DIM), "classifier.bias": (NUM_ANSWERS,)},
    "entailment": {"classifier.weight": (3, DIM), "classifier.bias": (3,)},
    "referring": {"classifier.weight": (1, DIM), "classifier.bias": (1,)},
}


def published_checkpoint(
    kind: str, num_words: int = NUM_WORDS, num_rows: int = NUM_ROWS
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the state and the config.json of a fine-tuned checkpoint."""
    generator = torch.Generator().manual_seed(len(kind))
    shapes = _backbone(num_rows) | PUBLISHED[kind]
    state = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    return state, {
        "only_word_size": num_words, "vocab_size": num_rows, "hidden_size": DIM, "num_attention_heads": 2,
        "intermediate_size": FFN, "num_hidden_layers": 2 * LAYERS, "max_position_embeddings": POSITIONS,
        "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1, "layer_norm_eps": 1e-12,
        "img_layer_norm_eps": 1e-12, "use_img_layernorm": int("bert.LayerNorm.weight" in shapes),
        "initializer_range": 0.02, "type_vocab_size": 2, "img_feature_dim": FEATURES + 6, "hidden_act": "gelu",
    }  # fmt: skip


def _backbone(num_rows: int) -> dict[str, tuple[int, ...]]:
    layer = {
        "attention.self.query": (DIM, DIM), "attention.self.key": (DIM, DIM), "attention.self.value": (DIM, DIM),
        "attention.output.dense": (DIM, DIM), "intermediate.dense": (FFN, DIM), "output.dense": (DIM, FFN),
    }  # fmt: skip
    shapes: dict[str, tuple[int, ...]] = {
        "bert.embeddings.word_embeddings.weight": (num_rows, DIM),
        "bert.embeddings.position_embeddings.weight": (POSITIONS, DIM),
        "bert.embeddings.token_type_embeddings.weight": (2, DIM),
        "bert.txt_proj": (DIM, DIM),
        "bert.vis_proj": (DIM, DIM),
    }
    linear = {"bert.pooler.dense": (DIM, DIM), "bert.img_embedding": (DIM, FEATURES + 6)}
    norms = ["bert.embeddings.LayerNorm"]
    for encoder in ("txt_encoder", "vis_encoder", "mul_encoder"):
        for number in range(LAYERS):
            prefix = f"bert.{encoder}.layer.{number}."
            linear |= {prefix + name: shape for name, shape in layer.items()}
            norms += [f"{prefix}attention.output.LayerNorm", f"{prefix}output.LayerNorm"]
    for name, shape in linear.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    for name in norms:
        shapes |= {f"{name}.weight": (DIM,), f"{name}.bias": (DIM,)}
    return shapes
