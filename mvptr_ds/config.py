"""The configuration tree: dataclass defaults < `--config FILE.yaml` < `section.key=value`.

Every object of the package receives its own section (a small dataclass below), never the whole tree.
A value is read by its annotation, which also holds the range of every number: text stays as it is written, and
unknown keys, values of another kind and numbers out of range are all told at once.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from mvptr_ds.config_reading import PATH, Overlay, Range, conclude, out_of_range
from mvptr_ds.user_io.user_files import expanded, read_text
from mvptr_ds.user_io.yaml_nodes import Node, dump_yaml, parse_yaml, plain

CONFIGS_DIR = Path(__file__).resolve().parent / "configs"

PathText = Annotated[str, PATH]  # of a file, a folder, a URL or a hub's name
Count = Annotated[int, Range(0)]
Positive = Annotated[int, Range(1)]
NotNegative = Annotated[float, Range(0)]
Above0 = Annotated[float, Range(0, least_is_open=True)]
Share = Annotated[float, Range(0, 1)]  # also a probability
Below1 = Annotated[float, Range(0, 1, most_is_open=True)]


@dataclass
class RunConfig:
    dir: PathText = "runs/demo"  # everything a run writes goes below this folder
    stages: list[str] = field(default_factory=lambda: ["1", "2"])  # of 1, 2, joint; run one after the other
    seed: Annotated[int, Range(0, 2**53)] = 0
    # what the first stage starts from: a run folder or an exported model folder; null: fresh weights; auto: fresh ones
    # for stage 1, and for stage 2 those that the finished stage 1 left in `dir`
    init_from: PathText | None = "auto"
    init_from_bert: PathText | None = None  # folder or hub name of a 12- or 6-layer BertModel for a fresh start


@dataclass
class SourceConfig:
    shards: PathText = ""  # folder of this source
    weight: Above0 | None = None  # its part of the samples is weight / sum of the weights; null: number of samples
    sidecars: list[PathText] = field(default_factory=list)


@dataclass
class DataConfig:
    train: PathText | None = (
        "runs/demo/shards/train"  # folder with manifest.json (made on first use when there is none)
    )
    held_out: PathText | None = "runs/demo/shards/held_out"
    sidecars: list[PathText] = field(default_factory=list)  # folders of regions, features or phrases, joined by key
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # a mixture by name, in place of `train`
    mixture_block_samples: Count = 0  # in so many samples each source has its exact share; 0: train.batch_size, or more
    held_out_sidecars: list[PathText] | None = None  # of `held_out`; null: `sidecars`
    missing_partners: str = "drop"  # a record that a sidecar lacks: drop | keep (it is used as it is)
    allow_mixed_extractors: bool = False  # regions or features of several extractors in one folder
    word_vocab: PathText | None = None  # WordPiece vocab.txt; null: bert-base-uncased's, shipped in the package
    phrase_vocab: PathText | None = "runs/demo/shards/phrase_vocab.json"
    demo_source: str | None = None  # shapes | stamps: build these demo shards when `train` is missing
    demo_train_scenes: Positive = 6000
    demo_held_out_scenes: Positive = 500
    bucket_batches: Count = 0  # pool that batches of like lengths come from; 1: dealt to equal ranks; 0: off
    num_workers: Count = 1  # loader processes a rank; 0 reads in the training process
    prefetch_batches: Positive = 4  # a worker
    block_samples: Positive = 64  # neighbours read together
    window_blocks: Positive = 256  # blocks whose samples are shuffled together
    max_tokens: Positive = 33  # wordpieces of a caption
    max_text_slots: Annotated[int, Range(3)] = 40  # [CLS] tokens phrases [SEP]
    max_tag_slots: Annotated[int, Range(2)] = 20  # [CLS] tags [SEP]
    max_regions: Positive = 50
    tag_drop_prob: Share = 0.0  # one tag is left out
    tag_wrong_prob: Share = 0.0  # one tag is replaced by a random other one
    tag_withhold_prob: Share = 0.0  # all tags of the sample are left out
    max_bad_fraction: Share = 0.01  # of the samples read; above it the run ends with one error
    # shards behind a URL (docs/loading.md)
    read_ahead_mib: Positive = 256  # what a loader process may hold of what it is about to need
    read_retries: Count = 3  # of a request that failed or stalled; then the sample is replaced and counted
    read_timeout_s: Above0 = 20.0  # of one request, 8 MiB at most
    cache_dir: PathText | None = None  # where their indices are kept; null: ~/.cache/mvptr_ds


@dataclass
class VisualConfig:
    source: str = "features"  # features: KEY.npy | image: RoIAlign on the backbone's map
    feature_dim: Positive = 2048  # of KEY.npy; with `image` it follows from the backbone
    image_size: Positive = 224  # pixels; the image is resized to this square
    grid_size: Positive = 4  # an image without boxes gets grid_size**2 regions
    roi_bins: Positive = 1  # RoIAlign's bins a side, concatenated
    backbone: PathText | None = None  # hub name or folder of any transformers AutoBackbone
    backbone_config: dict[str, Any] | None = None  # or {"model_type": ..., ...}: from scratch
    freeze_backbone: bool = False


@dataclass
class ModelConfig:
    hidden_size: Positive = 768
    num_attention_heads: Positive = 12
    intermediate_size: Positive = 3072
    num_text_layers: Positive = 6
    num_visual_layers: Positive = 6
    num_cross_layers: Positive = 6
    max_positions: Positive = 512
    dropout: Below1 = 0.1
    attention_dropout: Below1 = 0.1
    initializer_range: NotNegative = 0.02  # standard deviation of fresh weights; about 0.55 / sqrt(hidden_size)
    tie_word_heads: bool = True
    execution: str = "packed"  # encoders on the valid positions alone | padded: the same states, for comparison
    compile: bool = False  # torch.compile of the encoder layers
    activation_checkpointing: bool = False  # a layer's activations are computed again in the backward pass


@dataclass
class VscConfig:
    initial_temperature: Above0 = 0.07
    max_scale: Above0 = 100.0  # cap of exp(logit_scale), kept after each step
    scope: str = "global"  # negatives come from all ranks' micro-batches (global) or the rank's own (local)


@dataclass
class WpgConfig:
    states: str = "auto"  # uni | cross | auto: cross (published) in joint, uni in stage 2
    negatives: str = "auto"  # hardest | sampled | random | auto: random (published) in joint, sampled in stage 2
    scope: str = "global"  # of the other image, as for vsc
    top_k: Positive = 3  # one of the k highest region similarities is drawn
    margin: NotNegative = 0.2  # of cosine similarities


@dataclass
class ItmConfig:
    negatives: str = "auto"  # hardest | sampled | random | schedule | auto: hardest in joint, schedule in stage 2
    random_until: Share = 0.6  # schedule: random negatives for this share of the steps, then hardest
    scope: str = "global"  # of the mismatched pairs, as for vsc


@dataclass
class TaskConfig:
    vsc: VscConfig = field(default_factory=VscConfig)
    wpg: WpgConfig = field(default_factory=WpgConfig)
    itm: ItmConfig = field(default_factory=ItmConfig)
    scores_mib: Above0 = 16.0  # of a rank's similarities at a time; the rows of a larger global batch go in chunks


@dataclass
class WeightsConfig:
    mcr_tags: NotNegative = 0.0
    mcr_regions: NotNegative = 0.0
    mcr_phrases: NotNegative = 0.0
    mlm: NotNegative = 0.0
    vsc: NotNegative = 0.0
    wpg: NotNegative = 0.0
    wpg_cross: NotNegative = 0.0  # grounding by the cross encoder, against ITM's mismatched pairs
    itm: NotNegative = 0.0


@dataclass
class MaskingConfig:
    word_prob: Share = 0.15
    phrase_prob: Share = 0.15
    tag_prob: Share = 0.15


@dataclass
class StageConfig:
    max_steps: Positive = 100_000
    learning_rate: NotNegative = 5e-5
    warmup_steps: Count = 1_000
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | lamb, which takes another learning rate (docs/performance.md)
    beta1: Below1 = 0.9
    beta2: Below1 = 0.999
    eps: Above0 = 1e-8
    weight_decay: NotNegative = 0.01  # none on biases, norms and logit_scale
    clip_norm: NotNegative = 10.0


@dataclass
class TrainConfig:
    batch_size: Positive = 1024  # samples of one optimiser step, over all ranks
    round_batch_size: bool = False  # to what the ranks can share, instead of an error; the demo runs on any number
    # the micro-batch of a rank follows: batch_size / (ranks x accumulation_steps); negatives are those of one
    # micro-batch over all ranks, so that more accumulation steps leave fewer of them
    accumulation_steps: Positive = 1
    resume: str = "auto"  # auto: go on from the newest good checkpoint of run.dir | never: anew, keeping the old ones
    log_every_steps: Positive = 10
    checkpoint_every_steps: Count = 1_000
    keep_checkpoints: Positive = 2  # the newest
    keep_every_steps: Count = 0  # and those at multiples of it, for good; 0: none
    max_skipped_in_row: Positive = 20  # steps with a non-finite gradient before the run gives up
    hang_timeout_s: NotNegative = 1800.0  # without a step for so long: stacks are written and the run ends; 0: no limit
    start_timeout_s: NotNegative = 1800.0  # for all ranks to start; then until a stage's first step; 0: no limit
    preflight: bool = True  # look for what would go wrong later, before the first step
    preflight_only: bool = False  # and end there, with 0, or 2 where something would
    evaluate_every_steps: Count = 0  # on data.held_out, by rank 0; 0: never
    profile_steps: list[Count] = field(default_factory=list)  # [first, stop]: traced into STAGE/profile/, a file a rank


@dataclass
class WandbConfig:
    mode: str = "disabled"  # online | offline | disabled
    project: str = "mvptr_ds"
    name: str | None = None  # default: the run folder and the stage


@dataclass
class EvalConfig:
    batch_size: Positive = 64
    rerank_top_k: Positive = 32
    num_pictures: Count = 12


@dataclass
class Config:
    run: RunConfig = field(default_factory=RunConfig)
    data: DataConfig = field(default_factory=DataConfig)
    visual: VisualConfig = field(default_factory=VisualConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    task: TaskConfig = field(default_factory=TaskConfig)
    stage1: StageConfig = field(
        default_factory=lambda: StageConfig(
            weights=WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mcr_phrases=1.0, mlm=1.0),
            masking=MaskingConfig(tag_prob=0.5),
        )
    )
    stage2: StageConfig = field(
        default_factory=lambda: StageConfig(
            weights=WeightsConfig(mcr_tags=1.0, mcr_regions=1.0, mlm=1.0, vsc=1.0, wpg=1.0, wpg_cross=1.0, itm=1.0)
        )
    )
    joint: StageConfig = field(
        default_factory=lambda: StageConfig(weights=WeightsConfig(mcr_tags=1.0, mlm=1.0, vsc=1.0, wpg=1.0, itm=1.0))
    )
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def stage(self, name: str) -> StageConfig:
        """The section of one stage: `stage1`, `stage2` or `joint`."""
        if name not in STAGES:
            raise ValueError(f"stage {name!r} is unknown; choose from {', '.join(STAGES)}")
        return typing.cast(StageConfig, getattr(self, name))

    @property
    def stage_names(self) -> list[str]:
        """`run.stages` as section names, checked."""
        names = [s if s == "joint" or s.startswith("stage") else f"stage{s}" for s in self.run.stages]
        if not names or any(n not in STAGES for n in names):
            raise ValueError(f"run.stages is {self.run.stages}; it lists some of 1, 2, joint")
        return names


# every section that is a `StageConfig` is a stage, whose task stands in mvptr_ds/tasks/
STAGES = tuple(section.name for section in dataclasses.fields(Config) if section.type in ("StageConfig", StageConfig))


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Defaults < the YAML file < the overrides `section.key=value`.

    A file may say `extends: OTHER` and then only what differs. OTHER counts from the file, then from the working
    folder, then from the packaged configs (`base` is configs/base.yaml), as the last two do for `path`.

    Raises:
        ValueError: all unknown keys (the nearest ones are named), values that do not fit their annotation, and numbers
            out of range.
    """
    overlay = Overlay(Config())
    for layer in [] if path is None else _layers(_find_config(path)):
        overlay.add(layer)
    return _overridden(overlay, overrides)


def override_config(config: Config, overrides: typing.Sequence[str]) -> Config:
    """`config` itself, after `section.key=value` of each override. Raises ValueError as `load_config` does."""
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


def _layers(path: Path, inner: tuple[Path, ...] = ()) -> list[Node]:
    """The file, and before it what it extends."""
    if path.resolve() in [other.resolve() for other in inner]:
        raise ValueError(f"{path} extends itself, through {', '.join(map(str, inner))}")
    node = parse_yaml(read_text(path), str(path))
    if node.content is None:  # nothing is said
        return []
    if not isinstance(node.content, dict) or "extends" not in node.content:
        return [node]
    base = node.content["extends"].content
    if isinstance(base, (list, dict)):
        found = plain(node.content["extends"])
        raise ValueError(f"{path}: extends is {found!r}, expected one file or the name of a packaged configuration")
    own = dataclasses.replace(node, content={key: part for key, part in node.content.items() if key != "extends"})
    return [own] if base is None else [*_layers(_find_config(base, path), (*inner, path)), own]


def _find_config(path: str | Path, extended_by: Path | None = None) -> Path:
    path = Path(expanded(str(path)))
    candidates = [path, CONFIGS_DIR / path, CONFIGS_DIR / f"{path}.yaml"]
    if extended_by is not None and extended_by.parent == CONFIGS_DIR:  # packaged ones extend each other
        candidates = candidates[1:]
    elif extended_by is not None:
        candidates.insert(0, extended_by.parent / path)
    own = extended_by.resolve() if extended_by is not None else None
    for candidate in candidates:
        if candidate.is_file() and candidate.resolve() != own:  # mine/base.yaml may extend the packaged base.yaml
            return candidate
    said = f"{extended_by} extends {str(path)!r}, but there" if extended_by is not None else "there"
    if path.is_dir():
        raise ValueError(f"{path} is a folder, expected a YAML file")
    packaged = ", ".join(sorted(p.stem for p in CONFIGS_DIR.glob("*.yaml")))
    raise ValueError(f"{said} is no config {str(path)!r}; give a YAML file or one of the packaged ones: {packaged}")
