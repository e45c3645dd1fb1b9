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
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mvptr_ds import parallel
from mvptr_ds.config import Config, load_config
from mvptr_ds.streams import Stream, seed_sequence

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
LATEST = "latest"
UNREADABLE = "unreadable"


class CheckpointError(ValueError):
    """A checkpoint cannot be used; the message says which, why, and what to do."""


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    write_engine: Callable[[Path], None],
    write_model: Callable[[Path], None],
    keep: int,
    keep_every_steps: int = 0,
) -> Path | None:
    """Writes `folder/step-N`, then its checksums, then points `latest` at it, then removes what is not to be kept.

    A write that fails on any rank (no space left) is reported, its remains are removed, and the older checkpoints
    stay as they were: the run can go on.

    Args:
        state: what `state.json` holds besides the step.
        write_engine: writes the engine's files below a folder, on every rank; raises only when all its collectives
            are done.
        write_model: writes the model folder, on rank 0.
        keep: how many of the newest stay.
        keep_every_steps: checkpoints at multiples of it stay for good; 0 keeps none of them.

    Returns:
        The checkpoint; None where it could not be written.
    """
    path = folder / f"step-{step:08d}"

    def clear() -> None:
        if parallel.is_main():
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)

    def write_rest() -> None:
        torch.save(_rng_state(), path / f"rng-rank{parallel.rank()}.pt")
        if parallel.is_main():
            write_model(path / "model")
            _write_json(path / "state.json", {"step": step, "num_ranks": parallel.num_ranks(), **state})

    def publish() -> None:
        unreadable = {name: why for name, why in checksums.items() if why.startswith(UNREADABLE)}
        if unreadable:
            raise OSError(f"written, but then {unreadable}")
        if parallel.is_main():
            _write_json(path / CHECKSUMS, checksums)
            (folder / f"{LATEST}.partial").write_text(path.name, encoding="utf-8")
            os.replace(folder / f"{LATEST}.partial", folder / LATEST)

    problem = _on_all(clear) or _on_all(lambda: write_engine(path / "engine")) or _on_all(write_rest)
    if problem is None:
        checksums = _checksums(path)
        problem = _on_all(publish)
    if parallel.is_main():
        if problem is not None:
            _remove(path)
            logger.error("no checkpoint at step %d, going on without: %s", step, problem)
        else:
            _prune(folder, path, keep, keep_every_steps)
    parallel.barrier()
    return path if problem is None else None


def _on_all(action: Callable[[], None]) -> str | None:
    """Runs `action` on every rank; what went wrong on any of them, on all of them."""
    problem = None
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        problem = f"rank {parallel.rank()}: {' '.join(str(error).split())[:500]}"
    return next((p for p in parallel.gather_objects(problem) if p is not None), None)


def _prune(folder: Path, newest: Path, keep: int, keep_every_steps: int) -> None:
    complete = _complete(folder)
    # later ones come from a run that was started again, or are damaged: this run goes on without them
    later = [p for p in complete if p.name > newest.name]
    for old in [*later, *complete[len(later) + max(1, keep) :]]:
        step = int(old.name.removeprefix("step-"))
        if old in later or not keep_every_steps or step % keep_every_steps:
            _remove(old)
    for torn in folder.glob("step-*"):  # remains of a save that was killed
        if torn.name != newest.name and not (torn / CHECKSUMS).exists():
            _remove(torn)


def _remove(path: Path) -> None:
    """Takes away its checksums first: cut short, it leaves what reads as a save that was killed, not as damage."""
    with suppress(OSError):
        (path / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def check_resume(mode: str) -> None:
    """Raises ValueError for another `train.resume` than `auto`, `never`."""
    if mode not in ("auto", "never"):
        raise ValueError(f"train.resume is {mode!r}; choose from auto, never")


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
    expected = parallel.broadcast_object(_read_checksums(path) if parallel.is_main() else None)
    if expected is None:
        return f"{CHECKSUMS} cannot be read"
    found = _checksums(path)
    for name, digest in expected.items():
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed" if not found[name].startswith(UNREADABLE) else f"{name} is {found[name]}"
    return None


def _read_checksums(path: Path) -> dict[str, str] | None:
    try:
        content = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


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


def begin_rng(seed: int) -> None:
    """The random state of this rank at a stage's first step: dropout differs between ranks."""
    torch.manual_seed(seed + 1_000_003 * (1 + parallel.rank()))  # of the GPU too


def seed_rng(seed: int, step: int) -> None:
    """A random state for a rank that has none: on another number of ranks all begin anew, by (seed, step, rank)."""
    words = seed_sequence(Stream.NEW_RANKS, seed, step, parallel.rank()).generate_state(2)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def newest_state(run_dir: Path, stages: Sequence[str]) -> dict[str, Any] | None:
    """`state.json` of the newest checkpoint of the last stage that has one; nothing is verified. None without any."""
    state = None
    if parallel.is_main():
        for path in (path for stage in stages for path in reversed(_complete(run_dir / stage / "checkpoints"))):
            with suppress(OSError, ValueError):
                state = read_state(path)
    state = parallel.broadcast_object(state)
    assert state is None or isinstance(state, dict)
    return state


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


def first_model(config: Config) -> Path | None:
    """The model folder that the first of `run.stages` starts from, as `run.init_from` says; None: fresh weights.

    Raises:
        CheckpointError: there is none where it says; or stage 2 is to follow on a stage 1 that is not finished.
    """
    if config.run.init_from != "auto":
        return find_model(Path(config.run.init_from)) if config.run.init_from else None
    run_dir = Path(config.run.dir)
    if config.stage_names[0] != "stage2":
        return None
    resumes = config.train.resume == "auto" and _complete(run_dir / "stage2" / "checkpoints")
    if parallel.broadcast_object(bool(resumes) and not (run_dir / "stage1").is_dir()):
        return None  # its own checkpoint holds everything
    newest = newest_good(run_dir / "stage1" / "checkpoints")
    if newest is None:
        raise CheckpointError(
            f"stage 2 starts from a finished stage 1, and {run_dir / 'stage1'} holds no complete checkpoint: train it "
            "first (run.stages=[1]), name another start (run.init_from=...), or begin with fresh weights "
            "(run.init_from=null)"
        )
    step, max_steps = read_state(newest)["step"], load_config(newest / "model/mvptr.yaml").stage1.max_steps
    if step < max_steps:
        raise CheckpointError(
            f"stage 2 starts from a finished stage 1, and that of {run_dir} is at step {step} of {max_steps}: let it "
            f"finish first (run.stages=[1]), or take it as it is (run.init_from={run_dir / 'stage1'})"
        )
    return newest / "model"


def _complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first."""
    return sorted((p.parent for p in folder.glob(f"step-*/{CHECKSUMS}")), reverse=True)


def _checksums(path: Path) -> dict[str, str]:
    """sha256 of every file, the work shared among the ranks; of one that cannot be read: `unreadable` and why."""
    names: list[str] = []
    if parallel.is_main():  # whose listing holds for all: on network storage they may differ for a while
        names = sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file() and p.name != CHECKSUMS)
    names = parallel.broadcast_object(names)
    mine = {name: _sha256(path / name) for name in names[parallel.rank() :: parallel.num_ranks()]}
    return {name: digest for part in parallel.gather_objects(mine) for name, digest in part.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        return f"{UNREADABLE} ({error})"
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
