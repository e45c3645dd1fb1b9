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

All ranks call every public function here together, but for `complete`, which any rank may call alone.
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

from safetensors import SafetensorError

from mvptr_ds.checkpoints.rng import save_rng
from mvptr_ds.checkpoints.state import STATE, CheckpointState
from mvptr_ds.distributed import collectives
from mvptr_ds.errors import CheckpointError, StorageError, may_pass
from mvptr_ds.user_io.atomic import replacing

logger = logging.getLogger(__name__)
CHECKSUMS = "checksums.json"
LATEST = "latest"
STEP = re.compile(r"step-\d+")  # other names beside them are a user's own
UNREADABLE = "unreadable"
START_OVER = "bring a copy back, or begin anew, in another run.dir or with train.resume=never, which keeps the old ones"
PASSED_OVER = "passed-over"


@dataclass(frozen=True)
class CheckpointWriter:
    """Saves the checkpoints of a stage, and removes the ones that newer ones supersede."""

    folder: Path
    keep: int  # how many of the newest stay
    keep_every_steps: int = 0  # checkpoints at multiples of it stay for good; 0: none of them
    best_step: int | None = None  # its checkpoint stays, too

    def save(
        self,
        state: CheckpointState,
        write_engine: Callable[[Path], None],
        write_model: Callable[[Path], None],
        must: bool = False,
    ) -> Path | None:
        """Writes `step-N`, then its checksums, then points `latest` at it, then removes what is not to be kept.

        A write that fails on any rank (no space left) is reported and its remains are removed. The older checkpoints
        stay as they were, and the run may continue, unless nothing is to be saved after it.

        Args:
            write_engine: writes the engine's files below a folder, on every rank; raises only when all its collectives
                are done.
            write_model: writes the model folder, on rank 0.
            must: whether a save that fails is an error, because no later save makes up for it.

        Returns:
            The checkpoint; None where it could not be written.

        Raises:
            CheckpointError, StorageError: on all ranks, where it could not be written though it `must`.
        """
        path = self.folder / f"step-{state.step:08d}"

        def clear() -> None:
            if collectives.is_main():
                if _is_complete(path):  # which this run could not use
                    _pass_over(path)
                shutil.rmtree(path, ignore_errors=True)
                path.mkdir(parents=True)

        def write_rest() -> None:
            save_rng(path)
            if collectives.is_main():
                write_model(path / "model")
                _write_json(path / STATE, state.to_json())

        checksums: dict[str, str] = {}

        def hash_files() -> None:
            checksums.update(_checksums(path))

        def publish() -> None:
            unreadable = {name: why for name, why in checksums.items() if why.startswith(UNREADABLE)}
            if unreadable:
                raise OSError(errno.EIO, f"written, but then {unreadable}")
            if collectives.is_main():
                _write_json(path / CHECKSUMS, checksums)
                with replacing(self.folder / LATEST) as partial:
                    partial.write_text(path.name, encoding="utf-8")

        # Every part ends on all ranks before the next begins: none waits in a collective for a rank that has failed.
        parts = (clear, lambda: write_engine(path / "engine"), write_rest, hash_files, publish)
        problem = next((problem for problem in map(_try_on_all_ranks, parts) if problem is not None), None)
        if problem is None:
            if collectives.is_main():
                self._prune(path)
            collectives.barrier()
            return path
        if collectives.is_main():
            _remove(path)
            if not must:
                logger.error("no checkpoint at step %d, going on without: %s", state.step, problem.text)
        if must:
            raise _failed_save(self.folder, state.step, problem)
        collectives.barrier()
        return None

    def _prune(self, newest: Path) -> None:
        """Removes what the newest checkpoint has superseded, and moves later ones to `passed-over`."""
        try:
            found = complete(self.folder)
            # This run could not use the later ones. They stay until it has saved the same step, so that nothing is
            # lost before it is replaced.
            later = [path for path in found if _step_of(path) > _step_of(newest)]
            for path in later:
                _pass_over(path)
            for old in found[len(later) + max(1, self.keep) :]:
                stays = self.keep_every_steps and _step_of(old) % self.keep_every_steps == 0
                if not stays and _step_of(old) != self.best_step:
                    _remove(old)
            for torn in self.folder.glob("step-*"):  # remains of a save that was killed
                if STEP.fullmatch(torn.name) and torn.name != newest.name and not _is_complete(torn):
                    _remove(torn)
            for path in complete(self.folder / PASSED_OVER):
                if _step_of(path) <= _step_of(newest):
                    _remove(path)
        except OSError as error:  # the next save tries again
            logger.warning("older checkpoints in %s are not removed: %s", self.folder, error)


@dataclass(frozen=True)
class _Problem:
    """Why a save failed."""

    text: str  # rank and message
    passes: bool  # whether the reason may pass by itself


def _try_on_all_ranks(action: Callable[[], None]) -> _Problem | None:
    """Runs `action` on every rank. Returns on all of them what went wrong on the first that failed."""
    problem = None
    try:
        action()
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have their own for a full disk
        problem = _Problem(f"rank {collectives.rank()}: {' '.join(str(error).split())[:500]}", may_pass(error))
    return next((p for p in collectives.gather_objects(problem) if p is not None), None)


def _failed_save(folder: Path, step: int, problem: _Problem) -> Exception:
    """The error that ends a run whose last save has failed."""
    found = collectives.of_main(lambda: complete(folder))
    resumes = f"from step {_step_of(found[0])}" if found else "from the beginning"
    text = f"step {step} could not be saved in {folder}: {problem.text}"
    if problem.passes:
        return StorageError(f"{text}; started again, the run goes on {resumes}")
    return CheckpointError(f"{text}; make room there and start again: the run goes on {resumes}")


def _pass_over(path: Path) -> None:
    """Moves a checkpoint to `passed-over`, in place of an earlier one of the same step."""
    target = path.parent / PASSED_OVER / path.name
    target.parent.mkdir(exist_ok=True)
    _remove(target)
    os.replace(path, target)


def _remove(path: Path) -> None:
    """Removes a checkpoint, its checksums first: if cut short, the rest reads as a killed save, not as damage."""
    with suppress(OSError):
        (path / CHECKSUMS).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)


def newest_good(folder: Path, remedy: str = START_OVER) -> Path | None:
    """Returns the newest checkpoint whose every file has its checksum; damaged ones are reported and passed over.

    Args:
        remedy: what the user may do where none is good, as the error says it.

    Returns:
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
    """Returns the error for what `verify` has found: StorageError where files cannot be read, else CheckpointError."""
    if any(UNREADABLE in problem for problem in problems):
        return StorageError(f"{text}start again when the storage can be read")
    return CheckpointError(text + remedy)


def verify(path: Path, part: str = ".") -> str | None:
    """Returns what is wrong with a checkpoint, or with one folder of it alone; None where nothing is."""
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


def complete(folder: Path) -> list[Path]:
    """Returns the complete checkpoints, newest first.

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
    """Whether a checkpoint has its checksums. Where storage fails it counts as complete: `verify` then says why."""
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
    """sha256 of every file, or `unreadable` and why. The ranks share the files, and all get all of them."""
    names = collectives.of_main(  # on network storage the listings of two ranks may differ for a while
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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
