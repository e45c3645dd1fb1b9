"""What bench_step.py measures: batches of chosen lengths, our task, and the published code's computation.

Legend: B samples, T text slots, G tag slots, R regions, D hidden, F feature size, W word rows, K picked slots.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import BertConfig
from transformers.activations import ACT2FN
from transformers.models.bert.modeling_bert import BertEncoder

from mvptr_ds.config import TaskConfig
from mvptr_ds.config_stages import WeightsConfig
from mvptr_ds.data.collate import IGNORE, Batch, Sample, collate
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import to_reference
from mvptr_ds.model.embeddings import TAG_SEGMENT, TEXT_SEGMENT
from mvptr_ds.model.encoder import Execution
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.objectives import hard_negatives, losses
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.pretraining import PretrainingLosses
from mvptr_ds.objectives.stages import STAGES

TEXT_SLOTS, TAG_SLOTS, REGIONS = 40, 20, 50  # of the published code
OBJECTIVES = WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0)  # `joint`: the published sum
MASK_PROB = 0.15
GELUS = {
    "eager": "gelu_python",  # x / 2 * (1 + erf(x / sqrt(2))), written out as in the published code
    "sdpa": "gelu",  # one kernel
}


def make_batch(num: int, seed: int, config: MvptrConfig, caption_lengths: Sequence[int] | None = None) -> Batch:
    """Returns captions of 8-20 wordpieces (or of the given numbers), 0-5 phrases, 10-20 tag slots, 20-50 regions."""
    rng = np.random.default_rng(seed)
    samples = []
    for i in range(num):
        tokens = int(rng.integers(8, 21) if caption_lengths is None else rng.choice(np.asarray(caption_lengths)))
        phrases, tags, regions = (int(rng.integers(*bounds)) for bounds in ((0, 6), (8, 19), (20, 51)))
        samples.append(_sample(rng, i, min(tokens, 33), phrases, tags, regions, config))
    return collate(samples)


def _sample(
    rng: np.random.Generator, number: int, tokens: int, phrases: int, tags: int, regions: int, config: MvptrConfig
) -> Sample:
    words = rng.integers(1000, config.num_words, tokens + tags)
    rows = rng.integers(config.num_words, config.num_rows, phrases)
    text = np.concatenate([[101], words[:tokens], rows, [102]]).astype(np.int64)
    is_phrase = np.zeros(len(text), dtype=bool)
    is_phrase[1 + tokens : -1] = True
    tag_ids = np.concatenate([[101], words[tokens:], [102]]).astype(np.int64)
    labels = []
    for ids, num_words in ((text, tokens), (tag_ids, tags)):
        picked = 1 + np.flatnonzero(rng.random(num_words) < MASK_PROB)
        label = np.full(len(ids), IGNORE, dtype=np.int64)
        label[picked] = ids[picked]
        ids[picked] = 103
        labels.append(label)
    return Sample(
        text_ids_T=text,
        phrase_mask_T=is_phrase,
        mlm_labels_T=labels[0],
        phrase_labels_T=np.full(len(text), IGNORE, dtype=np.int64),
        tag_ids_G=tag_ids,
        tag_labels_G=labels[1],
        region_geometry_R6=rng.random((regions, 6), dtype=np.float32),
        region_features_RF=rng.standard_normal((regions, config.region_feature_dim), dtype=np.float32),
        image_3HW=None,
        image_index=number,
        position=number,
        num_oov_phrases=0,
        num_phrases=phrases,
    )


def build_task(config: MvptrConfig, execution: Execution) -> PretrainingLosses:
    """Our task with the published sum of losses; the weights depend on the configuration alone."""
    torch.manual_seed(0)
    model = Mvptr(config)
    model.set_execution(execution)
    return PretrainingLosses(
        model, STAGES["joint"], OBJECTIVES, TaskConfig(), max_text_slots=TEXT_SLOTS, max_steps=1, seed=0
    )


def fixed_slots(batch: Batch) -> Batch:
    """Returns the batch padded to the published code's slots, whatever its own lengths."""

    def pad(slots_BLx: Tensor, num: int, fill: float = 0) -> Tensor:
        return F.pad(slots_BLx, (0, 0) * (slots_BLx.ndim - 2) + (0, num - slots_BLx.shape[1]), value=fill)

    batch = batch.to(torch.device("cpu"))
    for name, num in (("text_ids_BT", TEXT_SLOTS), ("text_mask_BT", TEXT_SLOTS), ("phrase_mask_BT", TEXT_SLOTS)):
        setattr(batch, name, pad(getattr(batch, name), num))
    for name, num in (("tag_ids_BG", TAG_SLOTS), ("tag_mask_BG", TAG_SLOTS), ("region_mask_BR", REGIONS)):
        setattr(batch, name, pad(getattr(batch, name), num))
    for name, num in (("region_geometry_BR6", REGIONS), ("region_features_BRF", REGIONS)):
        setattr(batch, name, pad(getattr(batch, name), num))
    batch.mlm_labels_BT = pad(batch.mlm_labels_BT, TEXT_SLOTS, IGNORE)
    batch.tag_labels_BG = pad(batch.tag_labels_BG, TAG_SLOTS, IGNORE)
    return batch


class Reference(nn.Module):
    """What the published code computes, of transformers' BertLayer with eager attention, at fixed slots.

    Every slot goes through the encoders, padding too; matched and mismatched pairs are two passes; heads read the
    picked slots and GELU is written out, as there. LayerNorm is torch's: the published code takes apex's, which on a
    CPU is torch's, and without apex computes it in five steps. Word heads are tied, as in the packaged `base`. The
    random choices are those of `PretrainingLosses`, so that the losses are the same. Source: the published code.

    Args:
        attention: `eager` as published, or `sdpa`: transformers' own choice of today, with GELU as one kernel.
    """

    def __init__(self, ours: Mvptr, attention: str = "eager") -> None:
        super().__init__()
        config: MvptrConfig = ours.config  # type: ignore[assignment]  # transformers annotates its base class
        dim, eps = config.hidden_size, config.layer_norm_eps
        self.words = nn.Embedding(config.num_rows, dim)
        self.positions = nn.Embedding(config.max_positions, dim)
        self.segments = nn.Embedding(config.type_vocab_size, dim)
        self.embedding_norm = nn.LayerNorm(dim, eps=eps)
        self.dropout = nn.Dropout(config.hidden_dropout)
        self.img_embedding = nn.Linear(config.region_feature_dim + 6, dim)
        self.encoders = nn.ModuleDict()
        for name, num_layers in (
            ("txt_encoder", config.num_text_layers),
            ("vis_encoder", config.num_visual_layers),
            ("mul_encoder", config.num_cross_layers),
        ):
            self.encoders[name] = BertEncoder(_bert_config(config, num_layers, attention))
        self.pooler, self.itm = nn.Linear(dim, dim), nn.Linear(dim, 2)
        self.token_head, self.tag_head = (_Head(dim, config.num_words, eps, GELUS[attention]) for _ in range(2))
        self.txt_proj, self.vis_proj = nn.Parameter(torch.empty(dim, dim)), nn.Parameter(torch.empty(dim, dim))
        self.logit_scale = nn.Parameter(torch.empty(1))
        self.num_words = config.num_words
        self._copy(ours)

    def _copy(self, ours: Mvptr) -> None:
        theirs = to_reference(ours.state_dict(), ours.config, drop_phrase_head=True)  # type: ignore[arg-type]
        self.encoders.load_state_dict(
            {n.removeprefix("bert."): t for n, t in theirs.items() if "_encoder.layer" in n}, strict=True
        )
        tables = ours.embeddings
        copies = [
            (self.words, tables.word_embeddings),
            (self.positions, tables.position_embeddings),
            (self.segments, tables.segment_embeddings),
            (self.embedding_norm, tables.norm),
            (self.img_embedding, ours.region_embedding.projection),
            (self.pooler, ours.pooler.dense),
            (self.itm, ours.itm_head),
        ]
        for mine, given in ((self.token_head, ours.token_head), (self.tag_head, ours.tag_head)):
            copies += [(mine.dense, given.dense), (mine.norm, given.norm)]
            mine.bias.data.copy_(given.bias)
        for module, filled in copies:
            module.load_state_dict(filled.state_dict())
        self.txt_proj.data.copy_(ours.text_proj)
        self.vis_proj.data.copy_(ours.visual_proj)
        self.logit_scale.data.copy_(ours.logit_scale)

    def embed(self, ids_BL: Tensor, segment: int) -> Tensor:
        summed = self.words(ids_BL) + self.positions.weight[: ids_BL.shape[1]] + self.segments.weight[segment]
        embedded: Tensor = self.dropout(self.embedding_norm(summed))
        return embedded

    def encode(self, name: str, states_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        additive_B11L = (1.0 - mask_BL[:, None, None, :].to(states_BLD.dtype)) * -10000.0
        out: Tensor = self.encoders[name](states_BLD, attention_mask=additive_B11L).last_hidden_state
        return out

    def sums(self, batch: Batch, draws: RandomDraws) -> dict[str, LossSum]:
        """Returns the five losses of `joint` on a batch of fixed slots, which lies on the model's device.

        In half precision the losses of rows are summed in float32.
        """
        assert batch.region_features_BRF is not None
        draws = RandomDraws(**{name: drawn.to(batch.text_ids_BT.device) for name, drawn in vars(draws).items()})
        joined = torch.cat([batch.region_features_BRF, batch.region_geometry_BR6], -1).to(self.words.weight.dtype)
        text_BTD = self.encode("txt_encoder", self.embed(batch.text_ids_BT, TEXT_SEGMENT), batch.text_mask_BT)
        regions_BRD = self.dropout(self.img_embedding(joined))
        slots = torch.cat([self.embed(batch.tag_ids_BG, TAG_SEGMENT), regions_BRD], 1)
        visual_BVD = self.encode("vis_encoder", slots, torch.cat([batch.tag_mask_BG, batch.region_mask_BR], 1))
        tags_BGD, regions_BRD = visual_BVD[:, :TAG_SLOTS], visual_BVD[:, TAG_SLOTS:]
        words_WD = self.words.weight[: self.num_words]
        parts = {"mcr_tags": self.tag_head(tags_BGD, batch.tag_labels_BG, words_WD)}

        text_global_BD = F.normalize(text_BTD[:, 0] @ self.txt_proj, dim=-1)
        image_global_BD = F.normalize(tags_BGD[:, 0] @ self.vis_proj, dim=-1)
        sim_BB = text_global_BD @ image_global_BD.T
        scale, own_B = self.logit_scale.exp().clamp(max=100.0), torch.arange(len(sim_BB), device=sim_BB.device)
        both = [F.cross_entropy(s * scale, own_B, reduction="none").float() for s in (sim_BB, sim_BB.T)]
        parts["vsc"] = LossSum.of(0.5 * (both[0] + both[1]))

        regions = regions_BRD, batch.region_mask_BR
        cross_text_BTD, cross_regions_BRD = self.cross(text_BTD, batch.text_mask_BT, *regions)
        parts["mlm"] = self.token_head(cross_text_BTD, batch.mlm_labels_BT, words_WD)
        same_BB, takes_image_B = torch.eye(len(own_B), dtype=torch.bool, device=own_B.device), draws.itm_takes_image_N
        to_image_B = hard_negatives.choose("hardest", sim_BB, same_BB, draws.itm_N)
        to_text_B = hard_negatives.choose("hardest", sim_BB.T, same_BB, draws.itm_N)
        text_from_B = torch.where(takes_image_B, own_B, to_text_B)
        image_from_B = torch.where(takes_image_B, to_image_B, own_B)
        hard_text_BTD, _ = self.cross(
            text_BTD[text_from_B], batch.text_mask_BT[text_from_B], *(x[image_from_B] for x in regions)
        )
        logits = [self.itm(torch.tanh(self.pooler(x[:, 0]))) for x in (cross_text_BTD, hard_text_BTD)]
        parts["itm"] = losses.itm(logits[0], logits[1], torch.ones_like(own_B, dtype=torch.bool))

        negative_index_B = hard_negatives.choose("random", sim_BB, same_BB, draws.wpg_image_N)
        scores = [
            losses.phrase_region_score(
                cross_text_BTD, batch.phrase_mask_BT, cross_regions_BRD[i], batch.region_mask_BR[i], draw, 3
            )
            for i, draw in ((own_B, draws.wpg_own_NT), (negative_index_B, draws.wpg_other_NT))
        ]
        parts["wpg"] = losses.wpg(scores[0], scores[1], batch.phrase_mask_BT.any(-1), 0.2)
        return parts

    def cross(self, text: Tensor, text_mask: Tensor, regions: Tensor, region_mask: Tensor) -> tuple[Tensor, Tensor]:
        states = self.encode("mul_encoder", torch.cat([text, regions], 1), torch.cat([text_mask, region_mask], 1))
        return states[:, :TEXT_SLOTS], states[:, TEXT_SLOTS:]


class _Head(nn.Module):
    def __init__(self, dim: int, num_words: int, eps: float, gelu: str) -> None:
        super().__init__()
        self.gelu = ACT2FN[gelu]
        self.dense, self.norm = nn.Linear(dim, dim), nn.LayerNorm(dim, eps=eps)
        self.bias = nn.Parameter(torch.zeros(num_words))

    def forward(self, states_BLD: Tensor, labels_BL: Tensor, words_WD: Tensor) -> LossSum:
        picked = labels_BL != IGNORE
        hidden_KD = self.norm(self.gelu(self.dense(states_BLD[picked])))
        logits_KW = F.linear(hidden_KD, words_WD, self.bias)
        return LossSum.of(F.cross_entropy(logits_KW, labels_BL[picked], reduction="none").float())


def _bert_config(config: MvptrConfig, num_layers: int, attention: str) -> BertConfig:
    bert = BertConfig(
        hidden_size=config.hidden_size,
        num_hidden_layers=num_layers,
        num_attention_heads=config.num_attention_heads,
        intermediate_size=config.intermediate_size,
        hidden_act=GELUS[attention],
        hidden_dropout_prob=config.hidden_dropout,
        attention_probs_dropout_prob=config.attention_dropout,
        layer_norm_eps=config.layer_norm_eps,
    )
    bert._attn_implementation = attention
    return bert
