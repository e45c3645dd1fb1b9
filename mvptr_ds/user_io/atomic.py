"""Files and folders that appear whole or not at all: written under a partial name, then renamed.

A reader sees the old content or the new one, never a part. A process that is killed leaves the partial name behind,
which the next writer of the same name replaces.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


def partial_path(path: Path, unique: object = None) -> Path:
    """Returns `NAME.partial` beside a file, or `NAME.UNIQUE.partial`."""
    return path.with_name(f"{path.name}.partial" if unique is None else f"{path.name}.{unique}.partial")


@contextmanager
def replacing(path: Path, unique: object = None) -> Iterator[Path]:
    """Yields the partial path of a file, which the caller writes, and gives it the name `path` at the end.

    On an error the partial file is removed and `path` stays as it was.

    Args:
        unique: a part of the partial name, such as `os.getpid()`, for targets that several processes may write at once.
    """
    partial = partial_path(path, unique)
    try:
        yield partial
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


@contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yields an empty folder beside `path`, and gives it that name at the end; parents are made.

    On an error the folder is removed. `path` must then be missing or an empty folder.

    Raises:
        OSError: `path` holds something.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)  # of a process of the same number that was killed
    partial.mkdir(parents=True)
    try:
        yield partial
        os.replace(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
