"""Measures the share of the captions' phrases that a vocabulary knows, and reports what it holds."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mvptr_ds.corpus.phrases.captions import Part, list_inputs, read_captions
from mvptr_ds.corpus.resumable_jobs import Summary, run_units
from mvptr_ds.data.phrases import KINDS, PhraseVocab
from mvptr_ds.data.wordpiece import WordPiece

_MAX_KEPT = 10  # captions with so many kept phrases or more are one row
_WITH_PHRASES, _ALL_KEPT = "captions with phrases", "captions all of whose phrases are kept"


def measure_coverage(
    paths: Sequence[Path], vocab_path: Path, words: WordPiece, folder: Path, num_processes: int
) -> Summary:
    """Looks up all phrases of the captions in the vocabulary of `vocab_path`; a phrase counts once a caption.

    `folder` remembers what is done, for an interrupted run. `coverage_lines` reads the counts.

    Raises:
        DataError: an input cannot be read.
    """
    inputs = list_inputs(paths)
    fingerprint = PhraseVocab.load(vocab_path, words).fingerprint
    arguments = {"inputs": inputs.description, "vocabulary": fingerprint}
    work = functools.partial(_cover_part, str(vocab_path), words.source)
    return run_units(folder, arguments, inputs.parts, work, num_processes, "coverage")


@functools.lru_cache(maxsize=1)
def _load(vocab_path: str, word_path: str) -> PhraseVocab:
    return PhraseVocab.load(vocab_path, WordPiece(word_path))


def _cover_part(vocab_path: str, word_path: str, part: Part) -> Summary:
    vocab = _load(vocab_path, word_path)
    summary = Summary()
    counts: Counter[str] = Counter()
    for caption in read_captions(part, summary):
        phrases = {phrase.tuple for phrase in caption.phrases}
        kept = [phrase for phrase in phrases if vocab.index_of(phrase) is not None]
        counts["captions"] += 1
        counts[_kept_name(len(kept))] += 1
        counts[_WITH_PHRASES] += bool(phrases)
        counts[_ALL_KEPT] += bool(phrases) and len(kept) == len(phrases)
        counts.update(KINDS[len(phrase)] for phrase in phrases)
        counts.update(f"kept {KINDS[len(phrase)]}" for phrase in kept)
    summary.counts.update(counts)
    return summary


def _kept_name(number: int) -> str:
    return f"captions with {number} kept" if number < _MAX_KEPT else f"captions with {_MAX_KEPT} or more kept"


def coverage_lines(title: str, coverage: Summary) -> list[str]:
    """Returns lines of text: the shares of the phrases by kind, and of the captions."""
    counts = coverage.counts
    lines = [f"{title}: {counts['captions']:,} captions, {counts[_WITH_PHRASES]:,} with phrases"]
    num_found = sum(counts[kind] for kind in KINDS.values())
    num_kept = sum(counts[f"kept {kind}"] for kind in KINDS.values())
    lines.append(f"  phrases kept      {_share(num_kept, num_found)}")
    lines += [f"    {kind:<15} {_share(counts[f'kept {kind}'], counts[kind])}" for kind in KINDS.values()]
    lines.append(f"  captions with all phrases kept  {_share(counts[_ALL_KEPT], counts[_WITH_PHRASES])}")
    lines.append("  captions by kept phrases")
    for number in range(_MAX_KEPT + 1):
        name = f"{number}" if number < _MAX_KEPT else f"{number} or more"
        lines.append(f"    {name:<15} {_share(counts[_kept_name(number)], counts['captions'])}")
    return lines


def _share(part: int, whole: int) -> str:
    return f"{part:>11,} of {whole:>11,}  {part / whole:7.2%}" if whole else f"{part:>11,} of {whole:>11,}"


def most_frequent_lines(vocab: PhraseVocab, number: int) -> list[str]:
    """Returns the most frequent phrases of each kind with the number of their captions."""
    lines = []
    for kind_len, kind in KINDS.items():
        own = [
            (count, phrase) for phrase, count in zip(vocab.tuples, vocab.counts, strict=True) if len(phrase) == kind_len
        ]
        own.sort(key=lambda item: (-item[0], item[1]))
        lines.append(f"{kind}: " + ", ".join(f"{' '.join(phrase)} {count:,}" for count, phrase in own[:number]))
    return lines
