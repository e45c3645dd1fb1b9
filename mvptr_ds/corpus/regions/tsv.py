"""Reads lines of big TSV files, at the offsets of a `.lineidx` (one byte offset a line) or of the file itself.

Legend: L lines.
"""

from __future__ import annotations

import codecs
import json
import os
from pathlib import Path

import numpy as np

from mvptr_ds.data.shards.storage import open_files
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.progress import progress_bar

_ID_BYTES = 256  # of a line, within which the first column must end


class Table:
    """The lines of a TSV by offset, blank ones left out.

    `spans_L2` is int64 [L, 2], offset and number of bytes of each line; `ids` its first column, None where it has none.

    Raises:
        DataError: the file is absent or empty, or its `.lineidx` is not of this file.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        if not path.is_file() or not path.stat().st_size:
            raise DataError(f"{path} is absent or empty; give the .tsv file itself")
        with open(path, "rb") as file:
            has_mark = file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8
        self._start = len(codecs.BOM_UTF8) if has_mark else 0  # of the first line
        offsets_L = _read_lineidx(path)
        offsets_L = _find_lines(path) if offsets_L is None else offsets_L
        self.spans_L2 = _spans(np.maximum(offsets_L, self._start), path.stat().st_size)
        self.ids = self._read_ids()

    def _read_ids(self) -> list[str | None]:
        ids: list[str | None] = []
        descriptor = open_files.get(str(self.path))
        for number, (offset, num_bytes) in enumerate(self.spans_L2.tolist()):
            before = min(offset - self._start, 1)
            head = os.pread(descriptor, before + min(num_bytes, _ID_BYTES), offset - before)
            if before and head[:1] != b"\n":
                raise DataError(
                    f"line {number} of {self.path} does not begin at byte {offset}, as its .lineidx says; remove the "
                    ".lineidx, it is of another file"
                )
            image_id, tab, _ = head[before:].partition(b"\t")
            usable = bool(tab and image_id.strip()) and b"\n" not in image_id
            ids.append(image_id.strip().decode("utf-8", "replace") if usable else None)
        return ids

    def check_numbers(self, path: Path) -> None:
        """Compares the ids with an `imageid2idx.json`.

        Raises:
            DataError: it cannot be read, or names another line for an image.
        """
        try:
            line_of = dict(json.loads(path.read_text(encoding="utf-8-sig")))
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{path} cannot be read ({error}); remove it, it is not needed") from error
        for image_id, line in line_of.items():
            found = self.ids[line] if isinstance(line, int) and 0 <= line < len(self.ids) else None
            if found is None or without_zeros(found) != without_zeros(image_id):
                raise DataError(
                    f"{path} says that image {image_id!r} is line {line!r} of {self.path.name}, which has "
                    f"{len(self.ids)} lines and {found!r} there; one of the two is of another download"
                )


def _read_lineidx(tsv: Path) -> np.ndarray | None:
    """Returns int64 [L]: the offsets of a .lineidx file, or None where there is no such file."""
    path = tsv.with_suffix(".lineidx")
    if not path.is_file():
        return None
    try:
        offsets_L = np.array([int(line) for line in path.read_text(encoding="utf-8-sig").split()], dtype=np.int64)
    except (ValueError, OverflowError) as error:
        raise DataError(
            f"{path} is no list of byte offsets ({error}); remove it, the lines are found without"
        ) from error
    size = tsv.stat().st_size
    if not len(offsets_L) or offsets_L[0] or (np.diff(offsets_L) <= 0).any() or offsets_L[-1] >= size:
        raise DataError(
            f"{path} does not fit {tsv} of {size} bytes: offsets begin at 0, grow and stay within it; remove the "
            ".lineidx if it is of another file, or get the .tsv again if that was cut"
        )
    return offsets_L


def _find_lines(path: Path) -> np.ndarray:
    """Returns int64 [L]: where the lines of a file begin."""
    starts = [np.zeros(1, dtype=np.int64)]
    size, offset = path.stat().st_size, 0
    with (
        open(path, "rb") as file,
        progress_bar(total=size, unit="B", unit_scale=True, desc=f"lines of {path.name}", delay=2.0) as bar,
    ):
        while chunk := file.read(1 << 24):
            starts.append(np.flatnonzero(np.frombuffer(chunk, dtype=np.uint8) == ord("\n")) + (offset + 1))
            offset += len(chunk)
            bar.update(len(chunk))
    offsets_L = np.concatenate(starts)
    return offsets_L[offsets_L < size]


def _spans(offsets_L: np.ndarray, size: int) -> np.ndarray:
    """Returns int64 [L, 2]: offset and number of bytes of each line, blank ones left out."""
    num_bytes_L = np.diff(offsets_L, append=size)
    return np.stack([offsets_L, num_bytes_L], axis=1)[num_bytes_L > 1]


def without_zeros(image_id: str) -> str:
    """Returns an id without zeros in front: only some files of a data set write them."""
    return (image_id.lstrip("0") or "0") if image_id.isascii() and image_id.isdigit() else image_id
