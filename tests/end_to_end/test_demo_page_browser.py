"""The page in a real browser, clicked and typed into as by a user: what it shows, and that it asks nobody else."""

from __future__ import annotations

import hashlib
import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
from PIL import Image

import mvptr_ds
from mvptr_ds.data.schema import Extractor
from mvptr_ds.data.shards.index import Index
from mvptr_ds.data.shards.writer import write_shards
from mvptr_ds.inference import Picture, TrainedModel
from tests.conftest import REPO
from tests.support.browser import BROWSER, NO_BROWSER, Tab, opened
from tests.support.launch import environment, free_port
from tests.support.preview_items import hostile_record, hostile_texts, jpeg
from tests.support.untrained_folder import NUM_RECORDS, untrained_folder

pytest.importorskip("gradio", reason="the page needs gradio: pip install 'mvptr_ds[demo]'")
pytestmark = [pytest.mark.skipif(BROWSER is None, reason=NO_BROWSER), pytest.mark.timeout(300)]

ELSEWHERE = "http://elsewhere.invalid"
HOSTILE = NUM_RECORDS  # number of the picture with hostile captions and tags
SENTENCE = "A red dog stands beside a blue car."


@dataclass
class Served:
    address: str
    model: TrainedModel
    model_folder: Path
    before: dict[str, str]  # the content of its files
    temporary: Path  # where the command puts uploads
    process: subprocess.Popen[str]


def digests(folder: Path) -> dict[str, str]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    made = untrained_folder(folder / "made", "image")
    items = [(f"{n:04d}", *made.index.read(made.index.place(n))) for n in range(NUM_RECORDS)]
    hostile = replace(hostile_record(ELSEWHERE), extractor=Extractor("test/detector", "1"))
    write_shards(folder / "held_out", [*items, (f"{HOSTILE:04d}", hostile, {"jpg": jpeg()})], 5)
    before, temporary, port = digests(made.folder), folder / "temporary", free_port()
    temporary.mkdir()
    command = [sys.executable, str(REPO / "tools/demo_page.py"), str(made.folder)]
    process = subprocess.Popen(
        [*command, "--held-out", str(folder / "held_out"), "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(TMPDIR=str(temporary), http_proxy="http://127.0.0.1:9"),  # a proxy that does not answer
    )
    try:
        assert process.stdout is not None and process.stderr is not None
        said = process.stdout.readline()
        if f"{NUM_RECORDS + 1} held-out pictures: http://127.0.0.1:{port}/" not in said:
            process.kill()  # else its errors are read for ever
            pytest.fail(said + process.stderr.read())
        model = mvptr_ds.load(made.folder, device="cpu")
        yield Served(f"http://127.0.0.1:{port}/", model, made.folder, before, temporary, process)
    finally:
        process.kill()
        process.wait()


@pytest.fixture(scope="module")
def browser(served: Served, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tab]:
    with opened(served.address, tmp_path_factory.mktemp("browser")) as tab:
        yield tab


@pytest.fixture
def tab(served: Served, browser: Tab) -> Iterator[Tab]:
    """The page as it is when it was just opened. Whatever a test does, nothing goes wrong and nobody else is asked."""
    browser.send("Page.navigate", url="about:blank")
    browser.send("Page.navigate", url=served.address)
    browser.wait("!!document.querySelector('#search-text textarea, #search-text input')")
    yield browser
    assert browser.hosts == {served.address.split("/")[2]}
    assert browser.problems == []
    assert browser.run("document.title") != "owned"


def open_one_picture(tab: Tab, *inner: str) -> None:
    tab.click("button[role=tab]", "One picture")
    tab.wait_text("#chosen", "regions with the tags")
    for name in inner:
        tab.click("button[role=tab]", name)


def choose(tab: Tab, number: int) -> None:
    tab.type("#number input", f"{number}:")
    tab.click("#number [role=option], [role=option]", f"{number}:")


def field(name: str) -> str:
    return f"#{name} textarea, #{name} input"


def wait_value(tab: Tab, name: str, value: str) -> None:
    """Waits until a field holds a text."""
    tab.wait(f"document.querySelector('#{name} textarea, #{name} input').value === {json.dumps(value)}")


def numbers_of(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.\d+", text)]


def picture_of(served: Served, number: int) -> Picture:
    """A picture of the shards, read without the page."""
    index = Index.open(served.model_folder.parent / "shards")
    record, members = index.read(index.place(number))
    return Picture(members["png"], [region.box for region in record.regions], [region.tag for region in record.regions])


def test_a_search_shows_both_orders_and_heeds_tags(tab: Tab, served: Served) -> None:
    tab.type(field("search-text"), SENTENCE)
    tab.click("#search")
    said = tab.wait_text("#hits", "re-ranked")
    assert said.startswith("by the global states") and said.count("cosine") == said.count("match ") == 8
    assert tab.run("[...document.querySelectorAll('#hits image')].every((n) => n.getBoundingClientRect().width > 50)")
    first, second = tab.run("[...document.querySelectorAll('#hits section')].map((n) => n.getBoundingClientRect().x)")
    assert second > first + 300  # side by side
    tab.click("#tags input")
    tab.wait("document.querySelector('#hits').innerText.trim() === ''")
    tab.click("#search")
    assert tab.wait_text("#hits", "re-ranked") != said


def test_phrases_are_grounded_and_hovering_shows_scores(tab: Tab, served: Served) -> None:
    open_one_picture(tab, "Ground phrases")
    choose(tab, 2)
    tab.wait_text("#chosen", "4 regions with the tags dog, red car, Dog, tree")
    tab.type(field("ground-text"), SENTENCE)
    tab.click("#ground")
    tab.wait_text("#grounded", "Hover a phrase")
    picture = picture_of(served, 2)
    found = served.model.ground(picture, SENTENCE)
    chips = tab.run("[...document.querySelectorAll('.mv-chip')].map((n) => n.innerText.replace(/\\s+/g, ' ').trim())")
    assert chips == [f"{' '.join(one.phrase)} {one.score:.2f}" for one in found]
    assert len(set(tab.run("[...document.querySelectorAll('.mv-chip')].map((n) => n.style.borderColor)"))) == 4
    seen = "[...document.querySelectorAll('#grounded {}')].filter((n) => n.getClientRects().length).length"
    assert tab.run(seen.format(".mv-scores")) == 0 and tab.run(seen.format(".mv-outline")) == 4
    for p, one in enumerate(found):
        tab.hover(f".mv-chip.mv-p{p}")
        tab.wait(f"{seen.format('.mv-scores')} === 1 && {seen.format('.mv-outline')} === 1")
        scores = tab.run(f"[...document.querySelectorAll('.mv-s{p} text')].map((n) => n.textContent)")
        assert scores == [f"{score:.2f}" for score in one.scores]
    tab.hover(".mv-mark", "dog")
    tab.wait(f"{seen.format('.mv-scores')} === 1")
    region = tab.run("[...document.querySelectorAll('#grounded .mv-region')].length - 1")  # the last lies on top
    tab.hover(f"#grounded .mv-r{region}")
    tip = tab.wait_text(f".mv-t{region}", "car blue")
    assert tip.startswith("region 3, tree")
    assert numbers_of(tip) == [round(one.scores[region], 2) for one in found]

    tab.click("#states label", "cross states")
    tab.click("#ground")
    cross = [
        f"{' '.join(one.phrase)} {one.score:.2f}" for one in served.model.ground(picture, SENTENCE, states="cross")
    ]
    chips_now = "[...document.querySelectorAll('.mv-chip')].map((n) => n.innerText.replace(/\\s+/g, ' ').trim()).join()"
    tab.wait(f"{chips_now} === {','.join(cross)!r}")


def test_a_swap_is_judged_by_each_read_out(tab: Tab, served: Served) -> None:
    open_one_picture(tab, "Which is true?")
    choose(tab, 1)
    wait_value(tab, "first-text", "A blue car stands beside a tree.")
    wait_value(tab, "second-text", "A blue tree stands beside a car.")  # proposed
    tab.type(field("first-text"), SENTENCE)
    tab.type(field("second-text"), "A blue dog stands beside a red car.")
    tab.click("#compare")
    tab.wait_text("#compared", "held for true")
    rows = tab.run("[...document.querySelectorAll('#compared tbody tr')].map((n) => n.innerText)")
    picture = picture_of(served, 1)
    for n, caption in enumerate((SENTENCE, "A blue dog stands beside a red car.")):
        assert numbers_of(rows[0])[n] == pytest.approx(float(served.model.similarity(picture, caption)), abs=1e-4)
        assert numbers_of(rows[1])[n] == pytest.approx(float(served.model.match(picture, caption)), abs=1e-4)
    assert [row.split("\t")[0] for row in rows][2:] == [
        f"mean over phrases of the best region, {states} states" for states in ("uni-modal", "cross")
    ]
    for row in rows:
        one, two = numbers_of(row)
        assert one == two or row.rstrip().endswith("the first" if one > two else "the second")


def test_a_mask_is_filled_with_and_without_tags(tab: Tab, served: Served) -> None:
    open_one_picture(tab, "Fill a mask")
    wait_value(tab, "mask-text", "A red [MASK] stands beside a car.")  # proposed
    tab.type(field("mask-text"), "A [MASK] stands beside a [MASK].")
    tab.click("#fill")
    said = tab.wait_text("#filled", "mask 2")
    for words in served.model.fill(picture_of(served, 0), "A [MASK] stands beside a [MASK]."):
        assert words[0][0] in said and f"{words[0][1]:.3f}" in said
    tab.click("#tags input")
    tab.wait_text("#chosen", "regions without tags")
    tab.wait("document.querySelector('#filled').innerText.trim() === ''")
    tab.click("#fill")
    assert tab.wait_text("#filled", "mask 2") != said


def test_an_upload_is_read_by_the_one_decoder(tab: Tab, served: Served, tmp_path: Path) -> None:
    open_one_picture(tab, "Ground phrases")
    good, bad, bomb = tmp_path / "good.jpg", tmp_path / "bad.png", tmp_path / "bomb.png"
    good.write_bytes(jpeg())
    bad.write_bytes(b"<svg onload=alert(1)>")
    buffer = io.BytesIO()
    Image.new("1", (9000, 9000)).save(buffer, "PNG")
    bomb.write_bytes(buffer.getvalue())
    tab.upload("#upload input[type=file]", good)
    tab.wait_text("#chosen", "cells of a grid")
    tab.type(field("ground-text"), SENTENCE)
    tab.click("#ground")
    tab.wait("document.querySelectorAll('#grounded .mv-region').length === 9")
    for path, said in ((bad, "cannot be decoded"), (bomb, "at most 64000000 are decoded")):
        choose(tab, 0)  # a held-out picture takes the place of the upload
        tab.wait_text("#chosen", "regions with the tags")
        tab.upload("#upload input[type=file]", path)
        tab.wait_text("#chosen .mv-problem", said)
        tab.click("#ground")
        tab.wait_text("#grounded .mv-problem", said)
        choose(tab, 1)
        tab.wait_text("#chosen", "regions with the tags")


def test_what_somebody_types_wrongly_is_answered_in_words(tab: Tab) -> None:
    tab.click("#search")
    tab.wait_text("#hits .mv-problem", "there is no sentence yet: type one")
    open_one_picture(tab, "Ground phrases")
    tab.type(field("ground-text"), "<img src=x onerror=\"document.title='owned'\"> ${document.title='owned'}")
    tab.click("#ground")
    tab.wait_text("#grounded .mv-problem", "<img src=x")
    tab.click("button[role=tab]", "Which is true?")
    tab.type(field("first-text"), SENTENCE)
    tab.type(field("second-text"), SENTENCE)
    tab.click("#compare")
    tab.wait_text("#compared .mv-problem", "both captions are the same")
    tab.click("button[role=tab]", "Fill a mask")
    tab.type(field("mask-text"), "A dog.")
    tab.click("#fill")
    tab.wait_text("#filled .mv-problem", "holds no [MASK]")


def test_hostile_captions_and_tags_are_only_text(tab: Tab) -> None:
    open_one_picture(tab, "Ground phrases")
    choose(tab, HOSTILE)
    tab.wait_text("#chosen", "<script>")
    wait_value(tab, "ground-text", hostile_texts(ELSEWHERE)[0])
    tab.type(field("ground-text"), f"A dog {{{{ 7 * 7 }}}} ${{7 * 7}} {hostile_texts(ELSEWHERE)[1]}")
    tab.click("#ground")
    said = tab.wait_text("#grounded", "Hover a phrase")
    assert "{{ 7 * 7 }} ${7 * 7}" in said and "onerror" in said
    tab.click("button[role=tab]", "Search")
    tab.type(field("search-text"), "dog")
    tab.click("#search")
    tab.wait_text("#hits", "re-ranked")
    assert tab.run("document.querySelectorAll('#hits script, #hits img, #chosen iframe, #grounded img').length") == 0


def test_it_listens_here_alone_and_ends_with_ctrl_c(served: Served) -> None:
    """The last test: it ends the server."""
    port = int(served.address.rsplit(":", 1)[1].strip("/"))
    table = [line.split() for line in Path("/proc/net/tcp").read_text(encoding="utf-8").splitlines()]
    listening = "0A"
    assert [row[1] for row in table if row[1].endswith(f":{port:04X}") and row[3] == listening] == [
        f"0100007F:{port:04X}"
    ]
    assert list(served.temporary.glob("mvptr-page-*")) != []
    served.process.send_signal(signal.SIGINT)
    _, said = served.process.communicate(timeout=60)
    assert served.process.returncode == 0, said
    assert "Traceback" not in said, said
    assert list(served.temporary.glob("mvptr-*")) == []  # uploads are gone
    assert digests(served.model_folder) == served.before
