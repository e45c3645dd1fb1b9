"""Reads sources of one modality: sentences, and folders of images."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.corpus.sources.rows import Row, clean_caption, iter_lines
from mvptr_ds.errors import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_text(source: Path, summary: Summary) -> Iterator[Row]:
    """Yields a row for each line, a sentence whose id is a hash of it, so that repeated ones are found."""
    for _, line in iter_lines(source, summary):
        content = clean_caption(line).encode("utf-8", "surrogatepass")
        yield Row(f"text-{hashlib.blake2b(content, digest_size=12).hexdigest()}", (line,))


def read_image_folder(source: Path, summary: Summary) -> Iterator[Row]:
    """Yields a row for every image below a folder, whose id is its path; other files are counted.

    Links to folders are followed after the folders themselves, and each folder is read once: what a link leads to
    again is counted, and so is a folder that cannot be read.

    Raises:
        DataError: there is no such folder.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give the folder of pictures")

    def count(error: OSError) -> None:
        summary.drop("folder: cannot be read", f"{_below(source, Path(error.filename))}: {error.strerror}")

    known: set[tuple[int, int]] = set()  # device and inode of every folder that was read
    links = deque([source])
    while links:
        walk = os.walk(links.popleft(), onerror=count)
        for folder, folders, names in walk:
            status = os.stat(folder)
            if (identity := (status.st_dev, status.st_ino)) in known:
                summary.drop("folder: reached in several ways, read once", _below(source, Path(folder)))
                folders.clear()
                continue
            known.add(identity)
            folders.sort()
            links += (Path(folder, name) for name in folders if Path(folder, name).is_symlink())
            for path in (_below(source, Path(folder, name)) for name in sorted(names)):
                if path.lower().endswith(PICTURE_SUFFIXES):
                    yield Row(path, (), path)
                else:
                    summary.drop("file: no picture by its name", path)


def _below(source: Path, path: Path) -> str:
    return path.relative_to(source).as_posix()
