"""File access by ranges: local files by `pread`, files behind a URL by requests (remote.py)."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict

_MAX_OPEN_FILES = 64


class Files(ABC):
    """Reads ranges of files of one kind of storage. Picklable; each process opens its own files."""

    @abstractmethod
    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        """Returns that range of a file, cut where the file ends before.

        Raises:
            OSError: the file cannot be read.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """Returns the bytes of a file."""


class OpenFiles(threading.local):
    """Keeps the open descriptors of a thread; of more than 64 the longest unused is closed."""

    def __init__(self) -> None:
        self._open: OrderedDict[str, int] = OrderedDict()

    def get(self, path: str) -> int:
        if path in self._open:
            self._open.move_to_end(path)
        else:
            self._open[path] = os.open(path, os.O_RDONLY)
            if len(self._open) > _MAX_OPEN_FILES:
                os.close(self._open.popitem(last=False)[1])
        return self._open[path]

    def close(self) -> None:
        while self._open:
            os.close(self._open.popitem()[1])


open_files = OpenFiles()


class LocalFiles(Files):
    """Reads files of this machine."""

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        return os.pread(open_files.get(path), num_bytes, offset)

    def size(self, path: str) -> int:
        return os.fstat(open_files.get(path)).st_size


LOCAL = LocalFiles()
