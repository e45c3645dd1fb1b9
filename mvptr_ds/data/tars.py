"""Tar files from their headers: walk a whole tar (strictly) or the span of one record, read one record by `pread`.

Nothing is ever extracted, unpickled or run.
"""

from __future__ import annotations

import io
import os
import tarfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

from mvptr_ds.data.schema import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MEMBER_EXTENSIONS = frozenset(("json", "npy", *IMAGE_EXTENSIONS))
REBUILD = "rebuild the index with tools/index_shards.py"
_MAX_OPEN_FILES = 64
_BLOCK = tarfile.BLOCKSIZE


@dataclass(frozen=True)
class Member:
    name: str
    start: int  # of its first header, a long name's included
    data: int  # where its content begins
    size: int  # of its content

    @property
    def end(self) -> int:
        return self.data + -(-self.size // _BLOCK) * _BLOCK


class TarError(DataError):
    """A DataError at a byte of a tar."""

    def __init__(self, offset: int, reason: str) -> None:
        super().__init__(f"byte {offset}: {reason}")


def iter_members(file: BinaryIO, num_bytes: int, whole: bool) -> Iterator[Member]:
    """Members of a tar (`whole`: up to its end mark) or of a span of one, from the headers alone.

    Headers go through tarfile's own parser, which checks their sum; the walk is ours because tarfile's stops at a
    damaged header in mid-file as if the archive ended there.

    Raises:
        DataError: damaged header, cut content, missing end mark, content after it, or a link or device.
    """
    offset, start = 0, 0
    long_name: str | None = None
    pax: dict[str, str] = {}
    while offset < num_bytes:
        file.seek(offset)
        block = file.read(_BLOCK)
        if not block.strip(b"\0") and len(block) == _BLOCK and whole:
            _check_tail(file, offset)
            return
        try:
            info = tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
        except tarfile.HeaderError as error:
            raise TarError(offset, f"damaged tar header ({error})") from error
        size = int(pax.get("size", info.size)) if info.type in tarfile.REGULAR_TYPES else info.size
        member = Member(long_name or pax.get("path") or info.name, start, offset + _BLOCK, size)
        if member.end > num_bytes or size < 0:
            raise TarError(offset, f"{member.name!r} is cut: {size} bytes announced, the file ends before")
        if info.type == tarfile.GNUTYPE_LONGNAME:
            long_name = file.read(size).rstrip(b"\0").decode("utf-8", "surrogateescape")
        elif info.type == tarfile.XHDTYPE:
            pax = _parse_pax(file.read(size), offset)
        elif info.type in tarfile.REGULAR_TYPES:
            yield member
            start, long_name, pax = member.end, None, {}
        elif info.type in (tarfile.DIRTYPE, tarfile.XGLTYPE):
            start, long_name, pax = member.end, None, {}
        else:
            raise TarError(offset, f"{member.name!r} is a link or device (type {info.type!r}); store plain files only")
        offset = member.end
    if whole:
        raise TarError(offset, "the tar has no end mark, so its tail is missing")


def _check_tail(file: BinaryIO, offset: int) -> None:
    file.seek(offset)
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise TarError(offset, "there is content after the tar's end mark (two tars joined?)")


def _parse_pax(content: bytes, offset: int) -> dict[str, str]:
    out = {}
    while content.strip(b"\0"):
        length, _, _ = content.partition(b" ")
        if not length.isdigit() or not len(length) < int(length) <= len(content):
            raise TarError(offset, "damaged PAX header")
        name, _, value = content[len(length) + 1 : int(length) - 1].partition(b"=")
        out[name.decode("utf-8", "replace")] = value.decode("utf-8", "surrogateescape")
        content = content[int(length) :]
    if not out.get("size", "0").isdigit():
        raise TarError(offset, f"PAX size {out['size']!r} is not a number")
    return out


def split_name(member: Member) -> tuple[str, str]:
    name = member.name.removeprefix("./")
    key, _, extension = name.rpartition(".")
    if not key or not extension or "/" in extension or "." in key:
        raise TarError(member.start, f"member {member.name!r} is not KEY.extension with a key without dots")
    return key, extension.lower()


class _Files(threading.local):
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


open_files = _Files()


def read_record(path: str, offset: int, num_bytes: int) -> dict[str, bytes]:
    """The members of one record by extension, of those this package reads, by one `pread`.

    Raises:
        DataError: the shard no longer holds a whole record there.
        OSError: the file cannot be read.
    """
    _, members = _read_span(path, offset, num_bytes)
    return members


def record_key(path: str, offset: int, num_bytes: int) -> str:
    """Key of the record at that place, for messages; `?` when it cannot be read."""
    try:
        return _read_span(path, offset, num_bytes)[0]
    except (DataError, OSError):
        return "?"


def _read_span(path: str, offset: int, num_bytes: int) -> tuple[str, dict[str, bytes]]:
    span = os.pread(open_files.get(path), num_bytes, offset)
    if len(span) != num_bytes:
        raise DataError(f"{path} ends {num_bytes - len(span)} bytes too early for its index; {REBUILD}")
    keys, out = set(), {}
    for member in iter_members(io.BytesIO(span), num_bytes, whole=False):
        key, extension = split_name(member)
        keys.add(key)
        if extension in MEMBER_EXTENSIONS:
            out[extension] = span[member.data : member.data + member.size]
    if len(keys) != 1 or "json" not in out:
        raise DataError(f"{path}, byte {offset}: expected one record, found keys {sorted(keys)}; {REBUILD}")
    return keys.pop(), out
