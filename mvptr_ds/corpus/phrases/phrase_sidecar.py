"""Writes a sidecar with the phrases of the captions of shards: a tar for each shard, records in the same order."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mvptr_ds.corpus.concepts.caption_files import count_left_out, count_phrases, get_parser
from mvptr_ds.corpus.phrases.captions import read_entries, shard_paths
from mvptr_ds.corpus.resumable_jobs import Summary, refuse_foreign_tars, run_units
from mvptr_ds.data.phrases import KINDS
from mvptr_ds.data.schema import Caption, Extractor, Record
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.index_format import RECORDS
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_reader import MAX_JSON_BYTES
from mvptr_ds.data.shards.tar_writer import check_key, write_tar
from mvptr_ds.errors import DataError

_COUNTS = ("records", "records without a caption", "captions", "captions without a phrase", *KINDS.values())
_BATCH = 1024  # captions parsed together, or records without any


class _Shard(NamedTuple):
    number: int
    path: str


@dataclass(frozen=True)
class _Work:
    """Parses the captions of one shard; runs in a process of its own."""

    out: str
    backend: str
    extractor: Extractor

    def __call__(self, shard: _Shard) -> Summary:
        summary = Summary(Counter({name: 0 for name in _COUNTS}))
        parser = get_parser(self.backend)
        parser.left_out.clear()
        entries = self._entries(shard, summary)
        first = next(entries, None)
        if first is not None:
            path = Path(self.out, f"shard-{shard.number:06d}.tar")
            summary.counts["records"] += write_tar(path, itertools.chain([first], entries))
        count_left_out(summary, parser, shard.path)
        return summary

    def _entries(self, shard: _Shard, summary: Summary) -> Iterator[tuple[str, dict[str, bytes]]]:
        for batch in _batches(_read_records(Path(shard.path), summary)):
            found = iter(get_parser(self.backend).parse([c.text for _, record in batch for c in record.captions]))
            for key, record in batch:
                captions = [Caption(caption.text, tuple(next(found))) for caption in record.captions]
                for caption in captions:
                    count_phrases(summary, caption.phrases)
                    summary.counts["captions without a phrase"] += not caption.phrases
                summary.counts["records without a caption"] += not captions
                content = sidecar_json(self.extractor, captions=captions)
                if len(content) > MAX_JSON_BYTES:
                    summary.drop(f"the phrases of a record take over {MAX_JSON_BYTES >> 20} MiB", f"key {key!r}")
                    continue
                yield key, {"json": content}


def extract_phrases(shards: str | Path, out: str | Path, backend: str, num_processes: int) -> Summary:
    """Parses the captions of all shards and writes the sidecar into `out`, with its index.

    Records without captions get an entry too: a join that leaves out what lacks a partner keeps them. The same call
    resumes where an interrupted one stopped.

    Raises:
        DataError: no shards, a damaged tar, no record that can be used, or `out` was begun with other arguments.
    """
    shards, out = Path(shards), Path(out)
    index = ensure_index(shards)
    if index.kind != RECORDS:
        raise DataError(f"{shards} is a sidecar; give the folder of records whose captions are to be parsed")
    refuse_foreign_tars(out, shards)
    extractor = Extractor(f"mvptr_ds phrases ({backend})", get_parser(backend).version)
    if num_processes > 1:
        get_parser.cache_clear()  # the processes have their own
    units = [_Shard(number, str(path)) for number, path in enumerate(shard_paths(shards))]
    arguments = {"shards": index.fingerprint, "extractor": extractor._asdict()}
    work = _Work(str(out), backend, extractor)
    summary = run_units(out, arguments, units, work, num_processes, "phrases")
    if not summary.counts["records"]:
        raise DataError(f"no record of {shards} can be used; {out / 'summary.json'} says why")
    ensure_index(out)
    return summary


def _read_records(tar: Path, summary: Summary) -> Iterator[tuple[str, Record]]:
    for key, entry in read_entries(tar, summary):
        try:
            check_key(key)  # foreign tars may hold keys that the writer refuses
        except DataError as error:
            summary.drop("the key cannot be written", f"{tar.name}: {error}")
            continue
        if isinstance(entry, Record):
            yield key, entry


def _batches(records: Iterator[tuple[str, Record]]) -> Iterator[list[tuple[str, Record]]]:
    batch: list[tuple[str, Record]] = []
    num_captions = 0
    for item in records:
        batch.append(item)
        num_captions += len(item[1].captions)
        if max(num_captions, len(batch)) >= _BATCH:
            yield batch
            batch, num_captions = [], 0
    if batch:
        yield batch
