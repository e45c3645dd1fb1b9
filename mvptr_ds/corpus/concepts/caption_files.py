"""Reads captions from a text or JSON-lines file and writes JSON lines with their phrases.

in    captions.txt     one caption a line
      captions.jsonl   {"caption": "A brown dog.", ...} or {"captions": ["A brown dog.", ...], ...}; other fields stay
out   phrases.jsonl    {"caption": "A brown dog.", "phrases": [{"tuple": ["dog"], "spans": [[8, 11]]}, ...], ...}
                       or {"captions": [{"text": "A brown dog.", "phrases": [...]}, ...], ...}

The input is cut into ranges of whole lines. Each range is a unit of resumable work and writes a part of its own into
OUT.parts; the parts are joined at the end.
"""

from __future__ import annotations

import functools
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mvptr_ds.corpus.concepts.parser import PhraseParser
from mvptr_ds.corpus.resumable_jobs import Summary, put_in_place, run_units
from mvptr_ds.data.phrases import KINDS
from mvptr_ds.data.schema import Phrase
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import partial_path, replacing

UNIT_BYTES = 2**20  # about 18,000 captions: ten seconds of work, so that an interruption loses little
_BATCH = 1024  # lines parsed together

Range = tuple[int, int, int]  # number, first byte, byte behind the last


@dataclass(frozen=True)
class Work:
    """Parses one range of lines of `source`; runs in a process of its own."""

    source: Path
    parts: Path
    backend: str

    def __call__(self, unit: Range) -> Summary:
        number, start, end = unit
        summary = Summary()
        path = part_path(self.parts, number)
        parser = get_parser(self.backend)
        parser.left_out.clear()
        with replacing(path) as partial, partial.open("w", encoding="utf-8") as out:
            for batch in _batches(_read_lines(self.source, start, end)):
                for line in _parse(batch, parser, self.source, summary):
                    out.write(line + "\n")
        count_left_out(summary, parser, str(self.source))
        return summary


@functools.lru_cache(maxsize=1)
def get_parser(backend: str) -> PhraseParser:
    """Returns this process's parser, whose models are loaded once."""
    return PhraseParser(backend)


def extract_file(source: Path, out: Path, backend: str, num_processes: int) -> Summary:
    """Parses all captions of `source` into `out`; the same call resumes where an interrupted one stopped.

    Raises:
        DataError: the input cannot be read, a line is not what it should be, `out` was begun with another parser, or it
            holds something else.
    """
    if not source.is_file():
        raise DataError(f"{source} is not a file; give a .txt or .jsonl file of captions")
    parts = out.with_name(out.name + ".parts")
    units = list(_ranges(source))
    stat = source.stat()
    arguments = {
        "source": str(source.resolve()),
        "num_bytes": stat.st_size,
        "modified_ns": stat.st_mtime_ns,
        "parser": get_parser(backend).version,
    }
    parts.mkdir(parents=True, exist_ok=True)
    summary = run_units(parts, arguments, units, Work(source, parts, backend), num_processes, "phrases")
    partial = partial_path(out)
    with partial.open("wb") as whole:
        for number, _, _ in units:
            with part_path(parts, number).open("rb") as part:
                shutil.copyfileobj(part, whole)
    put_in_place(partial, out)
    shutil.rmtree(parts)
    return summary


def part_path(parts: Path, number: int) -> Path:
    return parts / f"part-{number:06d}.jsonl"


def phrases_json(phrases: Sequence[Phrase]) -> list[dict[str, Any]]:
    """Returns the phrases as they stand in a record."""
    return [{"tuple": list(phrase.tuple), "spans": [list(span) for span in phrase.spans]} for phrase in phrases]


def count_left_out(summary: Summary, parser: PhraseParser, where: str) -> None:
    """Adds what the parser left out since its counts were cleared."""
    for reason, number in sorted(parser.left_out.items()):
        summary.drop(reason, where, number)


def count_phrases(summary: Summary, phrases: Sequence[Phrase]) -> None:
    """Counts a caption, and its phrases by kind."""
    summary.counts["captions"] += 1
    for phrase in phrases:
        summary.counts[KINDS[len(phrase.tuple)]] += 1


def _ranges(path: Path) -> Iterator[Range]:
    """Ranges of whole lines, each of about UNIT_BYTES."""
    size = path.stat().st_size
    with path.open("rb") as lines:
        start = number = 0
        while start < size:
            lines.seek(min(size, start + UNIT_BYTES) - 1)
            lines.readline()
            end = lines.tell()
            yield number, start, end
            start, number = end, number + 1


def _read_lines(path: Path, start: int, end: int) -> Iterator[tuple[int, bytes]]:
    """Yields the offset and content of each line."""
    with path.open("rb") as lines:
        lines.seek(start)
        while start < end:
            line = lines.readline()
            yield start, line
            start += len(line)


def _batches(lines: Iterator[tuple[int, bytes]]) -> Iterator[list[tuple[int, bytes]]]:
    batch = []
    for line in lines:
        batch.append(line)
        if len(batch) == _BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


def _parse(batch: list[tuple[int, bytes]], parser: PhraseParser, source: Path, summary: Summary) -> Iterator[str]:
    """Yields the output lines of input lines; those without a caption are dropped and counted."""
    items = []
    for offset, line in batch:
        where = f"{source.name} at byte {offset}"
        try:
            content = _read_item(line.decode("utf-8-sig"), source.suffix == ".jsonl")
        except (ValueError, TypeError) as error:
            summary.drop("line that cannot be read", f"{where}: {error}")
            continue
        if content is None:
            summary.drop("line without a caption", where)
        else:
            items.append(content)
    found = iter(parser.parse([text for texts, _ in items for text in texts]))
    for texts, fields in items:
        phrases = [next(found) for _ in texts]
        for of_caption in phrases:
            count_phrases(summary, of_caption)
        if "captions" in fields:
            fields["captions"] = [
                {"text": text, "phrases": phrases_json(p)} for text, p in zip(texts, phrases, strict=True)
            ]
        else:
            fields["phrases"] = phrases_json(phrases[0])
        yield json.dumps(fields, ensure_ascii=True)


def _read_item(line: str, is_json: bool) -> tuple[list[str], dict[str, Any]] | None:
    """Returns the captions of a line and its other fields; None for a line without a caption."""
    if not is_json:
        text = line.strip()
        return ([text], {"caption": text}) if text else None
    if not line.strip():
        return None
    fields = json.loads(line)
    if not isinstance(fields, dict) or ("caption" in fields) == ("captions" in fields):
        raise ValueError('not an object with either "caption" or "captions"')
    texts = fields["captions"] if "captions" in fields else [fields["caption"]]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise ValueError("a caption is not text")
    return (texts, fields) if any(text.strip() for text in texts) else None
