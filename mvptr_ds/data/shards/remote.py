"""Reads shards behind a URL by range requests through fsspec, and keeps a copy of their index on this machine.

A request that fails or stalls is tried again. A shard is never copied whole, and nothing that was fetched is run.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import fsspec
from fsspec.asyn import AsyncFileSystem, sync

from mvptr_ds.data.pickling import PicklesWithoutCaches
from mvptr_ds.data.shards.index_format import INDEX_NAME, MANIFEST_NAME, REBUILD
from mvptr_ds.data.shards.storage import Files
from mvptr_ds.data.shards.urls import ReadOptions
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing

_PIECE_BYTES = 8 << 20  # of an index, a request
_MAX_MANIFEST_BYTES = 64 << 20
_FIRST_WAIT_S, _MAX_WAIT_S = 0.5, 30.0  # before a second try, doubled from try to try
_NAME_LEN = 16
Held = dict[tuple[str, int], tuple[int, "Future[bytes]"]]
T = TypeVar("T")


class LastingError(OSError):
    """Another try would fail, too."""


class RemoteFiles(PicklesWithoutCaches, Files):
    """Reads files behind the URLs of one folder.

    `held` has what was fetched ahead (data.read_ahead): (path, offset) of a record -> first byte and content of the
    range that holds it. A forked process begins with nothing: connections and threads are not inherited.

    Args:
        sizes: bytes of each file, as the index knows them. A file of another size is refused where the server tells it.
    """

    _CACHES = ("_held", "_pid")

    def __init__(self, options: ReadOptions, sizes: Mapping[str, int]) -> None:
        self.options = options
        self._sizes = dict(sizes)
        self._init_caches()

    def _init_caches(self) -> None:
        self._pid = os.getpid()
        self._held: Held = {}

    @property
    def held(self) -> Held:
        if self._pid != os.getpid():
            self._init_caches()
        return self._held

    def read(self, path: str, offset: int, num_bytes: int) -> bytes:
        found = self.held.get((path, offset))
        if found is not None:
            start, content = found
            return content.result()[offset - start : offset - start + num_bytes]
        return self.fetch(path, offset, offset + num_bytes)

    def fetch(self, path: str, start: int, end: int) -> bytes:
        """Fetches a range by a request of its own, whatever is held."""
        size = self.size(path)
        if start >= size:
            return b""
        end = min(end, size)
        return _retried(path, self.options, lambda: _get_range(path, start, end, size, self.options.timeout_s))

    def size(self, path: str) -> int:
        return self._sizes[path]

    def check(self, path: str) -> None:
        """Raises OSError where the file is missing, has another size, or its server gives no ranges."""
        if not _is_http(path):  # which says the size with every range
            found = _retried(path, self.options, lambda: _size(path, self.options.timeout_s))
            if found != self.size(path):
                raise LastingError(f"{path} has {found} bytes, the index was built for {self.size(path)}")
        self.fetch(path, 0, 512)


def _file_system(url: str) -> tuple[Any, str]:
    try:
        return fsspec.url_to_fs(url)
    except ImportError as error:
        remedy = "pip install 'mvptr_ds[remote]'" if _is_http(url) else "pip install it"
        raise LastingError(f"reading it needs another package ({error}): {remedy}") from error


def _retried(path: str, options: ReadOptions, get: Callable[[], T]) -> T:
    """Calls `get` until it succeeds, with growing pauses, and returns its result.

    Raises:
        OSError: the file is missing or refused, or no try succeeded; with the reason of the last.
    """
    for number in range(options.retries + 1):
        if number:
            wait_s = min(_MAX_WAIT_S, _FIRST_WAIT_S * 2 ** (number - 1))
            time.sleep(wait_s * random.SystemRandom().uniform(0.5, 1.0))  # not all processes at once
        try:
            return get()
        except (FileNotFoundError, PermissionError, LastingError):
            raise
        except Exception as error:  # every filesystem of fsspec raises its library's own
            last = error
    reason = f"{type(last).__name__}: {last}".rstrip(": ")
    raise ConnectionError(f"{path}: {options.retries + 1} tries failed; the last: {reason}") from last


def _is_http(url: str) -> bool:
    return url.lower().startswith(("http://", "https://"))


def _get_range(url: str, start: int, end: int, size: int, timeout_s: float) -> bytes:
    file_system, name = _file_system(url)
    if _is_http(url):
        content = sync(file_system.loop, _http_range, file_system, name, start, end, size, timeout=timeout_s)
    elif isinstance(file_system, AsyncFileSystem):
        content = sync(file_system.loop, file_system._cat_file, name, start=start, end=end, timeout=timeout_s)
    else:  # ends by a time limit of its own
        content = file_system.cat_file(name, start=start, end=end)
    if len(content) != end - start:
        raise OSError(f"{len(content)} bytes came in place of {end - start}")
    return bytes(content)


def _get_whole(url: str, max_bytes: int, timeout_s: float) -> bytes:
    file_system, name = _file_system(url)
    if _is_http(url):
        return sync(file_system.loop, _http_whole, file_system, name, max_bytes, timeout=timeout_s)
    size = _size(url, timeout_s)
    if size > max_bytes:
        raise LastingError(f"{url} has {size} bytes, at most {max_bytes} are read")
    return _get_range(url, 0, size, size, timeout_s)


def _size(url: str, timeout_s: float) -> int:
    file_system, name = _file_system(url)
    if isinstance(file_system, AsyncFileSystem):
        return int(sync(file_system.loop, file_system._info, name, timeout=timeout_s)["size"])
    return int(file_system.size(name))


async def _http_range(file_system: Any, url: str, start: int, end: int, size: int) -> bytes:
    """Fetches a range by HTTP; fsspec's own would load a whole shard from a server that knows no ranges."""
    async with _http(file_system, url, {"Range": f"bytes={start}-{end - 1}"}) as answer:
        if answer.status == 200:
            raise LastingError(
                f"{url}: the server gives whole files only; take one that answers range requests, or copy the folder"
            )
        given, _, total = answer.headers.get("Content-Range", "").removeprefix("bytes ").partition("/")
        if total.isdigit() and int(total) != size:
            raise LastingError(f"{url} has {total[:20]} bytes, the index was built for {size}")
        if answer.status != 206 or given != f"{start}-{end - 1}":
            raise OSError(f"HTTP {answer.status} {answer.reason}, range {given[:40]!r} in place of {start}-{end - 1}")
        return await _body(answer, end - start)


async def _http_whole(file_system: Any, url: str, max_bytes: int) -> bytes:
    async with _http(file_system, url, {}) as answer:
        if answer.status != 200:
            raise OSError(f"HTTP {answer.status} {answer.reason}")
        return await _body(answer, max_bytes)


@asynccontextmanager
async def _http(file_system: Any, url: str, headers: dict[str, str]) -> AsyncIterator[Any]:
    """Yields the answer to a request, made with the options that fsspec is configured with."""
    session = await file_system.set_session()
    options = dict(file_system.kwargs)
    options["headers"] = {**options.get("headers", {}), "Accept-Encoding": "identity", **headers}
    async with session.get(file_system.encode_url(url), **options) as answer:
        if answer.status in (404, 410):
            raise FileNotFoundError(f"HTTP {answer.status} {answer.reason}: {url}")
        if answer.status in (401, 403):
            raise PermissionError(f"HTTP {answer.status} {answer.reason}: {url}")
        yield answer


async def _body(answer: Any, max_bytes: int) -> bytes:
    content = bytearray()
    async for piece in answer.content.iter_any():
        content += piece
        if len(content) > max_bytes:
            raise LastingError(f"{answer.url} gives more than {max_bytes} bytes")
    return bytes(content)


def fetch_index(url: str, options: ReadOptions) -> Path:
    """Fetches manifest and index of the shards behind `url`, unless they are here; returns the folder that holds them.

    The folder's name is a hash of the manifest, so a remote folder that changes gives another copy. Files appear whole
    or not at all. Where several processes come at once, one fetches and the others wait.

    Raises:
        DataError: there is no index, or it is not the one the manifest names.
        OSError: the index cannot be fetched or kept.
    """
    where = f"{url}/{MANIFEST_NAME}"
    content = _retried(where, options, lambda: _get_whole(where, _MAX_MANIFEST_BYTES, options.timeout_s))
    try:
        manifest = json.loads(content)
        sha256, num_bytes = str(manifest["sha256"]), int(manifest["index_bytes"])
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{where} is not a manifest of this version: {error!r}; {REBUILD}, and copy both") from error
    folder = options.index_folder / hashlib.sha256(content).hexdigest()[:_NAME_LEN]
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder / "lock"):
        if not (folder / MANIFEST_NAME).exists():
            with replacing(folder / INDEX_NAME, os.getpid()) as partial:
                if _fetch_file(f"{url}/{INDEX_NAME}", num_bytes, partial, options) != sha256:
                    raise DataError(f"{url}/{INDEX_NAME} is not the one the manifest names; copy both again")
            with replacing(folder / MANIFEST_NAME, os.getpid()) as partial:  # last: it vouches for the index
                partial.write_bytes(content)
    return folder


def _fetch_file(url: str, num_bytes: int, target: Path, options: ReadOptions) -> str:
    """Copies the file in pieces; returns its sha256."""
    files = RemoteFiles(options, {url: num_bytes})
    digest = hashlib.sha256()
    with open(target, "wb") as file:
        for start in range(0, num_bytes, _PIECE_BYTES):
            piece = files.fetch(url, start, start + _PIECE_BYTES)
            digest.update(piece)
            file.write(piece)
    return digest.hexdigest()


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Lets one process in at a time. The system takes the lock from a process that ends, however it ends."""
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
