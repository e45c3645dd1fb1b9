"""The table of objectives: everything that the package knows of an objective besides its formula (losses.py).

A new objective is a formula in losses.py, a row here, and a weight in config.py.
What else asks about objectives reads this table: which parameters the optimiser gets, which rows of an encoder's last
layer are computed, FLOPs, memory, traffic, preflight's search for targets, and the names in the log.

Legend: B samples of this rank, K rows with a label, M regions beside a masked tag, P pairs of both, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.gather import pick_rows
from mvptr_ds.model.mvptr import PARTS
from mvptr_ds.model.packed import Packed
from mvptr_ds.objectives import losses
from mvptr_ds.objectives.lengths import Lengths
from mvptr_ds.objectives.losses import LossSum
from mvptr_ds.objectives.output_rows import without_covered
from mvptr_ds.objectives.pairs import grounding_scores
from mvptr_ds.objectives.passes import AlignedPass, ModelPass

# the parts of the model (model.mvptr.PARTS) that an encoder's outputs train: the cross encoder reads both others
ENCODER_PARTS = {
    "text": {"text"},
    "visual": {"visual", "regions"},
    "matched": {"text", "visual", "regions", "cross"},
    "mismatched": {"text", "visual", "regions", "cross"},
}


@dataclass(frozen=True)
class Objective:
    """What the package must know of an objective.

    Attributes:
        compute: sum and count of this rank's samples, from the model's outputs (passes.py).
        single, aligned: its place in the order of computation, in stages of single modalities and in aligned ones;
            None: they cannot compute it. Objectives that share an encoder's outputs find them there, and the order in
            which gradients are added up is part of what a resumed run must repeat to the bit.
        outputs: encoder -> kinds of rows (output_rows.py) whose last-layer states it reads. `matched` and
            `mismatched` are the two calls of the cross encoder.
        outputs_on_cross: the same where it reads the cross encoder instead (`Chosen.of` says when).
        heads: parts of the model that it trains beside the encoders whose outputs it reads.
        flops: of its head, one forward pass; arguments are the lengths of this rank's micro-batch, the model's
            configuration, and the number of samples of the global micro-batch.
        candidates: whose `task.NAME.scope` chooses its negatives: vsc, itm or wpg. None: it has no negatives.
        groundings: how often it compares phrases with regions, for the planner's memory.
        needs: what a sample must hold for it to learn anything (preflight.sample_checks).
        target: the same in words, for the log.
        masked_by: the probability of the stage's `masking` that makes its targets, if any does.
        scalars: name -> first value of weights of its own, such as a bias; all stages train them, and a model folder
            that lacks them lets them start fresh. `compute` finds them in `outputs.scalars`.
    """

    compute: Callable[[Any], LossSum]  # of an AlignedPass; in stages of single modalities of a ModelPass
    outputs: Mapping[str, frozenset[str]]
    needs: tuple[str, ...]
    target: str
    single: int | None = None
    aligned: int | None = None
    outputs_on_cross: Mapping[str, frozenset[str]] | None = None
    heads: frozenset[str] = frozenset()
    flops: Callable[[Lengths, MvptrConfig, float], float] = lambda lengths, model, num_samples: 0.0
    candidates: str | None = None
    groundings: int = 0
    masked_by: str | None = None
    scalars: Mapping[str, float] = field(default_factory=dict)

    @property
    def needs_mismatched(self) -> bool:
        """Whether it compares pairs that match with pairs that do not: a second call of the cross encoder."""
        return "mismatched" in self.outputs

    @property
    def crosses(self) -> bool:
        """Whether it reads the cross encoder."""
        return bool(self.outputs.keys() & {"matched", "mismatched"})


# --- from the model's outputs to the formulas


def _mlm(outputs: ModelPass) -> LossSum:
    states, masked = outputs.word_states, outputs.packed.masked_tokens
    states_KD = pick_rows(states.rows, masked.rows_K)
    nll_K = outputs.model.token_head.nll(states_KD, masked.labels_K, outputs.table.words_WD)
    return outputs.sum_over_slots(nll_K, states, masked)


def _mcr_phrases(outputs: ModelPass) -> LossSum:
    states, masked = outputs.text, outputs.packed.masked_phrases
    assert outputs.table.phrases_PD is not None
    states_KD = pick_rows(states.rows, masked.rows_K)
    nll_K = outputs.model.phrase_head.nll(states_KD, masked.labels_K, outputs.table.phrases_PD)
    return outputs.sum_over_slots(nll_K, states, masked)


def _mcr_tags(outputs: ModelPass) -> LossSum:
    states, masked = outputs.tags, outputs.packed.masked_tags
    states_KD = pick_rows(states.rows, masked.rows_K)
    nll_K = outputs.model.tag_head.nll(states_KD, masked.labels_K, outputs.table.words_WD)
    return outputs.sum_over_slots(nll_K, states, masked)


def _mcr_regions(outputs: ModelPass) -> LossSum:
    asked = outputs.packed.tag_regions
    states_MD = pick_rows(outputs.regions.rows, asked.rows_M)
    log_p_P = outputs.model.tag_head.log_p_of_pairs(states_MD, asked.picked_P, asked.labels_P, outputs.table.words_WD)
    of_tags = Packed(log_p_P, asked.of_tags.lengths, asked.of_tags)
    return losses.mcr_regions(of_tags.padded(), of_tags.mask())


def _vsc(outputs: AlignedPass) -> LossSum:
    return outputs.candidates(outputs.config.vsc.scope).vsc(outputs.scale)


def _itm(outputs: AlignedPass) -> LossSum:
    model = outputs.model
    matched_B2, mismatched_B2 = (model.itm_logits(model.pool(pairs.text)) for pairs in outputs.cross)
    return losses.itm(matched_B2, mismatched_B2, outputs.has_mismatched_B)


def _wpg_cross(outputs: AlignedPass) -> LossSum:
    (matched, mismatched), wpg, draws = outputs.cross, outputs.config.wpg, outputs.draws
    positive_B = matched.grounding_score(draws.wpg_own_BT, wpg.top_k, outputs.model.compiled)
    negative_B = mismatched.grounding_score(draws.wpg_other_BT, wpg.top_k, outputs.model.compiled)
    counts_B = matched.can_be_grounded() & mismatched.can_be_grounded() & outputs.has_mismatched_B
    return losses.wpg(positive_B, negative_B, counts_B, wpg.margin)


def _wpg(outputs: AlignedPass) -> LossSum:
    wpg = outputs.config.wpg
    pairs = outputs.matched if outputs.choices.wpg_states == "cross" else outputs.matched_inputs
    negative = outputs.grounding_negatives(pairs.regions)
    positive_B, negative_B, can_be_B = grounding_scores(pairs, negative, outputs.draws, wpg, outputs.model.compiled)
    return losses.wpg(positive_B, negative_B, can_be_B & outputs.candidates(wpg.scope).has_negative(), wpg.margin)


# --- the cost of a head: a transform [D, D], then products with `num_rows` rows


def _head_flops(slots: float, num_rows: int, model: MvptrConfig) -> float:
    return slots * 2 * (model.hidden_size**2 + model.hidden_size * num_rows)


WORDS, TAGS, REGIONS, PHRASES = "text", "tags", "something to see", "phrases of the vocabulary"
_GROUNDED = frozenset({"phrases", "regions"})

OBJECTIVES: dict[str, Objective] = {
    "mlm": Objective(
        _mlm,
        {"text": frozenset({"tokens"})},
        single=10,
        aligned=40,
        outputs_on_cross={"matched": frozenset({"tokens"})},  # in an aligned stage
        needs=(WORDS,),
        target="a masked word",
        heads=frozenset({"token_head"}),
        flops=lambda lengths, model, _: _head_flops(lengths.picked_tokens, model.num_words, model),
        masked_by="word_prob",
    ),
    "mcr_phrases": Objective(
        _mcr_phrases,
        {"text": frozenset({"picked_phrases"})},
        single=20,
        needs=(PHRASES,),
        target="a masked phrase of the vocabulary",
        heads=frozenset({"phrase_head"}),
        flops=lambda lengths, model, _: _head_flops(lengths.picked_phrases, model.num_phrases, model),
        masked_by="phrase_prob",
    ),
    "mcr_tags": Objective(
        _mcr_tags,
        {"visual": frozenset({"tags"})},
        single=30,
        aligned=10,
        needs=(TAGS,),
        target="a masked tag",
        heads=frozenset({"tag_head"}),
        flops=lambda lengths, model, _: _head_flops(lengths.picked_tags, model.num_words, model),
        masked_by="tag_prob",
    ),
    "mcr_regions": Objective(
        _mcr_regions,
        {"visual": frozenset({"asking_regions"})},
        single=40,
        aligned=20,
        needs=(TAGS, REGIONS),
        target="a masked tag beside a region",
        heads=frozenset({"tag_head"}),
        flops=lambda lengths, model, _: _head_flops(lengths.scored_regions, model.num_words, model),
        masked_by="tag_prob",
    ),
    "vsc": Objective(
        _vsc,
        {"text": frozenset({"first"}), "visual": frozenset({"first"})},
        aligned=30,
        needs=(WORDS, REGIONS),
        target="another image beside it",
        heads=frozenset({"globals"}),
        # both projections, and both directions of the similarity matrix
        flops=lambda lengths, model, num_samples: (
            lengths.samples * 4 * (model.hidden_size**2 + model.hidden_size * num_samples)
        ),
        candidates="vsc",
    ),
    "itm": Objective(
        _itm,
        {"matched": frozenset({"first"}), "mismatched": frozenset({"first"})},
        aligned=50,
        needs=(WORDS, REGIONS),
        target="another image beside it",
        heads=frozenset({"itm"}),
        # the pooler and two classes, for both pairs
        flops=lambda lengths, model, _: 2 * lengths.samples * 2 * (model.hidden_size**2 + 2 * model.hidden_size),
        candidates="itm",
    ),
    "wpg_cross": Objective(
        _wpg_cross,
        {"matched": _GROUNDED, "mismatched": frozenset({"text", "regions"})},
        aligned=60,
        needs=(PHRASES, REGIONS),
        target="a phrase of the vocabulary and another image beside it",
        candidates="itm",
        groundings=2,
    ),
    "wpg": Objective(
        _wpg,
        {"text": frozenset({"phrases"}), "visual": frozenset({"regions"})},
        aligned=70,
        outputs_on_cross={"matched": _GROUNDED},  # with task.wpg.states=cross
        needs=(PHRASES, REGIONS),
        target="a phrase of the vocabulary and another image beside it",
        candidates="wpg",
        groundings=2,
    ),
}


# --- what a set of objectives comes to


def objectives_of(aligned: bool) -> tuple[str, ...]:
    """Returns the objectives that aligned stages, or those of single modalities, can compute, in that order."""
    places = {name: row.aligned if aligned else row.single for name, row in OBJECTIVES.items()}
    return tuple(sorted((n for n, place in places.items() if place is not None), key=lambda n: (places[n], n)))


@dataclass(frozen=True)
class Chosen:
    """The objectives of a stage that have a weight, and all that follows from the set of them.

    Attributes:
        by_name: in the order of computation.
        aligned: see `Stage`.
    """

    by_name: Mapping[str, Objective]
    aligned: bool

    @classmethod
    def of(cls, names: Collection[str], aligned: bool, wpg_states: str) -> Chosen:
        """Returns those of `names`, in the order of computation."""
        crossing = {"mlm": aligned, "wpg": wpg_states == "cross"}
        rows = {}
        for name in (name for name in objectives_of(aligned) if name in names):
            rows[name] = row = OBJECTIVES[name]
            if crossing.get(name) and row.outputs_on_cross is not None:
                rows[name] = replace(row, outputs=row.outputs_on_cross)
        return cls(rows, aligned)

    def trained_parts(self) -> list[str]:
        """Returns the parts of the model that a gradient reaches, in the order of `PARTS`: all that the engine gets."""
        reached = {"embeddings"}
        for objective in self.by_name.values():
            reached |= objective.heads
            for encoder in objective.outputs:
                reached |= ENCODER_PARTS[encoder]
        return [part for part in PARTS if part in reached]

    def computed_parts(self) -> frozenset[str]:
        """Returns the parts that are computed, trained or not: in an aligned stage both encoders always are."""
        return frozenset((*self.trained_parts(), *(("text", "visual") if self.aligned else ())))

    def output_rows(self) -> dict[str, frozenset[str]]:
        """Returns by encoder the kinds of rows that its last layer must compute.

        An encoder that is not named is read wholly: the text encoder of an aligned stage, whose states the cross
        encoder takes.
        """
        encoders = ("visual", "matched", "mismatched") if self.aligned else ("text", "visual")
        rows = {encoder: set[str]() for encoder in encoders}
        for objective in self.by_name.values():
            for encoder, kinds in objective.outputs.items():
                if encoder in rows:
                    rows[encoder] |= kinds
        if self.aligned:  # for the global states, and for the cross encoder's input
            rows["visual"] |= {"first", "regions"}
        return {encoder: without_covered(kinds) for encoder, kinds in rows.items()}

    def scopes(self) -> set[str]:
        """Returns the sections of `task` whose `scope` is in use."""
        return {o.candidates for o in self.by_name.values() if o.candidates is not None}

    def needs_mismatched(self) -> bool:
        """Returns whether pairs that do not match go through the cross encoder, too."""
        return any(objective.needs_mismatched for objective in self.by_name.values())

    def needs_grounding(self) -> bool:
        """Returns whether phrases are grounded in another image, which WPG chooses."""
        return "wpg" in self.scopes()

    def crosses(self) -> bool:
        """Returns whether the cross encoder runs at all."""
        return any(objective.crosses for objective in self.by_name.values())

    def num_cross_calls(self) -> int:
        """Returns 2 where an objective compares matched pairs with mismatched ones, else 1."""
        return 2 if self.needs_mismatched() else 1

    def num_groundings(self) -> int:
        """Returns how often phrases are compared with regions."""
        return sum(objective.groundings for objective in self.by_name.values())

    def scalars(self) -> dict[str, Mapping[str, float]]:
        """Returns the first values of the weights of their own, by objective."""
        return {name: objective.scalars for name, objective in self.by_name.items() if objective.scalars}

    def head_flops(self, lengths: Lengths, model: MvptrConfig, num_samples: float) -> dict[str, float]:
        """Returns the FLOPs of each objective's head, one forward pass."""
        return {name: o.flops(lengths, model, num_samples) for name, o in self.by_name.items()}
