"""The model's outputs for one micro-batch, each computed once, when the first objective asks for it.

`ModelPass` encodes each modality by itself (stage 1). `PairPass` adds the cross encoder (downstream tasks).
`AlignedPass` finds a negative for each sample, and runs the cross encoder on both pairs (stage 2, joint).

Legend: B samples of this rank, N samples of all ranks, K rows with a label, D hidden.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from mvptr_ds.config import TaskConfig
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.model.packed import Packed, concat, unconcat
from mvptr_ds.model.sequence_index import JoinIndex
from mvptr_ds.objectives import output_rows
from mvptr_ds.objectives.candidates import Candidates, Globals
from mvptr_ds.objectives.gather_rows import Request
from mvptr_ds.objectives.hard_negatives import OwnDraws
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.negatives import ITM_REGIONS, ITM_TEXT, WPG_REGIONS, NegativePlan, Negatives
from mvptr_ds.objectives.packed_batch import MaskedTargets, PackedBatch
from mvptr_ds.objectives.pairs import Pairs


class ModelPass:
    """The outputs of both encoders, each modality by itself.

    Args:
        rows: encoder -> kinds of rows that its last layer computes (`table.Chosen.output_rows`); the others are zero.
        with_phrases: whether the rows of the phrase vocabulary are looked up, for the phrase head.
        per_sample: whether losses over slots are also summed by sample.
        scalars: the weights that objectives own, by objective and name.
    """

    def __init__(
        self,
        model: Mvptr,
        packed: PackedBatch,
        rows: Mapping[str, frozenset[str]],
        *,
        with_phrases: bool = False,
        per_sample: bool = False,
        scalars: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.model, self.packed, self.rows, self.per_sample = model, packed, rows, per_sample
        self.scalars = scalars or {}
        self.table = model.look_up(packed.text_ids, packed.tag_ids, phrases=with_phrases)

    @cached_property
    def text(self) -> Packed:
        """States of the text encoder [N, D]."""
        packed = self.packed
        return self.model.encode_text(
            packed.text_ids, self.table.text_ND, self._needed_rows("text"), packed.text_segments
        )

    def _needed_rows(self, encoder: str) -> Tensor | None:
        """The rows of an encoder's last layer that are read, int64; None: all."""
        known, key = self.packed.output_rows, (encoder, self.rows[encoder])
        if key not in known:
            rows_K = output_rows.needed_rows(*key, self.packed.host)
            known[key] = None if rows_K is None else rows_K.to(self.packed.image_index_B.device, non_blocking=True)
        return known[key]

    @property
    def word_states(self) -> Packed:
        """The states from which masked words are predicted."""
        return self.text

    @cached_property
    def _visual(self) -> tuple[Packed, Packed]:
        packed = self.packed
        regions = self.model.embed_regions(packed.features, packed.images_B3HW, packed.geometry)
        needed_K = self._needed_rows("visual")
        return self.model.encode_visual(packed.tag_ids, regions, self.table.tags_ND, needed_K, packed.visual)

    @property
    def tags(self) -> Packed:
        """States of the visual encoder at the tags [N, D]."""
        return self._visual[0]

    @property
    def regions(self) -> Packed:
        """States of the visual encoder at the regions [N, D]."""
        return self._visual[1]

    def sum_over_slots(self, values_K: Tensor, slots: Packed, masked: MaskedTargets) -> LossSum:
        """Returns sum and count of a loss at masked slots; also by sample, where a mixture's meters want them."""
        if not self.per_sample:
            return LossSum.of(values_K)
        return LossSum.of_slots(values_K, slots.owners().index_select(0, masked.rows_K), len(slots))


class PairPass(ModelPass):
    """The outputs of a batch of pairs: both encoders, and the cross encoder on each text and its image.

    Downstream tasks read it with `rows={"visual": {"regions"}, "matched": {"first"}}` or the like.

    Args:
        num_cross_layers: layers of the cross encoder that run; None: all.
    """

    def __init__(
        self,
        model: Mvptr,
        packed: PackedBatch,
        rows: Mapping[str, frozenset[str]],
        *,
        per_sample: bool = False,
        scalars: Mapping[str, Mapping[str, Tensor]] | None = None,
        num_cross_layers: int | None = None,
    ) -> None:
        super().__init__(model, packed, rows, per_sample=per_sample, scalars=scalars)
        self.num_cross_layers = num_cross_layers
        # Both encoders run before any objective, visual first. The cross encoder takes all of their states, and this
        # order fixes the order in which their gradients are added up.
        regions = self.crossing_regions()
        self.matched_inputs = Pairs(self.text, packed.phrase_mask, regions)

    def crossing_regions(self) -> Packed:
        """Returns the visual states that the cross encoder reads [N, D]."""
        return self.regions

    @cached_property
    def text(self) -> Packed:
        """States of the text encoder [N, D], of all slots."""
        return self.model.encode_text(self.packed.text_ids, self.table.text_ND, segments=self.packed.text_segments)

    @property
    def word_states(self) -> Packed:
        return self.matched.text

    @property
    def matched(self) -> Pairs:
        """The cross encoder's states of the matched pairs."""
        return self.cross[0]

    @cached_property
    def cross(self) -> tuple[Pairs, Pairs]:
        """The cross encoder's states of the matched and of the mismatched pairs, from one call; here without those."""
        text, regions = self.matched_inputs.text, self.matched_inputs.regions
        known = regions.lengths == self.packed.geometry.lengths  # a task may let other rows into the cross encoder
        index = self.packed.pairs if known else JoinIndex(text.index, regions.index)
        states = self.model.encode_cross(
            text, regions, needed_K=self._matched_rows(), num_layers=self.num_cross_layers, index=index
        )
        none = Packed(regions.rows[:0], ())
        return Pairs(states[0], self.matched_inputs.phrase_mask, states[1]), Pairs(none, none, none)

    def _matched_rows(self) -> Tensor | None:
        """The rows of the matched pairs that are read."""
        lengths = self.matched_inputs.regions.lengths
        if lengths == self.packed.geometry.lengths:
            return self._needed_rows("matched")
        marked = output_rows.matched_rows(self.rows["matched"], self.packed.host, lengths)
        rows_K = output_rows.numbers(marked)
        return None if rows_K is None else rows_K.to(self.packed.image_index_B.device, non_blocking=True)


@dataclass(frozen=True)
class Choices:
    """How a step takes its negatives, with every `auto` and every schedule resolved."""

    itm_negatives: str
    wpg_negatives: str
    wpg_states: str


class AlignedPass(PairPass):
    """The same with a negative for each sample: candidates, mismatched pairs, and the cross encoder on both kinds.

    What each sample is compared with is chosen from the global states alone, before any objective is computed. Token
    and region states are exchanged between ranks only for the negatives that were chosen.

    Args:
        draws: the random choices of this rank's samples.
        scale: of the contrastive logits, one element.
        needs_mismatched: whether an objective compares pairs that match with pairs that do not.
        needs_grounding: whether one grounds phrases in another image that WPG chooses.
    """

    def __init__(
        self,
        model: Mvptr,
        packed: PackedBatch,
        rows: Mapping[str, frozenset[str]],
        *,
        config: TaskConfig,
        choices: Choices,
        draws: OwnDraws,
        scale: Tensor,
        needs_mismatched: bool,
        needs_grounding: bool,
        per_sample: bool = False,
        scalars: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.config, self.choices, self.draws, self.scale = config, choices, draws, scale
        self.needs_mismatched = needs_mismatched
        self._candidates: dict[str, Candidates] = {}
        super().__init__(model, packed, rows, per_sample=per_sample, scalars=scalars)
        requests = (self._itm_requests() if needs_mismatched else {}) | (self._wpg_request() if needs_grounding else {})
        text, regions = self.matched_inputs.text.index, self.matched_inputs.regions.index
        self._negatives = Negatives(requests, text, regions, self._pair_rows) if requests else None

    def candidates(self, scope: str) -> Candidates:
        """Returns the samples, of this rank (`local`) or of all ranks (`global`), from which negatives are chosen."""
        if scope not in self._candidates:
            self._candidates[scope] = Candidates(self._globals, scope, self.config.scores_mib)
        return self._candidates[scope]

    @cached_property
    def _globals(self) -> Globals:
        text_BD, image_BD = self.model.text_global(self.text), self.model.visual_global(self.tags)
        return Globals(text_BD, image_BD, self.packed.image_index_B)

    @property
    def has_mismatched_B(self) -> Tensor:
        """Whether a sample's mismatched pair is one: its candidates show another image, bool [B]."""
        return self.candidates(self.config.itm.scope).has_negative()

    @cached_property
    def cross(self) -> tuple[Pairs, Pairs]:
        """The cross encoder's states of the matched and of the mismatched pairs, from one call.

        Without `needs_mismatched` the second holds no pair.
        """
        return self._matched_and_mismatched() if self.needs_mismatched else super().cross

    def grounding_negatives(self, regions: Packed) -> Packed:
        """Returns of images' regions [N, D] those of the negative that WPG has chosen for each text."""
        return self.negative_plan.fetch(WPG_REGIONS, regions)

    @cached_property
    def negative_plan(self) -> NegativePlan:
        """How the negatives are fetched; the first use waits for the choices."""
        assert self._negatives is not None, "no objective asked for negatives"
        return self._negatives.plan()

    def _matched_and_mismatched(self) -> tuple[Pairs, Pairs]:
        matched, plan = self.matched_inputs, self.negative_plan
        text, phrase_mask = (plan.fetch(ITM_TEXT, part) for part in (matched.text, matched.phrase_mask))
        regions = plan.fetch(ITM_REGIONS, matched.regions)
        both = [matched.text, text], [matched.regions, regions]
        states = self.model.encode_cross(
            concat(both[0]),
            concat(both[1]),
            needed_K=plan.needed_K,
            num_layers=self.num_cross_layers,
            index=plan.pairs,
        )
        texts, images = (unconcat(whole, parts) for whole, parts in zip(states, both, strict=True))
        return Pairs(texts[0], matched.phrase_mask, images[0]), Pairs(texts[1], phrase_mask, images[1])

    def _pair_rows(self, text: tuple[int, ...], regions: tuple[int, ...]) -> Tensor | None:
        """The rows that are read of the matched pairs, and of mismatched ones of these lengths; on the host."""
        matched = self.rows["matched"], self.packed.host, self.matched_inputs.regions.lengths
        mismatched = output_rows.pair_rows(self.rows["mismatched"], text, regions)
        return output_rows.numbers(output_rows.matched_rows(*matched), mismatched)

    def _itm_requests(self) -> dict[str, Request]:
        """For each sample its own text beside another's image, or the other way round, before the cross encoder.

        Half of the samples keep their text, the others their image (`draws.itm_takes_image_B`). With two samples of
        a rank, of which the first takes an image, and the negatives [1, 0], the pairs are (text 0, image 1) and
        (text 0, image 1) again: sample 1 keeps its image and takes the text of sample 0.
        """
        draws, candidates = self.draws, self.candidates(self.config.itm.scope)
        rows_B, num, mode = draws.itm_rows_B, draws.num_taking_image, self.choices.itm_negatives
        images = candidates.negative_images(mode, draws.itm_B, self.scale, rows_B[:num])
        texts = candidates.negative_texts(mode, draws.itm_B, self.scale, rows_B[num:])
        negative_B = torch.empty_like(rows_B).index_copy_(0, rows_B, torch.cat([images, texts]))
        local_B = torch.arange(len(rows_B), device=rows_B.device) + candidates.first
        text_from_B = torch.where(draws.itm_takes_image_B, local_B, negative_B)
        image_from_B = torch.where(draws.itm_takes_image_B, negative_B, local_B)
        matched = self.matched_inputs
        return {
            ITM_TEXT: Request(matched.text.index, text_from_B, candidates.across),
            ITM_REGIONS: Request(matched.regions.index, image_from_B, candidates.across),
        }

    def _wpg_request(self) -> dict[str, Request]:
        """For each sample another image, in which its phrases are grounded, too."""
        candidates = self.candidates(self.config.wpg.scope)
        wanted_B = candidates.negative_images(self.choices.wpg_negatives, self.draws.wpg_image_B, self.scale)
        return {WPG_REGIONS: Request(self.matched_inputs.regions.index, wanted_B, candidates.across)}
