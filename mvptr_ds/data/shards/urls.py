"""Shards behind a URL: which schemes are read, and how."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from mvptr_ds.errors import DataError

# what holds files and does nothing else; fsspec has more, some of which run programs or unpack archives
SCHEMES = (
    "http", "https", "s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "adl", "oss", "oci", "hf",
    "hdfs", "webhdfs", "sftp", "ssh", "ftp", "memory",
)  # fmt: skip


@dataclass(frozen=True)
class ReadOptions:
    """How shards behind a URL are read."""

    ahead_mib: int = 256  # what a process may fetch ahead
    retries: int = 3  # of a request that failed or stalled
    timeout_s: float = 20.0  # of one request
    cache_dir: str | None = None  # where indices are kept; None: ~/.cache/mvptr_ds (XDG_CACHE_HOME)

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
    """Tells whether shards lie behind a URL, and not in a folder of this machine.

    Raises:
        DataError: the scheme of the URL is not read (`pipe:` and its like run programs), or several are chained.
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
