"""From the configuration to objects: vocabularies, shards, task. The one place that maps its keys to arguments."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mvptr_ds import ds_config
from mvptr_ds.config import Config
from mvptr_ds.config_data import DataConfig
from mvptr_ds.config_stages import MaskingConfig
from mvptr_ds.data.dataset import MixedDataset, SampleDataset, ShardDataset
from mvptr_ds.data.features import ReadLabels, SampleBuilder, SampleOptions
from mvptr_ds.data.lengths import Lengths, lengths_are_there, lengths_path, measure, write_lengths
from mvptr_ds.data.phrases import PhraseVocab, Vocabs
from mvptr_ds.data.sampling.batches import Batches
from mvptr_ds.data.sampling.buckets import BucketedBatches
from mvptr_ds.data.sampling.mixture import Mixture, default_block, source_seed
from mvptr_ds.data.sampling.plan import Plan
from mvptr_ds.data.schema import SCHEMA_VERSION
from mvptr_ds.data.shards.index import SampleIndex
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.distributed import collectives
from mvptr_ds.distributed.collectives import run_on_rank_zero
from mvptr_ds.errors import DataError
from mvptr_ds.model import kernels
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.from_bert import init_from_bert, load_bert
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.optim.optimizer import optimizer_choice
from mvptr_ds.shard_folders import open_sources

logger = logging.getLogger(__name__)
NO_MASKING = MaskingConfig(word_prob=0.0, phrase_prob=0.0, tag_prob=0.0)


@dataclass(frozen=True)
class SampleNeeds:
    """What a task wants of its samples.

    Attributes:
        pairs: image-text pairs only. Folders with other samples are refused, and a sample without regions is replaced.
        masking: how much of each sample is masked.
        phrase_labels: whether masked phrases are labelled, for a head over the phrase vocabulary.
        labels: names in the labels of a caption, each with an example, which messages show. They come as
            `Batch.labels`, and a sample that lacks one is replaced.
        read_labels: makes what `Batch.labels` holds of all labels of a caption and of its record. It raises DataError
            for labels that the task cannot use; such a sample is replaced, too. Loader processes call it: a function
            of a module, or `functools.partial` of one.
        tags_in_text: whether the tags of all regions also stand behind the text.
    """

    pairs: bool = True
    masking: MaskingConfig = field(default_factory=lambda: NO_MASKING)
    phrase_labels: bool = False
    labels: Mapping[str, Any] = field(default_factory=dict)
    read_labels: ReadLabels | None = None
    tags_in_text: bool = False


NOTHING_MASKED = SampleNeeds(pairs=False)  # of any samples as they are


def build_dataset(
    config: Config, vocabs: Vocabs, task_name: str, needs: SampleNeeds, seed: int, joins: Path
) -> SampleDataset:
    """Opens the samples of a task by their positions in the run. All ranks call it.

    Wrong tags are drawn from the list of the own source, which has the vocabulary of its detector.

    Raises:
        DataError: as `open_sources`, or blocks of the mixture that are too short.
    """
    data, datasets = config.data, {}
    for name, index in open_sources(data, task_name, needs.pairs, joins).items():
        own_seed = source_seed(seed, name) if name else seed
        plan = Plan(len(index), own_seed, data.block_samples, data.window_blocks)
        builder = build_samples(config, vocabs, index, needs, tag_noise=True)
        datasets[name] = ShardDataset(index, plan, builder)
    if not data.sources:
        return datasets[""]
    return MixedDataset(datasets, build_mixture(config, {n: s.num_samples for n, s in datasets.items()}, seed))


def build_mixture(config: Config, num_samples: Mapping[str, int], seed: int) -> Mixture:
    """Returns the mixture of `data.sources`, whose numbers of samples are the weights where none are given.

    Raises:
        DataError: its blocks are too short or too long.
    """
    data = config.data
    weights = [float(source.weight or num_samples[name]) for name, source in data.sources.items()]
    try:
        block_samples = data.mixture_block_samples or default_block(weights, config.train.batch_size)
        return Mixture(weights, block_samples, seed)
    except ValueError as error:
        asked = f"data.sources, data.mixture_block_samples={data.mixture_block_samples}"
        raise DataError(f"{asked}: {error}") from error


def build_batches(
    config: Config, dataset: SampleDataset, seed: int, joins: Path, alive: Callable[[], None] = lambda: None
) -> Batches:
    """Returns which positions make up each batch: as they come, or of samples of like lengths. All ranks call it.

    Args:
        joins: folder where the samples' lengths are kept.
        alive: called all the while that they are measured.
    """
    batch_size, pool_batches = config.train.batch_size, config.data.bucket_batches
    if pool_batches == 0:
        return Batches(batch_size)
    tables = [_open_lengths(source.index, source.builder, joins, alive) for source in dataset.sources]
    return BucketedBatches(batch_size, pool_batches, seed, Lengths(dataset, tables))


def _open_lengths(index: SampleIndex, builder: SampleBuilder, folder: Path, alive: Callable[[], None]) -> np.ndarray:
    """Maps the lengths of the samples; where they are missing or damaged, each rank measures its part of them."""
    path = lengths_path(index, builder, folder)
    # rank 0 alone looks: network storage may remember for a while that another node found nothing
    if not collectives.of_main(lambda: lengths_are_there(path, index.num_samples)):
        ends = [index.num_records * part // collectives.num_ranks() for part in range(collectives.num_ranks() + 1)]
        records = range(ends[collectives.rank()], ends[collectives.rank() + 1])
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(measure, index, builder, records, show_progress=collectives.is_main())
            collectives.wait_for_all(work, alive)
        parts = collectives.gather_objects(work.result())
        run_on_rank_zero(lambda: write_lengths(path, np.concatenate(parts)))
    return np.load(path, mmap_mode="r", allow_pickle=False)


def build_vocabs(data: DataConfig) -> Vocabs:
    """Builds word and phrase vocabulary; without `data.phrase_vocab` every phrase is out of vocabulary."""
    words = WordPiece(data.word_vocab)
    phrases = PhraseVocab.load(data.phrase_vocab, words) if data.phrase_vocab else PhraseVocab.empty(words)
    return Vocabs(words, phrases)


def build_samples(
    config: Config, vocabs: Vocabs, index: SampleIndex, needs: SampleNeeds, tag_noise: bool
) -> SampleBuilder:
    """Returns what turns a record's members into a sample."""
    data = config.data
    options = replace(
        sample_sizes(config),
        word_prob=needs.masking.word_prob,
        phrase_prob=needs.masking.phrase_prob,
        tag_prob=needs.masking.tag_prob,
        predict_phrases=needs.phrase_labels,
        tag_drop_prob=data.tag_drop_prob if tag_noise else 0.0,
        tag_wrong_prob=data.tag_wrong_prob if tag_noise else 0.0,
        tag_withhold_prob=data.tag_withhold_prob if tag_noise else 0.0,
        needs_regions=needs.pairs,
        labels=needs.labels,
        read_labels=needs.read_labels,
        tags_in_text=needs.tags_in_text,
        tag_list=list(index.tags),
    )
    return SampleBuilder(vocabs.words, vocabs.phrases, options)


def evaluation_samples(
    config: Config, vocabs: Vocabs, index: SampleIndex, needs: SampleNeeds, withhold_tags: bool = False
) -> SampleBuilder:
    """Returns what makes the samples of an evaluation: no tag noise, and no tags at all where they are withheld."""
    builder = build_samples(config, vocabs, index, needs, tag_noise=False)
    if not withhold_tags and not config.eval.withhold_tags:
        return builder
    return SampleBuilder(vocabs.words, vocabs.phrases, replace(builder.options, tag_withhold_prob=1.0))


def sample_sizes(config: Config) -> SampleOptions:
    """Returns the options of samples as they are: the sizes of the run, nothing masked, no tag noise."""
    data, visual = config.data, config.visual
    return SampleOptions(
        visual_source=visual.source,
        feature_dim=visual.feature_dim,
        image_size=visual.image_size,
        grid_size=visual.grid_size,
        max_tokens=data.max_tokens,
        max_text_slots=data.max_text_slots,
        max_tag_slots=data.max_tag_slots,
        max_regions=data.max_regions,
    )


def model_config(config: Config, vocabs: Vocabs) -> MvptrConfig:
    """Returns the model's own configuration; the vocabularies give its rows."""
    model, visual = config.model, config.visual
    if config.data.max_text_slots > model.max_positions or config.data.max_tag_slots > model.max_positions:
        raise ValueError(
            f"data.max_text_slots={config.data.max_text_slots} and data.max_tag_slots={config.data.max_tag_slots} "
            f"must not exceed model.max_positions={model.max_positions}: lower them"
        )
    return MvptrConfig(
        num_words=len(vocabs.words),
        num_rows=vocabs.phrases.num_rows,
        num_phrases=len(vocabs.phrases),
        grid_size=visual.grid_size,
        cls_token_id=vocabs.words.cls_id,
        sep_token_id=vocabs.words.sep_id,
        hidden_size=model.hidden_size,
        num_attention_heads=model.num_attention_heads,
        intermediate_size=model.intermediate_size,
        num_text_layers=model.num_text_layers,
        num_visual_layers=model.num_visual_layers,
        num_cross_layers=model.num_cross_layers,
        max_positions=model.max_positions,
        hidden_dropout=model.dropout,
        attention_dropout=model.attention_dropout,
        initializer_range=model.initializer_range,
        tie_word_heads=model.tie_word_heads,
        initial_temperature=config.task.vsc.initial_temperature,
        visual_source=visual.source,
        region_feature_dim=visual.feature_dim,
        backbone=visual.backbone if visual.source == "image" else None,
        backbone_config=visual.backbone_config if visual.source == "image" else None,
        freeze_backbone=visual.freeze_backbone,
        image_size=visual.image_size,
        roi_bins=visual.roi_bins,
        region_norm=model.region_norm,
        data_schema=SCHEMA_VERSION,
    )


def build_model(config: Config, vocabs: Vocabs) -> Mvptr:
    """Builds a fresh model, the same on every rank; from BERT's weights where `run.init_from_bert` names them."""
    torch.manual_seed(config.run.seed)
    model = Mvptr(model_config(config, vocabs))
    if len(vocabs.phrases):
        model.set_phrase_rows(torch.from_numpy(vocabs.phrases.rows))
    if config.run.init_from_bert is not None:
        if config.data.word_vocab is not None:
            raise DataError(
                f"run.init_from_bert={config.run.init_from_bert} needs BERT's own vocabulary, but data.word_vocab is "
                f"{config.data.word_vocab}: leave data.word_vocab out"
            )
        state = load_bert(config.run.init_from_bert)
        for line in init_from_bert(model, state, vocabs.phrases.pieces(vocabs.words)):
            logger.info("from %s: %s", config.run.init_from_bert, line)
    model.set_execution(
        config.model.execution, config.model.activation_checkpointing, config.model.compile == "encoders"
    )
    return model


def filled_ds_config(config: Config, ds_content: dict[str, Any]) -> dict[str, Any]:
    """Returns the DeepSpeed JSON for these ranks and their devices. Raises ValueError like `fill_ds_config`."""
    bf16, fp16 = ds_config.precision_supported()
    return ds_config.fill_ds_config(
        ds_content, config.train, config.optim, collectives.num_ranks(), bf16_supported=bf16, fp16_supported=fp16
    )


def kernel_report(
    config: Config, device: torch.device, dtype: torch.dtype, optimizer_device: torch.device
) -> list[kernels.Choice]:
    """Returns which implementation each operation of training uses on this device, and why."""
    model = config.model
    found = kernels.report(
        device,
        dtype,
        model.attention_dropout,
        model.hidden_size // model.num_attention_heads,
        model.execution,
        model.compile == "encoders",
        model.activation_checkpointing,
    )
    return [*found, optimizer_choice(config.optim, optimizer_device)]
