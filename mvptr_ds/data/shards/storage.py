"""Where the bytes of shards come from: local files by `pread`, any other place by range requests (data.remote)."""

from __future__ import annotations

import os
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path

from mvptr_ds.errors import DataError

MANIFEST_NAME = "manifest.json"  # what a folder of shards holds besides them
INDEX_NAME = "index.npy"
REBUILD = "rebuild the index with tools/validate_shards.py"
_MAX_OPEN_FILES = 64
# what holds files and does nothing else; fsspec has more, some of which run programs or unpack archives
SCHEMES = (
    "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf",
    "hdfs", "webhdfs", "sftp", "ssh", "ftp", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class ReadOptions:
    """How shards that are not local files are read."""

    ahead_mib: int = 256  # what a process may hold of what it is about to need
    retries: int = 3  # of a request that failed or stalled
    timeout_s: float = 20.0  # of one request
    cache_dir: str | None = None  # where their indices are kept; None: ~/.cache/mvptr_ds (XDG_CACHE_HOME)

    def __post_init__(self) -> None:
        if self.ahead_mib < 1 or self.retries < 0 or not self.timeout_s > 0:
            raise ValueError(
                f"data.read_ahead_mib={self.ahead_mib} must be at least 1, data.read_retries={self.retries} at least "
                f"0, data.read_timeout_s={self.timeout_s} above 0"
            )

    @property
    def index_folder(self) -> Path:
        base = os.path.expanduser(os.environ.get("XDG_CACHE_HOME") or "~/.cache")
        return Path(self.cache_dir or os.path.join(base, "mvptr_ds")) / "indices"


def is_url(folder: str | Path) -> bool:
    """Whether shards lie elsewhere than in a folder of this machine.

    Raises:
        DataError: a URL of a scheme that is not read: `pipe:` and its like, which run programs, or several chained.
    """
    name = str(folder)
    scheme = name.partition(":")[0].lower()
    if "::" not in name and "://" not in name and scheme != "pipe":
        return False
    if not isinstance(folder, str) or "::" in name or "://" not in name or scheme not in SCHEMES:
        raise DataError(
            f"{name} cannot be read as a folder of shards; give a folder of this machine, or a URL of one of "
            f"{', '.join(SCHEMES)}"
        )
    return True


class Files(ABC):
    """Files of one kind of place, read in ranges; picklable, and each process opens its own."""

    @abstractmethod
    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        """That range of a file, less where the file ends before.

        Raises:
            OSError: it cannot be read.
        """

    @abstractmethod
    def size(self, path: str) -> int:
        """Bytes of a file."""


class OpenFiles(threading.local):
    """Open descriptors of a thread, the longest unused closed first."""

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
    """Files of this machine."""

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        return os.pread(open_files.get(path), num_bytes, offset)

    def size(self, path: str) -> int:
        return os.fstat(open_files.get(path)).st_size


LOCAL = LocalFiles()
