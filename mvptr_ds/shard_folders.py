"""The folders of shards that a run reads: which they are, what prepares them, and how they are opened."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from mvptr_ds.config_data import DataConfig, SourceConfig
from mvptr_ds.data.shards.index import Index, SampleIndex
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.other_pictures import OtherPictures
from mvptr_ds.data.shards.sidecar_join import JoinedIndex, check_extractors, check_kinds, ensure_join, visual_extractors
from mvptr_ds.data.shards.urls import ReadOptions, is_url
from mvptr_ds.demo import build
from mvptr_ds.demo.build import build_demo_shards
from mvptr_ds.demo.marker import FolderTakenError
from mvptr_ds.demo.tasks import build_task_shards, task_shards_are_there
from mvptr_ds.distributed.collectives import run_on_rank_zero
from mvptr_ds.errors import DataError


def read_options(data: DataConfig) -> ReadOptions:
    """Returns how shards behind a URL are read."""
    return ReadOptions(data.read_ahead_mib, data.read_retries, data.read_timeout_s, data.cache_dir)


def prepare_shards(data: DataConfig, seed: int, num_processes: int) -> None:
    """Builds the demo shards if the configuration asks for them and they are missing, and missing indices."""

    def prepare() -> None:
        if data.demo_source is not None and not demo_shards_are_there(data, seed):
            _build_demo(data, seed, num_processes)
        splits = splits_of(data)
        for folder, role in roles_of(splits).items():
            ensure_index(folder, read_options(data), role)
        if not data.allow_mixed_extractors:
            _check_same_extractors(splits, read_options(data))

    run_on_rank_zero(prepare)


def _build_demo(data: DataConfig, seed: int, num_processes: int) -> None:
    scenes = data.demo_train_scenes, data.demo_held_out_scenes
    build_demo_shards(_demo_folder(data), str(data.demo_source), *scenes, seed, num_processes)
    if data.demo_task is not None:
        folder = Path(str(data.train)).parent
        build_task_shards(folder, _demo_folder(data), data.demo_task, data.demo_task_scenes, seed)


def demo_shards_are_there(data: DataConfig, seed: int) -> bool:
    """Returns whether what the configuration asks of the demo is built; else its folders are free for that.

    Raises:
        DataError: it cannot be built there; a user's own shards under a demo's configuration are the usual case.
    """
    key = "demo_source" if data.demo_task is None else "demo_task"
    builds = f"data.{key}={getattr(data, key)} builds the shards of data.train"
    if data.train is None:
        raise DataError(f"{builds}, which is null; set data.demo_source=null")
    if is_url(data.train):
        raise DataError(f"{builds}={data.train}, which is a URL; set data.demo_source=null to train on what is there")
    scenes = data.demo_train_scenes, data.demo_held_out_scenes
    folder = _demo_folder(data)
    try:
        if not build.demo_shards_are_there(folder, str(data.demo_source), *scenes, seed):
            return False
        if data.demo_task is None:
            return True
        task = data.demo_task, data.demo_task_scenes, seed
        return task_shards_are_there(Path(data.train).parent, folder, *task)
    except FolderTakenError as error:
        raise DataError(
            f"{builds}={data.train}, but {error}; set data.demo_source=null to train on the shards that are there, or "
            "name another folder for those of the demo (data.train, data.held_out, data.word_vocab, data.phrase_vocab)"
        ) from error


def _demo_folder(data: DataConfig) -> Path:
    """Returns the folder of the demo shards: of data.train, or of the pictures that a task's texts share."""
    if data.demo_task is None:
        return Path(str(data.train)).parent
    if not data.sidecars or is_url(data.sidecars[0]):
        raise DataError(
            f"data.demo_task={data.demo_task} shares the pictures of demo shards, but data.sidecars is {data.sidecars}"
            "; set data.sidecars=[DEMO/train] data.held_out_sidecars=[DEMO/held_out], with a local folder for DEMO"
        )
    return Path(data.sidecars[0]).parent


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """Returns what to train on by name: `data.sources`, or `data.train` alone, whose name is empty.

    Raises:
        DataError: both or neither are given, a source has a name that cannot be used or no shards, or some a weight.
    """
    if not data.sources:
        if data.train is None:
            raise DataError("neither data.train nor data.sources is set: give data.train=FOLDER of shards")
        return {"": SourceConfig(data.train, None, data.sidecars)}
    if data.train is not None or data.sidecars:
        own = f"data.train={data.train}" if data.train is not None else f"data.sidecars={data.sidecars}"
        raise DataError(
            f"{own} and data.sources ({', '.join(data.sources)}) are given both: set data.train=null data.sidecars=[] "
            "(each source names its own sidecars), or data.sources=null"
        )
    for name, source in data.sources.items():
        if not re.fullmatch(r"[\w-]+", name):
            raise DataError(f"data.sources has a source {name!r}: name it with letters, digits, _ and - alone")
        if not source.shards:
            raise DataError(f"data.sources.{name}.shards is not set: give the source's folder of shards")
    without = [name for name, source in data.sources.items() if source.weight is None]
    if 0 < len(without) < len(data.sources):
        raise DataError(
            f"data.sources.{without[0]} has no weight, but others have: give all of them one, or none (then the "
            "numbers of samples are the weights)"
        )
    return data.sources


def splits_of(data: DataConfig) -> dict[str, SourceConfig]:
    """Returns every folder of shards that a run reads, by the key of the configuration that names it."""
    splits = {f"data.sources.{name}" if name else "data.train": source for name, source in sources_of(data).items()}
    if data.held_out is not None:
        sidecars = data.sidecars if data.held_out_sidecars is None else data.held_out_sidecars
        splits["data.held_out"] = SourceConfig(data.held_out, None, sidecars)
    return splits


def roles_of(splits: dict[str, SourceConfig]) -> dict[str, str]:
    """Returns every folder of these splits, and what it is for the configuration."""
    roles: dict[str, str] = {}
    for key, split in splits.items():
        roles |= {folder: f"a sidecar of {key}" for folder in split.sidecars if folder not in roles}
        roles[split.shards] = key
    return roles


def _check_same_extractors(splits: dict[str, SourceConfig], options: ReadOptions) -> None:
    first: tuple[str, set[str]] | None = None
    for name, split in splits.items():
        main, *sidecars = (Index.open(folder, options) for folder in (split.shards, *split.sidecars))
        check_kinds(main, sidecars)
        found = visual_extractors(main, sidecars, [0] * len(sidecars))
        if not found:
            continue
        first = first or (name, found)
        if found != first[1]:
            one, other = (", ".join(sorted(extractors)) for extractors in (first[1], found))
            raise DataError(
                f"the regions of {first[0]} are of {one}, those of {name} of {other}: make both with one extractor, "
                "or set data.allow_mixed_extractors=true"
            )


def open_sources(data: DataConfig, name: str, needs_pairs: bool, joins: Path) -> dict[str, SampleIndex]:
    """Returns the samples of each source that a task trains on; their indices must be there. All ranks call it.

    Args:
        name: of the task, for messages.
        joins: folder where the joins with the sidecars are kept.

    Raises:
        DataError: the folders cannot be opened or joined, or the task needs pairs and there are other samples.
    """
    indices = {}
    for source_name, source in sources_of(data).items():
        indices[source_name] = index = _open(data, source.shards, source.sidecars, joins)
        if needs_pairs:
            folder = f"source {source_name} ({source.shards})" if source_name else source.shards
            remedy = "leave it to stage 1 (run.stages=[1])"
            _check_pairs(index, folder, f"{name} aligns both, so it needs", remedy)
    return indices


def open_held_out(data: DataConfig, joins: Path) -> SampleIndex:
    """Returns the samples to evaluate on, like `open_sources`; builds missing indices."""
    if data.held_out is None:
        raise DataError("data.held_out is not set: give data.held_out=FOLDER of shards to evaluate on")
    sidecars = data.sidecars if data.held_out_sidecars is None else data.held_out_sidecars
    run_on_rank_zero(lambda: [ensure_index(folder, read_options(data)) for folder in (str(data.held_out), *sidecars)])
    index = _open(data, data.held_out, sidecars, joins)
    _check_pairs(index, data.held_out, "evaluation needs", "set data.held_out to others, or to null to do without")
    return index


def _open(data: DataConfig, folder: str, sidecars: Sequence[str], joins: Path) -> SampleIndex:
    index = _open_joined(data, folder, sidecars, joins)
    return index if data.permute_pictures is None else OtherPictures(index, data.permute_pictures)


def _open_joined(data: DataConfig, folder: str, sidecars: Sequence[str], joins: Path) -> SampleIndex:
    options = read_options(data)
    main = Index.open(folder, options)
    opened = [Index.open(sidecar, options) for sidecar in sidecars]
    if opened:
        missing, allow_mixed = data.missing_partners, data.allow_mixed_extractors
        run_on_rank_zero(lambda: ensure_join(main, opened, missing, allow_mixed, joins))
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
