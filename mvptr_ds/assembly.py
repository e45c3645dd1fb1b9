"""From the configuration to objects: vocabularies, shards, model. The one place that maps its keys to arguments."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from mvptr_ds import parallel
from mvptr_ds.config import Config, DataConfig, MaskingConfig
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.joined import JoinedIndex, check_extractors, check_kinds, ensure_join, visual_extractors
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import SCHEMA_VERSION, DataError
from mvptr_ds.data.shards import Index, SampleIndex, ensure_index
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.demo.build import build_demo_shards
from mvptr_ds.model.config import MvptrConfig
from mvptr_ds.model.convert import init_from_bert, load_bert
from mvptr_ds.model.mvptr import Mvptr

logger = logging.getLogger(__name__)
NO_MASKING = MaskingConfig(word_prob=0.0, phrase_prob=0.0, tag_prob=0.0)


@dataclass
class Vocabs:
    words: WordPiece
    phrases: PhraseVocab


def on_main(function: Callable[[], object]) -> None:
    """Runs `function` on rank 0 while the others wait; its error is raised on every rank."""
    error: Exception | None = None
    if parallel.is_main():
        try:
            function()
        except Exception as caught:  # passed on to every rank just below
            error = _portable(caught)
    error = parallel.broadcast_object(error)
    if error is not None:
        raise error


def _portable(error: Exception) -> Exception:
    """The error, or one that says the same where it cannot be sent to another process."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:  # whatever its own constructor or contents raise
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def prepare_shards(data: DataConfig, seed: int, num_processes: int) -> None:
    """Builds the demo shards if the configuration asks for them and they are missing, and missing indices."""

    def prepare() -> None:
        if data.demo_source is not None:
            build_demo_shards(
                Path(data.train).parent,
                data.demo_source,
                data.demo_train_scenes,
                data.demo_held_out_scenes,
                seed,
                num_processes,
            )
        for folder in (data.train, data.held_out):
            if folder is not None:
                ensure_index(folder)
        for folder in {*data.sidecars, *(data.held_out_sidecars or ())}:
            ensure_index(folder)
        if data.held_out is not None and not data.allow_mixed_extractors:
            _check_same_extractors(data)

    on_main(prepare)


def _check_same_extractors(data: DataConfig) -> None:
    held_out_sidecars = data.sidecars if data.held_out_sidecars is None else data.held_out_sidecars
    found = []
    for folder, names in ((data.train, data.sidecars), (data.held_out or "", held_out_sidecars)):
        main, sidecars = Index.open(folder), [Index.open(name) for name in names]
        check_kinds(main, sidecars)
        found.append(visual_extractors(main, sidecars, [0] * len(sidecars)))
    if found[0] and found[1] and found[0] != found[1]:
        train, held_out = (", ".join(sorted(extractors)) for extractors in found)
        raise DataError(
            f"the regions of data.train are of {train}, those of data.held_out of {held_out}: make both with one "
            "extractor, or set data.allow_mixed_extractors=true"
        )


def open_train(data: DataConfig, stage: str, joins: Path) -> SampleIndex:
    """The samples that a stage trains on; their indices must be there. All ranks call it.

    Args:
        joins: folder where the join with the sidecars is kept.

    Raises:
        DataError: the folders cannot be opened or joined, or the stage needs pairs and there are other samples.
    """
    index = _open(data, data.train, data.sidecars, joins)
    if stage != "stage1":
        _check_pairs(index, data.train, f"{stage} aligns both, so it needs", "leave it to stage 1 (run.stages=[1])")
    return index


def open_held_out(data: DataConfig, joins: Path) -> SampleIndex:
    """The samples to evaluate on, like `open_train`; builds missing indices."""
    if data.held_out is None:
        raise DataError("data.held_out is not set: give data.held_out=FOLDER of shards to evaluate on")
    sidecars = data.sidecars if data.held_out_sidecars is None else data.held_out_sidecars
    on_main(lambda: [ensure_index(folder) for folder in (data.held_out, *sidecars) if folder is not None])
    index = _open(data, data.held_out, sidecars, joins)
    _check_pairs(index, data.held_out, "evaluation needs", "set data.held_out to others, or to null to do without")
    return index


def _open(data: DataConfig, folder: str, sidecars: Sequence[str], joins: Path) -> SampleIndex:
    main = Index.open(folder)
    opened = [Index.open(sidecar) for sidecar in sidecars]
    if opened:
        missing, allow_mixed = data.missing_partners, data.allow_mixed_extractors
        on_main(lambda: ensure_join(main, opened, missing, allow_mixed, joins))
        return JoinedIndex(main, opened, missing, joins)
    check_kinds(main, ())
    if not data.allow_mixed_extractors:
        check_extractors(main)
    return main


def _check_pairs(index: SampleIndex, folder: str, who: str, remedy: str) -> None:
    if index.num_text_only_samples or index.num_image_only_samples:
        raise DataError(
            f"{folder} holds {index.num_text_only_samples} text-only and {index.num_image_only_samples} image-only "
            f"samples among {len(index)}; {who} image-text pairs: take them out, give what they lack in data.sidecars, "
            f"or {remedy}"
        )


def build_vocabs(data: DataConfig) -> Vocabs:
    """Word and phrase vocabulary; without `data.phrase_vocab` every phrase is out of vocabulary."""
    words = WordPiece(data.word_vocab)
    phrases = PhraseVocab.load(data.phrase_vocab, words) if data.phrase_vocab else PhraseVocab.empty(words)
    return Vocabs(words, phrases)


def build_samples(
    config: Config, vocabs: Vocabs, index: SampleIndex, masking: MaskingConfig, predict_phrases: bool, tag_noise: bool
) -> SampleBuilder:
    """What turns a record's members into a sample; evaluation passes `NO_MASKING` and no tag noise."""
    data, visual = config.data, config.visual
    options = SampleOptions(
        visual_source=visual.source,
        feature_dim=visual.feature_dim,
        image_size=visual.image_size,
        grid_size=visual.grid_size,
        max_tokens=data.max_tokens,
        max_text_slots=data.max_text_slots,
        max_tag_slots=data.max_tag_slots,
        max_regions=data.max_regions,
        word_prob=masking.word_prob,
        phrase_prob=masking.phrase_prob,
        tag_prob=masking.tag_prob,
        predict_phrases=predict_phrases,
        tag_drop_prob=data.tag_drop_prob if tag_noise else 0.0,
        tag_wrong_prob=data.tag_wrong_prob if tag_noise else 0.0,
        tag_withhold_prob=data.tag_withhold_prob if tag_noise else 0.0,
        tag_list=list(index.tags),
    )
    return SampleBuilder(vocabs.words, vocabs.phrases, options)


def model_config(config: Config, vocabs: Vocabs) -> MvptrConfig:
    """The model's own configuration; the vocabularies give its rows."""
    model, visual = config.model, config.visual
    if config.data.max_text_slots > model.max_positions or config.data.max_tag_slots > model.max_positions:
        raise ValueError(
            f"data.max_text_slots={config.data.max_text_slots} and data.max_tag_slots={config.data.max_tag_slots} "
            f"must not exceed model.max_positions={model.max_positions}"
        )
    return MvptrConfig(
        num_words=len(vocabs.words),
        num_rows=vocabs.phrases.num_rows,
        num_phrases=len(vocabs.phrases),
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
        data_schema=SCHEMA_VERSION,
    )


def build_model(config: Config, vocabs: Vocabs) -> Mvptr:
    """A fresh model, the same on every rank; from BERT's weights where `run.init_from_bert` names them."""
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
    return model
