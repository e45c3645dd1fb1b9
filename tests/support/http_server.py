"""A folder behind a real HTTP server that answers range requests, or behaves as badly as a test asks."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import TracebackType

# what a request meets: fine | whole (the range is ignored) | stall | cut | an HTTP status
Behave = Callable[[str, int], str]  # file name, how many requests for it came before


class Served:
    """`with Served(folder) as served: served.url`; requests are counted by file name in `requests`."""

    def __init__(self, folder: Path, behave: Behave = lambda name, number: "fine") -> None:
        self.folder, self.behave = folder, behave
        self.requests: Counter[str] = Counter()
        self.ended = threading.Event()

    def __enter__(self) -> Served:
        served = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                served._answer(self)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/shards"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        name = request.path.rpartition("/")[2]
        path = self.folder / name
        behaviour = self.behave(name, self.requests[name])
        self.requests[name] += 1
        if not path.is_file():
            behaviour = "404"
        if behaviour.isdigit():
            request.send_error(int(behaviour))
            return
        content = path.read_bytes()
        asked = request.headers.get("Range")
        if asked and behaviour != "whole":
            start, _, end = asked.removeprefix("bytes=").partition("-")
            part = content[int(start) : int(end) + 1]
            request.send_response(206)
            request.send_header("Content-Range", f"bytes {start}-{int(start) + len(part) - 1}/{len(content)}")
        else:
            part = content
            request.send_response(200)
        request.send_header("Content-Length", str(len(part)))
        request.end_headers()
        if behaviour == "stall":
            self.ended.wait(60)
        request.wfile.write(part[: len(part) // 2] if behaviour in ("stall", "cut") else part)
        request.close_connection = behaviour in ("stall", "cut")
