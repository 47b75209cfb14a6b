"""A web server on loopback that does whatever servers do."""

from __future__ import annotations

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.corpus.toy import noise
from tests.loading.fakes import encode


def image_of(number: int) -> bytes:
    """JPEG and PNG in turn."""
    return encode(noise(number, 40), "JPEG", quality=90) if number % 2 else encode(noise(number, 40))


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Web

    def do_GET(self) -> None:
        parts = urlsplit(self.path)
        with self.server.lock:
            self.server.asked[parts.path] += 1
            self.server.hosts.append(self.headers["Host"])
            self.server.agents.add(self.headers.get("User-Agent", ""))
            times = self.server.asked[parts.path]
        self.close_connection = True
        kind, _, number = parts.path.strip("/").partition("/")
        with contextlib.suppress(ConnectionError):
            getattr(self, f"do_{kind}", self.do_missing)(number, times, parse_qs(parts.query))

    def send(self, body: bytes, status: int = 200, **headers: object) -> None:
        self.send_response(status)
        for name, value in {"Content_Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        self.wfile.write(body)

    def do_missing(self, *_: object) -> None:
        self.send(b"not here", 404)

    def do_image(self, number: str, *_: object) -> None:
        time.sleep(self.server.delay)
        self.send(image_of(int(number)))

    def do_flaky(self, number: str, times: int, _: object) -> None:
        self.send(b"later", 500) if times == 1 else self.send(image_of(int(number)))

    def do_broken(self, *_: object) -> None:
        self.send(b"always", 500)

    def do_silent(self, *_: object) -> None:
        self.server.ended.wait(20)

    def do_drip(self, *_: object) -> None:
        """A byte now and then, which holds off any timeout of a single read."""
        self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
        while not self.server.ended.wait(0.1):
            self.wfile.write(b"x")

    def do_driphead(self, *_: object) -> None:
        self.wfile.write(b"HTTP/1.1 200 OK\r\nX: ")
        while not self.server.ended.wait(0.1):
            self.wfile.write(b"x")

    def do_page(self, *_: object) -> None:
        self.send(b"<html><body>no image</body></html>", Content_Type="image/jpeg")

    def do_cut(self, number: str, *_: object) -> None:
        self.send(image_of(int(number))[:300], Content_Length=5000)

    def do_large(self, length: str, *_: object) -> None:
        self.send_response(200)
        self.send_header("Content-Length", length)
        self.end_headers()
        with contextlib.suppress(ConnectionError):
            for _ in range(0, int(length), 1 << 16):
                self.wfile.write(bytes(1 << 16))

    def do_endless(self, length: str, *_: object) -> None:
        """A body without a length."""
        self.send_response(200)
        self.end_headers()
        for _ in range(0, int(length), 1 << 16):
            self.wfile.write(bytes(1 << 16))

    def do_chunked(self, length: str, *_: object) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for _ in range(0, int(length), 1 << 12):
            self.wfile.write(b"1000\r\n" + bytes(1 << 12) + b"\r\n")
        self.wfile.write(b"0\r\n\r\n")

    def do_badchunks(self, *_: object) -> None:
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.wfile.write(b"zzz\r\nabc\r\n")

    def do_nonsense(self, *_: object) -> None:
        self.wfile.write(b"\x00\xff nonsense\r\n\r\n")

    def do_to(self, _: str, __: int, query: dict[str, list[str]]) -> None:
        self.send(b"over there", 302, Location=query["url"][0])

    def do_jump(self, *_: object) -> None:
        self.send(b"over there", 307, Location=self.server.location)

    def do_nowhere(self, *_: object) -> None:
        self.send(b"over there", 302)

    def do_loop(self, number: str, *_: object) -> None:
        self.send(b"", 301, Location=f"/loop/{int(number or 0) + 1}")

    def do_optout(self, number: str, *_: object) -> None:
        self.send(image_of(int(number)), X_Robots_Tag="noai")

    def log_message(self, *_: object) -> None:
        pass


class Web(ThreadingHTTPServer):
    """The server; `url` is where it is."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.lock = threading.Lock()
        self.asked: Counter[str] = Counter()
        self.hosts: list[str] = []
        self.agents: set[str] = set()
        self.ended = threading.Event()
        self.delay = 0.0
        self.location = ""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, *_: object) -> None:
        """A client that hung up is what some tests are about."""


@contextlib.contextmanager
def web() -> Iterator[Web]:
    with Web() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.ended.set()
            server.shutdown()
            thread.join()
