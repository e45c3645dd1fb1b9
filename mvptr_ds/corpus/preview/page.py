"""Writes one self-contained HTML page of a folder's records: images, captions with their phrases, statistics.

The page loads nothing: style and script are inside, and images are data URIs. A content security policy names style and
script by their hashes, so that nothing else runs or loads, whatever the shards hold.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from markupsafe import Markup

from mvptr_ds.corpus.preview.card import card
from mvptr_ds.corpus.preview.charts import histogram, name_counts
from mvptr_ds.corpus.preview.measures import (
    PARTS,
    Measures,
    cut_shares,
    draw_records,
    find_records,
    measure_folder,
    padding,
    sequence_lengths,
    suggested_sizes,
)
from mvptr_ds.corpus.preview.render import TEMPLATES, render
from mvptr_ds.data.features import SampleOptions
from mvptr_ds.data.shards.index import Index, SampleIndex
from mvptr_ds.data.shards.index_builder import ensure_index
from mvptr_ds.data.shards.sidecar_join import DROP, JoinedIndex, check_kinds, ensure_join, join_path
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.user_io.atomic import replacing
from mvptr_ds.user_io.progress import progress_bar

BATCH_SIZE = 32  # of the padding that is foretold
_NUM_TOP = 30
_MAX_BAD_SHOWN = 10
_CARDS, _STATISTICS = 1, 2  # streams of the generator that draws records
_PADDINGS = {
    "fixed": "fixed slots ({maxima})",
    "longest": "to the longest of each batch",
    "bucketed": "to the longest, batches of equal total length (the best case)",
}


class Preview(NamedTuple):
    """What a page shows."""

    num_records: int  # of the folder, those that lack a partner in a sidecar left out
    num_shown: int
    measures: Measures


def write_preview(
    folder: str | Path,
    out: str | Path,
    num_records: int = 24,
    num_measured: int = 2000,
    seed: int = 0,
    num_processes: int = 1,
    sidecars: Sequence[str | Path] = (),
    keys: Sequence[str] = (),
) -> Preview:
    """Writes the page of `num_records` records of the folder, with statistics of `num_measured`, both drawn by `seed`.

    With `keys` it shows the records of these keys instead of drawn ones.

    With sidecars the records are those that training reads: joined, without those that lack a partner. Equal input
    gives an equal page, whatever `num_processes`.

    Raises:
        DataError: a folder has no sound index and none can be built, or it fits no other; no record has a key.
        OSError: `out` cannot be written.
    """
    folders = [ensure_index(path) for path in (folder, *sidecars)]
    with tempfile.TemporaryDirectory() as join_folder:
        index, partners = _joined(folders, join_folder)
        options = SampleOptions()
        numbers = draw_records(index, num_measured, seed, _STATISTICS)
        measures = measure_folder(index, WordPiece(), numbers, options.grid_size, num_processes)
        shown = find_records(index, keys) if keys else draw_records(index, num_records, seed, _CARDS)
        bar = progress_bar(shown, unit="record", desc="page", delay=1.0)
        cards = [card(index, number, options.grid_size) for number in bar]
    content = {
        "title": str(folder),
        "tiles": _tiles(index, folders[0], measures),
        "sources": _sources(folders, partners),
        **_statistics(measures, options, seed),
        **_padding(measures, options, seed),
        "drawn": f"{len(shown):,} records " + ("by their keys" if keys else f"drawn over the folder (seed {seed})"),
        "cards": cards,
    }
    out = Path(out)
    with replacing(out) as partial:
        partial.write_bytes(_page(content).encode())
    return Preview(index.num_records, len(shown), measures)


def _joined(folders: Sequence[Index], join_folder: str) -> tuple[SampleIndex, list[int]]:
    """Returns the folder of records (the first) joined with its sidecars, and how many records have a partner in each.

    Mixed extractors are let through: the page names them all.
    """
    main, sidecars = folders[0], folders[1:]
    check_kinds(main, sidecars)
    if not sidecars:
        return main, []
    ensure_join(main, sidecars, DROP, True, join_folder)
    counts = json.loads(join_path(main, sidecars, DROP, join_folder).read_text(encoding="utf-8"))
    return JoinedIndex(main, sidecars, DROP, join_folder), counts["partners"]


def _page(content: dict[str, Any]) -> str:
    style = Markup((TEMPLATES / "page.css").read_text(encoding="utf-8"))
    script = Markup((TEMPLATES / "page.js").read_text(encoding="utf-8"))
    policy = Markup(
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    return render("page.html", policy=policy, style=style, script=script, **content)


def _source(content: str) -> str:
    """Returns a source expression of a content security policy: this text and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _sources(folders: Sequence[Index], partners: Sequence[int]) -> list[str]:
    """Returns a line for each folder that names extractors: of the whole folder, by its manifest."""
    lines = []
    for folder, num in zip(folders, [None, *partners], strict=True):
        found = ", ".join(f"{name} ({count:,} records)" for name, count in folder.extractors.items())
        if num is not None:
            lines.append(
                f"sidecar {folder.folder}: {num:,} of {folders[0].num_records:,} records have a partner; {found}"
            )
        elif found:
            lines.append(f"extractors: {found}")
    return lines


def _tiles(index: SampleIndex, folder: Index, measures: Measures) -> list[tuple[str, str]]:
    num_read = max(1, measures.records["read"])
    facts = [
        (f"{index.num_records:,}", "records"),
        (f"{len(index):,}", "samples"),
        (f"{folder.num_shards:,}", "shards"),
        (f"{folder.num_bytes / 2**20:,.1f}", "MiB"),
    ]
    shares = ["with picture", "with features", "without regions", "without phrases"]
    shares += [name for name in ("text-only", "image-only") if measures.records[name]]
    return facts + [(f"{100 * measures.records[name] / num_read:.1f} %", name) for name in shares]


def _statistics(measures: Measures, options: SampleOptions, seed: int) -> dict[str, Any]:
    samples = measures.samples
    num_read = measures.records["read"]
    tokens = f"max_tokens {options.max_tokens}", options.max_tokens
    regions = f"max_regions {options.max_regions}", options.max_regions
    unreadable = []
    if measures.bad:
        unreadable = [f"{len(measures.bad):,} records could not be read:", *measures.bad[:_MAX_BAD_SHOWN]]
    if len(measures.bad) > _MAX_BAD_SHOWN:
        unreadable.append(f"and {len(measures.bad) - _MAX_BAD_SHOWN:,} more")
    return {
        "read_from": f"Shares and lengths from {num_read:,} records ({len(samples):,} samples) drawn by seed {seed}.",
        "unreadable": unreadable,
        "histograms": [
            histogram("Wordpieces a caption", [s.num_tokens for s in samples], tokens),
            histogram("Phrases a caption", [s.num_phrases for s in samples]),
            histogram("Regions a picture", measures.regions_per_record, regions),
        ],
        "name_counts": [
            name_counts("Tags", measures.tags, _NUM_TOP),
            name_counts("Phrases", measures.phrases, _NUM_TOP),
        ],
    }


def _padding(measures: Measures, options: SampleOptions, seed: int) -> dict[str, Any]:
    maxima = (options.max_text_slots, options.max_tag_slots, options.max_regions)
    shares = padding(sequence_lengths(measures.samples, options), maxima, BATCH_SIZE, seed)
    fixed = " + ".join(f"{size} {name}" for size, name in zip(maxima, PARTS, strict=True))
    cuts = cut_shares(measures.samples, options).items()
    return {
        "batch_size": BATCH_SIZE,
        "paddings": [(_PADDINGS[n].format(maxima=fixed), f"{100 * share:.1f} %") for n, share in shares.items()],
        "cuts": ", ".join(f"{what} {100 * share:.1f} %" for what, share in cuts),
        "suggested": " ".join(f"data.{name}={size}" for name, size in suggested_sizes(measures.samples).items()),
    }
