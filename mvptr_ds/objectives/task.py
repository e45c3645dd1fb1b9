"""Model + objectives of one stage: the only place where both are seen.

Sequences are packed (model/packed.py); only WPG's scores pad theirs, phrases by regions.

Legend: B samples of this rank, N rows of all its samples (of draws: samples of all ranks), T text slots, R regions,
D hidden, K picked rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from mvptr_ds.config import TaskConfig, WeightsConfig
from mvptr_ds.data.collate import Batch
from mvptr_ds.distributed import collectives
from mvptr_ds.model.mvptr import Mvptr, TableRows
from mvptr_ds.model.packed import Packed, concat, join, on_device
from mvptr_ds.objectives import gather_rows, losses, output_rows
from mvptr_ds.objectives.candidates import Candidates, Globals
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.packed_batch import MaskedTargets, PackedBatch

STAGE1_OBJECTIVES = ("mcr_tags", "mcr_regions", "mcr_phrases", "mlm")
STAGE2_OBJECTIVES = ("vsc", "wpg", "wpg_cross", "itm", "mlm", "mcr_tags", "mcr_regions")


class TaskOutput(NamedTuple):  # a tuple: ZeRO-3 hooks the tensors of tuples, lists and dicts alone
    """`loss` is what the engine differentiates; `parts` are this rank's detached sums and counts, for the meters."""

    loss: Tensor
    parts: dict[str, LossSum]


@dataclass
class Pairs:
    """Texts and the images beside them: their states, and which text rows hold a phrase."""

    text: Packed
    phrase_mask: Packed
    regions: Packed

    def split(self, num: int) -> tuple[Pairs, Pairs]:
        """The first `num` pairs, and the others."""
        (text, others), (mask, other_mask) = self.text.split(num), self.phrase_mask.split(num)
        regions, other_regions = self.regions.split(num)
        return Pairs(text, mask, regions), Pairs(others, other_mask, other_regions)

    def can_be_grounded(self) -> Tensor:
        """Whether the text has a phrase and the image a region, bool [B]."""
        has_region_B = torch.tensor([num > 0 for num in self.regions.lengths])
        return self.phrase_mask.padded(False).any(-1) & has_region_B.to(self.phrase_mask.rows.device, non_blocking=True)


class Task(nn.Module):
    """The objectives of one stage over one model.

    Args:
        stage: `stage1` (each modality by itself), `stage2` or `joint` (both, aligned).
        weights: of the objectives; those of weight 0 are not computed.
        max_text_slots: the most that a sample has; WPG draws a number for each.
        max_steps: of the stage; the schedule of ITM's negatives is a share of it.
        seed: of the random choices of every step.
        per_sample: whether masked predictions are also summed by sample, as a mixture's meters want them.

    Raises:
        ValueError: an objective has a weight that the stage cannot compute, or none has.
    """

    def __init__(
        self,
        model: Mvptr,
        stage: str,
        weights: WeightsConfig,
        config: TaskConfig,
        *,
        max_text_slots: int,
        max_steps: int,
        seed: int,
        per_sample: bool = False,
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.weights = {name: weight for name, weight in vars(weights).items() if weight}
        self.config = config
        self.max_text_slots, self.max_steps, self.seed = max_text_slots, max_steps, seed
        self.per_sample = per_sample
        known = STAGE1_OBJECTIVES if stage == "stage1" else STAGE2_OBJECTIVES
        if not self.weights or not set(self.weights) <= set(known):
            given = ", ".join(self.weights) or "nothing"
            raise ValueError(f"{stage}.weights sets {given}; {stage} computes {', '.join(known)}")
        if "mcr_phrases" in self.weights and not model.config.num_phrases:
            raise ValueError(
                f"{stage}.weights.mcr_phrases is {weights.mcr_phrases}, but there is no phrase vocabulary: set "
                f"data.phrase_vocab, or {stage}.weights.mcr_phrases=0"
            )
        self._resolve_choices(config)
        wpg_on_cross = "wpg" in self.weights and self.wpg_states == "cross"
        self.reads = output_rows.kinds_read(stage, self.weights, wpg_on_cross)

    def _resolve_choices(self, config: TaskConfig) -> None:
        joint = self.stage == "joint"
        self.wpg_states, self.wpg_negatives = config.wpg.states, config.wpg.negatives
        self.itm_negatives = config.itm.negatives
        if self.wpg_states == "auto":
            self.wpg_states = "cross" if joint else "uni"
        if self.wpg_negatives == "auto":
            self.wpg_negatives = "random" if joint else "sampled"
        if self.itm_negatives == "auto":
            self.itm_negatives = "hardest" if joint else "schedule"

    @staticmethod
    def _scopes(config: TaskConfig) -> dict[str, str]:
        return {"vsc": config.vsc.scope, "itm": config.itm.scope, "wpg": config.wpg.scope}

    def trained_parts(self) -> list[str]:
        """The parts of the model (`Mvptr.parameters_of`) that the objectives reach; the engine gets no others."""
        on = set(self.weights)
        sees_image = self.stage != "stage1" or bool(on & {"mcr_tags", "mcr_regions"})
        uses = {
            "embeddings": True,
            "text": bool(on - {"mcr_tags", "mcr_regions"}),
            "visual": sees_image,
            "regions": sees_image,
            "cross": self._crosses(),
            "globals": "vsc" in on,
            "token_head": "mlm" in on,
            "tag_head": bool(on & {"mcr_tags", "mcr_regions"}),
            "phrase_head": "mcr_phrases" in on,
            "itm": "itm" in on,
        }
        return [part for part, used in uses.items() if used]

    def _crosses(self) -> bool:
        on = set(self.weights)
        reads_cross = bool(on & {"itm", "mlm", "wpg_cross"}) or ("wpg" in on and self.wpg_states == "cross")
        return self.stage != "stage1" and reads_cross

    def forward(self, batch: Batch, step: int, accumulation: int = 0) -> TaskOutput:
        """All objectives of one micro-batch, normalised over the global micro-batch.

        The loss is scaled by the number of ranks, because the engine averages gradients over them.
        """
        num = len(batch) * collectives.num_ranks()
        draws = RandomDraws.keyed(self.seed, step, accumulation, num, self.max_text_slots)
        parts = self.objectives(batch, draws, step)
        counts = collectives.all_reduce_sum(torch.stack([part.count for part in parts.values()]))
        terms = [
            self.weights[name] * part.sum / count.clamp(min=1.0)
            for (name, part), count in zip(parts.items(), counts, strict=True)
        ]
        loss = collectives.num_ranks() * torch.stack(terms).sum()
        return TaskOutput(loss, {name: part.detach() for name, part in parts.items()})

    def objectives(self, batch: Batch, draws: RandomDraws, step: int = 0) -> dict[str, LossSum]:
        """Sums and counts of this rank's samples, in a fixed order; `draws` are those of all ranks."""
        return self._stage1(batch) if self.stage == "stage1" else self._stage2(batch, draws, step)

    def _stage1(self, batch: Batch) -> dict[str, LossSum]:
        parts: dict[str, LossSum] = {}
        model, packed = self.model, PackedBatch.of(batch, self.model.device)
        table = model.read_table(packed.text_ids, packed.tag_ids, phrases="mcr_phrases" in self.weights)
        if self.weights.keys() & {"mlm", "mcr_phrases"}:
            read = output_rows.of_text(self.reads["text"], packed)
            text = model.encode_text(packed.text_ids, table.text_ND, read)
            if "mlm" in self.weights:
                parts["mlm"] = self._mlm(packed, text, table)
            if "mcr_phrases" in self.weights:
                masked = packed.masked_phrases
                assert table.phrases_PD is not None
                nll_K = model.phrase_head.nll(
                    text.rows.index_select(0, masked.rows_K), masked.labels_K, table.phrases_PD
                )
                parts["mcr_phrases"] = self._of_slots(nll_K, text, masked)
        if self.weights.keys() & {"mcr_tags", "mcr_regions"}:
            parts |= self._mcr(packed, *self._encode_visual(packed, table), table)
        return parts

    def _stage2(self, batch: Batch, draws: RandomDraws, step: int) -> dict[str, LossSum]:
        model, weights, packed = self.model, self.weights, PackedBatch.of(batch, self.model.device)
        table = model.read_table(packed.text_ids, packed.tag_ids)
        tags, regions = self._encode_visual(packed, table)
        own = Pairs(model.encode_text(packed.text_ids, table.text_ND), packed.phrase_mask, regions)
        parts = self._mcr(packed, tags, regions, table)

        draws = draws.rows(collectives.rank() * len(batch), len(batch))
        scale = self.scale()
        pools = self._pools(Globals(model.text_global(own.text), model.visual_global(tags), packed.image_index_B))
        if "vsc" in weights:
            parts["vsc"] = pools[self.config.vsc.scope].vsc(scale)
        others: Pairs | None = None
        if weights.keys() & {"itm", "wpg_cross"}:
            pool = pools[self.config.itm.scope]
            negative_index_B = pool.others(self._itm_mode(step), draws.itm_takes_image_N, draws.itm_N, scale)
            others = self._mismatched(own, negative_index_B, draws.itm_takes_image_N, pool)
        if self._crosses():
            matched, mismatched = self._cross(own, others, packed)
        if "mlm" in weights:
            parts["mlm"] = self._mlm(packed, matched.text, table)
        if others is not None:
            parts |= self._compare(matched, mismatched, pool.has_negative(), draws)
        if "wpg" in weights:
            pool = pools[self.config.wpg.scope]
            all_B = torch.ones(len(batch), dtype=torch.bool)
            negative_index_B = pool.others(self.wpg_negatives, all_B, draws.wpg_image_N, scale)
            pairs = matched if self.wpg_states == "cross" else own
            pos_B, neg_B, can_be_B = self.grounding_scores(pairs, negative_index_B, draws)
            parts["wpg"] = losses.wpg(pos_B, neg_B, can_be_B & pool.has_negative(), self.config.wpg.margin)
        return parts

    def _pools(self, own: Globals) -> dict[str, Candidates]:
        """The candidates of each scope in use; every rank gathers the same."""
        objectives = {"vsc": ("vsc",), "itm": ("itm", "wpg_cross"), "wpg": ("wpg",)}
        scopes = self._scopes(self.config)
        used = sorted({scopes[name] for name, on in objectives.items() if self.weights.keys() & set(on)})
        return {scope: Candidates(own, scope, self.config.scores_mib) for scope in used}

    def _compare(
        self, matched: Pairs, mismatched: Pairs, has_negative_B: Tensor, draws: RandomDraws
    ) -> dict[str, LossSum]:
        """What is learnt from pairs that match against pairs that do not."""
        parts: dict[str, LossSum] = {}
        if "itm" in self.weights:
            logits = [self.model.itm_logits(self.model.pool(pairs.text)) for pairs in (matched, mismatched)]
            parts["itm"] = losses.itm(logits[0], logits[1], has_negative_B)
        if "wpg_cross" in self.weights:
            pos_B, neg_B = self._score(matched, draws.wpg_own_NT), self._score(mismatched, draws.wpg_other_NT)
            counts_B = matched.can_be_grounded() & mismatched.can_be_grounded() & has_negative_B
            parts["wpg_cross"] = losses.wpg(pos_B, neg_B, counts_B, self.config.wpg.margin)
        return parts

    def scale(self) -> Tensor:
        """Of the contrastive logits, capped; one element, float32 (float64 for a float64 model).

        The cap leaves the gradient alone, which would else be zero above it: the parameter could never come back.
        """
        log_scale: Tensor = self.model.logit_scale
        log_scale = log_scale if log_scale.dtype == torch.float64 else log_scale.float()
        above = (log_scale.detach() - self.max_log_scale).clamp(min=0)  # also where half precision rounds the cap up
        return (log_scale - above).exp()

    @property
    def max_log_scale(self) -> float:
        """The cap of the parameter `logit_scale`: the largest float32 that is not above ln(`task.vsc.max_scale`)."""
        exact = math.log(self.config.vsc.max_scale)
        nearest = np.float32(exact)
        return float(nearest if float(nearest) <= exact else np.nextafter(nearest, np.float32(-np.inf)))

    @torch.no_grad()
    def cap_logit_scale(self) -> None:
        """Takes the parameter back to the cap where a step has carried it above, as CLIP does."""
        self.model.logit_scale.clamp_(max=self.max_log_scale)

    def _encode_visual(self, packed: PackedBatch, table: TableRows) -> tuple[Packed, Packed]:
        regions = self.model.embed_regions(packed.features, packed.images_B3HW, packed.geometry)
        kinds = self.reads["visual"]
        read = join(output_rows.of_tags(kinds, packed), output_rows.of_regions(kinds, packed))
        return self.model.encode_visual(packed.tag_ids, regions, table.tags_ND, read)

    def _mlm(self, packed: PackedBatch, text: Packed, table: TableRows) -> LossSum:
        masked = packed.masked_tokens
        states_KD = text.rows.index_select(0, masked.rows_K)
        return self._of_slots(self.model.token_head.nll(states_KD, masked.labels_K, table.words_WD), text, masked)

    def _of_slots(self, values_K: Tensor, slots: Packed, picked: MaskedTargets) -> LossSum:
        if not self.per_sample:
            return LossSum.of(values_K)
        return LossSum.of_slots(values_K, slots.owners().index_select(0, picked.rows_K), len(slots))

    def _mcr(self, packed: PackedBatch, tags: Packed, regions: Packed, table: TableRows) -> dict[str, LossSum]:
        parts: dict[str, LossSum] = {}
        head, words_WD = self.model.tag_head, table.words_WD
        masked = packed.masked_tags
        if "mcr_tags" in self.weights:
            nll_K = head.nll(tags.rows.index_select(0, masked.rows_K), masked.labels_K, words_WD)
            parts["mcr_tags"] = self._of_slots(nll_K, tags, masked)
        if "mcr_regions" in self.weights:
            # scoring every region against all words is dear: only where a tag is asked for
            asked, place_K = np.unique(np.array(masked.samples, dtype=np.int64), return_inverse=True)
            asking = regions.take(asked.tolist())
            log_p_RK = head.log_p_of(asking.rows, masked.labels_K, words_WD)
            own_RK = asking.owners()[:, None] == on_device(place_K, asking.rows.device)
            parts["mcr_regions"] = losses.mcr_regions(log_p_RK, own_RK)
        return parts

    def _itm_mode(self, step: int) -> str:
        if self.itm_negatives != "schedule":
            return self.itm_negatives
        return "random" if step < self.config.itm.random_until * self.max_steps else "hardest"

    def _mismatched(self, own: Pairs, negative_index_B: Tensor, takes_image_B: Tensor, pool: Candidates) -> Pairs:
        """For each sample its own text and another's image, or the other way round, before the cross encoder."""
        own_B = torch.arange(len(negative_index_B), device=negative_index_B.device) + pool.first
        takes_image_B = takes_image_B.to(negative_index_B.device, non_blocking=True)
        text_from_B = torch.where(takes_image_B, own_B, negative_index_B)
        image_from_B = torch.where(takes_image_B, negative_index_B, own_B)
        text, phrase_mask = _fetch([own.text, own.phrase_mask], text_from_B, pool.across)
        (regions,) = _fetch([own.regions], image_from_B, pool.across)
        return Pairs(text, phrase_mask, regions)

    def _cross(self, own: Pairs, others: Pairs | None, packed: PackedBatch) -> tuple[Pairs, Pairs]:
        """The cross encoder on the matched and on the mismatched pairs, in one call."""
        text, phrase_mask, regions = own.text, own.phrase_mask, own.regions
        kinds = self.reads["matched"]
        read = join(output_rows.of_text(kinds, packed), output_rows.of_regions(kinds, packed))
        if others is not None:
            text, regions = concat([text, others.text]), concat([regions, others.regions])
            phrase_mask = concat([phrase_mask, others.phrase_mask])
            strangers = output_rows.of_pairs(self.reads["mismatched"], others.text.lengths, others.regions.lengths)
            read = concat([read, strangers])
        text, regions = self.model.encode_cross(text, regions, read=read)
        return Pairs(text, phrase_mask, regions).split(len(own.text))

    def grounding_scores(
        self, pairs: Pairs, negative_index_B: Tensor, draws: RandomDraws
    ) -> tuple[Tensor, Tensor, Tensor]:
        """How well a sample's phrases are grounded in its own image and in that of sample `negative_index_B`, [B] each.

        And whether they can be in both, bool [B].
        """
        across = self.config.wpg.scope == "global" and collectives.num_ranks() > 1
        (regions,) = _fetch([pairs.regions], negative_index_B, across)
        other = Pairs(pairs.text, pairs.phrase_mask, regions)
        can_be_B = pairs.can_be_grounded() & other.can_be_grounded()
        return self._score(pairs, draws.wpg_own_NT), self._score(other, draws.wpg_other_NT), can_be_B

    def _score(self, pairs: Pairs, draw_BT: Tensor) -> Tensor:
        """How well each text's phrases are grounded in the image beside it, [B]."""
        text_BTD, regions = pairs.text.padded(), pairs.regions
        return losses.phrase_region_score(
            text_BTD,
            pairs.phrase_mask.padded(False),
            regions.padded(),
            regions.mask(),
            draw_BT[:, : text_BTD.shape[1]],
            self.config.wpg.top_k,
        )


def _fetch(parts: list[Packed], wanted_B: Tensor, across: bool) -> list[Packed]:
    """The samples `wanted_B` (their places among those of all ranks, or of this one) out of each part."""
    route = gather_rows.RowExchange(torch.tensor(parts[0].lengths), wanted_B, across)
    return [Packed(route.fetch(part.rows), tuple(route.lengths)) for part in parts]
