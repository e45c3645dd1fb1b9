"""The configuration tree: dataclass defaults < `--config FILE.yaml` < `section.key=value`.

Every object of the package receives its own section (a small dataclass below), never the whole tree.
An unknown key is an error that names the nearest one; values are coerced by their annotation, because
PyYAML reads `1e-4` as a string.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

STAGES = ("stage1", "stage2", "joint")
CONFIGS_DIR = Path(__file__).resolve().parent / "configs"


@dataclass
class RunConfig:
    dir: str = "runs/demo"  # everything a run writes goes below this folder
    stages: list[str] = field(default_factory=lambda: ["1", "2"])  # of 1, 2, joint; run one after the other
    seed: int = 0
    # what the first stage starts from: a run folder or an exported model folder; null: fresh weights; auto: fresh ones
    # for stage 1, and for stage 2 those that the finished stage 1 left in `dir`
    init_from: str | None = "auto"
    init_from_bert: str | None = None  # folder or hub name of a 12- or 6-layer BertModel for a fresh start


@dataclass
class SourceConfig:
    shards: str = ""  # folder of this source
    weight: float | None = None  # its part of the samples is weight / sum of the weights; null: number of samples
    sidecars: list[str] = field(default_factory=list)


@dataclass
class DataConfig:
    train: str | None = "runs/demo/shards/train"  # folder with manifest.json (made on first use when there is none)
    held_out: str | None = "runs/demo/shards/held_out"
    sidecars: list[str] = field(default_factory=list)  # folders of regions, features or phrases, joined by key
    sources: dict[str, SourceConfig] = field(default_factory=dict)  # a mixture by name, in place of `train`
    mixture_block_samples: int = 0  # in so many samples each source has its exact share; 0: train.batch_size, or more
    held_out_sidecars: list[str] | None = None  # of `held_out`; null: `sidecars`
    missing_partners: str = "drop"  # a record that a sidecar lacks: drop | keep (it is used as it is)
    allow_mixed_extractors: bool = False  # regions or features of several extractors in one folder
    word_vocab: str | None = None  # WordPiece vocab.txt; null: bert-base-uncased's, shipped in the package
    phrase_vocab: str | None = "runs/demo/shards/phrase_vocab.json"
    demo_source: str | None = None  # shapes | stamps: build these demo shards when `train` is missing
    demo_train_scenes: int = 6000
    demo_held_out_scenes: int = 500
    bucket_batches: int = 0  # pool that batches of like lengths come from; 1: dealt to equal ranks; 0: off
    num_workers: int = 1  # loader processes a rank; 0 reads in the training process
    prefetch_batches: int = 4  # a worker
    block_samples: int = 64  # neighbours read together
    window_blocks: int = 256  # blocks whose samples are shuffled together
    max_tokens: int = 33  # wordpieces of a caption
    max_text_slots: int = 40  # [CLS] tokens phrases [SEP]
    max_tag_slots: int = 20  # [CLS] tags [SEP]
    max_regions: int = 50
    tag_drop_prob: float = 0.0  # one tag is left out
    tag_wrong_prob: float = 0.0  # one tag is replaced by a random other one
    tag_withhold_prob: float = 0.0  # all tags of the sample are left out
    max_bad_fraction: float = 0.01  # of the samples read; above it the run ends with one error
    # shards behind a URL (docs/loading.md)
    read_ahead_mib: int = 256  # what a loader process may hold of what it is about to need
    read_retries: int = 3  # of a request that failed or stalled; then the sample is replaced and counted
    read_timeout_s: float = 20.0  # of one request, 8 MiB at most
    cache_dir: str | None = None  # where their indices are kept; null: ~/.cache/mvptr_ds


@dataclass
class VisualConfig:
    source: str = "features"  # features: KEY.npy | image: RoIAlign on the backbone's map
    feature_dim: int = 2048  # of KEY.npy; with `image` it follows from the backbone
    image_size: int = 224  # pixels; the image is resized to this square
    grid_size: int = 4  # an image without boxes gets grid_size**2 regions
    roi_bins: int = 1  # RoIAlign's bins a side, concatenated
    backbone: str | None = None  # hub name or folder of any transformers AutoBackbone
    backbone_config: dict[str, Any] | None = None  # or {"model_type": ..., ...}: from scratch
    freeze_backbone: bool = False


@dataclass
class ModelConfig:
    hidden_size: int = 768
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    num_text_layers: int = 6
    num_visual_layers: int = 6
    num_cross_layers: int = 6
    max_positions: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.1
    initializer_range: float = 0.02  # standard deviation of fresh weights; about 0.55 / sqrt(hidden_size)
    tie_word_heads: bool = True
    execution: str = "packed"  # encoders on the valid positions alone | padded: the same states, for comparison
    compile: bool = False  # torch.compile of the encoder layers
    activation_checkpointing: bool = False  # a layer's activations are computed again in the backward pass


@dataclass
class VscConfig:
    initial_temperature: float = 0.07
    max_scale: float = 100.0  # cap of exp(logit_scale), kept after each step
    scope: str = "global"  # negatives come from all ranks' micro-batches (global) or the rank's own (local)


@dataclass
class WpgConfig:
    states: str = "auto"  # uni | cross | auto: cross (published) in joint, uni in stage 2
    negatives: str = "auto"  # hardest | sampled | random | auto: random (published) in joint, sampled in stage 2
    scope: str = "global"  # of the other image, as for vsc
    top_k: int = 3  # one of the k highest region similarities is drawn
    margin: float = 0.2  # of cosine similarities


@dataclass
class ItmConfig:
    negatives: str = "auto"  # hardest | sampled | random | schedule | auto: hardest in joint, schedule in stage 2
    random_until: float = 0.6  # schedule: random negatives for this share of the steps, then hardest
    scope: str = "global"  # of the mismatched pairs, as for vsc


@dataclass
class TaskConfig:
    vsc: VscConfig = field(default_factory=VscConfig)
    wpg: WpgConfig = field(default_factory=WpgConfig)
    itm: ItmConfig = field(default_factory=ItmConfig)
    scores_mib: float = 16.0  # of a rank's similarities at a time; the rows of a larger global batch go in chunks


@dataclass
class WeightsConfig:
    mcr_tags: float = 0.0
    mcr_regions: float = 0.0
    mcr_phrases: float = 0.0
    mlm: float = 0.0
    vsc: float = 0.0
    wpg: float = 0.0
    wpg_cross: float = 0.0  # grounding by the cross encoder, against ITM's mismatched pairs
    itm: float = 0.0


@dataclass
class MaskingConfig:
    word_prob: float = 0.15
    phrase_prob: float = 0.15
    tag_prob: float = 0.15


@dataclass
class StageConfig:
    max_steps: int = 100_000
    learning_rate: float = 5e-5
    warmup_steps: int = 1_000
    weights: WeightsConfig = field(default_factory=WeightsConfig)
    masking: MaskingConfig = field(default_factory=MaskingConfig)


@dataclass
class OptimConfig:
    name: str = "adamw"  # adamw | lamb, which takes another learning rate (docs/performance.md)
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 0.01  # none on biases, norms and logit_scale
    clip_norm: float = 10.0


@dataclass
class TrainConfig:
    batch_size: int = 1024  # samples of one optimiser step, over all ranks
    round_batch_size: bool = False  # to what the ranks can share, instead of an error; the demo runs on any number
    # the micro-batch of a rank follows: batch_size / (ranks x accumulation_steps); negatives are those of one
    # micro-batch over all ranks, so that more accumulation steps leave fewer of them
    accumulation_steps: int = 1
    resume: str = "auto"  # auto: go on from the newest good checkpoint of run.dir | never
    log_every_steps: int = 10
    checkpoint_every_steps: int = 1_000
    keep_checkpoints: int = 2  # the newest
    keep_every_steps: int = 0  # and those at multiples of it, for good; 0: none
    max_skipped_in_row: int = 20  # steps with a non-finite gradient before the run gives up
    hang_timeout_s: float = 1800.0  # without a step for so long: stacks are written and the run ends; 0: no limit
    start_timeout_s: float = 1800.0  # for all ranks to start; then until a stage's first step; 0: no limit
    preflight: bool = True  # look for what would go wrong later, before the first step
    preflight_only: bool = False  # and end there, with 0, or 2 where something would
    evaluate_every_steps: int = 0  # on data.held_out, by rank 0; 0: never
    profile_steps: list[int] = field(default_factory=list)  # [first, stop]: traced into STAGE/profile/, one file a rank


@dataclass
class WandbConfig:
    mode: str = "disabled"  # online | offline | disabled
    project: str = "mvptr_ds"
    name: str | None = None  # default: the run folder and the stage


@dataclass
class EvalConfig:
    batch_size: int = 64
    rerank_top_k: int = 32
    num_pictures: int = 12


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


def load_config(path: str | Path | None = None, overrides: typing.Sequence[str] = ()) -> Config:
    """Defaults < the YAML file < the overrides `section.key=value` (values are YAML).

    A file may begin with `extends: OTHER` and then says only what differs. A path that does not exist is also looked
    for among the packaged configs (`base` is configs/base.yaml).

    Raises:
        ValueError: unknown keys (the nearest ones are named) and values that do not fit their annotation.
    """
    return override_config(Config() if path is None else _load_file(path), overrides)


def _load_file(path: str | Path, inner: tuple[Path, ...] = ()) -> Config:
    found = _find_config(path)
    if found in inner:
        raise ValueError(f"{found} extends itself, through {', '.join(map(str, inner))}")
    tree = _parse_yaml(found.read_text(encoding="utf-8"), str(found)) or {}
    base = tree.pop("extends", None) if isinstance(tree, dict) else None
    start = None if base is None else _load_file(base, (*inner, found))
    return typing.cast(Config, _build(Config, tree, "", start))


def override_config(config: Config, overrides: typing.Sequence[str]) -> Config:
    """`config` itself, after `section.key=value` of each override. Raises ValueError as `load_config` does."""
    for override in overrides:
        key, equals, value = override.partition("=")
        if not equals or not key:
            raise ValueError(f"cannot read the argument {override!r}; overrides look like train.batch_size=64")
        tree: Any = _parse_yaml(value, override)
        for name in reversed(key.split(".")):
            tree = {name: tree}
        _build(Config, tree, "", config)
    return config


def save_config(config: Config, path: Path) -> None:
    """Writes the resolved tree as YAML that `load_config` reads back to an equal tree."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(dataclasses.asdict(config), sort_keys=False), encoding="utf-8")


def _parse_yaml(text: str, origin: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"{origin} is not YAML: {' '.join(str(error).split())}") from error


def _find_config(path: str | Path) -> Path:
    for candidate in (Path(path), CONFIGS_DIR / Path(path), CONFIGS_DIR / f"{path}.yaml"):
        if candidate.is_file():
            return candidate
    packaged = ", ".join(sorted(p.stem for p in CONFIGS_DIR.glob("*.yaml")))
    raise ValueError(f"there is no config {str(path)!r}; give a YAML file or one of the packaged ones: {packaged}")


def _build(cls: type, tree: Any, prefix: str, base: Any = None) -> Any:
    """An instance of the dataclass from a (partial) mapping laid over `base` (default: the class's defaults)."""
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.') or 'the configuration'} is {tree!r}, expected a section with keys")
    hints = typing.get_type_hints(cls)
    out = base if base is not None else cls()
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if key not in hints:
            near = difflib.get_close_matches(str(key), hints, n=3, cutoff=0.5) or sorted(hints)
            raise ValueError(f"unknown configuration key {name!r}; did you mean {', '.join(prefix + n for n in near)}?")
        hint = hints[key]
        sections = _sections_of(hint)
        if sections is not None:
            setattr(out, key, _build_sections(sections, value, f"{name}.", getattr(out, key)))
        elif dataclasses.is_dataclass(hint):
            setattr(out, key, _build(typing.cast(type, hint), value, f"{name}.", getattr(out, key)))
        else:
            setattr(out, key, _coerce(value, hint, name))
    return out


def _sections_of(hint: Any) -> type | None:
    """The dataclass of a section that the user names, where the annotation is dict[str, dataclass]."""
    args = typing.get_args(hint)
    is_named = typing.get_origin(hint) is dict and dataclasses.is_dataclass(args[1])
    return typing.cast(type, args[1]) if is_named else None


def _build_sections(cls: type, tree: Any, prefix: str, base: dict[str, Any]) -> dict[str, Any]:
    """The sections of `base` with those of the tree laid over them; null takes one away, and in place of all, all."""
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ValueError(f"{prefix.rstrip('.')} is {tree!r}, expected sections by name")
    out = {name: section for name, section in base.items() if tree.get(name, section) is not None}
    named = {str(name): section for name, section in tree.items() if section is not None}
    return out | {name: _build(cls, part, f"{prefix}{name}.", out.get(name)) for name, part in named.items()}


def _coerce(value: Any, hint: Any, name: str) -> Any:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in args:
            return None
        return _coerce(value, next(a for a in args if a is not type(None)), name)
    if origin is list:
        items = value if isinstance(value, list) else [value]
        return [_coerce(item, args[0], name) for item in items]
    if origin is dict:
        if isinstance(value, dict):
            return value
    elif hint is bool:
        if isinstance(value, bool):
            return value
    elif hint is str:
        if isinstance(value, (str, int, float)) and not isinstance(value, bool):
            return str(value)
    elif hint in (int, float) and not isinstance(value, bool):
        number = _number(value)
        if number is not None and (hint is float or number == int(number)):
            return hint(number)
    wanted = hint.__name__ if isinstance(hint, type) else str(hint)
    raise ValueError(f"{name} is {value!r}, expected {wanted}")


def _number(value: Any) -> float | None:
    try:
        number = float(value)
    except (TypeError, ValueError):
        return None
    return number if math.isfinite(number) else None
