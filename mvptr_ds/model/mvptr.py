"""The model: text, visual and cross encoder with their heads. States in, states and logits out; losses live elsewhere.

    text ids -> embeddings -> text encoder ----------------+-> cross encoder -> pooler -> ITM, token head
    tag ids -> embeddings -+-> visual encoder -> regions --+
    regions -> linear -----+

Legend: B samples, T text slots, G tag slots, R regions, D hidden, V embedding rows, W word rows, P phrases,
F feature size, N picked slots.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.embeddings import TAG_SEGMENT, TEXT_SEGMENT, SlotEmbeddings, gather_rows
from mvptr_ds.model.encoder import Encoder, EncoderSizes
from mvptr_ds.model.heads import Pooler, RowHead, global_state
from mvptr_ds.model.vision import ImageBackbone, RegionEmbedding, backbone_structure, load_backbone_weights

PARTS: dict[str, tuple[str, ...]] = {  # what a stage may train -> prefixes of parameter names
    "embeddings": ("embeddings.",),
    "text": ("text_encoder.",),
    "visual": ("visual_encoder.",),
    "cross": ("cross_encoder.",),
    "globals": ("text_proj", "visual_proj", "logit_scale"),
    "token_head": ("token_head.",),
    "tag_head": ("tag_head.",),
    "phrase_head": ("phrase_head.",),
    "itm": ("pooler.", "itm_head."),
    "regions": ("region_embedding.",),
}
_UNSET_ROW = -1


class Mvptr(PreTrainedModel):
    """MVPTR without its losses. Source: REFERENCE, Model.

    Differs: QKV is one matrix, `logit_scale` has shape [1] (DeepSpeed refuses 0-dim parameters), word heads are tied
    unless `tie_word_heads` is false.
    """

    config_class = MvptrConfig
    base_model_prefix = "mvptr"
    main_input_name = "text_ids_BT"
    phrase_rows: Tensor  # buffer [P] int64, when num_phrases > 0

    def __init__(self, config: MvptrConfig) -> None:
        super().__init__(config)
        dim, eps, dropout = config.hidden_size, config.layer_norm_eps, config.hidden_dropout
        sizes = EncoderSizes(
            dim, config.num_attention_heads, config.intermediate_size, eps, dropout, config.attention_dropout
        )
        self.embeddings = SlotEmbeddings(
            config.num_rows, dim, config.max_positions, config.type_vocab_size, eps, dropout
        )
        self.region_embedding = self._build_regions(config)
        self.text_encoder = Encoder(config.num_text_layers, sizes)
        self.visual_encoder = Encoder(config.num_visual_layers, sizes)
        self.cross_encoder = Encoder(config.num_cross_layers, sizes)
        self.text_proj = nn.Parameter(torch.empty(dim, dim))  # used as x @ W
        self.visual_proj = nn.Parameter(torch.empty(dim, dim))
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.pooler = Pooler(dim)
        self.itm_head = nn.Linear(dim, 2)
        self.token_head = RowHead(dim, config.num_words, eps, tied=config.tie_word_heads)
        self.tag_head = RowHead(dim, config.num_words, eps, tied=config.tie_word_heads)
        if config.num_phrases:
            self.phrase_head = RowHead(dim, config.num_phrases, eps, tied=True)
            self.register_buffer("phrase_rows", torch.full((config.num_phrases,), _UNSET_ROW, dtype=torch.int64))
        if config.num_answers:
            self.qa_head = nn.Linear(dim, config.num_answers)  # carried for the reference's checkpoints, never trained
        self.post_init()
        self._load_backbone()

    @staticmethod
    def _build_regions(config: MvptrConfig) -> RegionEmbedding:
        backbone = None
        if config.visual_source == "image":
            structure = backbone_structure(config.backbone, config.backbone_config)
            backbone = ImageBackbone(structure, config.freeze_backbone)
        embedding = RegionEmbedding(
            config.region_feature_dim, config.hidden_size, config.hidden_dropout, backbone, config.roi_bins
        )
        config.region_feature_dim = embedding.feature_dim
        return embedding

    def _load_backbone(self) -> None:
        """Pretrained backbone weights, once: from then on they belong to this model's own checkpoints."""
        config, backbone = self.config, self.region_embedding.backbone
        if backbone is None or config.backbone is None:
            return
        if not next(backbone.parameters()).is_meta:
            load_backbone_weights(backbone, config.backbone)
        config.backbone_config = backbone.net.config.to_dict()
        config.backbone_origin, config.backbone = config.backbone, None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        std = self.config.initializer_range
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=std)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, RowHead):
            nn.init.zeros_(module.bias)
            if module.decoder is not None:
                nn.init.normal_(module.decoder, std=std)
        elif isinstance(module, Mvptr):
            nn.init.normal_(module.text_proj, std=std)
            nn.init.normal_(module.visual_proj, std=std)
            nn.init.constant_(module.logit_scale, math.log(1.0 / self.config.initial_temperature))

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings.word_embeddings

    # --- encoders

    def embed_regions(self, features_BRF: Tensor | None, images_B3HW: Tensor | None, geometry_BR6: Tensor) -> Tensor:
        """Float features [B, R, F] or uint8 images [B, 3, H, W], and geometry [B, R, 6] -> [B, R, D].

        Raises:
            ValueError: when what the model's visual source needs is missing or of another size.
        """
        return self.region_embedding(features_BRF, images_B3HW, geometry_BR6)

    def encode_text(self, ids_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """int64 rows and bool mask [B, T] -> text states [B, T, D]."""
        return self.text_encoder(self.embeddings(ids_BT, TEXT_SEGMENT), mask_BT)

    def encode_visual(
        self, tag_ids_BG: Tensor, tag_mask_BG: Tensor, regions_BRD: Tensor, region_mask_BR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Tags and embedded regions, with their bool masks -> tag states [B, G, D], region states [B, R, D]."""
        tags_BGD = self.embeddings(tag_ids_BG, TAG_SEGMENT)
        return _encode_pair(self.visual_encoder, tags_BGD, tag_mask_BG, regions_BRD, region_mask_BR)

    def encode_cross(
        self, text_states_BTD: Tensor, text_mask_BT: Tensor, region_states_BRD: Tensor, region_mask_BR: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Text and region states of the uni-modal encoders -> both after cross encoding, same shapes."""
        return _encode_pair(self.cross_encoder, text_states_BTD, text_mask_BT, region_states_BRD, region_mask_BR)

    def text_global(self, text_states_BTD: Tensor) -> Tensor:
        """-> [B, D] of length 1, float32 (float64 for a float64 model)."""
        return global_state(text_states_BTD, self.text_proj)

    def visual_global(self, tag_states_BGD: Tensor) -> Tensor:
        """-> [B, D] of length 1, float32 (float64 for a float64 model)."""
        return global_state(tag_states_BGD, self.visual_proj)

    # --- heads

    def pool(self, cross_text_states_BTD: Tensor) -> Tensor:
        """tanh(linear) of slot 0 -> [B, D]."""
        return self.pooler(cross_text_states_BTD)

    def itm_logits(self, pooled_BD: Tensor) -> Tensor:
        """-> [B, 2]; class 0 is a match. Source: REFERENCE, Losses 4."""
        return self.itm_head(pooled_BD)

    def token_logits(self, states_ND: Tensor) -> Tensor:
        """Cross-encoder (stage 1: text-encoder) states [N, D] -> logits over the words [N, W]."""
        return self.token_head(states_ND, self._word_rows())

    def tag_logits(self, states_ND: Tensor) -> Tensor:
        """Visual-encoder states [N, D] -> logits over the words [N, W]."""
        return self.tag_head(states_ND, self._word_rows())

    def phrase_logits(self, states_ND: Tensor) -> Tensor:
        """Text-encoder states [N, D] -> logits over the phrase vocabulary [N, P].

        Raises:
            ValueError: when the model has no phrase head (num_phrases 0).
        """
        if not self.config.num_phrases:
            raise ValueError("num_phrases is 0: this model has no phrase head")
        return self.phrase_head(states_ND, gather_rows(self.embeddings.word_embeddings.weight, self.phrase_rows))

    def set_phrase_rows(self, rows_P: Tensor) -> None:
        """Tells the embedding row of each phrase, int64 [P]; saved with the weights.

        Raises:
            ValueError: for another number of rows than num_phrases, or one outside the embedding table.
        """
        rows_P = torch.as_tensor(rows_P, dtype=torch.int64)
        num_phrases, num_rows = self.config.num_phrases, self.config.num_rows
        if not num_phrases or rows_P.shape != (num_phrases,):
            raise ValueError(f"phrase rows of shape {tuple(rows_P.shape)}, but num_phrases is {num_phrases}")
        low, high = int(rows_P.min()), int(rows_P.max())
        if low < 0 or high >= num_rows:
            raise ValueError(f"phrase rows run from {low} to {high}, the embedding table from 0 to {num_rows - 1}")
        self.phrase_rows.copy_(rows_P)

    def parameters_of(self, parts: Iterable[str]) -> list[str]:
        """Names of the parameters of these parts (see PARTS), in the model's order; a frozen backbone is in none.

        Raises:
            ValueError: for an unknown part.
        """
        wanted = list(parts)
        unknown = [part for part in wanted if part not in PARTS]
        if unknown:
            raise ValueError(f"unknown parts {unknown}, expected some of {list(PARTS)}")
        prefixes = tuple(prefix for part in wanted for prefix in PARTS[part])
        frozen = "region_embedding.backbone." if self.config.freeze_backbone else None
        names = (name for name, _ in self.named_parameters() if name.startswith(prefixes))
        return [name for name in names if frozen is None or not name.startswith(frozen)]

    def _word_rows(self) -> Tensor:
        return self.embeddings.word_embeddings.weight[: self.config.num_words]


def _encode_pair(
    encoder: Encoder, first_BMD: Tensor, first_mask_BM: Tensor, second_BRD: Tensor, second_mask_BR: Tensor
) -> tuple[Tensor, Tensor]:
    """Encodes two sequences as one and splits the states again."""
    states = encoder(torch.cat([first_BMD, second_BRD], dim=1), torch.cat([first_mask_BM, second_mask_BR], dim=1))
    num_first = first_BMD.shape[1]
    return states[:, :num_first], states[:, num_first:]
