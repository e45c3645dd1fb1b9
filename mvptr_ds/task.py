"""Model + objectives of one stage: the only place where both are seen.

Legend: B samples of this rank, N samples of all ranks, T text slots, G tag slots, R regions, D hidden, K picked slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mvptr_ds import exchange, hard_negatives, losses, parallel
from mvptr_ds.config import TaskConfig, WeightsConfig
from mvptr_ds.contrast import SCOPES, Globals, Pool
from mvptr_ds.data.collate import Batch
from mvptr_ds.hard_negatives import Draws
from mvptr_ds.losses import IGNORE, LossSum
from mvptr_ds.model.mvptr import Mvptr

STAGE1_OBJECTIVES = ("mcr_tags", "mcr_regions", "mcr_phrases", "mlm")
STAGE2_OBJECTIVES = ("vsc", "wpg", "wpg_cross", "itm", "mlm", "mcr_tags", "mcr_regions")


@dataclass
class TaskOutput:
    """`loss` is what the engine differentiates; `parts` are this rank's detached sums and counts, for the meters."""

    loss: Tensor
    parts: dict[str, LossSum]


@dataclass
class CrossStates:
    """What the cross encoder makes of pairs of a text and an image, with the masks that grounding needs."""

    text_BTD: Tensor
    phrase_mask_BT: Tensor
    regions_BRD: Tensor
    region_mask_BR: Tensor


class Task(nn.Module):
    """The objectives of one stage over one model.

    Args:
        stage: `stage1` (each modality by itself), `stage2` or `joint` (both, aligned).
        weights: of the objectives; those of weight 0 are not computed.
        max_text_slots: the most that a sample has; WPG draws a number for each.
        max_steps: of the stage; the schedule of ITM's negatives is a share of it.
        seed: of the random choices of every step.

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
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.weights = {name: weight for name, weight in vars(weights).items() if weight}
        self.config = config
        self.max_text_slots, self.max_steps, self.seed = max_text_slots, max_steps, seed
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
        modes = hard_negatives.MODES
        for key, given, found, known in (
            ("wpg.states", config.wpg.states, self.wpg_states, ("uni", "cross", "auto")),
            ("wpg.negatives", config.wpg.negatives, self.wpg_negatives, (*modes, "auto")),
            ("itm.negatives", config.itm.negatives, self.itm_negatives, (*modes, "schedule", "auto")),
            *((f"{name}.scope", scope, scope, SCOPES) for name, scope in self._scopes(config).items()),
        ):
            if found not in known:
                raise ValueError(f"task.{key} is {given!r}; choose from {', '.join(known)}")

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
        num = len(batch) * parallel.num_ranks()
        draws = Draws.keyed(self.seed, step, accumulation, num, self.max_text_slots)
        parts = self.objectives(batch, draws, step)
        counts = parallel.all_reduce_sum(torch.stack([part.count for part in parts.values()]))
        terms = [
            self.weights[name] * part.sum / count.clamp(min=1.0)
            for (name, part), count in zip(parts.items(), counts, strict=True)
        ]
        loss = parallel.num_ranks() * torch.stack(terms).sum()
        return TaskOutput(loss, {name: LossSum(p.sum.detach(), p.count) for name, p in parts.items()})

    def objectives(self, batch: Batch, draws: Draws, step: int = 0) -> dict[str, LossSum]:
        """Sums and counts of this rank's samples, in a fixed order; `draws` are those of all ranks."""
        return self._stage1(batch) if self.stage == "stage1" else self._stage2(batch, draws, step)

    def _stage1(self, batch: Batch) -> dict[str, LossSum]:
        parts: dict[str, LossSum] = {}
        if self.weights.keys() & {"mlm", "mcr_phrases"}:
            text_BTD = self.model.encode_text(batch.text_ids_BT, batch.text_mask_BT)
            if "mlm" in self.weights:
                parts["mlm"] = self._mlm(batch, text_BTD)
            if "mcr_phrases" in self.weights:
                picked_BT = batch.phrase_labels_BT != IGNORE
                logits = self.model.phrase_logits(text_BTD[picked_BT])
                parts["mcr_phrases"] = losses.masked_prediction(logits, batch.phrase_labels_BT[picked_BT])
        if self.weights.keys() & {"mcr_tags", "mcr_regions"}:
            tags_BGD, regions_BRD = self._encode_visual(batch)
            parts |= self._mcr(batch, tags_BGD, regions_BRD)
        return parts

    def _stage2(self, batch: Batch, draws: Draws, step: int) -> dict[str, LossSum]:
        model, weights = self.model, self.weights
        text_BTD = model.encode_text(batch.text_ids_BT, batch.text_mask_BT)
        tags_BGD, regions_BRD = self._encode_visual(batch)
        parts = self._mcr(batch, tags_BGD, regions_BRD)

        draws = draws.rows(parallel.rank() * len(batch), len(batch))
        scale = self.scale()
        pools = self._pools(Globals(model.text_global(text_BTD), model.visual_global(tags_BGD), batch.image_index_B))
        if "vsc" in weights:
            parts["vsc"] = pools[self.config.vsc.scope].vsc(scale)
        if self._crosses():
            matched = self._cross(text_BTD, batch.text_mask_BT, batch.phrase_mask_BT, regions_BRD, batch.region_mask_BR)
        if "mlm" in weights:
            parts["mlm"] = self._mlm(batch, matched.text_BTD)
        if weights.keys() & {"itm", "wpg_cross"}:
            pool = pools[self.config.itm.scope]
            others_B = pool.others(self._itm_mode(step), draws.itm_takes_image_N, draws.itm_N, scale)
            mismatched = self._cross_with_others(batch, text_BTD, regions_BRD, others_B, draws.itm_takes_image_N, pool)
            parts |= self._compare(matched, mismatched, pool.has_negative(), draws)
        if "wpg" in weights:
            from_cross = self.wpg_states == "cross"
            states = (matched.text_BTD, matched.regions_BRD) if from_cross else (text_BTD, regions_BRD)
            pool = pools[self.config.wpg.scope]
            all_B = torch.ones(len(batch), dtype=torch.bool)
            others_B = pool.others(self.wpg_negatives, all_B, draws.wpg_image_N, scale)
            pos_B, neg_B = self.grounding_scores(batch, *states, others_B, draws)
            counts_B = batch.phrase_mask_BT.any(-1) & pool.has_negative()
            parts["wpg"] = losses.wpg(pos_B, neg_B, counts_B, self.config.wpg.margin)
        return parts

    def _pools(self, own: Globals) -> dict[str, Pool]:
        """The candidates of each scope in use; every rank gathers the same."""
        objectives = {"vsc": ("vsc",), "itm": ("itm", "wpg_cross"), "wpg": ("wpg",)}
        scopes = self._scopes(self.config)
        used = sorted({scopes[name] for name, on in objectives.items() if self.weights.keys() & set(on)})
        return {scope: Pool(own, scope, self.config.scores_mib) for scope in used}

    def _compare(
        self, matched: CrossStates, mismatched: CrossStates, has_negative_B: Tensor, draws: Draws
    ) -> dict[str, LossSum]:
        """What is learnt from pairs that match against pairs that do not."""
        parts: dict[str, LossSum] = {}
        if "itm" in self.weights:
            logits = [self.model.itm_logits(self.model.pool(pairs.text_BTD)) for pairs in (matched, mismatched)]
            parts["itm"] = losses.itm(logits[0], logits[1], has_negative_B)
        if "wpg_cross" in self.weights:
            pos_B, neg_B = (
                self._score(p.text_BTD, p.phrase_mask_BT, p.regions_BRD, p.region_mask_BR, draw_BT)
                for p, draw_BT in ((matched, draws.wpg_own_NT), (mismatched, draws.wpg_other_NT))
            )
            counts_B = matched.phrase_mask_BT.any(-1) & mismatched.phrase_mask_BT.any(-1) & has_negative_B
            parts["wpg_cross"] = losses.wpg(pos_B, neg_B, counts_B, self.config.wpg.margin)
        return parts

    def scale(self) -> Tensor:
        """Of the contrastive logits, clamped; one element, float32 (float64 for a float64 model)."""
        log_scale: Tensor = self.model.logit_scale
        log_scale = log_scale if log_scale.dtype == torch.float64 else log_scale.float()
        return log_scale.exp().clamp(max=self.config.vsc.max_scale)

    def _encode_visual(self, batch: Batch) -> tuple[Tensor, Tensor]:
        regions_BRD = self.model.embed_regions(batch.region_features_BRF, batch.images_B3HW, batch.region_geometry_BR6)
        return self.model.encode_visual(batch.tag_ids_BG, batch.tag_mask_BG, regions_BRD, batch.region_mask_BR)

    def _mlm(self, batch: Batch, text_BTD: Tensor) -> LossSum:
        picked_BT = batch.mlm_labels_BT != IGNORE
        return losses.masked_prediction(self.model.token_logits(text_BTD[picked_BT]), batch.mlm_labels_BT[picked_BT])

    def _mcr(self, batch: Batch, tags_BGD: Tensor, regions_BRD: Tensor) -> dict[str, LossSum]:
        parts: dict[str, LossSum] = {}
        picked_BG = batch.tag_labels_BG != IGNORE
        if "mcr_tags" in self.weights:
            logits = self.model.tag_logits(tags_BGD[picked_BG])
            parts["mcr_tags"] = losses.masked_prediction(logits, batch.tag_labels_BG[picked_BG])
        if "mcr_regions" in self.weights:
            rows = picked_BG.any(-1)  # scoring every region against all words is dear: only where a tag is asked for
            logits = self.model.tag_logits(regions_BRD[rows])
            parts["mcr_regions"] = losses.mcr_regions(logits, batch.region_mask_BR[rows], batch.tag_labels_BG[rows])
        return parts

    def _itm_mode(self, step: int) -> str:
        if self.itm_negatives != "schedule":
            return self.itm_negatives
        return "random" if step < self.config.itm.random_until * self.max_steps else "hardest"

    def _cross_with_others(
        self,
        batch: Batch,
        text_BTD: Tensor,
        regions_BRD: Tensor,
        others_B: Tensor,
        takes_image_B: Tensor,
        pool: Pool,
    ) -> CrossStates:
        """The cross encoder on the mismatched pairs."""
        own_B = torch.arange(len(batch), device=others_B.device) + pool.first
        takes_image_B = takes_image_B.to(others_B.device)
        text_from_B = torch.where(takes_image_B, own_B, others_B)
        image_from_B = torch.where(takes_image_B, others_B, own_B)
        text_mask_BT, (text_BTD, phrase_mask_BT) = exchange.fetch_padded(
            batch.text_mask_BT, [text_BTD, batch.phrase_mask_BT], text_from_B, pool.across
        )
        region_mask_BR, (regions_BRD,) = exchange.fetch_padded(
            batch.region_mask_BR, [regions_BRD], image_from_B, pool.across
        )
        return self._cross(text_BTD, text_mask_BT, phrase_mask_BT, regions_BRD, region_mask_BR)

    def _cross(
        self,
        text_BTD: Tensor,
        text_mask_BT: Tensor,
        phrase_mask_BT: Tensor,
        regions_BRD: Tensor,
        region_mask_BR: Tensor,
    ) -> CrossStates:
        states = self.model.encode_cross(text_BTD, text_mask_BT, regions_BRD, region_mask_BR)
        return CrossStates(states[0], phrase_mask_BT, states[1], region_mask_BR)

    def grounding_scores(
        self, batch: Batch, text_BTD: Tensor, regions_BRD: Tensor, others_B: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """How well a sample's phrases are grounded in its own image and in that of sample `others_B`, [B] each."""
        across = self.config.wpg.scope == "global" and parallel.num_ranks() > 1
        other_mask_BR, (others_BRD,) = exchange.fetch_padded(batch.region_mask_BR, [regions_BRD], others_B, across)
        text = text_BTD, batch.phrase_mask_BT
        return (
            self._score(*text, regions_BRD, batch.region_mask_BR, draws.wpg_own_NT),
            self._score(*text, others_BRD, other_mask_BR, draws.wpg_other_NT),
        )

    def _score(
        self, text_BTD: Tensor, phrase_mask_BT: Tensor, regions_BRD: Tensor, region_mask_BR: Tensor, draw_BT: Tensor
    ) -> Tensor:
        """How well each text's phrases are grounded in the image beside it, [B]."""
        draw_BT = draw_BT[:, : text_BTD.shape[1]]
        top_k = self.config.wpg.top_k
        return losses.phrase_region_score(text_BTD, phrase_mask_BT, regions_BRD, region_mask_BR, draw_BT, top_k)
