"""Runs a part of a test without the rights of root, whom no mode of a file hinders."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

_NOBODY = 65534


@contextlib.contextmanager
def as_ordinary_user() -> Iterator[None]:
    """Within, this process is no longer root if it was. Files are then to be named from the working folder."""
    if os.geteuid() != 0:
        yield
        return
    os.setresuid(_NOBODY, _NOBODY, 0)  # access() asks the real user
    try:
        yield
    finally:
        os.setresuid(0, 0, 0)
