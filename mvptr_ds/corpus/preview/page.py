"""One self-contained HTML page of a folder's records: pictures, captions with their phrases, statistics.

It asks for nothing: style and script are inside, pictures are data URIs, and a content security policy that names style
and script by their hashes keeps anything else from running or loading, whatever the shards hold.
"""

from __future__ import annotations

import base64
import hashlib
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import NamedTuple

from mvptr_ds.corpus.preview.card import card
from mvptr_ds.corpus.preview.charts import bars, histogram
from mvptr_ds.corpus.preview.markup import Html, element, escaped, joined, shortened
from mvptr_ds.corpus.preview.measures import (
    PARTS,
    Measures,
    cut_shares,
    draw_records,
    measure_folder,
    padding,
    sequence_lengths,
    suggested_sizes,
)
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
_FILES = Path(__file__).resolve().parent
_CARDS, _STATISTICS = 1, 2  # streams of the generator that draws records
_LEGEND = (("noun", "noun"), ("attribute", "noun with attribute"), ("relation", "subject, relation, object"))
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
) -> Preview:
    """Writes the page of `num_records` records of the folder, with statistics of `num_measured`, both drawn by `seed`.

    With sidecars the records are those that training reads: joined, without those that lack a partner. Equal input
    gives an equal page, whatever `num_processes`.

    Raises:
        DataError: a folder has no sound index and none can be built, or it does not fit the others.
        OSError: `out` cannot be written.
    """
    folders = [ensure_index(path) for path in (folder, *sidecars)]
    with tempfile.TemporaryDirectory() as join_folder:
        index, partners = _joined(folders, join_folder)
        options = SampleOptions()
        numbers = draw_records(index, num_measured, seed, _STATISTICS)
        measures = measure_folder(index, WordPiece(), numbers, options.grid_size, num_processes)
        shown = draw_records(index, num_records, seed, _CARDS)
        bar = progress_bar(shown, unit="record", desc="page", delay=1.0)
        cards = [card(index, number, options.grid_size) for number in bar]
    title = str(folder)
    body = joined(
        element("header", element("h1", title), _tiles(index, folders[0], measures), *_sources(folders, partners)),
        _statistics(measures, options, seed),
        element("h2", f"{len(shown):,} records drawn over the folder (seed {seed})"),
        _legend(),
        element("main", *cards),
    )
    out = Path(out)
    with replacing(out) as partial:
        partial.write_bytes(_page(title, body).encode())
    return Preview(index.num_records, len(shown), measures)


def _joined(folders: Sequence[Index], join_folder: str) -> tuple[SampleIndex, list[int]]:
    """The folder of records (the first) joined with its sidecars, and how many records have a partner in each.

    Mixed extractors are let through: the page names them all.
    """
    main, sidecars = folders[0], folders[1:]
    check_kinds(main, sidecars)
    if not sidecars:
        return main, []
    ensure_join(main, sidecars, DROP, True, join_folder)
    counts = json.loads(join_path(main, sidecars, DROP, join_folder).read_text(encoding="utf-8"))
    return JoinedIndex(main, sidecars, DROP, join_folder), counts["partners"]


def _page(title: str, body: Html) -> str:
    style = (_FILES / "page.css").read_text(encoding="utf-8")
    script = (_FILES / "page.js").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; img-src data:; style-src {_source(style)}; script-src {_source(script)}; "
        "base-uri 'none'; form-action 'none'"
    )
    shell = Template((_FILES / "page.html").read_text(encoding="utf-8"))
    return shell.substitute(policy=policy, title=escaped(title), style=style, script=script, body=body)


def _source(content: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()}'"


def _sources(folders: Sequence[Index], partners: Sequence[int]) -> list[Html]:
    """A line for each folder that names extractors: of the whole folder, by its manifest."""
    lines = []
    for folder, num in zip(folders, [None, *partners], strict=True):
        found = ", ".join(f"{name} ({count:,} records)" for name, count in folder.extractors.items())
        if num is not None:
            lines.append(
                f"sidecar {folder.folder}: {num:,} of {folders[0].num_records:,} records have a partner; {found}"
            )
        elif found:
            lines.append(f"extractors: {found}")
    return [element("p", shortened(line, 600), class_="note") for line in lines]


def _tiles(index: SampleIndex, folder: Index, measures: Measures) -> Html:
    num_read = max(1, measures.records["read"])
    facts = [
        (f"{index.num_records:,}", "records"),
        (f"{len(index):,}", "samples"),
        (f"{folder.num_shards:,}", "shards"),
        (f"{folder.num_bytes / 2**20:,.1f}", "MiB"),
    ]
    shares = ["with picture", "with features", "without regions", "without phrases"]
    shares += [name for name in ("text-only", "image-only") if measures.records[name]]
    facts += [(f"{100 * measures.records[name] / num_read:.1f} %", name) for name in shares]
    return element("ul", *(element("li", element("b", v), element("span", name)) for v, name in facts), class_="tiles")


def _statistics(measures: Measures, options: SampleOptions, seed: int) -> Html:
    samples = measures.samples
    read_from = f"Shares and lengths from {measures.records['read']:,} records ({len(samples):,} samples) drawn by seed"
    lengths = joined(
        histogram(
            "Wordpieces a caption",
            [s.num_tokens for s in samples],
            (f"max_tokens {options.max_tokens}", options.max_tokens),
        ),
        histogram("Phrases a caption", [s.num_phrases for s in samples]),
        histogram(
            "Regions a picture",
            measures.regions_per_record,
            (f"max_regions {options.max_regions}", options.max_regions),
        ),
    )
    panels = [
        element("div", lengths, class_="panel"),
        element("div", bars("Tags", measures.tags, _NUM_TOP), class_="panel"),
        element("div", bars("Phrases", measures.phrases, _NUM_TOP), class_="panel"),
    ]
    return joined(
        element("h2", "Statistics"),
        element("p", f"{read_from} {seed}.", class_="note"),
        *_bad(measures),
        element("div", *panels, class_="panels"),
        element("h2", f"Padding to expect at batch {BATCH_SIZE}"),
        _padding(measures, options, seed),
    )


def _bad(measures: Measures) -> list[Html]:
    if not measures.bad:
        return []
    lines = [f"{len(measures.bad):,} records could not be read:", *measures.bad[:_MAX_BAD_SHOWN]]
    if len(measures.bad) > _MAX_BAD_SHOWN:
        lines.append(f"and {len(measures.bad) - _MAX_BAD_SHOWN:,} more")
    return [element("div", *(element("p", shortened(line, 600)) for line in lines), class_="problem")]


def _padding(measures: Measures, options: SampleOptions, seed: int) -> Html:
    maxima = (options.max_text_slots, options.max_tag_slots, options.max_regions)
    shares = padding(sequence_lengths(measures.samples, options), maxima, BATCH_SIZE, seed)
    fixed = " + ".join(f"{size} {name}" for size, name in zip(maxima, PARTS, strict=True))
    rows = [
        element(
            "tr",
            element("th", _PADDINGS[name].format(maxima=fixed), scope="row"),
            element("td", f"{100 * share:.1f} %", class_="number"),
        )
        for name, share in shares.items()
    ]
    cuts = ", ".join(f"{what} {100 * share:.1f} %" for what, share in cut_shares(measures.samples, options).items())
    suggested = " ".join(f"data.{name}={size}" for name, size in suggested_sizes(measures.samples).items())
    return element(
        "div",
        element("table", *rows, class_="paddings"),
        element("p", f"Cut at these sizes, of the samples: {cuts}. All phrases count as known.", class_="note"),
        element("p", "Each of these holds 99 % of the samples whole: ", element("code", suggested)),
        class_="panel",
    )


def _legend() -> Html:
    items = [element("li", element("span", name, class_=f"mark {kind}")) for kind, name in _LEGEND]
    items.append(
        element("li", "Point at, or press, a phrase or a region: what belongs to it lights up.", class_="note")
    )
    return element("ul", *items, class_="legend")
