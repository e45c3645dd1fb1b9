"""Checkpoints of a stage: written so that an interruption never leaves one that looks whole.

    checkpoints/
      latest                  name of the newest complete checkpoint (replaced atomically, last of all)
      step-00000100/
        model/                config.json, model.safetensors, vocabularies, mvptr.yaml: all that evaluation and the next
                              stage need; holds no pickle
        engine/               DeepSpeed's ZeRO state (pickle: resume only checkpoints that you trust)
        rng-rank0.pt ...      random state of every rank
        state.json            step, ranks, versions
        checksums.json        sha256 of every file above; its presence makes the checkpoint complete

Every function here is called by all ranks together.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mvptr_ds import parallel

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
LATEST = "latest"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    write_engine: Callable[[Path], None],
    write_model: Callable[[Path], None],
    keep: int,
) -> Path:
    """Writes `folder/step-N`, then its checksums, then points `latest` at it, then removes all but the last `keep`.

    Args:
        state: what `state.json` holds besides the step.
        write_engine: writes the engine's files below a folder, on every rank.
        write_model: writes the model folder, on rank 0.
    """
    path = folder / f"step-{step:08d}"
    if parallel.is_main():
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
    parallel.barrier()
    write_engine(path / "engine")
    torch.save(_rng_state(), path / f"rng-rank{parallel.rank()}.pt")
    if parallel.is_main():
        write_model(path / "model")
        _write_json(path / "state.json", {"step": step, "num_ranks": parallel.num_ranks(), **state})
    parallel.barrier()
    checksums = _checksums(path)
    if parallel.is_main():
        _write_json(path / CHECKSUMS, checksums)
        (folder / f"{LATEST}.partial").write_text(path.name, encoding="utf-8")
        os.replace(folder / f"{LATEST}.partial", folder / LATEST)
        complete = _complete(folder)
        # later ones come from a run that was started again, or are damaged: this run goes on without them
        later = [p for p in complete if p.name > path.name]
        for old in [*later, *complete[len(later) + max(1, keep) :]]:
            shutil.rmtree(old)
    parallel.barrier()
    return path


def newest_good(folder: Path) -> Path | None:
    """The newest checkpoint whose every file has its checksum; damaged ones are reported and passed over."""
    names = parallel.broadcast_object([p.name for p in _complete(folder)] if parallel.is_main() else None)
    for path in (folder / name for name in names):
        problem = verify(path)
        if problem is None:
            return path
        if parallel.is_main():
            logger.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
    return None


def verify(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        expected = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        expected = None
    if not isinstance(expected, dict):
        return f"{CHECKSUMS} cannot be read"
    found = _checksums(path)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed"
    return None


def read_state(path: Path) -> dict[str, Any]:
    """The content of `state.json`."""
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def restore_rng(path: Path) -> None:
    """Puts back this rank's random state."""
    saved = torch.load(path / f"rng-rank{parallel.rank()}.pt", weights_only=True)
    torch.set_rng_state(saved["cpu"])
    if torch.cuda.is_available() and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"])


def find_model(path: Path) -> Path:
    """The model folder meant by a run folder, a stage folder, a checkpoint or a model folder itself.

    Raises:
        CheckpointError: there is none below `path`.
    """
    for candidate in (path, path / "model"):
        if (candidate / "model.safetensors").is_file():
            return candidate
    for stage in (path, *(path / name for name in ("stage2", "joint", "stage1"))):
        newest = newest_good(stage / "checkpoints")
        if newest is not None:
            return newest / "model"
    raise CheckpointError(f"{path} holds no complete checkpoint; give a run folder, a stage folder or a model folder")


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((p.parent for p in folder.glob(f"step-*/{CHECKSUMS}")), reverse=True)


def _checksums(path: Path) -> dict[str, str]:
    """sha256 of every file, the work shared among the ranks."""
    names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    mine = {name: _sha256(path / name) for name in names[parallel.rank() :: parallel.num_ranks()]}
    return {name: digest for part in parallel.gather_objects(mine) for name, digest in part.items()}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _rng_state() -> dict[str, torch.Tensor]:
    state = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state()
    return state


def _write_json(path: Path, content: dict[str, Any]) -> None:
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
