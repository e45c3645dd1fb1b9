"""Reads tars of img2dataset: KEY.jpg, KEY.txt, KEY.json."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.data.shards.tar_reader import IMAGE_EXTENSIONS, Member, iter_members, split_name
from mvptr_ds.data.shards.tar_reader import list_tars as tars_of_folder
from mvptr_ds.errors import DataError

_READ = frozenset(("txt", "json", *IMAGE_EXTENSIONS))
_MAX_TEXT_BYTES = 1 << 20
_AMBIGUOUS = "row: several pictures or captions under one key"


def list_tars(sources: Iterable[Path]) -> list[Path]:
    """Returns the given tars, and those in the given folders, in the order of their names.

    Raises:
        DataError: none there, two of one name, or a name that is not UTF-8.
    """
    tars: list[Path] = []
    for source in sources:
        found = tars_of_folder(source) if source.is_dir() else [source]
        if not found or not all(tar.is_file() for tar in found):
            raise DataError(f"{source} holds no .tar file; give img2dataset's output folder (output_format webdataset)")
        tars += found
    names = [tar.name for tar in tars]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise DataError(f"two tars are named {twice}; build the folders one by one")
    return tars


def scan_tar(tar: Path, file: BinaryIO, summary: Summary) -> dict[str, dict[str, Member]]:
    """Returns the members of every whole record, by key and extension; what follows damage is left out.

    A record with a member twice or with two pictures is dropped: whose caption it holds cannot be told.
    """
    records: dict[str, dict[str, Member]] = {}
    repeated: dict[str, Counter[str]] = {}  # key -> how often each extension came again
    key = None
    try:
        for member in iter_members(file, tar.stat().st_size, whole=True):
            try:
                member_key, extension = split_name(member)
            except DataError as error:
                summary.drop("member: name is not KEY.extension", f"{tar.name}: {error}")
                continue
            if member_key != key and member_key in records:
                summary.drop("member: its key was seen before in the tar", f"{tar.name}, {member.name}")
                continue
            key = member_key
            members = records.setdefault(key, {})
            if extension in members:
                repeated.setdefault(key, Counter())[extension] += 1
            elif extension in _READ:
                members[extension] = member
    except DataError as error:
        summary.drop("tar: damaged, skipped from there on", f"{tar.name}: {error}")
        if key is not None:
            del records[key]  # its members may be among what is lost
    for key, members in list(records.items()):
        times = repeated.get(key, Counter())
        if times or sum(extension in IMAGE_EXTENSIONS for extension in members) > 1:
            found = ", ".join((*members, *times.elements()))
            summary.drop(_AMBIGUOUS, f"{tar.name}, {key}: {found}", 1 + max(times.values(), default=0))
            del records[key]
    return records


def read_caption(file: BinaryIO, members: Mapping[str, Member]) -> str:
    """Returns the caption of a record: its txt member, or `caption` of its json member; "" when there is none.

    Bytes that are not UTF-8 become lone surrogates, which the check of captions counts.
    """
    if "txt" in members:
        return _text(file, members["txt"])
    try:
        caption = json.loads(_text(file, members["json"]))["caption"]
    except (KeyError, TypeError, ValueError, RecursionError):
        return ""
    return caption if isinstance(caption, str) else ""


def _text(file: BinaryIO, member: Member) -> str:
    file.seek(member.data)
    return file.read(min(member.size, _MAX_TEXT_BYTES)).decode("utf-8-sig", "surrogateescape")
