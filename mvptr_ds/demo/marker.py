"""The file of a drawn folder that says with which arguments it was made; it comes last and vouches for the rest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mvptr_ds.errors import DataError
from mvptr_ds.user_io.user_files import parse_json, read_text


class FolderTakenError(DataError):
    """The folder holds something else than the drawn shards that are asked for; nothing of it is replaced."""


def was_made(folder: Path, marker: str, arguments: Mapping[str, Any], what: str, names: Mapping[str, str]) -> bool:
    """Returns whether a folder was made with these arguments; False where it is missing or empty.

    Args:
        marker: name of the file with the arguments.
        what: what the folder holds, for messages; `names` says what its arguments are called there.

    Raises:
        FolderTakenError: it was made with others, or holds something else.
    """
    path = folder / marker
    if path.is_file():
        before = parse_json(read_text(path), str(path))
        differ = [
            f"{name} {before.get(key)} there, {arguments[key]} here"
            for key, name in names.items()
            if before.get(key) != arguments[key]
        ]
        if differ:
            raise FolderTakenError(f"{folder} holds {what} of other arguments ({'; '.join(differ)})")
        return True
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FolderTakenError(f"{folder} holds other files and no {marker}")
    return False


def write_marker(folder: Path, marker: str, content: Mapping[str, Any]) -> None:
    """Writes the arguments, and what else the content says, into a folder that is complete but for this file."""
    (folder / marker).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
