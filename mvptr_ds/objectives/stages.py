"""The stages of pre-training: what each computes, and what `auto` means there."""

from __future__ import annotations

from dataclasses import dataclass

from mvptr_ds.objectives.table import objectives_of


@dataclass(frozen=True)
class Stage:
    """One stage of pre-training.

    Attributes:
        name: of its section of the configuration and of its folder in the run's.
        aligned: pairs go through both encoders and the cross encoder. Otherwise each modality is encoded by itself.
        wpg_states, wpg_negatives, itm_negatives: what `auto` stands for in `task.wpg` and `task.itm`.
    """

    name: str
    aligned: bool
    wpg_states: str = "uni"
    wpg_negatives: str = "sampled"
    itm_negatives: str = "schedule"

    @property
    def objectives(self) -> tuple[str, ...]:
        """Those that it can compute, in the order of computation."""
        return objectives_of(self.aligned)


STAGES = {
    stage.name: stage
    for stage in (
        Stage("stage1", aligned=False),
        Stage("stage2", aligned=True),
        # the published recipe, all at once and with its choices
        Stage("joint", aligned=True, wpg_states="cross", wpg_negatives="random", itm_negatives="hardest"),
    )
}
