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
from mvptr_ds.model.packed import Packed, concat, join
from mvptr_ds.objectives import output_rows
from mvptr_ds.objectives.candidates import Candidates, Globals
from mvptr_ds.objectives.hard_negatives import RandomDraws
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.packed_batch import MaskedTargets, PackedBatch
from mvptr_ds.objectives.pairs import Pairs, fetch_samples


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
        needed = output_rows.text_rows(self.rows["text"], self.packed)
        return self.model.encode_text(self.packed.text_ids, self.table.text_ND, needed, self.packed.text_segments)

    @property
    def word_states(self) -> Packed:
        """The states from which masked words are predicted."""
        return self.text

    @cached_property
    def _visual(self) -> tuple[Packed, Packed]:
        packed, kinds = self.packed, self.rows["visual"]
        regions = self.model.embed_regions(packed.features, packed.images_B3HW, packed.geometry)
        needed = join(output_rows.tag_rows(kinds, packed), output_rows.region_rows(kinds, packed))
        return self.model.encode_visual(packed.tag_ids, regions, self.table.tags_ND, needed)

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
        return self._cross(None)

    def _cross(self, mismatched: Pairs | None) -> tuple[Pairs, Pairs]:
        packed, matched = self.packed, self.matched_inputs
        text, phrase_mask, regions = matched.text, matched.phrase_mask, matched.regions
        kinds = self.rows["matched"]
        marked = output_rows.some_rows(regions.lengths, "regions" in kinds, False)
        needed = join(output_rows.text_rows(kinds, packed), marked)
        if mismatched is not None:
            text, regions = concat([text, mismatched.text]), concat([regions, mismatched.regions])
            phrase_mask = concat([phrase_mask, mismatched.phrase_mask])
            lengths = mismatched.text.lengths, mismatched.regions.lengths
            needed = concat([needed, output_rows.pair_rows(self.rows["mismatched"], *lengths)])
        text, regions = self.model.encode_cross(text, regions, needed=needed, num_layers=self.num_cross_layers)
        return Pairs(text, phrase_mask, regions).split(len(matched.text))


@dataclass(frozen=True)
class Choices:
    """How a step takes its negatives, with every `auto` and every schedule resolved."""

    itm_negatives: str
    wpg_negatives: str
    wpg_states: str


class AlignedPass(PairPass):
    """The same with a negative for each sample: candidates, mismatched pairs, and the cross encoder on both kinds.

    What each sample is compared with is chosen from the global states alone. Token and region states are exchanged
    between ranks only for the negatives that were chosen.

    Args:
        draws: the random choices of this rank's samples.
        scale: of the contrastive logits, one element.
        needs_mismatched: whether an objective compares pairs that match with pairs that do not.
    """

    def __init__(
        self,
        model: Mvptr,
        packed: PackedBatch,
        rows: Mapping[str, frozenset[str]],
        *,
        config: TaskConfig,
        choices: Choices,
        draws: RandomDraws,
        scale: Tensor,
        needs_mismatched: bool,
        per_sample: bool = False,
        scalars: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:
        self.config, self.choices, self.draws, self.scale = config, choices, draws, scale
        self.needs_mismatched = needs_mismatched
        self._candidates: dict[str, Candidates] = {}
        super().__init__(model, packed, rows, per_sample=per_sample, scalars=scalars)

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
        return self._cross(self._mismatched_inputs() if self.needs_mismatched else None)

    def _mismatched_inputs(self) -> Pairs:
        """For each sample its own text beside another's image, or the other way round, before the cross encoder.

        Half of the samples keep their text, the others their image (`draws.itm_takes_image_N`). With two samples of
        a rank, of which the first takes an image, and the negatives [1, 0], the pairs are (text 0, image 1) and
        (text 0, image 1) again: sample 1 keeps its image and takes the text of sample 0.
        """
        takes_image_B = self.draws.itm_takes_image_N
        candidates = self.candidates(self.config.itm.scope)
        negative_index_B = candidates.negatives(self.choices.itm_negatives, takes_image_B, self.draws.itm_N, self.scale)
        device = negative_index_B.device
        local_index_B = torch.arange(len(negative_index_B), device=device) + candidates.first
        takes_image_B = takes_image_B.to(device, non_blocking=True)
        text_from_B = torch.where(takes_image_B, local_index_B, negative_index_B)
        image_from_B = torch.where(takes_image_B, negative_index_B, local_index_B)
        matched = self.matched_inputs
        text, phrase_mask = fetch_samples([matched.text, matched.phrase_mask], text_from_B, candidates.across)
        (regions,) = fetch_samples([matched.regions], image_from_B, candidates.across)
        return Pairs(text, phrase_mask, regions)
