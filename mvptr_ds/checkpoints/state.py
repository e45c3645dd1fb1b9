"""What `state.json` of a checkpoint holds, and what of a run must stay as it was for the run to resume."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mvptr_ds.batch_size import BatchSplit
from mvptr_ds.errors import CheckpointError

STATE = "state.json"
# Each factor of the learning rate has parameter groups of its own, in whose order the engine's files hold everything.
MUST_MATCH = (
    "batch_size",
    "bucket_batches",
    "precision",
    "learning_rate_factors",
)  # fields that a resumed run shares with its checkpoint
# Keys of the configuration that decide which samples a step has. `state.json` does not hold them: a resume compares
# its own with those of the checkpoint's mvptr.yaml.
SAMPLE_ORDER = ("run.seed", "data.block_samples", "data.window_blocks")
BUCKET_ORDER = (  # where there are buckets: the caps of the lengths that buckets are drawn by
    "data.max_tokens", "data.max_text_slots", "data.max_tag_slots", "data.max_regions", "visual.grid_size",
)  # fmt: skip


@dataclass(frozen=True)
class SampleCounts:
    """How many samples a stage has read on all ranks, and how many of them were bad and were replaced."""

    read: int = 0
    bad: int = 0


@dataclass(frozen=True, kw_only=True)
class CheckpointState:
    """A stage of a run at one of its steps. Each field is a key of `state.json`, in this order.

    A field with a default may be absent from the checkpoints of earlier versions. The default is what held for them.
    """

    step: int
    num_ranks: int
    stage: str
    batch_size: int  # samples of a step, on all ranks together
    bucket_batches: int = 0  # data.bucket_batches
    zero_stage: int = 2
    precision: str | None = None  # bf16, fp16 or float32; None where it was not recorded, and then is not compared
    data: str | dict[str, str]  # fingerprint of the shards; of a mixture, one for each source in their order
    trained_parts: list[str]  # of the model
    learning_rate_factors: dict[str, float] = field(default_factory=dict)  # by part; those that are not 1
    optimizer: str = "adamw"  # optim.name
    parameter_order: str | None = None  # in ZeRO's flat buffers (optim/optimizer.py); None: the model's own order
    accumulation_steps: int = 1
    samples_seen: int = 0
    skipped_steps: int = 0  # of all steps, those that left the weights as they were
    samples: SampleCounts = SampleCounts()
    wandb_id: str | None = None  # of the run on wandb
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that wrote the checkpoint

    @classmethod
    def from_json(cls, content: Any) -> CheckpointState:
        """Reads the content of a `state.json`; keys of other versions are left out.

        Raises:
            ValueError: it is no JSON object of these keys, or lacks some that every version writes.
        """
        try:
            given = {f.name: content[f.name] for f in dataclasses.fields(cls) if f.name in content}
            if "samples" in given:
                given["samples"] = SampleCounts(**given["samples"])
            return cls(**given)
        except TypeError as error:
            raise ValueError(str(error)) from error

    def to_json(self) -> dict[str, Any]:
        """Returns the content of `state.json`."""
        return dataclasses.asdict(self)

    @property
    def batch_split(self) -> BatchSplit:
        """How the samples of a step were divided."""
        return BatchSplit(self.batch_size, self.num_ranks, self.accumulation_steps)

    def has_data_of(self, current: CheckpointState) -> bool:
        """Returns whether both runs read the same samples. Of a mixture, the order of its sources counts too."""
        return self.data == current.data and list(self.data) == list(current.data)


def read_state(checkpoint: Path) -> CheckpointState:
    """Returns the state of a checkpoint.

    Raises:
        CheckpointError: it is not the state of a checkpoint.
        OSError: it cannot be read.
    """
    path = checkpoint / STATE
    try:
        return CheckpointState.from_json(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise CheckpointError(f"{path} is not the state of a checkpoint: {error}") from error
