"""The model: text, visual and cross encoder with their heads. States in, states and logits out; losses live elsewhere.

    text ids -> embeddings -> text encoder ----------------+-> cross encoder -> pooler -> ITM, token head
    tag ids -> embeddings -+-> visual encoder -> regions --+
    regions -> linear -----+

Sequences are packed (packed.py): the rows of all samples, one sample behind another, and how many each has.

Legend: B samples, N rows of all samples, D hidden, V embedding rows, W word rows, P phrases, F feature size,
K picked rows, A asked classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.utils.logging import disable_progress_bar

from .config import MvptrConfig
from .embeddings import TAG_SEGMENT, TEXT_SEGMENT, SlotEmbeddings
from .encoder import Encoder, EncoderSizes, Execution
from .heads import Pooler, RowHead, global_state
from .kernels import TableLookup, aligned_classes
from .packed import Packed, join, unjoin
from .sequence_index import JoinIndex
from .vision import ImageBackbone, RegionEmbedding, backbone_structure, load_backbone_weights

disable_progress_bar()  # each of `from_pretrained` draws one, on any output, for weights that load in a second

# what a stage may train -> prefixes of parameter names; checkpoints record their parts in this order
PARTS: dict[str, tuple[str, ...]] = {
    "embeddings": ("embeddings.",),
    "text": ("text_encoder.",),
    "visual": ("visual_encoder.",),
    "regions": ("region_embedding.",),
    "cross": ("cross_encoder.",),
    "globals": ("text_proj", "visual_proj", "logit_scale"),
    "token_head": ("token_head.",),
    "tag_head": ("tag_head.",),
    "phrase_head": ("phrase_head.",),
    "itm": ("pooler.", "itm_head."),
    "pooler": ("pooler.",),  # of tasks that read the pooled state alone
}
_UNSET_ROW = -1


@dataclass(frozen=True)
class TableRows:
    """What one pass reads of the embedding table, together, so that its gradient is written once."""

    text_ND: Tensor
    tags_ND: Tensor
    words_WD: Tensor  # of the tied word heads
    phrases_PD: Tensor | None  # of the phrase head, where it is asked for


class Mvptr(PreTrainedModel):
    """MVPTR without its losses. Source: the published code, Model.

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
        self.compiled = False
        self.post_init()
        self._load_backbone()

    @staticmethod
    def _build_regions(config: MvptrConfig) -> RegionEmbedding:
        backbone = None
        if config.visual_source == "image":
            structure = backbone_structure(config.backbone, config.backbone_config)
            backbone = ImageBackbone(structure, config.freeze_backbone)
        embedding = RegionEmbedding(
            config.region_feature_dim,
            config.hidden_size,
            config.hidden_dropout,
            backbone,
            config.roi_bins,
            config.layer_norm_eps if config.region_norm else None,
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

    def set_execution(
        self, execution: Execution, activation_checkpointing: bool = False, compiled: bool = False
    ) -> None:
        """Sets how the encoders run; the states are the same.

        Args:
            execution: `packed` or `padded`, see `Encoder`.
            activation_checkpointing: compute a layer's inner activations again in the backward pass.
            compiled: torch.compile of packed encoders, and of what losses compute on CUDA; cannot be undone.
        """
        self.compiled = self.compiled or compiled
        for encoder in (self.text_encoder, self.visual_encoder, self.cross_encoder):
            encoder.execution, encoder.activation_checkpointing = execution, activation_checkpointing
            if compiled:
                encoder.compile_layers()

    # --- encoders

    def look_up(self, text_ids: Packed, tag_ids: Packed, phrases: bool = False) -> TableRows:
        """Returns the table's rows for a pass: of the texts, of the tags, and those that tied heads score against.

        Rows for heads are as many as matrix products want (`kernels.aligned_classes`). Those behind the classes are any
        rows of the table: `picked_classes` gives them no probability and no gradient.
        """
        table: Tensor = self.embeddings.word_embeddings.weight
        num_words = aligned_classes(self.config.num_words, table.device)
        asked = [text_ids.rows, tag_ids.rows]
        if phrases:
            num = self.config.num_phrases
            asked.append(F.pad(self.phrase_rows, (0, aligned_classes(num, table.device) - num)))
        num_first = num_words if num_words <= len(table) else self.config.num_words
        rows, words_WD = TableLookup.apply(table, torch.cat(asked), num_first)
        parts = rows.split([len(ids) for ids in asked])
        return TableRows(parts[0], parts[1], words_WD, parts[2] if phrases else None)

    def embed_regions(self, features: Packed | None, images_B3HW: Tensor | None, geometry: Packed) -> Packed:
        """Embeds regions as [N, D], from float features [N, F] or uint8 images [B, 3, H, W], and geometry [N, 6].

        Raises:
            ValueError: when what the model's visual source needs is missing or of another size.
        """
        embedded: Packed = self.region_embedding(features, images_B3HW, geometry)
        return embedded

    # `needed_K` are the rows (int64) whose states are wanted; the others come back as zeros (`Encoder`)

    def encode_text(
        self,
        ids: Packed,
        rows_ND: Tensor | None = None,
        needed_K: Tensor | None = None,
        segments: Packed | None = None,
    ) -> Packed:
        """Computes text states [N, D] of int64 rows of the table [N]; `rows_ND` where `look_up` has read them.

        Args:
            segments: int64 [N], of texts that have tags behind them. Default: all rows are of the text.
        """
        segment = TEXT_SEGMENT if segments is None else segments.rows
        states: Packed = self.text_encoder(self.embeddings(ids, segment, rows_ND), needed_K)
        return states

    def encode_visual(
        self,
        tag_ids: Packed,
        regions: Packed,
        tag_rows_ND: Tensor | None = None,
        needed_K: Tensor | None = None,
        index: JoinIndex | None = None,
    ) -> tuple[Packed, Packed]:
        """Computes tag and region states, [N, D] each, of int64 rows of the table and embedded regions [N, D].

        Args:
            index: of tags joined with regions, where it is there already.
        """
        tags = self.embeddings(tag_ids, TAG_SEGMENT, tag_rows_ND)
        index = index or JoinIndex(tags.index, regions.index)
        return unjoin(self.visual_encoder(join(tags, regions, index=index), needed_K), tags.lengths, index)

    def encode_cross(
        self,
        text: Packed,
        regions: Packed,
        pairs: Sequence[tuple[int, int]] | None = None,
        needed_K: Tensor | None = None,
        num_layers: int | None = None,
        index: JoinIndex | None = None,
    ) -> tuple[Packed, Packed]:
        """Computes both modalities' states after cross encoding, from those of the uni-modal encoders.

        Args:
            pairs: which text with which image, any number of times; default: those of the same number.
            num_layers: how many layers to run; default: all.
            index: of texts joined with regions, without `pairs`, where it is there already.
        """
        if pairs is None:
            index = index or JoinIndex(text.index, regions.index)
        joined = join(text, regions, pairs, index)
        text_of = range(len(text)) if pairs is None else [first for first, _ in pairs]
        states = self.cross_encoder(joined, needed_K, num_layers)
        return unjoin(states, [text.lengths[i] for i in text_of], index)

    def text_global(self, text_states: Packed) -> Tensor:
        """Returns the global states of texts, [B, D] of length 1, float32 (float64 for a float64 model)."""
        return global_state(text_states, self.text_proj)

    def visual_global(self, tag_states: Packed) -> Tensor:
        """Returns the global states of images, [B, D] of length 1, float32 (float64 for a float64 model)."""
        return global_state(tag_states, self.visual_proj)

    # --- heads

    def pool(self, cross_text_states: Packed) -> Tensor:
        """Returns tanh(linear) of slot 0, [B, D]."""
        pooled_BD: Tensor = self.pooler(cross_text_states)
        return pooled_BD

    def itm_logits(self, pooled_BD: Tensor) -> Tensor:
        """Returns matching logits [B, 2]; class 0 is a match. Source: Li et al. 2022, ITM."""
        return self.itm_head(pooled_BD)

    def token_logits(self, states_KD: Tensor) -> Tensor:
        """Returns logits over the words [K, W] of cross-encoder (stage 1: text-encoder) states [K, D]."""
        return self.token_head(states_KD, self._word_rows())

    def tag_logits(self, states_KD: Tensor) -> Tensor:
        """Returns logits over the words [K, W] of visual-encoder states [K, D]."""
        return self.tag_head(states_KD, self._word_rows())

    def phrase_logits(self, states_KD: Tensor) -> Tensor:
        """Returns logits over the phrase vocabulary [K, P] of text-encoder states [K, D].

        Raises:
            ValueError: when the model has no phrase head (num_phrases 0).
        """
        if not self.config.num_phrases:
            raise ValueError("num_phrases is 0: this model has no phrase head")
        # an unset row (-1) is an error of the indexing kernel, never the last row
        table: Tensor = self.embeddings.word_embeddings.weight
        return self.phrase_head(states_KD, table.index_select(0, self.phrase_rows))

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

    def parameters_used_at_large(self) -> list[nn.Parameter]:
        """Returns the parameters read outside their own module's forward pass, of which ZeRO-3 has to be told."""
        return [*self.parameters(recurse=False), *self.embeddings.parameters()]

    def _word_rows(self) -> Tensor:
        return self.embeddings.word_embeddings.weight[: self.config.num_words]
