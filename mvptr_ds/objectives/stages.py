"""The stages of pre-training: what each computes, and what `auto` means there."""

from __future__ import annotations

from dataclasses import dataclass

# In the order of computation: objectives that share an encoder's outputs find them there, and the order in which
# gradients are added up is part of what a resumed run must repeat to the bit.
SINGLE_MODALITY = ("mlm", "mcr_phrases", "mcr_tags", "mcr_regions")
ALIGNING = ("mcr_tags", "mcr_regions", "vsc", "mlm", "itm", "wpg_cross", "wpg")


@dataclass(frozen=True)
class Stage:
    """One stage of pre-training.

    Attributes:
        name: of its section of the configuration and of its folder in the run's.
        objectives: those that it can compute (table.OBJECTIVES), in the order of computation.
        aligned: pairs go through both encoders and the cross encoder. Otherwise each modality is encoded by itself.
        wpg_states, wpg_negatives, itm_negatives: what `auto` stands for in `task.wpg` and `task.itm`.
    """

    name: str
    objectives: tuple[str, ...]
    aligned: bool
    wpg_states: str = "uni"
    wpg_negatives: str = "sampled"
    itm_negatives: str = "schedule"


STAGES = {
    stage.name: stage
    for stage in (
        Stage("stage1", SINGLE_MODALITY, aligned=False),
        Stage("stage2", ALIGNING, aligned=True),
        # the published recipe, all at once and with its choices
        Stage("joint", ALIGNING, True, wpg_states="cross", wpg_negatives="random", itm_negatives="hardest"),
    )
}
