"""Reads tars by their headers: walks a whole tar, strictly, or the span of one record, which it reads.

Nothing is ever extracted, unpickled or run.
"""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from mvptr_ds.data.shards.index_format import REBUILD
from mvptr_ds.data.shards.storage import LOCAL, Files
from mvptr_ds.data.shards.tar_header import (
    FOREIGN_PAX,
    GLOBAL_PAX,
    PLAIN,
    SETTINGS,
    TarError,
    parse_header,
    parse_pax,
)
from mvptr_ds.errors import DataError

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MEMBER_EXTENSIONS = frozenset(("json", "npy", *IMAGE_EXTENSIONS))
MAX_JSON_BYTES = 16 << 20
MAX_MEMBER_BYTES = 64 << 20  # of an image or of features
MAX_RECORD_MEMBERS = 64
MAX_RECORD_BYTES = 256 << 20  # of a record's span, other members included
MAX_HEADER_BYTES = 64 << 10  # of a long name or of PAX settings
MAX_TAIL_BYTES = 2 * tarfile.BLOCKSIZE + tarfile.RECORDSIZE  # end mark and padding, as most tar programs write them
MAX_BLOCKING = 2048  # blocks, of `tar --blocking-factor`: up to 1 MiB of zeros fill a tar to a multiple of them
WHOLE_BYTES = 8 << 20  # a span up to this is read at once, a larger one member by member
_BLOCK = tarfile.BLOCKSIZE
_GLANCE_BYTES = 16 << 10  # read at once where not all is wanted: a json member and the next header, as a rule


class Member(NamedTuple):
    """A member of a tar; places are bytes of the tar."""

    name: str
    start: int  # of its first header, a long name's included
    data: int  # where its content begins
    size: int  # of its content

    @property
    def end(self) -> int:
        return self.data + -(-self.size // _BLOCK) * _BLOCK


def list_tars(folder: Path) -> list[Path]:
    """Lists the tars of a folder, in the order of their names.

    Raises:
        DataError: a path is not UTF-8: no manifest, configuration or message could name it.
    """
    tars = sorted(folder.glob("*.tar"))
    for tar in tars:
        try:
            str(tar).encode()
        except UnicodeEncodeError as error:
            raise DataError(f"the name of the shard {str(tar)!r} is not UTF-8; rename it") from error
    return tars


def is_of_a_mac(name: str) -> bool:
    """Tells whether macOS added a member to a tar: attributes of the member behind it (`._KEY.jpg`), or of a folder.

    webdataset's reader passes over both, too.
    """
    base = name.rpartition("/")[2]
    return base.startswith("._") or base == ".DS_Store"


def iter_members(file: BinaryIO, num_bytes: int, whole: bool, with_mac_files: bool = False) -> Iterator[Member]:
    """Yields the members of a tar, or of a span of one, from the headers alone.

    The walk is ours because tarfile's stops at a damaged header in mid-file as if the archive ended there.

    Args:
        whole: the file is a whole tar, which must end with its end mark.
        with_mac_files: yield what macOS adds, too.

    Raises:
        DataError: damaged header, cut content, missing end mark, content after it, a link, device or sparse file, a
            name that leads out of the folder or is not UTF-8, or a long name or PAX header over MAX_HEADER_BYTES.
    """
    offset, start = 0, 0
    any_members = False
    long_name: str | None = None
    pax: dict[str, str] = {}
    while offset < num_bytes:
        file.seek(offset)
        block = file.read(_BLOCK)
        if not block.strip(b"\0") and len(block) == _BLOCK and whole:
            if start != offset:
                raise TarError(start, "a long name or PAX header stands before the end mark, and no member behind it")
            _check_tail(file, offset, num_bytes, any_members)
            return
        name, size, kind = parse_header(block, offset)
        plain = kind in PLAIN
        if plain and "size" in pax:
            size = int(pax["size"])
        member = Member(long_name or pax.get("path") or name, start, offset + _BLOCK, size)
        if member.end > num_bytes or size < 0:
            raise TarError(offset, f"{member.name!r} is cut: {size} bytes announced, the file ends before")
        if kind in SETTINGS:
            if start != offset:
                raise TarError(
                    offset, "a second long name or PAX header of one member; readers differ in which they take"
                )
            content = _read_settings(file, member, offset)
            if kind == tarfile.GNUTYPE_LONGNAME:
                long_name = content.rstrip(b"\0").decode("utf-8", "surrogateescape")
            elif kind == tarfile.XHDTYPE:
                pax = parse_pax(content, offset, FOREIGN_PAX)
            else:
                parse_pax(content, offset, GLOBAL_PAX)
                start, long_name, pax = member.end, None, {}
        elif plain:
            _check_name(member.name, offset)
            any_members = True
            if with_mac_files or not is_of_a_mac(member.name):
                yield member
            start, long_name, pax = member.end, None, {}
        elif kind == tarfile.DIRTYPE:
            start, long_name, pax = member.end, None, {}
        else:
            raise TarError(
                offset, f"{member.name!r} is a link or device or sparse (type {kind!r}); store plain files only"
            )
        offset = member.end
    if whole:
        raise TarError(offset, "the tar has no end mark, so its tail is missing")


def _read_settings(file: BinaryIO, member: Member, offset: int) -> bytes:
    if member.size > MAX_HEADER_BYTES:
        raise TarError(
            offset, f"a long name or PAX header has {member.size} bytes, at most {MAX_HEADER_BYTES} are read"
        )
    return file.read(member.size)


def _check_name(name: str, offset: int) -> None:
    if "\0" in name or name.startswith("/") or ".." in name.split("/"):
        raise TarError(offset, f"member name {name!r} leads out of the folder or holds a NUL; store plain names")
    if not name.isascii():
        try:
            name.encode()
        except UnicodeEncodeError as error:
            raise TarError(offset, f"member name {name!r} is not UTF-8; rename it") from error


def _check_tail(file: BinaryIO, offset: int, num_bytes: int, any_members: bool) -> None:
    """Checks that the end mark is followed by zeros alone, and by no more than a blocking factor explains.

    A tail that was lost leaves zeros, too.
    """
    file.seek(offset)
    num_zeros = 0
    while chunk := file.read(1 << 20):
        if chunk.strip(b"\0"):
            raise TarError(offset, "there is content after the tar's end mark (two tars joined?)")
        num_zeros += len(chunk)
    if num_zeros > MAX_TAIL_BYTES and not (any_members and _fills_a_block(num_bytes, num_zeros)):
        raise TarError(
            offset,
            f"{num_zeros} zero bytes end the tar, where at most {MAX_TAIL_BYTES} pad one, or what fills it up to a "
            f"blocking factor of at most {MAX_BLOCKING}: its tail was lost",
        )


def _fills_a_block(num_bytes: int, num_zeros: int) -> bool:
    """Tells whether zeros, the end mark among them, fill a file to a multiple of a blocking factor or power of two."""
    least = num_zeros // _BLOCK - 1
    larger = [MAX_BLOCKING << shift for shift in range(1, 8) if MAX_BLOCKING << shift >= least]
    return any(num_bytes % (factor * _BLOCK) == 0 for factor in (*range(least, MAX_BLOCKING + 1), *larger))


def split_name(member: Member) -> tuple[str, str]:
    """Splits the name of a member into key and extension.

    Raises:
        TarError: the name is not KEY.extension.
    """
    name = member.name.removeprefix("./")
    key, _, extension = name.rpartition(".")
    if not key or not extension or "/" in extension or "." in key:
        raise TarError(member.start, f"member {member.name!r} is not KEY.extension with a key without dots")
    return key, extension.lower()


def max_member_bytes(extension: str) -> int:
    """Returns the cap on the size of a member."""
    return MAX_JSON_BYTES if extension == "json" else MAX_MEMBER_BYTES


def check_member(member: Member, extension: str) -> None:
    """Refuses a member that this package would read when it is empty or over its cap.

    Raises:
        DataError: with its place, name, size and cap.
    """
    if extension not in MEMBER_EXTENSIONS:
        return
    if member.size == 0:
        raise TarError(member.start, f"{member.name!r} is empty; leave it out or write it again")
    cap = max_member_bytes(extension)
    if member.size > cap:
        raise TarError(member.start, f"{member.name!r} has {member.size} bytes, at most {cap} are read")


def check_record(num_members: int, start: int, end: int) -> None:
    """Refuses a record of too many members or bytes; to be called at each member, before the next is read.

    Raises:
        DataError: with its place, size and cap.
    """
    if num_members > MAX_RECORD_MEMBERS:
        raise TarError(start, f"the record has {num_members} members or more, at most {MAX_RECORD_MEMBERS} are read")
    if end - start > MAX_RECORD_BYTES:
        raise TarError(start, f"the record has {end - start} bytes or more, at most {MAX_RECORD_BYTES} are read")


def read_record(path: str, offset: int, num_bytes: int, files: Files = LOCAL) -> dict[str, bytes]:
    """Reads those members of one record that this package uses, by extension; in one read, or one a member if large.

    Raises:
        DataError: the shard no longer holds a whole record there, or one that is over a cap.
        OSError: the file cannot be read.
    """
    return read_keyed_record(path, offset, num_bytes, files)[1]


def record_key(path: str, offset: int, num_bytes: int, files: Files = LOCAL) -> str:
    """Returns the key of the record at that place, for messages; `?` when it cannot be read."""
    try:
        return split_name(next(iter_members(_span(path, offset, num_bytes, files), num_bytes, whole=False)))[0]
    except (DataError, OSError, StopIteration):
        return "?"


def read_keyed_record(
    path: str, offset: int, num_bytes: int, files: Files = LOCAL, contents: Collection[str] = MEMBER_EXTENSIONS
) -> tuple[str, dict[str, bytes]]:
    """Reads the key of a record, and its members as `read_record` does; raises as that does.

    Args:
        contents: extensions of the members to read; the others come as b"".
    """
    file = _span(path, offset, num_bytes, files, whole=contents is MEMBER_EXTENSIONS)
    keys: set[str] = set()
    out: dict[str, bytes] = {}
    try:
        for number, member in enumerate(iter_members(file, num_bytes, whole=False), start=1):
            key, extension = split_name(member)
            keys.add(key)
            check_member(member, extension)
            check_record(number, 0, member.end)
            if extension in MEMBER_EXTENSIONS:
                file.seek(member.data)
                out[extension] = file.read(member.size) if extension in contents else b""
    except TarError as error:
        raise TarError(offset + error.offset, error.reason) from error
    if len(keys) != 1 or "json" not in out:
        raise DataError(f"{path}, byte {offset}: expected one record, found keys {sorted(keys)}; {REBUILD}")
    return keys.pop(), out


def _span(path: str, offset: int, num_bytes: int, files: Files, whole: bool = True) -> BinaryIO:
    """Opens a record's bytes as a file. Raises DataError when it is over its cap or the shard ends before.

    Args:
        whole: read the bytes at once, unless they are many.
    """
    check_record(1, offset, offset + num_bytes)
    if not whole or num_bytes > WHOLE_BYTES:
        missing = offset + num_bytes - files.size(path)
        buffer_bytes = _BLOCK if whole else _GLANCE_BYTES
        file: BinaryIO = io.BufferedReader(_PartOfFile(files, path, offset, num_bytes), buffer_bytes)
    else:
        content = files.read(path, offset, num_bytes)
        missing = num_bytes - len(content)
        file = io.BytesIO(content)
    if missing > 0:
        raise DataError(f"{path} ends {missing} bytes too early for its index; {REBUILD}")
    return file


class _PartOfFile(io.RawIOBase):
    """A range of a file, of which only what is wanted is read."""

    def __init__(self, files: Files, path: str, start: int, num_bytes: int) -> None:
        self._files, self._path, self._start, self._num_bytes = files, path, start, num_bytes
        self._at = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        assert whence == os.SEEK_SET
        self._at = offset
        return offset

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        num_bytes = min(len(buffer), self._num_bytes - self._at)
        content = self._files.read(self._path, self._start + self._at, num_bytes)
        buffer[: len(content)] = content
        self._at += len(content)
        return len(content)
