"""The model's own configuration, saved as `config.json` beside the weights (the run's YAML tree is elsewhere)."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

VISUAL_SOURCES = ("features", "image")
_MIN_ONE = (
    "num_words",
    "hidden_size",
    "num_attention_heads",
    "intermediate_size",
    "num_text_layers",
    "num_visual_layers",
    "num_cross_layers",
    "max_positions",
    "type_vocab_size",
    "region_feature_dim",
    "image_size",
    "roi_bins",
    "grid_size",
)
_MIN_ZERO = ("num_phrases", "num_answers")


class MvptrConfig(PretrainedConfig):
    """Sizes and switches of `Mvptr`; the defaults are the published base model with tied word heads.

    `backbone` names pretrained weights (hub name or folder) and is resolved when the model is built: afterwards
    `backbone_config` holds its structure, `backbone_origin` the name, and `backbone` is None, so that a saved model
    needs nothing else. With `backbone_config` alone the backbone starts from scratch.

    Raises:
        ValueError: for sizes that cannot be, naming each with its value.

    Source: the published code, Model.
    """

    model_type = "mvptr"

    def __init__(
        self,
        num_words: int = 30522,
        num_rows: int = 86051,
        num_phrases: int = 0,
        hidden_size: int = 768,
        num_attention_heads: int = 12,
        intermediate_size: int = 3072,
        num_text_layers: int = 6,
        num_visual_layers: int = 6,
        num_cross_layers: int = 6,
        max_positions: int = 512,
        hidden_dropout: float = 0.1,
        attention_dropout: float = 0.1,
        layer_norm_eps: float = 1e-12,
        initializer_range: float = 0.02,
        type_vocab_size: int = 2,
        visual_source: str = "features",
        region_feature_dim: int = 2048,
        backbone: str | None = None,
        backbone_config: dict[str, Any] | None = None,
        backbone_origin: str | None = None,
        freeze_backbone: bool = False,
        image_size: int = 224,
        roi_bins: int = 1,
        tie_word_heads: bool = True,
        initial_temperature: float = 0.07,
        num_answers: int = 0,
        data_schema: int = 1,
        grid_size: int = 4,
        cls_token_id: int = 101,
        sep_token_id: int = 102,
        region_extractors: list[str] | None = None,
        region_norm: bool = False,
        **kwargs: Any,
    ) -> None:
        self.num_words = num_words  # wordpieces: the first rows of the embedding table
        self.num_rows = num_rows  # wordpieces + the phrases' own rows
        self.num_phrases = num_phrases  # labels of the phrase head; 0: no phrase head
        self.hidden_size = hidden_size
        self.num_attention_heads = num_attention_heads
        self.intermediate_size = intermediate_size
        self.num_text_layers = num_text_layers
        self.num_visual_layers = num_visual_layers
        self.num_cross_layers = num_cross_layers
        self.max_positions = max_positions
        self.hidden_dropout = hidden_dropout
        self.attention_dropout = attention_dropout
        self.layer_norm_eps = layer_norm_eps
        self.initializer_range = initializer_range
        self.type_vocab_size = type_vocab_size
        self.visual_source = visual_source
        self.region_feature_dim = region_feature_dim  # with `image` it follows from the backbone
        self.backbone = backbone
        self.backbone_config = backbone_config
        self.backbone_origin = backbone_origin
        self.freeze_backbone = freeze_backbone
        self.image_size = image_size  # pixels; the loader resizes to this square
        self.roi_bins = roi_bins  # RoIAlign's bins a side
        self.tie_word_heads = tie_word_heads
        self.initial_temperature = initial_temperature
        self.num_answers = num_answers  # the reference's qa_head; 0: none
        self.data_schema = data_schema  # of the shards that the model was trained on
        self.grid_size = grid_size  # regions a side of an image without boxes
        self.cls_token_id = cls_token_id  # [CLS] and [SEP] among the wordpieces
        self.sep_token_id = sep_token_id
        self.region_extractors = region_extractors or []  # what made the boxes and features it was trained on
        self.region_norm = region_norm  # a LayerNorm behind the projection of regions
        self._check()
        # The library's own tying would share tensors; ours is functional (see heads.py).
        kwargs["tie_word_embeddings"] = False
        super().__init__(**kwargs)

    def _check(self) -> None:
        lower_bounds = [(name, 1) for name in _MIN_ONE] + [(name, 0) for name in _MIN_ZERO]
        wrong = [
            f"{name} is {getattr(self, name)}, at least {bound} is needed"
            for name, bound in lower_bounds
            if getattr(self, name) < bound
        ]
        for name in ("hidden_dropout", "attention_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                wrong.append(f"{name} is {getattr(self, name)}, expected 0 <= p < 1")
        if self.initial_temperature <= 0:
            wrong.append(f"initial_temperature is {self.initial_temperature}, it must be positive")
        if self.num_attention_heads > 0 and self.hidden_size % self.num_attention_heads:
            wrong.append(f"hidden_size {self.hidden_size} is no multiple of {self.num_attention_heads} attention heads")
        if self.num_rows < self.num_words:
            wrong.append(f"num_rows {self.num_rows} is below num_words {self.num_words}: rows hold words and phrases")
        if self.type_vocab_size < 2:
            wrong.append(f"type_vocab_size is {self.type_vocab_size}, text and tags need 2")
        if self.visual_source not in VISUAL_SOURCES:
            wrong.append(f"visual_source is {self.visual_source!r}, expected one of {VISUAL_SOURCES}")
        elif self.visual_source == "image" and (self.backbone is None) == (self.backbone_config is None):
            wrong.append(
                f"visual_source image needs either backbone (is {self.backbone!r}) or backbone_config "
                f"(is {self.backbone_config!r}), not both"
            )
        if wrong:
            raise ValueError("MvptrConfig: " + "; ".join(wrong))
