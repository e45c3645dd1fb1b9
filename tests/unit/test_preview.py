from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable
from functools import partial
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from mvptr_ds.corpus.preview import measures
from mvptr_ds.corpus.preview.card import (
    NUM_COLOURS,
    Drawing,
    Piece,
    ShownCaption,
    ShownPhrase,
    ShownRegion,
    colours_of,
    place_labels,
    segments,
)
from mvptr_ds.corpus.preview.charts import Bar, Histogram, Limit, NameCounts, bins_of
from mvptr_ds.corpus.preview.measures import (
    Sizes,
    cut_shares,
    draw_records,
    measure_folder,
    padding,
    sequence_lengths,
    suggested_sizes,
)
from mvptr_ds.corpus.preview.page import write_preview
from mvptr_ds.corpus.preview.render import ENVIRONMENT, TEMPLATES, readable, render
from mvptr_ds.data.collate import Sample, collate
from mvptr_ds.data.features import SampleBuilder, SampleOptions
from mvptr_ds.data.phrases import PhraseVocab
from mvptr_ds.data.schema import Caption, Extractor, Phrase, Record, Region
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.index_builder import build_index
from mvptr_ds.data.shards.sidecars import sidecar_json
from mvptr_ds.data.shards.tar_reader import read_record
from mvptr_ds.data.shards.tar_writer import write_tar
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.data.wordpiece import WordPiece
from mvptr_ds.errors import DataError
from tests.support.preview_items import CAPTION, PHRASES, REGIONS, features, hostile_texts, items, jpeg
from tests.support.tools import run_tool

WORDS = WordPiece()


class _Page(HTMLParser):
    """Elements, texts and attributes of a page, and whether every element is closed where it should be."""

    def __init__(self, content: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.open: list[str] = []
        self.feed(content)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    def classes(self, name: str) -> list[dict[str, str | None]]:
        return [attributes for _, attributes in self.elements if name in (attributes.get("class") or "").split()]


def _write(folder: Path, out: Path, num: int = 24, seed: int = 0, processes: int = 1) -> str:
    write_preview(folder, out, num, 2000, seed, processes)
    return out.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("preview") / "shards"
    write_shards(path, items(), records_per_shard=3)
    return path


@pytest.fixture(scope="module")
def page(folder: Path) -> str:
    return _write(folder, folder.parent / "page.html")


@pytest.mark.parametrize("text", [*hostile_texts("http://host"), "\ud800 half a pair", "a\x85b\ufeffc\n"])
def test_text_stays_text_in_content_and_attributes(text: str) -> None:
    element = ENVIRONMENT.from_string('<p title="{{ text }}">{{ text }}</p>').render(text=text)
    page = _Page(element)
    assert page.elements == [("p", {"title": readable(text)})]
    assert "".join(page.texts) == readable(text)
    assert page.open == []
    element.encode()  # no half surrogate pair is left
    assert not any(ord(c) < 32 or c in "\u202e\u2028\x85\ufeff" for c in readable(text))


def test_readable_keeps_scripts_and_joined_emoji() -> None:
    text = "שלום مرحبا 日本語 👩\u200d👩\u200d👧 नमस्ते é"
    assert readable(text) == text
    assert readable("a\x00\u202eb") == "a⟨U+0000⟩⟨U+202E⟩b"


def test_every_value_of_every_template_is_escaped() -> None:
    """Also one that is added later: no template switches the escaping off."""
    for path in TEMPLATES.glob("*.html"):
        source = path.read_text(encoding="utf-8")
        assert not re.search(r"\bsafe\b|autoescape|{%-? *raw|Markup", source), path.name
    assert ENVIRONMENT.autoescape is True
    template = ENVIRONMENT.from_string("{% macro b(t) %}<b>{{ t }}</b>{% endmacro %}{{ b(text) }}{{ x }} {{ n }}")
    assert template.render(text="<i>", x=1.5, n=2) == "<b>&lt;i&gt;</b>1.5 2"


HOSTILE = "<script>\u202e\"'&{{ title }}"


def test_no_text_reaches_the_page_unescaped() -> None:
    """Whatever is handed to a template: each text of all is hostile, whether a record could hold it there or not."""
    region = ShownRegion(HOSTILE, HOSTILE, HOSTILE, HOSTILE, (0, 0, 9, 9), (0, 0, 9, 9), True)  # type: ignore[arg-type]
    phrase = ShownPhrase((HOSTILE,), HOSTILE, HOSTILE, False)
    caption = ShownCaption([Piece(HOSTILE), Piece(*[HOSTILE] * 4)], [phrase], [HOSTILE])
    shown = render(
        "card.html", key=HOSTILE, unreadable="", facts=HOSTILE, problems=[HOSTILE], regions=[region],
        captions=[caption], drawing=Drawing(9, 9, HOSTILE, HOSTILE), num_more_regions=1, num_more_captions=1,
    )  # fmt: skip
    bad = render("card.html", key=HOSTILE, unreadable=HOSTILE)
    chart = Histogram(HOSTILE, HOSTILE, [Bar(0, 0, 9, 9, HOSTILE)], [(0, HOSTILE)], Limit(HOSTILE, 0, 0, HOSTILE))
    names = NameCounts(HOSTILE, HOSTILE, [(HOSTILE, HOSTILE, 9)])
    texts = ("policy", "style", "script", "title", "read_from", "batch_size", "cuts", "suggested", "drawn")
    page = render(
        "page.html", **dict.fromkeys(texts, HOSTILE), tiles=[(HOSTILE, HOSTILE)], sources=[HOSTILE],
        unreadable=[HOSTILE], histograms=[chart, Histogram(HOSTILE)], cards=[HOSTILE, shown, bad],
        name_counts=[names, NameCounts(HOSTILE, HOSTILE, [])], paddings=[(HOSTILE, HOSTILE)],
    )  # fmt: skip
    written = "&lt;script&gt;⟨U+202E⟩&#34;&#39;&amp;{{ title }}"
    assert page.count(written) == page.count("title }}") > 50 and "\u202e" not in page
    assert page.count("<script>") == page.count("</script>") == 1


def test_segments_cover_each_character_with_its_phrases() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        text_len = int(rng.integers(1, 12))
        phrases = []
        for _ in range(int(rng.integers(0, 5))):
            ends = np.sort(rng.integers(0, text_len + 3, (int(rng.integers(0, 3)), 2)), axis=1)
            phrases.append(Phrase(("w",), tuple((int(a), int(b) + 1) for a, b in ends)))
        pieces = segments(text_len, phrases)
        assert [place for start, end, _ in pieces for place in range(start, end)] == list(range(text_len))
        for start, end, covering in pieces:
            for place in range(start, end):
                expected = tuple(n for n, p in enumerate(phrases) if any(a <= place < b for a, b in p.spans))
                assert covering == expected


def test_labels_lie_inside_and_those_shown_do_not_overlap() -> None:
    rng = np.random.default_rng(1)
    corners = np.sort(rng.random((60, 2, 2)), axis=1).reshape(60, 4) * [480, 300, 480, 300]
    boxes = [(x1, y1, x2, y2) for x1, y1, x2, y2 in corners.tolist()]
    places = place_labels(boxes, [f"tag {n}" for n in range(59)] + ["日" * 200], 480, 300)
    shown = [place for place, fits in places if fits]
    assert 10 < len(shown) < 60  # so both kinds are there
    for number, a in enumerate(shown):
        assert 0 <= a[0] < a[2] <= 480 and 0 <= a[1] < a[3] <= 300
        assert not any(a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3] for b in shown[:number])


def test_colours_are_stable_and_distinct_while_they_last() -> None:
    tags = [f"tag {n}" for n in range(NUM_COLOURS)]
    assert sorted(colours_of(tags).values()) == list(range(NUM_COLOURS))
    assert colours_of(["dog"])["dog"] == colours_of(["dog", "dog", "cat"])["dog"]
    assert len(colours_of([*tags, "one more", "\ud800"])) == NUM_COLOURS + 2


def _contrast(colour: str, other: str) -> float:
    def luminance(text: str) -> float:
        parts = [int(text[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    light, dark = sorted((luminance(colour), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_colours_of_tags_and_text_have_contrast() -> None:
    style = (TEMPLATES / "page.css").read_text()
    tags = re.findall(r"\.c(\d+) \{ --tag: (#\w{6}); \}", style)
    assert [int(number) for number, _ in tags] == list(range(NUM_COLOURS))
    assert min(_contrast(colour, "#ffffff") for _, colour in tags) >= 4.5
    for theme in (style.partition("@media")[0], style.partition("@media")[2].partition("* {")[0]):
        colours = dict(re.findall(r"--([\w-]+): (#\w{6});", theme))
        for ink in ("ink", "soft"):
            assert min(_contrast(colours[ink], colours[ground]) for ground in ("ground", "card")) >= 4.5
        assert _contrast(colours["warn"], colours["warn-ground"]) >= 4.5
        assert _contrast(colours["ink"], colours["lit"]) >= 4.5


@pytest.mark.parametrize("values", [[0], [3, 1, 1], list(range(200)), [0, 10**6]])
def test_bins_count_every_value(values: list[int]) -> None:
    width, counts = bins_of(values)
    assert sum(counts) == len(values) and len(counts) <= 41 and counts[-1] > 0
    assert all(counts[n] == sum(n * width <= v < (n + 1) * width for v in values) for n in range(len(counts)))


def _random_item(rng: np.random.Generator, number: int) -> tuple[str, Record, dict[str, bytes]]:
    nouns = ["dog", "hippopotamus", "cat", "xylophone", "tree"]
    captions = []
    for _ in range(int(rng.integers(1, 4))):
        words = rng.choice(nouns, int(rng.integers(1, 45))).tolist()
        phrases = tuple(Phrase((w,), ((0, 3),)) for w in words[: int(rng.integers(0, 20))])
        captions.append(Caption(" ".join(words), phrases))
    num_regions = int(rng.integers(1, 70))
    regions = tuple(Region((0, 0, 5, 5), f"{rng.choice(nouns)} {rng.integers(9)}") for _ in range(num_regions))
    return f"r{number}", Record(str(number), 64, 48, tuple(captions), regions), {"npy": features(num_regions)}


def _samples(index: Index, options: SampleOptions) -> list[Sample]:
    """Every sample of the folder as training builds it, all phrases known."""
    records = [json.loads(read_record(*index.locate(n)[:3])["json"]) for n in range(len(index))]
    tuples = Counter(tuple(p["tuple"]) for r in records for c in r["captions"] for p in c["phrases"])
    builder = SampleBuilder(WORDS, PhraseVocab.build(tuples, WORDS, min_count=1), options)
    out = []
    for number in range(len(index)):
        place = index.locate(number)
        members = read_record(place.path, place.offset, place.num_bytes)
        out.append(builder.build(members, place.caption, place.record, number, np.random.default_rng(0)))
    return out


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Index:
    path = tmp_path_factory.mktemp("drawn")
    rng = np.random.default_rng(5)
    write_shards(path, (_random_item(rng, n) for n in range(40)), records_per_shard=9)
    return Index.open(path)


def test_lengths_and_padding_are_those_of_training(drawn: Index) -> None:
    options = SampleOptions()
    counted = measure_folder(drawn, WORDS, range(drawn.num_records), options.grid_size, 1)
    samples = _samples(drawn, options)
    expected_S3 = [(len(s.text_ids_T), len(s.tag_ids_G), len(s.region_geometry_R6)) for s in samples]
    lengths_S3 = sequence_lengths(counted.samples, options)
    assert lengths_S3.tolist() == [list(row) for row in expected_S3]
    assert {row[0] for row in expected_S3} >= {40} and {row[2] for row in expected_S3} >= {50}  # some are cut

    batch = collate(samples)
    masks = (batch.text_mask_BT, batch.tag_mask_BG, batch.region_mask_BR)
    shares = padding(lengths_S3, (40, 20, 50), len(samples), 0)
    valid, places = sum(int(m.sum()) for m in masks), sum(m.numel() for m in masks)
    assert shares["longest"] == pytest.approx(1 - valid / places, abs=1e-12)
    assert shares["fixed"] == pytest.approx(1 - valid / (len(samples) * 110), abs=1e-12)


def test_padding_falls_from_fixed_to_bucketed(drawn: Index) -> None:
    options = SampleOptions()
    counted = measure_folder(drawn, WORDS, range(drawn.num_records), options.grid_size, 1)
    shares = padding(sequence_lengths(counted.samples, options), (40, 20, 50), 8, 0)
    assert 1 > shares["fixed"] >= shares["longest"] > shares["bucketed"] > 0
    equal_S3 = np.full((10, 3), 7)
    assert padding(equal_S3, (7, 7, 7), 4, 0) == {"fixed": 0.0, "longest": 0.0, "bucketed": 0.0}
    alternating_S3 = np.array([[2, 2, 2], [4, 4, 4]] * 8)
    assert padding(alternating_S3, (8, 8, 8), 8, 0)["bucketed"] == 0.0
    assert padding(alternating_S3, (8, 8, 8), 16, 0)["longest"] == pytest.approx(0.25)
    assert padding(np.zeros((0, 3), np.int64), (8, 8, 8), 8, 0) == {}


def test_counts_against_brute_force(drawn: Index) -> None:
    counted = measure_folder(drawn, WORDS, range(drawn.num_records), 4, 1)
    firsts = [drawn.locate(drawn.samples_of(n)[0]) for n in range(drawn.num_records)]
    records = [json.loads(read_record(*place[:3])["json"]) for place in firsts]
    assert counted.tags == Counter(region["tag"] for r in records for region in r["regions"])
    assert counted.phrases == Counter(p["tuple"][0] for r in records for c in r["captions"] for p in c["phrases"])
    assert counted.regions_per_record == [len(r["regions"]) for r in records]
    captions = [c for r in records for c in r["captions"]]
    assert [s.num_phrases for s in counted.samples] == [len(c["phrases"]) for c in captions]
    assert [s.num_tokens for s in counted.samples] == [len(WORDS.encode(c["text"])[0]) for c in captions]
    without = sum(not any(c["phrases"] for c in r["captions"]) for r in records)
    assert (counted.records["read"], counted.records["without phrases"]) == (40, without)
    assert counted.records["with features"] == 40 and counted.records["with picture"] == 0


def test_processes_and_chunks_change_nothing(drawn: Index, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = measure_folder(drawn, WORDS, range(drawn.num_records), 4, 1)
    monkeypatch.setattr(measures, "_CHUNK_RECORDS", 7)
    assert measure_folder(drawn, WORDS, range(drawn.num_records), 4, 1) == whole
    assert measure_folder(drawn, WORDS, range(drawn.num_records), 4, 2) == whole


def test_suggested_sizes_are_the_smallest_that_hold_99_percent(drawn: Index) -> None:
    samples = measure_folder(drawn, WORDS, range(drawn.num_records), 4, 1).samples
    sizes = suggested_sizes(samples)

    def share(wanted: Callable[[Sizes], int], size: int) -> float:
        return sum(wanted(s) <= size for s in samples) / len(samples)

    wanted: dict[str, Callable[[Sizes], int]] = {
        "max_tokens": lambda s: s.num_tokens,
        "max_text_slots": lambda s: 2 + min(s.num_tokens, sizes["max_tokens"]) + s.num_phrases,
        "max_tag_slots": lambda s: 2 + s.num_tag_pieces,
        "max_regions": lambda s: s.num_regions,
    }
    for name, length in wanted.items():
        assert share(length, sizes[name]) >= 0.99 > share(length, sizes[name] - 1), name
    shares = cut_shares(samples, SampleOptions())
    assert shares["regions"] == pytest.approx(1 - share(wanted["max_regions"], 50))
    assert shares["caption or phrases"] == pytest.approx(
        sum(s.num_tokens > 33 or 2 + s.num_tokens + s.num_phrases > 40 for s in samples) / len(samples)
    )
    assert 0 < shares["tags"] < 1
    assert suggested_sizes([]) == {"max_tokens": 1, "max_text_slots": 3, "max_tag_slots": 2, "max_regions": 1}


def test_records_are_drawn_over_the_whole_folder(drawn: Index) -> None:
    numbers = draw_records(drawn, 10, 0, 1)
    assert numbers == sorted(set(numbers)) and len(numbers) == 10
    assert draw_records(drawn, 10, 0, 1) == numbers
    assert draw_records(drawn, 10, 1, 1) != numbers
    assert draw_records(drawn, 1000, 0, 1) == list(range(40))
    seen = Counter(n for seed in range(200) for n in draw_records(drawn, 10, seed, 1))
    assert len(seen) == 40 and max(seen.values()) < 90  # 50 expected, standard deviation 6


def test_equal_input_gives_an_equal_page(folder: Path, page: str, tmp_path: Path) -> None:
    assert _write(folder, tmp_path / "again.html") == page
    assert _write(folder, tmp_path / "two.html", processes=2) == page
    few = _write(folder, tmp_path / "few.html", num=3)
    assert len(_Page(few).classes("card")) == 3
    assert _write(folder, tmp_path / "other.html", num=3, seed=1) != few
    assert sorted(p.name for p in tmp_path.iterdir()) == ["again.html", "few.html", "other.html", "two.html"]


def test_page_shows_every_kind_of_record(page: str) -> None:
    parsed = _Page(page)
    text = " ".join(parsed.texts)
    assert parsed.open == [] and len(parsed.classes("card")) == 7
    assert text.count("cannot be decoded") == 1 and "features hold NaN" in text and "0x" not in text
    assert "no boxes, so a grid of 4 x 4 regions" in text
    assert "record 0 in shard-000000.tar" in text and "features 2 x 4" in text
    marks = {a["data-p"]: a["class"] for a in parsed.classes("mark") if "data-p" in a}
    assert marks["0.0 0.1 0.2"] == "mark noun attribute relation"  # dog
    assert marks["0.1"] == "mark attribute" and marks["0.2"] == "mark relation"
    buttons = [a for a in parsed.classes("phrase") if a.get("data-r")]
    assert [(a["data-p"], a["data-r"]) for a in buttons] == [("0.0", "0"), ("0.1", "0"), ("0.2", "0 1")]
    assert len(parsed.classes("sheet")) == 3  # features only, bad picture, bad features
    assert len([tag for tag, _ in parsed.elements if tag == "image"]) == 4
    assert text.count("shown squeezed") == 1 and "data.max_tokens=" in text and "0.90" in text


def test_page_asks_for_nothing_and_runs_only_its_own_script(page: str) -> None:
    parsed = _Page(page)
    addresses = [a[name] or "" for _, a in parsed.elements for name in ("src", "href", "data", "action") if name in a]
    assert addresses and all(address.startswith("data:image/jpeg;base64,") for address in addresses)
    tags = Counter(tag for tag, _ in parsed.elements)
    assert (tags["script"], tags["style"]) == (1, 1)
    assert not tags.keys() & {"iframe", "link", "base", "img", "object", "form", "use", "foreignObject"}
    assert not any(name.startswith("on") or name == "style" for _, a in parsed.elements for name in a)
    assert "default-src 'none'; img-src data:" in page
    template_text = "日本語 {{ policy }} {% include 'page.js' %} {# &lt;b&gt;"
    assert template_text in "".join(parsed.texts)  # what a caption says is no template


def test_boxes_lie_on_the_drawing(page: str) -> None:
    parsed = _Page(page)
    boxes = [tuple(float(a[k] or 0) for k in ("x", "y", "width", "height")) for a in parsed.classes("box")]
    assert len(boxes) == 2 * 4 + 1 + 5  # of the seven records
    first = (480 * 4 / 64, 360 * 4 / 48, 480 * 26 / 64, 360 * 36 / 48)
    assert boxes[0] == pytest.approx(first)
    views = [a["viewBox" if "viewBox" in a else "viewbox"] for _, a in parsed.elements if a.get("role") == "img"]
    assert "0 0 480 360" in views and "0 0 107 480" in views and "0 0 480 80" in views  # the last is squeezed


def test_one_record_cannot_swell_the_page(tmp_path: Path) -> None:
    captions = tuple(Caption("word " * 2000, (Phrase(("w",), ((0, 4),)),) * 300) for _ in range(30))
    regions = tuple(Region((0, 0, 9, 9), "long tag " * 500) for _ in range(400))
    record = Record("x" * 5000, 64, 48, captions, regions)
    write_shards(tmp_path / "s", [("k", record, {"jpg": jpeg()})], 1)
    page = _write(tmp_path / "s", tmp_path / "p.html")
    assert len(page) < 2_500_000
    assert "and 10 more captions" in page and "and 300 more" in page and "100 of 300 phrases shown" in page
    assert "10,000 characters in all" in page


def test_records_without_picture_or_caption_and_their_extractor(tmp_path: Path) -> None:
    detector = Extractor("some/detector", "v1.0")
    rows = [
        ("text", Record("1", 0, 0, (Caption("Only words."),)), {}),
        ("image", Record("2", 64, 48, (), (Region((0, 0, 9, 9), "dog"),), detector), {"jpg": jpeg()}),
        ("boxes", Record("3", 64, 48, (Caption("Boxes."),), (Region((0, 0, 9, 9), "cat"),), detector), {}),
    ]
    write_shards(tmp_path / "s", rows, 5)
    preview = write_preview(tmp_path / "s", tmp_path / "p.html")
    parsed = _Page((tmp_path / "p.html").read_text())
    text = " ".join(parsed.texts)
    assert not preview.measures.bad and len(parsed.classes("card")) == 3 and not parsed.classes("problem")
    assert "image-only: no caption" in text and "· text-only" in text and "some/detector v1.0 (2 records)" in text
    assert text.count("own extractor: some/detector v1.0") == 2
    assert (len(parsed.classes("sheet")), len([tag for tag, _ in parsed.elements if tag == "image"])) == (1, 1)
    expected = {"read": 3, "with picture": 1, "text-only": 1, "image-only": 1, "without regions": 1}
    assert {name: preview.measures.records[name] for name in expected} == expected
    assert preview.measures.samples == [Sizes(3, 0, 0, 0), Sizes(0, 0, 1, 1), Sizes(2, 0, 1, 1)]


def _write_sidecar(folder: Path, entries: dict[str, dict[str, bytes]]) -> Path:
    folder.mkdir()
    write_tar(folder / "shard-000000.tar", entries.items())
    build_index(folder)
    return folder


def test_sidecars_are_joined_as_in_training(tmp_path: Path) -> None:
    plain = [(f"k{n}", Record(str(n), 64, 48, (Caption(CAPTION),)), {"jpg": jpeg()}) for n in range(4)]
    write_shards(tmp_path / "s", plain, 3)
    regions = sidecar_json(Extractor("detector", "7"), width=64, height=48, regions=REGIONS)
    phrases = sidecar_json(Extractor("parser", "2"), captions=[Caption(CAPTION, PHRASES)])
    first = _write_sidecar(tmp_path / "r", {f"k{n}": {"json": regions, "npy": features(2)} for n in (3, 1, 0)})
    second = _write_sidecar(tmp_path / "p", {f"k{n}": {"json": phrases} for n in (0, 1, 2, 3, 9)})
    out = tmp_path / "p.html"
    preview = write_preview(tmp_path / "s", out, sidecars=[first, second], num_processes=2)
    assert (preview.num_records, preview.num_shown, preview.measures.bad) == (3, 3, [])
    assert preview.measures.records["with features"] == 3 and preview.measures.tags == {"dog": 3, "cat": 3}
    assert preview.measures.phrases == {"dog": 3, "dog · brown": 3, "dog · chase · cat": 3}
    page = out.read_text()
    text = " ".join(_Page(page).texts)
    assert f"sidecar {first}: 3 of 4 records have a partner; detector 7 (3 records)" in text
    assert f"sidecar {second}: 4 of 4 records have a partner; parser 2 (5 records)" in text
    assert "features 2 x 4" in text and len(_Page(page).classes("box")) == 6
    write_preview(tmp_path / "s", out, sidecars=[first, second])
    assert out.read_text() == page
    assert write_preview(tmp_path / "s", out, keys=["k3", "k0"]).num_shown == 2
    joined = write_preview(tmp_path / "s", out, sidecars=[first, second], keys=["k3"])
    chosen = " ".join(_Page(out.read_text()).texts)
    assert joined.num_shown == 1 and "k3" in chosen and "k0" not in chosen
    with pytest.raises(DataError, match=r"no record has the key 'k2', 'k7'; "):  # k2 lacks a partner
        write_preview(tmp_path / "s", out, sidecars=[first, second], keys=["k3", "k2", "k7"])
    with pytest.raises(DataError, match="is a sidecar; name it among the sidecars"):
        write_preview(first, out)


@pytest.mark.parametrize(
    ("old", "new", "shown"),
    [
        (b'"schema":1', b'"schema":7', "schema is 7"),
        (b'"width":64', b'"width":""', "a field is missing or of the wrong type"),
        (b"Victim text.", b"\\ud800 half.", "half of a surrogate pair"),
        (b'"score":0.9', b'"score":NaN', "score is nan"),
        (b'"schema":1', b'"schema"!1', "not JSON"),
    ],
)
def test_a_bad_record_never_breaks_the_page(tmp_path: Path, old: bytes, new: bytes, shown: str) -> None:
    regions = (Region((0, 0, 9, 9), "tag", 0.9),)
    victim = Record("1", 64, 48, (Caption("Victim text."),), regions)
    sound = Record("2", 64, 48, (Caption("Sound."),), regions)
    write_shards(tmp_path / "s", [("victim", victim, {"npy": features(1)}), ("sound", sound, {"npy": features(1)})], 2)
    tar = tmp_path / "s" / "shard-000000.tar"
    content = tar.read_bytes()
    assert old in content and len(old) == len(new)  # the index still fits
    tar.write_bytes(content.replace(old, new, 1))
    page = _write(tmp_path / "s", tmp_path / "p.html")
    parsed = _Page(page)
    assert parsed.open == [] and len(parsed.classes("card")) == 2
    assert "Sound." in page and "victim" in page and shown in " ".join(parsed.texts)


_tool = partial(run_tool, "preview_shards.py")


def test_tool(folder: Path, tmp_path: Path) -> None:
    done = _tool(str(folder), "--out", str(tmp_path / "p.html"), "--num", "2")
    assert done.returncode == 0 and "2 of 7 records shown, 7 counted, 0 unreadable" in done.stdout
    assert len(_Page((tmp_path / "p.html").read_text()).classes("card")) == 2
    failed = _tool(str(tmp_path / "none"), "--out", str(tmp_path / "x.html"))
    assert failed.returncode == 1 and failed.stderr.startswith("error: ") and failed.stderr.count("\n") == 1
    assert _tool(str(folder), "--out", "x.html", "--num", "-1").returncode == 2
    with pytest.raises(FileNotFoundError):
        write_preview(folder, tmp_path / "no" / "x.html", 0, 0)


def test_an_empty_preview_is_a_page_too(folder: Path, tmp_path: Path) -> None:
    write_preview(folder, tmp_path / "p.html", 0, 0)
    parsed = _Page((tmp_path / "p.html").read_text())
    assert parsed.open == [] and not parsed.classes("card") and "nothing to count" in " ".join(parsed.texts)
