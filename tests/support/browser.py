"""A headless Chromium that is clicked and typed into as by a hand, over the DevTools protocol.

Clicks are events of the mouse at the middle of what is seen, so that something hidden or covered cannot be clicked.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
NO_BROWSER = f"no browser: none of {', '.join(NAMES)} is installed"
_LIMIT_S = 60.0  # of one wait
_FIND = """(selector, text) => {
  const found = [...document.querySelectorAll(selector)].filter((n) => n.textContent.includes(text));
  return found.find((n) => n.getClientRects().length && getComputedStyle(n).visibility !== "hidden");
}"""


class Tab:
    """The one tab of a browser."""

    def __init__(self, loop: asyncio.AbstractEventLoop, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._loop, self._socket, self._numbers = loop, socket, itertools.count()
        self.hosts: set[str] = set()  # that the page asked for anything
        self.problems: list[str] = []  # exceptions of scripts, and errors in the console

    def send(self, method: str, **options: Any) -> dict[str, Any]:
        """Returns the browser's answer to a command."""
        return self._loop.run_until_complete(asyncio.wait_for(self._send(method, options), _LIMIT_S))

    async def _send(self, method: str, options: dict[str, Any]) -> dict[str, Any]:
        number = next(self._numbers)
        await self._socket.send_json({"id": number, "method": method, "params": options})
        while True:
            heard = json.loads((await self._socket.receive()).data)
            if heard.get("id") == number:
                assert "error" not in heard, heard
                return dict(heard["result"])
            self._hear(heard.get("method"), heard.get("params", {}))

    def _hear(self, event: str | None, said: dict[str, Any]) -> None:
        if event in ("Network.requestWillBeSent", "Network.webSocketCreated"):
            address = urlsplit(said.get("url") or said["request"]["url"])
            if address.scheme not in ("data", "blob"):
                self.hosts.add(address.netloc)
        elif event == "Runtime.exceptionThrown":
            self.problems.append(said["exceptionDetails"].get("exception", {}).get("description", "an exception"))
        elif event == "Log.entryAdded" and said["entry"]["level"] == "error":
            self.problems.append(said["entry"]["text"] + " " + said["entry"].get("url", ""))

    def run(self, script: str) -> Any:
        """Returns the value of an expression of JavaScript."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def wait(self, condition: str, limit_s: float = _LIMIT_S) -> Any:
        """Waits until an expression is true, and returns its value."""
        ends = time.monotonic() + limit_s
        while not (value := self.run(condition)):
            assert time.monotonic() < ends, (
                f"still not: {condition}; the page says {self.run('document.body.innerText')}"
            )
            time.sleep(0.1)
        return value

    def text(self, selector: str) -> str:
        """Returns what is seen of the first element of that selector; nothing where there is none."""
        return str(self.run(f"(document.querySelector({json.dumps(selector)}) || {{}}).innerText || ''"))

    def wait_text(self, selector: str, text: str) -> str:
        """Waits until an element says a text, and returns all that it says."""
        chosen = f"(document.querySelector({json.dumps(selector)}) || {{}}).innerText || ''"
        self.wait(f"({chosen}).includes({json.dumps(text)})")
        return self.text(selector)

    def _middle(self, selector: str, text: str) -> tuple[float, float]:
        found = f"({_FIND})({json.dumps(selector)}, {json.dumps(text)})"
        self.wait(f"!!{found}")
        x, y = self.run(
            f"(() => {{ const n = {found}; n.scrollIntoView({{block: 'center'}}); const r = n.getBoundingClientRect();"
            "return [r.x + r.width / 2, r.y + r.height / 2]; })()"
        )
        return x, y

    def hover(self, selector: str, text: str = "") -> None:
        """Moves the mouse to the first element that is seen, of that selector and with that text."""
        x, y = self._middle(selector, text)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def click(self, selector: str, text: str = "", num: int = 1) -> None:
        """Clicks it; three clicks choose all of a line."""
        x, y = self._middle(selector, text)
        self.send("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)
        for count in range(1, num + 1):
            for kind in ("mousePressed", "mouseReleased"):
                self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=count)

    def type(self, selector: str, text: str) -> None:
        """Clicks a field and types a text in the place of what stands in it.

        Again, as a person would, where an answer of the server has meanwhile put something else there.
        """
        for _ in range(10):
            self.click(selector, num=3)
            self.run("document.activeElement.select && document.activeElement.select()")
            if text:
                self.send("Input.insertText", text=text)
            else:
                for kind in ("keyDown", "keyUp"):
                    self.send("Input.dispatchKeyEvent", type=kind, key="Delete", windowsVirtualKeyCode=46)
            time.sleep(0.5)
            if self.run(f"document.querySelector({json.dumps(selector)}).value") == text:
                return
        raise AssertionError(f"{selector} does not keep {text!r}")

    def upload(self, selector: str, path: Path) -> None:
        """Chooses a file for an input of files."""
        self.wait(f"!!document.querySelector({json.dumps(selector)})")
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        node = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def screenshot(self, path: Path, width: int, height: int) -> None:
        """Writes what is seen as a PNG."""
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        time.sleep(0.5)
        path.write_bytes(base64.b64decode(self.send("Page.captureScreenshot")["data"]))


@contextmanager
def opened(address: str, folder: Path) -> Iterator[Tab]:
    """Opens a page in a browser of its own, whose profile lies in `folder`; both end with the block."""
    assert BROWSER is not None
    command = [
        *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"),
        *("--disable-background-networking", "--disable-component-update", "--window-size=1280,1000", "--lang=en"),
        *("--remote-debugging-port=0", f"--user-data-dir={folder / 'profile'}", "about:blank"),
    ]
    browser = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    loop = asyncio.new_event_loop()
    session: aiohttp.ClientSession | None = None
    try:
        port = _port(folder / "profile" / "DevToolsActivePort", browser)

        async def connect() -> tuple[aiohttp.ClientSession, aiohttp.ClientWebSocketResponse]:
            session = aiohttp.ClientSession()
            async with session.get(f"http://127.0.0.1:{port}/json/list") as answer:
                targets = await answer.json()
            url = next(target["webSocketDebuggerUrl"] for target in targets if target["type"] == "page")
            return session, await session.ws_connect(url, max_msg_size=0)

        session, socket = loop.run_until_complete(connect())
        tab = Tab(loop, socket)
        for domain in ("Page", "Network", "Runtime", "Log", "DOM"):
            tab.send(f"{domain}.enable")
        tab.send("Page.navigate", url=address)
        yield tab
    finally:
        browser.kill()
        browser.wait()
        if session is not None:
            loop.run_until_complete(session.close())
        loop.close()


def _port(path: Path, browser: subprocess.Popen[bytes]) -> int:
    ends = time.monotonic() + _LIMIT_S
    while not (path.is_file() and path.read_text().strip()):
        assert browser.poll() is None and time.monotonic() < ends, "the browser did not start"
        time.sleep(0.1)
    return int(path.read_text().split()[0])
