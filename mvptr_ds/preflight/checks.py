"""Finds what would go wrong later before the first step, and reports all findings at once with their remedies.

A training run begins with it (`train.preflight`). With `train.preflight_only=true` the run ends after it: with 0, or
with 2 where a finding is an error.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import yaml

from mvptr_ds import builders, ds_config, shard_folders
from mvptr_ds.checkpoints import hand_over, model_folder, resume
from mvptr_ds.checkpoints.checkpoint import newest_good
from mvptr_ds.config import Config
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.data.shards.index import Index, SampleIndex
from mvptr_ds.data.shards.index_builder import check_first_record, where_tars_are
from mvptr_ds.data.shards.index_format import MANIFEST_NAME
from mvptr_ds.data.shards.urls import is_url
from mvptr_ds.distributed import collectives
from mvptr_ds.distributed.rendezvous import deadline
from mvptr_ds.errors import DataError, PreflightError
from mvptr_ds.model.mvptr import Mvptr
from mvptr_ds.monitoring.versions import code_sha256, versions
from mvptr_ds.preflight import sample_checks, setting_checks, shared_pictures
from mvptr_ds.preflight.loader_memory import loader_memory
from mvptr_ds.preflight.rank_checks import (
    ERROR,
    OK,
    WARNING,
    Finding,
    alike,
    clocks,
    devices,
    exchange,
    on_each,
    on_first,
    run_folder,
)
from mvptr_ds.tasks import TASKS
from mvptr_ds.user_io.tool_names import command

logger = logging.getLogger(__name__)
CONNECT_LIMIT_S = 180.0  # from the start of the last rank: thousands of ranks may make an NCCL communicator
LIMIT_S = 60.0


def examine(config: Config, ds_content: dict[str, Any], device: torch.device, prepare: bool) -> list[Finding]:
    """Returns all findings, the same on every rank. All ranks call it.

    Args:
        ds_content: the DeepSpeed JSON as written.
        prepare: whether to build missing shards and indices, which may take long. Otherwise they are findings.
    """
    started_s = time.perf_counter()
    with deadline(LIMIT_S, "the exchange of preflight"):
        found = exchange(device) + devices(device) + clocks()
        found += alike("versions", versions() | {"code": code_sha256()[:12]}, "install the same on all nodes")
        asked = alike("configuration", _fingerprints(config, ds_content), "give all ranks the same files and arguments")
        found += asked + run_folder(Path(config.run.dir))
    if any(finding.level == ERROR for finding in asked):
        return found  # ranks with different settings cannot check anything else together
    found += on_each("configuration", lambda: setting_checks.examine(config))
    found += on_each("batch", lambda: _batch(config, ds_content))
    found += loader_memory(config)
    begun_s = time.perf_counter()
    missing = _prepare(config) if prepare else _missing(config)
    started_s += time.perf_counter() - begun_s
    indices: dict[str, SampleIndex] = {}
    found += missing if missing else _shards(config, indices)
    if not collectives.broadcast_object(_demo_to_be_drawn(config)):
        found += _model(config, ds_content, device, indices)
    took_s = collectives.broadcast_object(time.perf_counter() - started_s)
    found.append(Finding("preflight", OK, f"took {took_s:.1f} s, but for what it had to build"))
    return list({(finding.level, finding.text): finding for finding in reversed(found)}.values())[::-1]


def conclude(findings: Iterable[Finding], show_all: bool) -> None:
    """Logs the findings that are not well, or all of them.

    Raises:
        PreflightError: there are errors.
    """
    findings = list(findings)
    for finding in findings:
        if show_all or finding.level == WARNING:
            logger.info("%-8s %-14s %s", finding.level, finding.check, finding.text)
            if finding.remedy:
                logger.info("%-23s -> %s", "", finding.remedy)
    wrong = [finding for finding in findings if finding.level == ERROR]
    errors = [f"{f.text}: {f.remedy}" if f.remedy else f.text for f in wrong]
    if errors:
        several = f"preflight found {len(errors)} errors:\n  - " + "\n  - ".join(errors)
        error = PreflightError(errors[0] if len(errors) == 1 else several)
        error.passes = all(finding.passes for finding in wrong)
        raise error
    levels = [finding.level for finding in findings]
    logger.info("preflight: %d checks well, %d warnings", levels.count(OK), levels.count(WARNING))


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 2**30:.1f} GiB" if num_bytes >= 2**28 else f"{num_bytes / 2**20:.1f} MiB"


def _fingerprints(config: Config, ds_content: dict[str, Any]) -> dict[str, str]:
    texts = {
        "configuration": yaml.safe_dump(dataclasses.asdict(config)),
        "DeepSpeed JSON": json.dumps(ds_content, sort_keys=True),
    }
    return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}


def _batch(config: Config, ds_content: dict[str, Any]) -> Iterator[Finding]:
    train, num = config.train, collectives.num_ranks()
    filled = builders.filled_ds_config(config, ds_content)
    micro = filled["train_micro_batch_size_per_gpu"]
    text = f"{train.batch_size} samples a step = {num} ranks x {train.accumulation_steps} accumulated x {micro}"
    yield Finding("batch", OK, text)


def _prepare(config: Config) -> list[Finding]:
    try:
        shard_folders.prepare_shards(config.data, config.run.seed, collectives.num_ranks())
    except (ValueError, OSError) as error:  # the same on all ranks
        return [Finding.of("shards", error)]
    return []


def _missing(config: Config) -> list[Finding]:
    """Returns findings on shards that training would build first."""
    data = config.data

    def check() -> Iterator[Finding]:
        if data.demo_source is not None and not shard_folders.demo_shards_are_there(data, config.run.seed):
            num_scenes = data.demo_train_scenes if data.demo_task is None else data.demo_task_scenes
            text = f"{data.train} is not there yet: the run draws its {num_scenes} demo scenes first"
            yield Finding("shards", WARNING, text, "nothing; vocabularies and hand-over can be looked at only then")
            return
        roles = shard_folders.roles_of(shard_folders.splits_of(data))
        for folder, role in sorted((folder, role) for folder, role in roles.items() if not is_url(folder)):
            num_bytes = sum(tar.stat().st_size for tar in Path(folder).glob("*.tar"))
            if not num_bytes and not (Path(folder) / MANIFEST_NAME).exists():
                text = f"{folder} ({role}) holds no .tar file"
                yield Finding("shards", ERROR, text, where_tars_are(folder))
            elif not (Path(folder) / MANIFEST_NAME).exists():
                yield _without_index(folder, role, num_bytes)

    return on_first("shards", check)


def _without_index(folder: str, role: str, num_bytes: int) -> Finding:
    """Returns the finding on a folder of tars without an index, which the run would build first."""
    try:
        check_first_record(folder)
    except (DataError, OSError) as error:
        return Finding("shards", ERROR, str(error))
    if not os.access(folder, os.W_OK):
        text = f"{folder} ({role}) has no index, and none can be written there"
        remedy = f"write it elsewhere with {command('validate')} {folder} --out DIR, and name DIR instead"
        return Finding("shards", ERROR, text, remedy)
    text = f"{folder} has no index yet: one process reads its {_size(num_bytes)} when the run starts"
    return Finding("shards", WARNING, text, f"{command('validate')} {folder} makes it now")


def _demo_to_be_drawn(config: Config) -> bool:
    data = config.data
    return data.demo_source is not None and data.train is not None and not Path(data.train).exists()


def _shards(config: Config, indices: dict[str, SampleIndex]) -> list[Finding]:
    """Opens every folder on every rank, verifies indices on rank 0, and checks that stages get what they need.

    Args:
        indices: receives the samples of each folder, by the key of the configuration that names it.
    """
    data, joins = config.data, Path(config.run.dir) / "joins"
    options = shard_folders.read_options(data)

    def opened() -> Iterator[Finding]:
        for name, split in shard_folders.splits_of(data).items():
            index = Index.open(split.shards, options)
            for sidecar in split.sidecars:
                Index.open(sidecar, options)
            text = f"{name}: {len(index)} samples of {index.num_records} records in {index.num_shards} shards"
            yield Finding("shards", OK, f"{text}, {_size(index.num_bytes)}")

    def verified() -> Iterator[Finding]:
        for split in shard_folders.splits_of(data).values():
            for folder in (split.shards, *split.sidecars):
                Index.open(folder, options).verify()
        yield from ()

    found = on_each("shards", opened)
    if all(finding.level == OK for finding in found):
        found += on_first("shards", verified)
    if all(finding.level == OK for finding in found):
        try:  # the rest is the same on all ranks, and parts of it are collective
            for stage in config.stage_names:
                sources = shard_folders.open_sources(data, stage, TASKS[stage].sample_needs(config).pairs, joins)
                if data.sources:
                    num_samples = {name: len(index) for name, index in sources.items()}
                    builders.build_mixture(config, num_samples, config.run.seed)
                indices |= {f"data.sources.{name}" if name else "data.train": index for name, index in sources.items()}
        except (ValueError, OSError) as error:
            found.append(Finding.of("shards", error))
        if data.held_out is not None:
            found += _held_out(config, joins, indices)
    return found


def _held_out(config: Config, joins: Path, indices: dict[str, SampleIndex]) -> list[Finding]:
    """Opens the held-out split. A problem is no error of a run that does not evaluate."""
    try:
        indices["data.held_out"] = shard_folders.open_held_out(config.data, joins)
    except (ValueError, OSError) as error:
        if config.train.evaluate_every_steps > 0:
            return [Finding("shards", ERROR, str(error))]
        return [Finding("shards", WARNING, str(error), "training goes on without, eval.py would end with it")]
    return []


def _model(
    config: Config, ds_content: dict[str, Any], device: torch.device, indices: Mapping[str, SampleIndex]
) -> list[Finding]:
    """Checks vocabularies, records, objectives, kernels, disk and hand-over, with a model on the meta device."""
    vocabs: list[Vocabs] = []

    def load() -> Iterator[Finding]:
        vocabs.append(builders.build_vocabs(config.data))
        words, phrases = vocabs[0].words, vocabs[0].phrases
        text = f"{len(words)} words ({words.fingerprint[:12]}), {len(phrases)} phrases ({phrases.fingerprint[:12]})"
        yield Finding("vocabularies", OK, text)

    found = on_each("vocabularies", load)
    if any(finding.level == ERROR for finding in found):
        return found
    if len({finding.text for finding in found}) > 1:
        return [dataclasses.replace(f, level=ERROR, remedy="give all nodes the same files") for f in found]

    def build() -> Iterator[Finding]:
        num = sum(p.numel() for p in _shapes(config, vocabs[0]).parameters())
        yield Finding("model", OK, f"{num / 1e6:.1f} M parameters")

    def run() -> Iterator[Finding]:
        filled = builders.filled_ds_config(config, ds_content)
        precision, steps_on = ds_config.precision_of(filled), ds_config.optimizer_device(filled, device)
        for choice in builders.kernel_report(config, device, ds_config.DTYPES[precision], steps_on):
            yield Finding("kernels", OK, str(choice))
        yield from _disk(config, _num_bytes(config, _shapes(config, vocabs[0]), precision))

    if indices:
        found += on_first("records", lambda: sample_checks.examine(config, vocabs[0], indices))
        pretrained = shared_pictures.pretrained_data(config)  # looks for a model, which all ranks do together
        found += on_first("splits", lambda: shared_pictures.examine(config, indices, pretrained))
    built = on_first("model", build)
    found += built
    if built[0].level == OK:
        found += on_first("model", run) + _hand_over(config, vocabs[0])
    return found


def _shapes(config: Config, vocabs: Vocabs) -> Mvptr:
    with torch.device("meta"):
        return Mvptr(builders.model_config(config, vocabs))


def _num_bytes(config: Config, model: Mvptr, precision: str) -> dict[str, int]:
    """Returns the bytes of a checkpoint of each stage.

    A checkpoint holds the model in float32 and in the precision of the run, and 12 bytes for each trained parameter.

    Raises:
        ValueError: a stage's objectives cannot be computed.
    """
    width, num_bytes = 4 if precision == "float32" else 2, {}
    num_all = sum(p.numel() for p in model.parameters())
    for name in config.stage_names:
        module = TASKS[name].build(config, model, seed=0)
        module.freeze_untrained()
        num_trained = sum(p.numel() for _, p in module.named_weights() if p.requires_grad)
        num_bytes[name] = (4 + width) * num_all + 12 * num_trained
    return num_bytes


def _disk(config: Config, num_bytes: dict[str, int]) -> Iterator[Finding]:
    """Compares free space with the checkpoints that are kept, and one more while it is written."""
    train, run_dir = config.train, Path(config.run.dir)
    needed, next_needed = 0, None
    for name, size in num_bytes.items():
        kept = train.keep_checkpoints + (
            config.stage(name).max_steps // train.keep_every_steps if train.keep_every_steps else 0
        )
        kept += TASKS[name].best_by is not None and train.evaluate_every_steps > 0  # the best one
        own = run_dir / name / "checkpoints"
        there = sum(file.stat().st_size for file in own.rglob("*") if file.is_file())
        there = there if train.resume == "auto" else 0  # otherwise old checkpoints stay beside the new ones
        needed += max(0, (kept + 1) * size - there)
        next_needed = size if next_needed is None else next_needed
    free = shutil.disk_usage(run_dir if run_dir.exists() else Path(".")).free
    text = f"{_size(free)} free, the checkpoints take up to {_size(needed)} more"
    remedy = "free some, set another run.dir, or keep fewer (train.keep_checkpoints, train.keep_every_steps)"
    if free < (next_needed or 0):
        yield Finding("disk", ERROR, f"{text}; there is no room for a single one", remedy)
    elif free < needed:
        yield Finding("disk", WARNING, f"{text}; saves will fail then, training goes on without", remedy)
    else:
        yield Finding("disk", OK, text)


def _hand_over(config: Config, vocabs: Vocabs) -> list[Finding]:
    """Finds what the stages start from that start from no other stage of this run. All ranks call it."""
    outside = [name for name in config.stage_names if hand_over.stage_before(config, name, TASKS[name].follows) is None]
    return [finding for name in outside for finding in _start_of(name, config, vocabs)]


def _start_of(stage: str, config: Config, vocabs: Vocabs) -> list[Finding]:
    own = Path(config.run.dir) / stage / "checkpoints"
    try:
        resumes = hand_over.resumes(config, stage)
        if resumes and not config.train.preflight_only:  # the stage compares it after it is built
            return [Finding("hand-over", OK, f"{stage} goes on from its checkpoints in {own}")]
        path = newest_good(own) if resumes else hand_over.first_model(config, TASKS[stage].follows, stage)
    except (ValueError, OSError) as error:
        return [Finding.of("hand-over", error)]
    if path is None:
        return [Finding("hand-over", OK, f"{stage} takes over no other's weights")]

    def fits() -> Iterator[Finding]:
        model = _shapes(config, vocabs)
        if resumes:
            resume.refuse(path, model_folder.differences(model, vocabs, path / "model"))
        else:
            model_folder.check_fits(model, vocabs, path, TASKS[stage].fresh_weights)
        yield Finding("hand-over", OK, f"{stage} {'goes on' if resumes else 'starts'} from {path}")

    return on_first("hand-over", fits)
