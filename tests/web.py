"""A real HTTP server over a folder that misbehaves on demand: slow, cut, refused or missing answers."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import defaultdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Web:
    """Serves `folder` on a free port. `faults[name]` are used up one a GET: "500", "404", "cut", "hang", "garble"; one
    that begins with "always " stays. `requests` lists (name, Range header) of every GET that came."""

    def __init__(self, folder: Path | str, knows_ranges: bool = True) -> None:
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.requests: list[tuple[str, str | None]] = []
        self.delay_s = 0.0
        self.stop = threading.Event()
        web, folder = self, Path(folder)

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True  # else head and body of an answer wait 40 ms for each other

            def do_HEAD(self) -> None:
                self.answer(with_body=False)

            def do_GET(self) -> None:
                web.requests.append((self.path[1:], self.headers["Range"]))
                self.answer(with_body=True)

            def answer(self, with_body: bool) -> None:
                name = self.path[1:]
                fault = web.next_fault(name) if with_body else ""
                path = folder / name
                if fault == "hang":
                    web.stop.wait(30)
                    return
                if fault.isdigit() or not path.is_file():
                    self.send_error(int(fault or 404))
                    return
                data, code = path.read_bytes(), 200
                if knows_ranges and self.headers["Range"]:
                    first, last = self.headers["Range"].removeprefix("bytes=").split("-")
                    data, code = data[int(first) : int(last) + 1], 206
                self.send_response(code)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if with_body:
                    self.write(data, fault)

            def write(self, data: bytes, fault: str) -> None:
                if fault == "garble":
                    data = bytes(len(data))
                if fault == "cut":
                    data, self.close_connection = data[: len(data) // 2], True
                with contextlib.suppress(ConnectionError):  # whoever asked may have been killed meanwhile
                    for start in range(0, len(data), 1 << 14):
                        time.sleep(web.delay_s)
                        self.wfile.write(data[start : start + (1 << 14)])

            def log_message(self, *_: object) -> None:
                """Tests' output stays clean."""

        self.server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def next_fault(self, name: str) -> str:
        """The fault of this request, "" for none."""
        waiting = self.faults[name]
        if not waiting:
            return ""
        return waiting[0].removeprefix("always ") if waiting[0].startswith("always ") else waiting.pop(0)

    def count(self, suffix: str) -> int:
        """Requests whose name ends so."""
        return sum(name.endswith(suffix) for name, _ in self.requests)

    def close(self) -> None:
        """Stop serving."""
        self.stop.set()
        self.server.shutdown()
        self.server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # with the default 5, a burst of connections loses some for a second
