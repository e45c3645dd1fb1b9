"""The sections `data` and `visual` of the configuration: what is read, and what a sample is made of."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

from mvptr_ds.config_reading import Above0, Count, PathText, Positive, Range, Share


@dataclass(frozen=True)
class SourceConfig:
    """One source of a mixture."""

    shards: PathText = ""
    """Folder or URL of the source's shards."""
    weight: Above0 | None = None
    """The source's share of the samples is its weight / the sum of all weights. null in all sources: their numbers of
    samples are the weights."""
    sidecars: list[PathText] = field(default_factory=list)
    """Folders that join the source's records by key, as data.sidecars."""


@dataclass(frozen=True)
class DataConfig:
    """Shards, vocabularies, the loader, and the sizes and noise of a sample."""

    train: PathText | None = "runs/demo/shards/train"
    """Folder or URL of the shards to train on. Their index (manifest.json) is built when it is missing. null: the
    shards of data.sources."""
    held_out: PathText | None = "runs/demo/shards/held_out"
    """Folder or URL of the shards to evaluate on. null: none."""
    sidecars: list[PathText] = field(default_factory=list)
    """Folders that join the records by key: sidecars of regions, features or phrases, and shards whose pictures they
    share."""
    sources: dict[str, SourceConfig] = field(default_factory=dict)
    """Several sources by name, in place of data.train and data.sidecars."""
    mixture_block_samples: Count = 0
    """Within each block of this many samples, every source has its exact share. 0: train.batch_size, or more where a
    source needs it."""
    held_out_sidecars: list[PathText] | None = None
    """Sidecars of data.held_out. null: data.sidecars."""
    missing_partners: Literal["drop", "keep"] = "drop"
    """What happens to a record that a sidecar lacks. drop: it is left out. keep: it is used as it is."""
    allow_mixed_extractors: bool = False
    """Allows regions or features of several extractors in one run."""
    permute_pictures: Literal["picture", "contents"] | None = None
    """A control experiment: every text is shown the picture of another record. picture: with its boxes and tags.
    contents: the boxes stay, and the tags are left out. null: pictures stay with their texts."""
    word_vocab: PathText | None = None
    """WordPiece vocabulary (vocab.txt). null: that of bert-base-uncased, which the package contains."""
    phrase_vocab: PathText | None = "runs/demo/shards/phrase_vocab.json"
    """Phrase vocabulary. null: no phrase has a label or an embedding of its own."""
    demo_source: Literal["shapes", "stamps"] | None = None
    """Demo shards to build when data.train is missing. null: none."""
    demo_train_scenes: Positive = 6000
    """Training scenes of the demo shards."""
    demo_held_out_scenes: Positive = 500
    """Held-out scenes of the demo shards."""
    demo_task: Literal["retrieval", "vqa", "entailment", "referring"] | None = None
    """Task shards to build, with data.demo_source, when data.train is missing. The demo shards, whose pictures they
    share, are built in the folder of the first of data.sidecars. null: none."""
    demo_task_scenes: Positive = 1500
    """Training scenes of the demo shards that the task shards are about."""
    bucket_batches: Count = 0
    """Batches of samples of similar length are drawn from a pool of this many batches. 1: each batch is only divided
    evenly among the ranks. 0: off."""
    num_workers: Count = 1
    """Loader processes of each rank. 0: the training process itself reads."""
    prefetch_batches: Positive = 4
    """Batches that each loader process prepares in advance."""
    block_samples: Positive = 64
    """Samples that are neighbours in the shards and are read together."""
    window_blocks: Positive = 256
    """Blocks whose samples are shuffled together."""
    max_tokens: Positive = 33
    """Word pieces of a caption; the rest is cut off."""
    max_text_slots: Annotated[int, Range(3)] = 40
    """Slots of the text sequence: [CLS], word pieces, phrases, [SEP]."""
    max_tag_slots: Annotated[int, Range(2)] = 20
    """Slots of the tag sequence: [CLS], word pieces of tags, [SEP]."""
    max_regions: Positive = 50
    """Regions of an image; the rest is left out."""
    tag_drop_prob: Share = 0.0
    """Probability that one tag of a sample is left out."""
    tag_wrong_prob: Share = 0.0
    """Probability that one tag of a sample is replaced by a random other one."""
    tag_withhold_prob: Share = 0.0
    """Probability that all tags of a sample are left out."""
    max_bad_fraction: Share = 0.01
    """The run ends with an error when more than this fraction of the samples cannot be read."""
    read_ahead_mib: Positive = 256
    """MiB that each loader process may hold of shards behind a URL."""
    read_retries: Count = 3
    """Retries of a request that failed or stalled. After them the sample is replaced and counted as bad."""
    read_timeout_s: Above0 = 20.0
    """Seconds that one request may take; it reads at most 8 MiB."""
    cache_dir: PathText | None = None
    """Folder for the indices of shards behind a URL. null: ~/.cache/mvptr_ds."""


@dataclass(frozen=True)
class VisualConfig:
    """What an image gives the model: features of a detector, or pixels for a backbone."""

    source: Literal["features", "image"] = "features"
    """features: one vector a region from KEY.npy. image: RoIAlign on the backbone's feature map."""
    feature_dim: Positive = 2048
    """Numbers of each feature vector in KEY.npy; with source=image the backbone decides."""
    image_size: Positive = 224
    """Pixels; each image is resized to a square with this side."""
    grid_size: Positive = 4
    """An image without boxes gets a grid of grid_size x grid_size regions."""
    roi_bins: Positive = 1
    """RoIAlign divides a region into roi_bins x roi_bins bins, whose vectors are concatenated."""
    backbone: PathText | None = None
    """Pretrained backbone: hub name or folder of any AutoBackbone of transformers."""
    backbone_config: dict[str, Any] | None = None
    """Backbone with fresh weights, as {model_type: ..., ...}, in place of visual.backbone."""
    freeze_backbone: bool = False
    """Keeps the backbone's weights as they are."""
