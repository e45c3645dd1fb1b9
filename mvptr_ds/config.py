"""The configuration: every key with its type or choices, its default and, below it, its meaning.

    dataclass defaults < `--config FILE.yaml` < `section.key=value`

Every object of the package receives its own section (a small dataclass below), never the whole tree. Nothing changes a
section: `dataclasses.replace` makes another one. A value is read and checked by its annotation (config_reading.py).
`python tools/dev/config_reference.py` makes docs/configuration.md of this file and of config_data.py.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from mvptr_ds.config_data import DataConfig, VisualConfig
from mvptr_ds.config_reading import (
    Above0,
    Below1,
    Count,
    NotNegative,
    Overlay,
    PathText,
    Positive,
    Range,
    Share,
    conclude,
    find_config,
    layers_of,
    out_of_range,
)
from mvptr_ds.config_stages import (
    FinetuningConfig,
    MaskingConfig,
    PretrainingConfig,
    ReferringConfig,
    StageConfig,
    VqaConfig,
    WeightsConfig,
)
from mvptr_ds.user_io.yaml_nodes import dump_yaml

Scope = Literal["local", "global"]  # where negatives come from


@dataclass(frozen=True)
class RunConfig:
    """Where a run writes, what it trains, and what it starts from."""

    dir: PathText = "runs/demo"
    """Folder for everything that the run writes."""
    stages: list[str] = field(default_factory=lambda: ["1", "2"])
    """Stages to train, one after the other: a list of 1, 2, joint, retrieval, vqa, entailment and referring."""
    seed: Annotated[int, Range(0, 2**53)] = 0
    """Seed of the fresh weights, the order of samples, the masks and the negatives."""
    init_from: PathText | None = "auto"
    """Weights that the first stage starts from, and each task that follows no stage of this run: a run folder or a
    model folder. null: fresh weights. auto: a finished stage in run.dir, if any is needed. That is stage 1 for stage 2,
    and stage 2 or else joint for a task."""
    init_from_bert: PathText | None = None
    """Fresh weights start from this BERT of 12 or 6 layers: a folder or a hub name."""


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of the model, and how it is computed."""

    hidden_size: Positive = 768
    """Numbers of a state."""
    num_attention_heads: Positive = 12
    """Attention heads of each layer; they must divide hidden_size."""
    intermediate_size: Positive = 3072
    """Hidden numbers of each feed-forward block."""
    num_text_layers: Positive = 6
    """Layers of the text encoder."""
    num_visual_layers: Positive = 6
    """Layers of the visual encoder."""
    num_cross_layers: Positive = 6
    """Layers of the cross encoder."""
    max_positions: Positive = 512
    """Position embeddings: the limit of data.max_text_slots and data.max_tag_slots."""
    dropout: Below1 = 0.1
    """Dropout probability of states."""
    attention_dropout: Below1 = 0.1
    """Dropout probability of attention weights."""
    initializer_range: NotNegative = 0.02
    """Standard deviation of fresh weights; about 0.55 / sqrt(hidden_size) is right."""
    tie_word_heads: bool = True
    """The heads for words and tags score against the word embeddings."""
    execution: Literal["packed", "padded"] = "packed"
    """packed: the encoders skip padding. padded: they compute and mask it, with the same result."""
    compile: Literal["off", "encoders"] = "off"
    """encoders: torch.compile makes one graph of each encoder's layers. It takes packed rows."""
    region_norm: bool = False
    """A LayerNorm behind the projection of regions, as published models that were fine-tuned for retrieval have."""
    activation_checkpointing: bool = False
    """Computes a layer's activations again in the backward pass, which saves memory and costs time."""


@dataclass(frozen=True)
class VscConfig:
    """VSC: the contrast of whole captions and images."""

    initial_temperature: Above0 = 0.07
    """Temperature of the softmax at the start; it is learnt."""
    max_scale: Above0 = 100.0
    """Upper limit of the learnt scale, which is 1 / temperature."""
    scope: Scope = "global"
    """Negatives come from the micro-batches of all ranks (global) or of the own rank (local)."""


@dataclass(frozen=True)
class WpgConfig:
    """WPG: the grounding of a caption's phrases in the image's regions."""

    states: Literal["uni", "cross", "auto"] = "auto"
    """States to compare: of the text and visual encoders (uni) or of the cross encoder (cross, published). auto: cross
    in joint, uni in stage 2."""
    negatives: Literal["hardest", "sampled", "random", "auto"] = "auto"
    """The other image: the most similar one, one drawn by similarity, or any. auto: random in joint (published),
    sampled in stage 2."""
    scope: Scope = "global"
    """Ranks that the other image may come from, as for task.vsc.scope."""
    top_k: Positive = 3
    """A phrase's score is drawn from the similarities of its top_k best regions."""
    margin: NotNegative = 0.2
    """Cosine similarity by which the own image must score better than the other one."""


@dataclass(frozen=True)
class ItmConfig:
    """ITM: whether a caption and an image match."""

    negatives: Literal["hardest", "sampled", "random", "schedule", "auto"] = "auto"
    """The mismatched partner, chosen as for task.wpg.negatives. schedule: first random, then hardest. auto: hardest in
    joint, schedule in stage 2, sampled in retrieval."""
    random_until: Share = 0.6
    """schedule: the fraction of the stage's steps with random negatives."""
    scope: Scope = "global"
    """Ranks that the mismatched partner may come from, as for task.vsc.scope."""


@dataclass(frozen=True)
class TaskConfig:
    """How the objectives that compare samples choose and score them."""

    vsc: VscConfig = field(default_factory=VscConfig)
    wpg: WpgConfig = field(default_factory=WpgConfig)
    itm: ItmConfig = field(default_factory=ItmConfig)
    scores_mib: Above0 = 16.0
    """MiB of float32 similarities that a rank holds at a time; it computes more of them in chunks."""


@dataclass(frozen=True)
class OptimConfig:
    """The optimiser."""

    name: Literal["adamw", "lamb"] = "adamw"
    """AdamW, or LAMB for very large batches, which takes another learning rate (docs/performance.md)."""
    beta1: Below1 = 0.9
    """Decay rate of the mean of gradients."""
    beta2: Below1 = 0.999
    """Decay rate of the mean of squared gradients."""
    eps: Above0 = 1e-8
    """Added to the root of the mean of squared gradients."""
    weight_decay: NotNegative = 0.01
    """Decoupled weight decay; biases, norms and the scale of VSC have none."""
    clip_norm: NotNegative = 10.0
    """Largest norm of the gradient; a longer one is scaled down."""


@dataclass(frozen=True)
class TrainConfig:
    """The training loop: batch, checkpoints, log, limits."""

    batch_size: Positive = 1024
    """Samples of one optimiser step, over all ranks. A micro-batch has batch_size / (ranks x accumulation_steps)."""
    round_batch_size: bool = False
    """Rounds batch_size to a number that the ranks can share, instead of an error."""
    accumulation_steps: Positive = 1
    """Micro-batches of one optimiser step. Negatives come from one micro-batch: more steps leave fewer of them."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest good checkpoint in run.dir. never: start again and set the old checkpoints aside."""
    log_every_steps: Positive = 10
    """Steps between two lines of the log."""
    report_to: list[Literal["wandb", "tensorboard"]] = field(default_factory=list)
    """Trackers that show reports, scores and pictures, besides metrics.jsonl: a list of wandb and tensorboard."""
    checkpoint_every_steps: Count = 1_000
    """Steps between two checkpoints. 0: only at the end of a stage."""
    keep_checkpoints: Positive = 2
    """Newest checkpoints to keep, beside the best one of a task."""
    keep_every_steps: Count = 0
    """Also keeps the checkpoints of steps that are multiples of this number. 0: none."""
    max_skipped_in_row: Positive = 20
    """The run ends with an error after this many steps in a row without a finite gradient."""
    hang_timeout_s: NotNegative = 1800.0
    """Seconds without a step after which the run writes its stacks and ends. 0: no limit."""
    start_timeout_s: NotNegative = 1800.0
    """Seconds for all ranks to start, and then for the first step of a stage. 0: no limit."""
    preflight: bool = True
    """Looks for what would go wrong later, before the first step."""
    preflight_only: bool = False
    """Ends after preflight, with exit code 0, or 2 if there is an error."""
    evaluate_every_steps: Count = 0
    """Steps between two evaluations on data.held_out; another one follows the last step of a stage. 0: none."""
    profile_steps: list[Count] = field(default_factory=list)
    """Steps [first, stop) that torch's profiler traces into STAGE/profile/, one file a rank. []: none."""


@dataclass(frozen=True)
class WandbConfig:
    """Weights & Biases."""

    mode: Literal["online", "offline", "disabled"] | None = None
    """online: log to the service. offline: write files for `wandb sync`. Both log even if train.report_to does not name
    wandb. disabled: nothing, even if it does. null: online if it does, else nothing."""
    project: str = "mvptr_ds"
    """Project of the service."""
    name: str | None = None
    """Name of the run. null: the names of the run folder and the stage."""


@dataclass(frozen=True)
class EvalConfig:
    """Evaluation, by eval.py or at intervals."""

    batch_size: Positive = 64
    """Samples that are encoded together."""
    rerank_top_k: Positive = 32
    """Best candidates of each query that the cross encoder ranks again."""
    fold_images: Count = 0
    """Retrieval is also scored on parts of the split of so many images, whose mean is reported: 1000 is COCO's 1k
    protocol. 0: not."""
    controls: list[Literal["texts", "permuted_pictures", "without_tags", "tags_alone"]] = field(
        default_factory=lambda: ["texts", "permuted_pictures", "without_tags", "tags_alone"]
    )
    """What a task's report compares its score with. texts: guesses from the training texts. permuted_pictures: the
    model, shown other pictures. without_tags: the model without tags. tags_alone: the model with nothing but tags."""
    withhold_tags: bool = False
    """Everything is evaluated without object tags, as for pictures that no detector will see."""
    num_pictures: Count = 12
    """Held-out images to draw in pictures.png, or in answers.png."""


@dataclass(frozen=True)
class Config:
    """The whole tree; a value is named by its path in it, such as train.batch_size."""

    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    visual: VisualConfig = field(default_factory=VisualConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    stage1: PretrainingConfig = field(
        default_factory=lambda: PretrainingConfig(
            weights=WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mcr_phrases=1.0, mlm=1.0),
            masking=MaskingConfig(tag_prob=0.5),
        )
    )
    stage2: PretrainingConfig = field(
        default_factory=lambda: PretrainingConfig(
            weights=WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mlm=1.0, vsc=1.0, wpg=1.0, wpg_cross=1.0, itm=1.0)
        )
    )
    joint: PretrainingConfig = field(
        default_factory=lambda: PretrainingConfig(
            weights=WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0)
        )
    )
    retrieval: FinetuningConfig = field(
        default_factory=lambda: FinetuningConfig(learning_rate_factors={})  # both of its heads are pre-trained
    )
    vqa: VqaConfig = field(default_factory=VqaConfig)
    entailment: FinetuningConfig = field(default_factory=FinetuningConfig)
    referring: ReferringConfig = field(default_factory=ReferringConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def stage(self, name: str) -> StageConfig:
        """Returns the section of one stage, such as `stage1`, `stage2` or `joint`."""
        if name not in STAGES:
            raise ValueError(f"stage {name!r} is unknown; choose from {', '.join(STAGES)}")
        return typing.cast(StageConfig, getattr(self, name))

    def pretraining(self, name: str) -> PretrainingConfig | None:
        """Returns the section of one stage as that of a stage of pre-training; None where it is another task's."""
        section = self.stage(name)
        return section if isinstance(section, PretrainingConfig) else None

    def finetuning(self, name: str) -> FinetuningConfig | None:
        """Returns the section of one stage as that of a downstream task; None where it is a stage of pre-training."""
        section = self.stage(name)
        return section if isinstance(section, FinetuningConfig) else None

    @property
    def stage_names(self) -> list[str]:
        """`run.stages` as section names, checked."""
        names = [name if name in STAGES else f"stage{name}" for name in self.run.stages]
        if not names or any(name not in STAGES for name in names):
            known = ", ".join(name.removeprefix("stage") for name in STAGES)
            raise ValueError(f"run.stages is {self.run.stages}; it lists some of {known}")
        return names


# every section that is a `StageConfig` is a stage, whose task stands in mvptr_ds/tasks/
STAGES = tuple(name for name, section in vars(Config()).items() if isinstance(section, StageConfig))


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Defaults < the YAML file < the overrides `section.key=value`.

    A file may say `extends: OTHER` and then only what differs. OTHER counts from the file, then from the working
    folder, then from the packaged configs (`base` is configs/base.yaml), as the last two do for `path`.

    Raises:
        ValueError: all unknown keys and unknown choices (the nearest ones are named), other values that do not fit
            their annotation, and numbers out of range.
    """
    overlay = Overlay(Config())
    for layer in [] if path is None else layers_of(find_config(path)):
        overlay.add(layer)
    return _overridden(overlay, overrides)


def override_config(config: Config, overrides: typing.Sequence[str]) -> Config:
    """Returns `config` with `section.key=value` of each override. Raises ValueError as `load_config` does."""
    return _overridden(Overlay(config), overrides)


def _overridden(overlay: Overlay, overrides: typing.Sequence[str]) -> Config:
    for override in overrides:
        overlay.add_argument(override)
    conclude([*overlay.problems, *out_of_range(overlay.tree)])
    return typing.cast(Config, overlay.tree)


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved tree as YAML that `load_config` reads back to an equal tree."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_yaml(dataclasses.asdict(config)), encoding="utf-8")
