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
      passed-over/            later ones that this run could not use; each stays until the run has saved its step

Every function here is called by all ranks together.
"""

from __future__ import annotations

import errno
import hashlib
import json
import logging
import os
import re
import shutil
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from mvptr_ds.distributed import collectives
from mvptr_ds.errors import CheckpointError, StorageError, may_pass
from mvptr_ds.streams import Stream, seed_sequence

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
LATEST = "latest"
STEP = re.compile(r"step-\d+")  # not what a user has put beside them
UNREADABLE = "unreadable"
BEGIN_ANEW = "bring a copy back, or begin anew, in another run.dir or with train.resume=never, which keeps the old ones"
PASSED_OVER = "passed-over"


def save(
    folder: Path,
    step: int,
    state: dict[str, Any],
    write_engine: Callable[[Path], None],
    write_model: Callable[[Path], None],
    keep: int,
    keep_every_steps: int = 0,
    must: bool = False,
) -> Path | None:
    """Writes `folder/step-N`, then its checksums, then points `latest` at it, then removes what is not to be kept.

    A write that fails on any rank (no space left) is reported, its remains are removed, and the older checkpoints
    stay as they were: the run can go on, unless nothing is to be saved after it.

    Args:
        state: what `state.json` holds besides the step.
        write_engine: writes the engine's files below a folder, on every rank; raises only when all its collectives
            are done.
        write_model: writes the model folder, on rank 0.
        keep: how many of the newest stay.
        keep_every_steps: checkpoints at multiples of it stay for good; 0 keeps none of them.
        must: no later save makes up for one that fails.

    Returns:
        The checkpoint; None where it could not be written.

    Raises:
        CheckpointError, StorageError: on all ranks, where it could not be written though it `must`.
    """
    path = folder / f"step-{step:08d}"

    def clear() -> None:
        if collectives.is_main():
            if _is_complete(path):  # which this run could not use
                _pass_over(path)
            shutil.rmtree(path, ignore_errors=True)
            path.mkdir(parents=True)

    def write_rest() -> None:
        torch.save(_rng_state(), path / f"rng-rank{collectives.rank()}.pt")
        if collectives.is_main():
            write_model(path / "model")
            _write_json(path / "state.json", {"step": step, "num_ranks": collectives.num_ranks(), **state})

    checksums: dict[str, str] = {}

    def publish() -> None:
        unreadable = {name: why for name, why in checksums.items() if why.startswith(UNREADABLE)}
        if unreadable:
            raise OSError(errno.EIO, f"written, but then {unreadable}")
        if collectives.is_main():
            _write_json(path / CHECKSUMS, checksums)
            (folder / f"{LATEST}.partial").write_text(path.name, encoding="utf-8")
            os.replace(folder / f"{LATEST}.partial", folder / LATEST)

    def hash_files() -> None:
        checksums.update(_checksums(path))

    parts = (clear, lambda: write_engine(path / "engine"), write_rest, hash_files, publish)
    problem = next((problem for problem in map(_on_all, parts) if problem is not None), None)
    if problem is None:
        if collectives.is_main():
            _prune(folder, path, keep, keep_every_steps)
        collectives.barrier()
        return path
    if collectives.is_main():
        _remove(path)
        if not must:
            logger.error("no checkpoint at step %d, going on without: %s", step, problem.text)
    if must:
        raise _unsaved(folder, step, problem)
    collectives.barrier()
    return None


@dataclass(frozen=True)
class _Problem:
    """Why a save failed: rank and message, and whether the reason may pass by itself."""

    text: str
    passes: bool


def _on_all(action: Callable[[], None]) -> _Problem | None:
    """Runs `action` on every rank; what went wrong on any of them, on all of them."""
    problem = None
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        problem = _Problem(f"rank {collectives.rank()}: {' '.join(str(error).split())[:500]}", may_pass(error))
    return next((p for p in collectives.gather_objects(problem) if p is not None), None)


def _unsaved(folder: Path, step: int, problem: _Problem) -> Exception:
    """What ends a run whose last save has failed."""
    there = collectives.of_main(lambda: complete(folder))
    goes_on = f"from step {_step_of(there[0])}" if there else "from the beginning"
    text = f"step {step} could not be saved in {folder}: {problem.text}"
    if problem.passes:
        return StorageError(f"{text}; started again, the run goes on {goes_on}")
    return CheckpointError(f"{text}; make room there and start again: the run goes on {goes_on}")


def _prune(folder: Path, newest: Path, keep: int, keep_every_steps: int) -> None:
    """Removes what the newest checkpoint has superseded, and takes out of the way what is later than it."""
    try:
        found = complete(folder)
        # this run could not use the later ones; what they hold is lost to nobody before it has come as far
        later = [path for path in found if _step_of(path) > _step_of(newest)]
        for path in later:
            _pass_over(path)
        for old in found[len(later) + max(1, keep) :]:
            if not keep_every_steps or _step_of(old) % keep_every_steps:
                _remove(old)
        for torn in folder.glob("step-*"):  # remains of a save that was killed
            if STEP.fullmatch(torn.name) and torn.name != newest.name and not _is_complete(torn):
                _remove(torn)
        for path in complete(folder / PASSED_OVER):
            if _step_of(path) <= _step_of(newest):
                _remove(path)
    except OSError as error:  # the next save tries again
        logger.warning("older checkpoints in %s are not removed: %s", folder, error)


def _pass_over(path: Path) -> None:
    target = path.parent / PASSED_OVER / path.name
    target.parent.mkdir(exist_ok=True)
    _remove(target)
    os.replace(path, target)


def _remove(path: Path) -> None:
    """Takes away its checksums first: cut short, it leaves what reads as a save that was killed, not as damage."""
    with suppress(OSError):
        (path / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def newest_good(folder: Path, remedy: str = BEGIN_ANEW) -> Path | None:
    """The newest checkpoint whose every file has its checksum; damaged ones are reported and passed over.

    None where there is no complete one.

    Raises:
        CheckpointError: none of the complete ones is good, with what is wrong with each.
        StorageError: the same, but some could not be read at all.
    """
    names = collectives.of_main(lambda: [path.name for path in complete(folder)])
    problems: list[str] = []
    for number, path in enumerate((folder / name for name in names), start=1):
        problem = verify(path)
        if problem is None:
            return path
        problems.append(f"{path.name}: {problem}")
        if collectives.is_main() and number < len(names):
            logger.warning("checkpoint %s is damaged (%s); trying the one before it", path, problem)
    if not problems:
        return None
    raise damaged(f"no checkpoint in {folder} is good:\n  - " + "\n  - ".join(problems) + "\n  ", problems, remedy)


def damaged(text: str, problems: Sequence[str], remedy: str) -> Exception:
    """The error of what `verify` has found, which tells storage that fails from files that have changed."""
    if any(UNREADABLE in problem for problem in problems):
        return StorageError(f"{text}start again when the storage can be read")
    return CheckpointError(text + remedy)


def verify(path: Path, part: str = ".") -> str | None:
    """What is wrong with a checkpoint, or with one folder of it alone; None where all is well."""
    expected = collectives.of_main(lambda: _read_checksums(path))
    if isinstance(expected, str):
        return expected
    try:
        found = _checksums(path, part)
    except OSError as error:
        return f"{UNREADABLE} ({error})"
    for name, digest in expected.items():
        if not Path(name).is_relative_to(part):
            continue
        if name not in found:
            return f"{name} is missing"
        if found[name] != digest:
            return f"{name} has changed" if not found[name].startswith(UNREADABLE) else f"{name} is {found[name]}"
    return None


def _read_checksums(path: Path) -> dict[str, str] | str:
    """The content of `checksums.json`, or what is wrong with it."""
    try:
        content = json.loads((path / CHECKSUMS).read_text(encoding="utf-8"))
    except OSError as error:
        return f"{CHECKSUMS} is {UNREADABLE} ({error})"
    except ValueError:
        content = None
    return content if isinstance(content, dict) else f"{CHECKSUMS} is no list of checksums"


def read_state(path: Path) -> dict[str, Any]:
    """The content of `state.json`."""
    content = json.loads((path / "state.json").read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def restore_rng(path: Path) -> None:
    """Puts back this rank's random state."""
    saved = torch.load(path / f"rng-rank{collectives.rank()}.pt", weights_only=True)
    torch.set_rng_state(saved["cpu"])
    if torch.cuda.is_available() and "cuda" in saved:
        torch.cuda.set_rng_state(saved["cuda"])


def begin_rng(seed: int) -> None:
    """The random state of this rank at a stage's first step: dropout differs between ranks."""
    torch.manual_seed(seed + 1_000_003 * (1 + collectives.rank()))  # of the GPU too


def seed_rng(seed: int, step: int) -> None:
    """A random state for a rank that has none: on another number of ranks all begin anew, by (seed, step, rank)."""
    words = seed_sequence(Stream.NEW_RANKS, seed, step, collectives.rank()).generate_state(2)
    torch.manual_seed(int(words[0]) << 31 | int(words[1]) >> 1)


def complete(folder: Path) -> list[Path]:
    """Complete checkpoints, newest first; not together, but by one rank.

    Raises:
        StorageError, OSError: the folder is there and cannot be listed.
    """
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    except OSError as error:
        if may_pass(error):
            raise StorageError(f"{folder} cannot be listed: {error}") from error
        raise
    found = [folder / name for name in names if STEP.fullmatch(name)]
    return sorted(filter(_is_complete, found), key=_step_of, reverse=True)


def _is_complete(path: Path) -> bool:
    """Whether a checkpoint has its checksums; where they cannot be looked at, `verify` says why."""
    try:
        (path / CHECKSUMS).stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError:
        return True
    return True


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _checksums(path: Path, part: str = ".") -> dict[str, str]:
    """sha256 of every file, the work shared among the ranks; of one that cannot be read: `unreadable` and why."""
    names = collectives.of_main(  # whose listing holds for all: on network storage they may differ for a while
        lambda: sorted(
            str(p.relative_to(path)) for p in (path / part).rglob("*") if p.is_file() and p.name != CHECKSUMS
        )
    )
    mine = {name: _sha256(path / name) for name in names[collectives.rank() :: collectives.num_ranks()]}
    return {name: digest for part in collectives.gather_objects(mine) for name, digest in part.items()}


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
