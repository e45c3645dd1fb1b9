"""Model + objectives of one stage: the only place where both are seen.

Legend: B samples of this rank, N samples of all ranks, T text slots, G tag slots, R regions, D hidden, K picked slots.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mvptr_ds import hard_negatives, losses, parallel
from mvptr_ds.config import TaskConfig, WeightsConfig
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
        max_text_slots, max_regions: lengths to which states are padded before ranks exchange them.
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
        max_regions: int,
        max_steps: int,
        seed: int,
    ) -> None:
        super().__init__()
        self.model = model
        self.stage = stage
        self.weights = {name: weight for name, weight in vars(weights).items() if weight}
        self.config = config
        self.max_text_slots, self.max_regions = max_text_slots, max_regions
        self.max_steps, self.seed = max_steps, seed
        known = STAGE1_OBJECTIVES if stage == "stage1" else STAGE2_OBJECTIVES
        if not self.weights or not set(self.weights) <= set(known):
            given = ", ".join(self.weights) or "nothing"
            raise ValueError(f"{stage}.weights sets {given}; {stage} computes {', '.join(known)}")
        if "mcr_phrases" in self.weights and not model.config.num_phrases:
            raise ValueError(
                f"{stage}.weights.mcr_phrases is {weights.mcr_phrases}, but there is no phrase vocabulary: set "
                f"data.phrase_vocab, or {stage}.weights.mcr_phrases=0"
            )
        joint = stage == "joint"
        self.wpg_states, self.wpg_negatives = config.wpg.states, config.wpg.negatives
        self.itm_negatives = config.itm.negatives
        if self.wpg_states == "auto":
            self.wpg_states = "cross" if joint else "uni"
        if self.wpg_negatives == "auto":
            self.wpg_negatives = "random" if joint else "sampled"
        if self.itm_negatives == "auto":
            self.itm_negatives = "hardest" if joint else "schedule"
        if self.wpg_states not in ("uni", "cross"):
            raise ValueError(f"task.wpg.states is {config.wpg.states!r}; choose from uni, cross, auto")
        if self.wpg_negatives not in hard_negatives.MODES:
            raise ValueError(
                f"task.wpg.negatives is {config.wpg.negatives!r}; choose from {', '.join(hard_negatives.MODES)}, auto"
            )
        if self.itm_negatives not in (*hard_negatives.MODES, "schedule"):
            raise ValueError(
                f"task.itm.negatives is {config.itm.negatives!r}; choose from "
                f"{', '.join(hard_negatives.MODES)}, schedule, auto"
            )

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

        first = parallel.rank() * len(batch)
        draws = draws.rows(first, len(batch))
        image_index_N = parallel.gather(batch.image_index_B)
        same_image_BN = batch.image_index_B[:, None] == image_index_N[None, :]

        text_global_BD, image_global_BD = model.text_global(text_BTD), model.visual_global(tags_BGD)
        text_global_ND, image_global_ND = parallel.gather(text_global_BD), parallel.gather(image_global_BD)
        scale = self.scale()
        if "vsc" in weights:
            parts["vsc"] = losses.vsc(
                text_global_BD, image_global_BD, text_global_ND, image_global_ND, scale, same_image_BN, first
            )
        if self._crosses():
            matched = self._cross(text_BTD, batch.text_mask_BT, batch.phrase_mask_BT, regions_BRD, batch.region_mask_BR)
        if "mlm" in weights:
            parts["mlm"] = self._mlm(batch, matched.text_BTD)
        text_to_image_BN, image_to_text_BN = text_global_BD @ image_global_ND.T, image_global_BD @ text_global_ND.T
        if weights.keys() & {"itm", "wpg_cross"}:
            sims = text_to_image_BN, image_to_text_BN
            others_B, takes_image_B = self._itm_negatives(sims, same_image_BN, draws, scale, step)
            mismatched = self._cross_with_others(batch, text_BTD, regions_BRD, others_B, takes_image_B)
            parts |= self._compare(matched, mismatched, hard_negatives.has_negative(same_image_BN), draws)
        if "wpg" in weights:
            from_cross = self.wpg_states == "cross"
            states = (matched.text_BTD, matched.regions_BRD) if from_cross else (text_BTD, regions_BRD)
            others_B = hard_negatives.choose(
                self.wpg_negatives, text_to_image_BN, same_image_BN, draws.wpg_image_N, scale.detach()
            )
            parts["wpg"] = self._wpg(batch, *states, others_B, same_image_BN, draws)
        return parts

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
        """Of the contrastive logits, clamped; float32, one element."""
        return self.model.logit_scale.float().exp().clamp(max=self.config.vsc.max_scale)

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

    def _itm_negatives(
        self, sims: tuple[Tensor, Tensor], same_image_BN: Tensor, draws: Draws, scale: Tensor, step: int
    ) -> tuple[Tensor, Tensor]:
        """For each sample the other one, and whether its image (else its text) is taken."""
        mode = self.itm_negatives
        if mode == "schedule":
            mode = "random" if step < self.config.itm.random_until * self.max_steps else "hardest"
        text_to_image_BN, image_to_text_BN = sims
        takes_image_B = draws.itm_takes_image_N.to(same_image_BN.device)
        sim_BN = torch.where(takes_image_B[:, None], text_to_image_BN, image_to_text_BN)
        return hard_negatives.choose(mode, sim_BN, same_image_BN, draws.itm_N, scale.detach()), takes_image_B

    def _cross_with_others(
        self, batch: Batch, text_BTD: Tensor, regions_BRD: Tensor, others_B: Tensor, takes_image_B: Tensor
    ) -> CrossStates:
        """The cross encoder on the mismatched pairs."""
        all_text_NTD = self._exchange(text_BTD, self.max_text_slots)
        all_text_mask_NT = self._exchange(batch.text_mask_BT, self.max_text_slots)
        all_phrase_mask_NT = self._exchange(batch.phrase_mask_BT, self.max_text_slots)
        all_regions_NRD = self._exchange(regions_BRD, self.max_regions)
        all_region_mask_NR = self._exchange(batch.region_mask_BR, self.max_regions)
        own_B = torch.arange(len(batch), device=others_B.device) + parallel.rank() * len(batch)
        text_from_B = torch.where(takes_image_B, own_B, others_B)
        image_from_B = torch.where(takes_image_B, others_B, own_B)
        return self._cross(
            all_text_NTD[text_from_B],
            all_text_mask_NT[text_from_B],
            all_phrase_mask_NT[text_from_B],
            all_regions_NRD[image_from_B],
            all_region_mask_NR[image_from_B],
        )

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

    def _wpg(
        self,
        batch: Batch,
        text_BTD: Tensor,
        regions_BRD: Tensor,
        others_B: Tensor,
        same_image_BN: Tensor,
        draws: Draws,
    ) -> LossSum:
        pos_B, neg_B = self.grounding_scores(batch, text_BTD, regions_BRD, others_B, draws)
        counts_B = batch.phrase_mask_BT.any(-1) & hard_negatives.has_negative(same_image_BN)
        return losses.wpg(pos_B, neg_B, counts_B, self.config.wpg.margin)

    def grounding_scores(
        self, batch: Batch, text_BTD: Tensor, regions_BRD: Tensor, others_B: Tensor, draws: Draws
    ) -> tuple[Tensor, Tensor]:
        """How well a sample's phrases are grounded in its own image and in that of sample `others_B`, [B] each."""
        all_regions_NRD = self._exchange(regions_BRD, self.max_regions)
        all_mask_NR = self._exchange(batch.region_mask_BR, self.max_regions)
        text = text_BTD, batch.phrase_mask_BT
        return (
            self._score(*text, regions_BRD, batch.region_mask_BR, draws.wpg_own_NT),
            self._score(*text, all_regions_NRD[others_B], all_mask_NR[others_B], draws.wpg_other_NT),
        )

    def _score(
        self, text_BTD: Tensor, phrase_mask_BT: Tensor, regions_BRD: Tensor, region_mask_BR: Tensor, draw_BT: Tensor
    ) -> Tensor:
        """How well each text's phrases are grounded in the image beside it, [B]."""
        draw_BT = draw_BT[:, : text_BTD.shape[1]]
        top_k = self.config.wpg.top_k
        return losses.phrase_region_score(text_BTD, phrase_mask_BT, regions_BRD, region_mask_BR, draw_BT, top_k)

    @staticmethod
    def _exchange(slots_BSx: Tensor, max_slots: int) -> Tensor:
        """States [B, S, D] or a mask [B, S] of all ranks, padded to the same length; differentiable."""
        if parallel.num_ranks() > 1:
            after_slots = (0, 0) * (slots_BSx.ndim - 2)
            slots_BSx = F.pad(slots_BSx, (*after_slots, 0, max_slots - slots_BSx.shape[1]))
        return parallel.gather(slots_BSx)
