"""Reads captions with their phrases from records, sidecars and JSON lines.

    a folder of tars   the captions of its records, or of a sidecar's entries
    NAME.jsonl         what `mvptr phrases` writes: {"caption": "A dog.", "phrases": [{"tuple": ["dog"],
                       "spans": [[2, 5]]}]} or {"captions": [{"text": "A dog.", "phrases": [...]}, ...]} a line

An input is cut into parts, a tar or some lines each, which processes share.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mvptr_ds.corpus.resumable_jobs import Summary
from mvptr_ds.data.schema import SCHEMA_VERSION, Caption, Record, SidecarEntry, parse_entry
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.index_format import MANIFEST_NAME
from mvptr_ds.data.shards.tar_reader import check_member, iter_members, split_name
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.tool_names import tool

UNREADABLE_RECORD = "the record cannot be read"
_UNREADABLE_LINE = "the line cannot be read"
_EMPTY_CAPTION = "the caption is empty"
_PART_BYTES = 1 << 22  # of JSON lines: some 15,000 parsed captions


class Part(NamedTuple):
    """A tar, or a range of whole lines of a JSONL file."""

    path: str
    start: int  # bytes
    end: int


class Inputs(NamedTuple):
    """What is read: its parts in order, and a description that changes when the files do."""

    parts: list[Part]
    description: list[dict[str, Any]]


def list_inputs(paths: Sequence[Path]) -> Inputs:
    """Returns the parts of all inputs, in their order; builds the index of a folder that has none.

    Raises:
        DataError: a path is neither a folder of tars nor a .jsonl file, or one is given twice.
    """
    parts: list[Part] = []
    description = []
    for path in paths:
        own = _tars(path) if path.is_dir() else _line_ranges(path)
        stats = [(Path(part.path).name, Path(part.path).stat(), part) for part in own]
        listing = json.dumps([[name, stat.st_size, stat.st_mtime_ns, part.start] for name, stat, part in stats])
        digest = hashlib.sha256(listing.encode()).hexdigest()[:16]
        description.append({"name": path.name, "num_parts": len(own), "digest": digest})
        parts += own
    repeated = [
        str(path) for number, path in enumerate(paths) if path.resolve() in {p.resolve() for p in paths[:number]}
    ]
    if repeated:
        raise DataError(f"{', '.join(repeated)} is given twice; its captions would count twice")
    return Inputs(parts, description)


def shard_paths(folder: Path) -> list[Path]:
    """Returns the tars of a folder in the order of its manifest, which `ensure_index` has written."""
    manifest = json.loads((folder / MANIFEST_NAME).read_text(encoding="utf-8"))
    return [folder / manifest.get("folder", ".") / shard["name"] for shard in manifest["shards"]]


def _tars(folder: Path) -> list[Part]:
    ensure_index(folder)
    return [Part(str(path), 0, path.stat().st_size) for path in shard_paths(folder)]


def _line_ranges(path: Path) -> list[Part]:
    if path.suffix != ".jsonl" or not path.is_file():
        raise DataError(f"{path} is neither a folder of shards nor a .jsonl file; give what {tool('phrases')} wrote")
    size = path.stat().st_size
    parts = []
    with open(path, "rb") as lines:
        start = 0
        while start < size:
            lines.seek(min(size, start + _PART_BYTES) - 1)
            lines.readline()
            end = lines.tell()
            parts.append(Part(str(path), start, end))
            start = end
    return parts


def read_captions(part: Part, summary: Summary) -> Iterator[Caption]:
    """Yields the captions of a part; what cannot be read is dropped and counted in `summary`.

    Raises:
        DataError: the tar is damaged.
    """
    if part.path.endswith(".tar"):
        for _, entry in read_entries(Path(part.path), summary):
            yield from entry.captions or ()
    else:
        yield from _read_lines(part, summary)


def read_entries(tar: Path, summary: Summary) -> Iterator[tuple[str, Record | SidecarEntry]]:
    """Yields the key and content of every `KEY.json` of a tar, in its order; other members are skipped.

    Raises:
        DataError: the tar is damaged.
    """
    with open(tar, "rb") as file:
        try:
            for member in iter_members(file, tar.stat().st_size, whole=True):
                key, extension = split_name(member)
                if extension != "json":
                    continue
                check_member(member, extension)
                file.seek(member.data)
                try:
                    entry = parse_entry(file.read(member.size))
                except DataError as error:
                    summary.drop(UNREADABLE_RECORD, f"{tar.name}, key {key!r}: {error}")
                    continue
                yield key, entry
        except DataError as error:
            raise DataError(f"{tar}: {error}; {tool('validate')} says more") from error


def _read_lines(part: Part, summary: Summary) -> Iterator[Caption]:
    with open(part.path, "rb") as lines:
        lines.seek(part.start)
        at = part.start
        while at < part.end:
            line = lines.readline()
            try:
                captions = _captions_of(line, summary) if line.strip() else ()
            except DataError as error:
                summary.drop(_UNREADABLE_LINE, f"{Path(part.path).name}, byte {at}: {error}")
                captions = ()
            yield from captions
            at += len(line)


def _captions_of(line: bytes, summary: Summary) -> tuple[Caption, ...]:
    try:
        content = json.loads(line)
        if "captions" in content:
            captions = content["captions"]
        else:
            captions = [{"text": content["caption"], "phrases": content["phrases"]}]
        said = [caption for caption in captions if str(caption["text"]).strip()]
    except (ValueError, RecursionError, KeyError, TypeError) as error:
        raise DataError(f"neither a caption with phrases nor a list of them: {error!r}") from error
    if len(said) < len(captions):
        summary.drop(_EMPTY_CAPTION, repr(line[:80]), len(captions) - len(said))
    # an entry of a sidecar, so that the same is accepted here and there
    entry = parse_entry({"schema": SCHEMA_VERSION, "extractor": {"name": "lines", "version": "1"}, "captions": said})
    return entry.captions or ()
