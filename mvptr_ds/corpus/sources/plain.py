"""Sources of one modality: sentences, and folders of pictures."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from mvptr_ds.corpus.jobs import Summary
from mvptr_ds.corpus.sources.rows import Row, clean_caption, iter_lines
from mvptr_ds.data.schema import DataError

PICTURE_SUFFIXES = (".jpg", ".jpeg", ".jpe", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def read_text(source: Path, summary: Summary) -> Iterator[Row]:
    """One sentence a line. Its id is a hash of the sentence, so that a repeated one is found, wherever it stands."""
    for _, line in iter_lines(source, summary):
        content = clean_caption(line).encode("utf-8", "surrogatepass")
        yield Row(f"text-{hashlib.blake2b(content, digest_size=12).hexdigest()}", (line,))


def read_image_folder(source: Path, summary: Summary) -> Iterator[Row]:
    """Every picture below a folder; its id is its path. Files of other names are counted.

    Raises:
        DataError: there is no such folder.
    """
    if not source.is_dir():
        raise DataError(f"{source} is not a folder; give the folder of pictures")
    for folder, folders, names in os.walk(source):
        folders.sort()
        for name in sorted(names):
            path = Path(folder, name).relative_to(source).as_posix()
            if name.lower().endswith(PICTURE_SUFFIXES):
                yield Row(path, (), path)
            else:
                summary.drop("file: no picture by its name", path)
