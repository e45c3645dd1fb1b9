"""Counts the captions that hold each phrase: exactly, in a memory that does not grow with the corpus.

    1. every part of the input is counted by itself; a full counter is written out, sorted, and emptied
    2. the sorted runs of a part become its one run: FOLDER/counts-000012.tsv, a line `["dog","brown"]<TAB>17` a phrase
    3. the runs of all parts are merged, phrase by phrase; what is in too few captions is forgotten at once

Memory: `max_in_memory` phrases a process while counting, then the kept phrases. The disk holds, until the vocabulary is
written, one line for each phrase of each part. A phrase that stands in a caption twice counts once.
"""

from __future__ import annotations

import functools
import heapq
import itertools
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from mvptr_ds.corpus.concepts.web import are_words
from mvptr_ds.corpus.phrases.captions import Inputs, Part, list_inputs, read_captions
from mvptr_ds.corpus.resumable_jobs import Summary, run_units
from mvptr_ds.data.phrases import KINDS, PhraseTuple
from mvptr_ds.errors import DataError
from mvptr_ds.user_io.atomic import replacing
from mvptr_ds.user_io.tool_names import tool

MAX_IN_MEMORY = 200_000  # phrases of a process: some 60 MB
_MAX_OPEN_RUNS = 128
_Run = Iterator[tuple[str, int]]  # phrase as JSON, count; sorted by phrase


class SpillingCounter:
    """Counts phrases; more than `max_in_memory` of them go to sorted runs beside `path`, where `write` puts the sum."""

    def __init__(self, path: Path, max_in_memory: int = MAX_IN_MEMORY) -> None:
        self._path, self._max_in_memory = path, max_in_memory
        self._counts: Counter[PhraseTuple] = Counter()
        self._runs: list[Path] = []

    def add(self, phrases: Iterable[PhraseTuple]) -> None:
        """Counts the phrases of one caption."""
        self._counts.update(phrases)
        if len(self._counts) > self._max_in_memory:
            self._spill()

    def _spill(self) -> None:
        path = self._path.with_name(f"{self._path.name}.spill-{len(self._runs):06d}")
        write_run(path, self._sorted())
        self._runs.append(path)
        self._counts.clear()

    def _sorted(self) -> _Run:
        # a key is ASCII, without tab and line end, whatever the words hold
        keys = (json.dumps(phrase, separators=(",", ":")) for phrase in self._counts)
        return iter(sorted(zip(keys, self._counts.values(), strict=True)))

    def write(self) -> None:
        """Writes all counts to `path`, sorted; the runs in between are removed."""
        write_run(self._path, _merged(self._runs, self._path, self._sorted()))
        for run in self._runs:
            run.unlink()


def write_run(path: Path, run: _Run) -> None:
    """Writes a run under a temporary name first."""
    with replacing(path) as partial, open(partial, "w", encoding="ascii") as file:
        file.writelines(f"{key}\t{count}\n" for key, count in run)


def _read_run(path: Path) -> _Run:
    with open(path, encoding="ascii") as file:
        for line in file:
            key, _, count = line.partition("\t")
            yield key, int(count)


def _merged(paths: Sequence[Path], name: Path, *others: _Run) -> _Run:
    """Merges runs into one; more files than may be open at once are first merged in groups, beside `name`."""
    level = 0
    between: list[Path] = []
    while len(paths) > _MAX_OPEN_RUNS:
        groups = [paths[at : at + _MAX_OPEN_RUNS] for at in range(0, len(paths), _MAX_OPEN_RUNS)]
        merged = [name.with_name(f"{name.name}.merge-{level}-{number:06d}") for number in range(len(groups))]
        for path, group in zip(merged, groups, strict=True):
            write_run(path, _merged(group, name))
        for stale in between:
            stale.unlink()
        paths, between, level = merged, merged, level + 1
    both = heapq.merge(*map(_read_run, paths), *others)
    for key, same in itertools.groupby(both, key=lambda item: item[0]):
        yield key, sum(count for _, count in same)
    for stale in between:
        stale.unlink()


def merge_counts(paths: Sequence[Path], name: Path) -> Iterator[tuple[PhraseTuple, int]]:
    """Phrases of all runs with their counts, each phrase once; files in between lie beside `name`."""
    for key, count in _merged(paths, name):
        yield tuple(json.loads(key)), count


def count_phrases(inputs: Inputs, folder: Path, num_processes: int, max_in_memory: int = MAX_IN_MEMORY) -> Summary:
    """Counts the phrases of all inputs into `folder`, a run for each part; resumes where it was interrupted.

    Counted in the summary: captions, captions without a phrase, and for each kind the captions' phrases.

    Raises:
        DataError: a tar is damaged, or `folder` was begun with other inputs.
    """
    units = list(enumerate(inputs.parts))
    work = functools.partial(_count_part, str(folder), max_in_memory)
    return run_units(folder, {"inputs": inputs.description}, units, work, num_processes, "count")


def _count_part(folder: str, max_in_memory: int, unit: tuple[int, Part]) -> Summary:
    number, part = unit
    summary = Summary()
    counter = SpillingCounter(_run_path(Path(folder), number), max_in_memory)
    found: Counter[int] = Counter()
    num_captions = num_without = 0
    for caption in read_captions(part, summary):
        phrases = {phrase.tuple for phrase in caption.phrases}
        counter.add(phrases)
        found.update(map(len, phrases))
        num_captions += 1
        num_without += not phrases
    counter.write()
    summary.counts.update({"captions": num_captions, "captions without a phrase": num_without})
    summary.counts.update({kind: found[len_words] for len_words, kind in KINDS.items()})
    return summary


def _run_path(folder: Path, number: int) -> Path:
    return folder / f"counts-{number:06d}.tsv"


def choose_phrases(
    counts: Iterable[tuple[PhraseTuple, int]], min_count: int, max_phrases: int | None, summary: Summary
) -> dict[PhraseTuple, int]:
    """Returns the phrases in at least `min_count` captions, of these the `max_phrases` most frequent, ties by phrase.

    One with a word that is none (`are_words`) is left out. Counted in `summary`: the phrases found and kept of each
    kind, and the dropped ones with the reason.
    """
    kept: dict[PhraseTuple, int] = {}
    summary.counts.update({f"different {kind}": 0 for kind in KINDS.values()})
    for phrase, count in counts:
        kind = KINDS[len(phrase)]
        summary.counts[f"different {kind}"] += 1
        if not are_words(phrase):
            summary.drop(f"{kind} with a word that is none", f"{' '.join(phrase)}: {count}")
        elif count >= min_count:
            kept[phrase] = count
        else:
            summary.drop(f"{kind} in fewer than {min_count} captions", f"{' '.join(phrase)}: {count}")
    if max_phrases is not None and len(kept) > max_phrases:
        order = sorted(kept, key=lambda phrase: (-kept[phrase], phrase))
        for phrase in order[max_phrases:]:
            summary.drop(
                f"{KINDS[len(phrase)]} beyond the {max_phrases} most frequent", f"{' '.join(phrase)}: {kept[phrase]}"
            )
            del kept[phrase]
    for kind_len, kind in KINDS.items():
        summary.counts[f"kept {kind}"] = sum(len(phrase) == kind_len for phrase in kept)
    return kept


def count_corpus(
    paths: Sequence[Path], folder: Path, min_count: int, max_phrases: int | None, num_processes: int
) -> tuple[dict[PhraseTuple, int], Summary]:
    """Returns the phrases to keep and their counts; `folder` holds the counts of an interrupted call.

    Raises:
        DataError: an input cannot be read, there is no phrase in any, or none in so many captions.
    """
    inputs = list_inputs(paths)
    summary = count_phrases(inputs, folder, num_processes)
    runs = [_run_path(folder, number) for number in range(len(inputs.parts))]
    kept = choose_phrases(merge_counts(runs, folder / "all"), min_count, max_phrases, summary)
    if not kept:
        shutil.rmtree(folder)  # other inputs may come next
    if not any(summary.counts[kind] for kind in KINDS.values()):
        raise DataError(
            f"the {summary.counts['captions']} captions of {', '.join(map(str, paths))} have no phrases; find them "
            f"with {tool('phrases')} and give what it wrote"
        )
    if not kept:
        raise DataError(
            f"none of the {sum(summary.dropped.values()):,} phrases of {', '.join(map(str, paths))} is of words and in "
            f"{min_count} captions; set --min-count lower"
        )
    return kept, summary
