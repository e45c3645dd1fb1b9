"""Reads what is left of a damaged tar: walks on behind damage, and finds the members of each record.

The walk is that of `tars.iter_members`, started again at the next header whose sum holds. Such a header is looked for
by its magic ("ustar"), at any byte, because a transfer that lost or doubled bytes moves all that follows.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import BinaryIO

from mvptr_ds.data.shards.tar_header import TarError
from mvptr_ds.data.shards.tar_reader import Member, check_member, check_record, is_of_a_mac, iter_members, split_name

_BLOCK = tarfile.BLOCKSIZE
_MAGIC, _MAGIC_AT = b"ustar", 257  # in every header of a tar since 1988
_CHUNK = 1 << 20
MAX_NAMES = 64  # extensions remembered of one record

CUT = "the tar is cut"
ZEROS = "zero blocks inside, or another tar behind the end mark"
GARBAGE = "no valid header where one belongs"
REFUSED = "a member that no shard may hold"
IN_RECORD = "damage in a record: "  # and one of those above
BAD_NAME = "a name that is not KEY.extension"
EMPTY = "an empty member"
OVER_CAP = "a member or record over its cap"


@dataclass(frozen=True)
class Break:
    """A place where one header does not lead to the next."""

    start: int  # byte of the header that was expected
    end: int  # byte of the next header that holds, or the end of the file
    reason: str  # one of the words above
    detail: str
    key: str | None  # whose member was passed over, where its header can be read
    lost: bool  # bytes were passed over that may have held members of any key
    spoilt: bool  # the content of the member before it cannot be trusted


@dataclass
class Piece:
    """Neighbouring members of one key."""

    key: str
    start: int
    end: int = 0
    num_members: int = 0
    num_mac_files: int = 0  # passed over, before its first member or among them
    extensions: list[str] = field(default_factory=list)  # the first MAX_NAMES
    broken: str | None = None  # why it cannot be used, whatever it holds
    detail: str = ""
    beside_loss: bool = False  # members of it may have been lost


class _From:
    """A file that begins at a byte of another one."""

    def __init__(self, file: BinaryIO, start: int) -> None:
        self._file = file
        self._start = start

    def seek(self, offset: int) -> None:
        self._file.seek(self._start + offset)

    def read(self, size: int) -> bytes:
        return self._file.read(size)


def walk(file: BinaryIO, num_bytes: int) -> Iterator[Member | Break]:
    """Members of a tar, and the breaks between them; a sound tar has none."""
    base = 0
    while True:
        last: Member | None = None
        try:
            for member in iter_members(_From(file, base), num_bytes - base, True, with_mac_files=True):  # type: ignore[arg-type]
                last = member._replace(start=member.start + base, data=member.data + base)
                yield last
            return
        except TarError as error:
            found = _break(file, num_bytes, base + error.offset, error.reason, last)
        yield found
        if found.end >= num_bytes:
            return
        base = found.end


def _break(file: BinaryIO, num_bytes: int, start: int, detail: str, last: Member | None) -> Break:
    file.seek(start)
    block = file.read(_BLOCK)
    header = _header(block)
    if last is not None:
        inside = find_header(file, last.data, min(last.end, num_bytes))
        if inside is not None:
            detail = f"{last.name!r} runs over the tar header at byte {inside}; behind it, {detail}"
            return Break(start, inside, GARBAGE, detail, None, lost=True, spoilt=True)
    if header is not None:
        return _break_at_header(file, num_bytes, start, detail, header)
    end = find_header(file, start + 1, num_bytes)
    reason = CUT if len(block) < _BLOCK else GARBAGE if block.strip(b"\0") else ZEROS
    # bytes put into the content of the member before leave the same trace as a header that was overwritten
    return Break(start, end or num_bytes, reason, detail, None, lost=True, spoilt=reason == GARBAGE)


def _break_at_header(file: BinaryIO, num_bytes: int, start: int, detail: str, header: tarfile.TarInfo) -> Break:
    """Returns the break at a sound header that cannot be followed or must not be."""
    behind = _behind(start, header)
    if behind > num_bytes or header.size < 0:
        end = find_header(file, start + _BLOCK, num_bytes)
        return Break(start, end or num_bytes, CUT, detail, _key_of(header.name), lost=True, spoilt=False)
    lost = False
    if header.type in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        # the member that it was to name stands behind it under another name
        file.seek(behind)
        named = _header(file.read(_BLOCK))
        behind, lost = (behind if named is None else max(behind, _behind(behind, named))), True
    end = find_header(file, behind, num_bytes)
    lost = lost or (end != behind and behind < num_bytes)
    return Break(start, end or num_bytes, REFUSED, detail, _key_of(header.name), lost, spoilt=False)


def _behind(start: int, header: tarfile.TarInfo) -> int:
    return start + _BLOCK + -(-header.size // _BLOCK) * _BLOCK


def _header(block: bytes) -> tarfile.TarInfo | None:
    try:
        return tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return None


def find_header(file: BinaryIO, start: int, end: int) -> int | None:
    """Returns the first byte in [start, end) where a tar header begins whose sum holds."""
    while start < end:
        file.seek(start)
        chunk = file.read(min(_CHUNK, end - start) + _BLOCK - 1)
        at = chunk.find(_MAGIC, _MAGIC_AT)
        while at >= 0:
            first = at - _MAGIC_AT
            if start + first < end and _header(chunk[first : first + _BLOCK]) is not None:
                return start + first
            at = chunk.find(_MAGIC, at + 1)
        start += _CHUNK
    return None


def _key_of(name: str) -> str:
    name = name.removeprefix("./")
    return name.rpartition(".")[0] or name


def pieces(file: BinaryIO, num_bytes: int) -> Iterator[Piece | Break]:
    """Runs of members of one key in a tar, and its breaks; each piece knows what a break beside it did to it."""
    current: Piece | None = None
    after: Break | None = None  # the break behind which nothing was read yet
    num_mac_files = 0  # since the last member
    for item in walk(file, num_bytes):
        if isinstance(item, Break):
            if current is not None:
                current.beside_loss |= item.lost
                if item.spoilt or item.key == current.key:
                    _break_piece(current, IN_RECORD + item.reason, item.detail)
                yield current
            yield item
            current, after = None, item
            continue
        if is_of_a_mac(item.name):
            num_mac_files += 1
            continue
        key, extension, bad_name = _split(item)
        if current is None or key != current.key:
            if current is not None:
                yield current
            current = Piece(key, item.start)
            if after is not None:
                current.beside_loss = after.lost
                if after.key == key:
                    _break_piece(current, IN_RECORD + after.reason, after.detail)
            after = None
        _add_member(current, item, extension, bad_name)
        current.num_mac_files += num_mac_files
        num_mac_files = 0
    if current is not None:
        yield current


def _add_member(piece: Piece, member: Member, extension: str, bad_name: str | None) -> None:
    piece.end = member.end
    piece.num_members += 1
    if len(piece.extensions) < MAX_NAMES:
        piece.extensions.append(extension)
    if bad_name is not None:
        _break_piece(piece, BAD_NAME, bad_name)
    try:
        check_record(piece.num_members, piece.start, piece.end)
    except TarError as error:
        _break_piece(piece, OVER_CAP, error.reason)
    try:
        check_member(member, extension)
    except TarError as error:
        _break_piece(piece, OVER_CAP if member.size else EMPTY, error.reason)


def _break_piece(piece: Piece, reason: str, detail: str) -> None:
    if piece.broken is None:
        piece.broken, piece.detail = reason, detail


def _split(member: Member) -> tuple[str, str, str | None]:
    """Returns the key, the extension, and what is wrong with the name."""
    try:
        return *split_name(member), None
    except TarError as error:
        return _key_of(member.name), "", error.reason


def first_key(file: BinaryIO, start: int, num_bytes: int) -> str:
    """Returns the key of the record that begins at a byte of a tar, for messages."""
    for member in iter_members(_From(file, start), num_bytes, whole=False):  # type: ignore[arg-type]
        return _split(member)[0]
    return "?"
