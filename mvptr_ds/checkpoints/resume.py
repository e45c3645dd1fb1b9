"""Whether a stage can resume from its newest checkpoint: compares the checkpoint with this run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import yaml

from mvptr_ds.checkpoints import model_folder, reshard
from mvptr_ds.checkpoints.checkpoint import newest_good
from mvptr_ds.checkpoints.state import BUCKET_ORDER, MUST_MATCH, SAMPLE_ORDER, CheckpointState, read_state
from mvptr_ds.config import Config
from mvptr_ds.config_data import DataConfig
from mvptr_ds.data.dataset import differences
from mvptr_ds.data.phrases import Vocabs
from mvptr_ds.errors import CheckpointError
from mvptr_ds.model.mvptr import Mvptr


def find_checkpoint(
    stage_dir: Path, current: CheckpointState, config: Config, model: Mvptr, vocabs: Vocabs
) -> Path | None:
    """Returns the checkpoint that a stage resumes from, None for a fresh start. All ranks call it.

    The engine is not needed: what does not fit is found before it is built.

    Args:
        current: the state that this run would save.
        model, vocabs: of this run; of the model, only names and shapes of the weights are compared.

    Raises:
        CheckpointError: the checkpoint does not fit this run, or none of several is good.
        StorageError: none of them can be read.
    """
    path = newest_good(stage_dir / "checkpoints") if config.train.resume == "auto" else None
    if path is None:
        return None
    saved = read_state(path)
    for name in MUST_MATCH:
        before, now = getattr(saved, name), getattr(current, name)
        if before not in (None, now):
            raise CheckpointError(
                f"{path} was written with {name} {before}, this run has {now}: start it with {before}, or elsewhere "
                f"with run.init_from={stage_dir}"
            )
    reshard.needs_conversion(path, saved, current.num_ranks, current.zero_stage)
    _check_data(path, saved, current, config.data, stage_dir)
    _check_order(path, config, stage_dir)
    problems = model_folder.differences(model, vocabs, path / "model")
    if saved.trained_parts != current.trained_parts:
        problems.append(f"trained: {saved.trained_parts} there, {current.trained_parts} here")
    refuse(path, problems)
    return path


def refuse(path: Path, problems: Sequence[str]) -> None:
    """Raises CheckpointError where a checkpoint's model does not fit this run's, with all that differs."""
    if problems:
        raise CheckpointError(
            f"{path} does not fit this configuration:\n  - "
            + "\n  - ".join(problems)
            + "\n  use that of the run (model/mvptr.yaml there), another run.dir, or train.resume=never"
        )


def _check_data(
    path: Path, saved: CheckpointState, current: CheckpointState, data: DataConfig, stage_dir: Path
) -> None:
    """Raises CheckpointError where a run reads other samples than its checkpoint was trained on."""
    if saved.has_data_of(current):
        return
    what = f"other shards than {data.train} holds now (a repaired or rebuilt folder is another one): bring them back"
    if data.sources or not isinstance(saved.data, str):
        in_order = [f"order: {', '.join(saved.data)} there, {', '.join(current.data)} here"]
        changes = "\n  - ".join(differences(saved.data, current.data) or in_order)
        what = f"another mixture:\n  - {changes}\n  bring data.sources back"
    raise CheckpointError(
        f"{path} was trained on {what}, or start elsewhere with run.dir=... run.init_from={stage_dir}"
    )


def _check_order(path: Path, config: Config, stage_dir: Path) -> None:
    """Raises CheckpointError where the samples would come in another order than the checkpoint's mvptr.yaml says.

    A key that the file lacks is of a later version than the checkpoint, and is not compared.
    """
    saved = yaml.safe_load((path / "model/mvptr.yaml").read_text(encoding="utf-8"))
    changed = {}
    for key in SAMPLE_ORDER + (BUCKET_ORDER if config.data.bucket_batches else ()):
        section, name = key.split(".")
        now = getattr(getattr(config, section), name)
        before = saved.get(section, {}).get(name, now)
        if before != now:
            changed[key] = (before, now)
    if changed:
        lines = [f"{key}: {before} there, {now} here" for key, (before, now) in changed.items()]
        back = " ".join(f"{key}={before}" for key, (before, _) in changed.items())
        raise CheckpointError(
            f"{path} was trained on the samples in another order:\n  - "
            + "\n  - ".join(lines)
            + f"\n  go on with {back}, or start elsewhere with run.dir=... run.init_from={stage_dir}"
        )
