"""The preview in a real browser: what it shows, what it lights up, and that nothing in it runs or asks for anything."""

from __future__ import annotations

import html
import json
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from mvptr_ds.corpus.preview.page import write_preview
from mvptr_ds.data.shards.writer import write_shards
from tests.support.preview_items import hostile_texts, items

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason=f"no browser: none of {', '.join(NAMES)} is installed")


@dataclass
class Visit:
    dom: str  # as it stands after the scripts have run
    console: list[str]
    urls: list[str]  # that the browser began to load, its own errands at its maker's included

    @property
    def title(self) -> str:
        found = re.search(r"<title>(.*?)</title>", self.dom, re.DOTALL)
        return html.unescape(found.group(1)) if found else ""


def visit(page: Path, folder: Path, *flags: str) -> Visit:
    assert BROWSER is not None
    log = folder / "net.json"
    command = [
        BROWSER,
        "--headless=new",
        "--no-sandbox",  # it refuses to start as root otherwise, as in a container
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--no-first-run",
        "--disable-background-networking",
        "--disable-component-update",
        f"--user-data-dir={folder / 'profile'}",
        "--enable-logging=stderr",
        f"--log-net-log={log}",
        "--virtual-time-budget=2000",
        *flags,
        "--dump-dom",
        page.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.decode("utf-8", "replace").splitlines() if "CONSOLE" in line]
    urls = re.findall(r'"url":"([^"]*)"', log.read_text(encoding="utf-8", errors="replace"))
    return Visit(done.stdout.decode(), console, urls)


class Trap:
    """A web server that only counts who comes."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        self.num_visitors = 0
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:  # closed
                return
            with connection:
                self.num_visitors += 1
                connection.sendall(b"HTTP/1.0 404 Not Found\r\nContent-Length: 0\r\n\r\n")


@pytest.fixture(scope="module")
def trap() -> Iterator[Trap]:
    trap = Trap()
    yield trap
    trap.listener.close()


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, trap: Trap) -> Path:
    folder = tmp_path_factory.mktemp("preview")
    write_shards(folder / "shards", items(trap.url), records_per_shard=3)
    write_preview(folder / "shards", folder / "page.html")
    return folder / "page.html"


def test_page_shows_boxes_and_marks_and_asks_for_nothing(page: Path, trap: Trap, tmp_path: Path) -> None:
    before = trap.num_visitors
    seen = visit(page, tmp_path)
    assert seen.title == str(page.with_name("shards"))
    assert seen.console == []
    assert trap.num_visitors == before
    assert [url for url in seen.urls if trap.url in url] == []
    assert len(re.findall(r'<article class="card">', seen.dom)) == 7
    assert len(re.findall(r'class="box"', seen.dom)) == 14
    assert 'class="mark noun attribute relation" data-p="0.0 0.1 0.2"' in seen.dom
    assert "the image cannot be decoded" in seen.dom
    assert len(re.findall("<script", seen.dom)) == 1 and "<iframe" not in seen.dom and "<img" not in seen.dom


def test_the_same_texts_do_harm_where_nothing_stops_them(trap: Trap, tmp_path: Path) -> None:
    """Control: the browser, the console and the trap would notice."""
    before = trap.num_visitors
    bare = tmp_path / "bare.html"
    bare.write_text("<title>bare</title><meta charset=utf-8>" + "".join(hostile_texts(trap.url)), encoding="utf-8")
    seen = visit(bare, tmp_path)
    assert seen.title == "owned"
    assert trap.num_visitors > before
    assert [url for url in seen.urls if trap.url in url]


def test_the_policy_stops_what_an_escape_would_miss(page: Path, trap: Trap, tmp_path: Path) -> None:
    before = trap.num_visitors
    broken = tmp_path / "broken.html"
    content = page.read_text(encoding="utf-8")
    assert content.count("</main>") == 1
    broken.write_text(content.replace("</main>", "".join(hostile_texts(trap.url)) + "</main>"), encoding="utf-8")
    seen = visit(broken, tmp_path)
    assert seen.title == str(page.with_name("shards"))
    assert trap.num_visitors == before
    assert any("Content Security Policy" in line for line in seen.console)


# opens the page in a frame of a given width, points at things, and leaves what it saw in its own title
DRIVER = """<!DOCTYPE html><meta charset="utf-8"><title></title>
<iframe src="page.html" width="{width}" height="900"></iframe><script>
document.querySelector("iframe").onload = (loaded) => {{
  const inner = loaded.target.contentDocument;
  const card = [...inner.querySelectorAll(".card")].find((c) => c.querySelector("h3").textContent === "sound");
  const lit = () => [...card.querySelectorAll(".lit")].map((n) => [n.tagName, n.dataset.p, n.dataset.r].join(" "));
  const over = (query) => {{
    const node = query && card.querySelector(query);
    (node || inner.body).dispatchEvent(new PointerEvent("pointerover", {{bubbles: true}}));
    return lit();
  }};
  const seen = {{
    phrase: over('button[data-p="0.1"]'), word: over('span[data-p="0.2"]'), region: over('g.region[data-r="1"]'),
    nothing: over(null),
  }};
  card.querySelector('button[data-p="0.0"]').click();
  seen.pinned = over(null);
  inner.dispatchEvent(new KeyboardEvent("keydown", {{key: "Escape"}}));
  seen.unpinned = over(null);
  const root = inner.documentElement;
  seen.widths = [root.scrollWidth, root.clientWidth];
  seen.overflowing = [...inner.querySelectorAll(".card, .panel, .caption, svg, button")]
    .filter((n) => n.getBoundingClientRect().right > root.clientWidth + 1).map((n) => n.outerHTML.slice(0, 80));
  const image = card.querySelector("image").getBoundingClientRect();
  const box = card.querySelector(".box").getBoundingClientRect();
  seen.box = [(box.x - image.x) / image.width, (box.y - image.y) / image.height, box.width / image.width];
  document.title = JSON.stringify(seen);
}};
</script>"""


@pytest.mark.parametrize("width", [1280, 400])
def test_pointing_lights_up_what_belongs_together_at_any_width(page: Path, tmp_path: Path, width: int) -> None:
    driver = page.with_name(f"driver-{width}.html")
    driver.write_text(DRIVER.format(width=width), encoding="utf-8")
    seen = json.loads(visit(driver, tmp_path, "--allow-file-access-from-files").title)
    region_0, region_1 = {"g  0", "BUTTON  0"}, {"g  1", "BUTTON  1"}
    assert set(seen["phrase"]) == region_0 | {"SPAN 0.1 ", "SPAN 0.0 0.1 0.2 ", "BUTTON 0.1 0"}
    assert set(seen["word"]) == region_0 | region_1 | {"SPAN 0.2 ", "SPAN 0.0 0.1 0.2 ", "BUTTON 0.2 0 1"}
    assert set(seen["region"]) == region_1 | {"BUTTON 0.2 0 1", "SPAN 0.2 ", "SPAN 0.0 0.1 0.2 "}
    assert seen["nothing"] == [] and seen["unpinned"] == []
    assert set(seen["pinned"]) == region_0 | {"SPAN 0.0 0.1 0.2 ", "BUTTON 0.0 0"}
    assert seen["overflowing"] == [] and seen["widths"][0] <= seen["widths"][1]
    assert seen["box"] == pytest.approx([4 / 64, 4 / 48, 26 / 64], abs=0.01)
