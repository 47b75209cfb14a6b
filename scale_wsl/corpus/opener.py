"""A `urllib` opener that asks only for what a `Guard` permits, and takes no more bytes or time than it was given.

Must never connect to an address that the guard did not see, on a redirect either, and never hold more than its budget
of what servers send.

`img2dataset` fetches by `urllib.request.urlopen(url).read()`, which asks the installed opener: `urllib.request.
install_opener` puts this one there.
"""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import re
import socket
import ssl
import string
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from typing import Any
from urllib.parse import quote, urljoin

from scale_wsl.corpus.addresses import Guard, Refused

__all__ = ["Budget", "Opener"]

_CHUNK = 1 << 16  # bytes
_FIRST_ROOM = 4 << 20  # bytes of a body whose length the server does not say
_REDIRECTS = 5
_TIMEOUT = 30.0  # seconds, where the caller gives none
_PASSING = re.compile("timeout|no connection|broken off|unknown host|no HTTP|HTTP (408|425|429|5..)")
"""What another attempt may mend."""


class Budget:
    """Bytes that bodies may take at a time: those being read, and those read and not yet given back.

    Room for a body is reserved before it is read. One of unknown length that outgrows its first room goes on once all
    others keep within the budget, two such bodies at a time. So no more is held than the budget and the two largest
    bodies, and none waits for another that waits.

    Args:
        total: Bytes.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.taken = 0
        self._changed = threading.Condition()
        self._growing = threading.Semaphore(2)

    def reserve(self, length: int) -> None:
        """Wait until so many bytes are free, or all of them."""
        with self._changed:
            self._changed.wait_for(lambda: self.taken == 0 or self.taken + length <= self.total)
            self.taken += length

    def give_back(self, length: int) -> None:
        """Free so many bytes."""
        with self._changed:
            self.taken -= length
            self._changed.notify_all()

    @contextlib.contextmanager
    def grown(self) -> Iterator[None]:
        """Wait to be one of two bodies that grow; the growth is counted once it is known."""
        with self._growing:
            with self._changed:
                self._changed.wait_for(lambda: self.taken <= self.total)
            yield


class _Deadline:
    """When an attempt ends."""

    def __init__(self, seconds: float) -> None:
        self.at = time.monotonic() + seconds

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """Time that does not count: it is spent on what the server has no part in."""
        start = time.monotonic()
        yield
        self.at += time.monotonic() - start

    def left(self) -> float:
        """Seconds.

        Raises:
            Refused: None are left.
        """
        left = self.at - time.monotonic()
        if left <= 0:
            raise Refused("timeout", "the attempt took too long")
        return left


class _Raw(io.RawIOBase):
    """A socket's bytes until the deadline; a server that sends one now and then does not hold it off."""

    def __init__(self, sock: Any, deadline: _Deadline) -> None:
        self._socket = sock
        self._bytes = sock.makefile("rb", buffering=0)
        self._deadline = deadline

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int | None:
        self._socket.settimeout(self._deadline.left())
        return self._bytes.readinto(buffer)  # type: ignore[no-any-return]

    def close(self) -> None:
        self._bytes.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response whose body is read whole, within the limits, or not at all."""

    def __init__(self, sock: Any, *arguments: Any, opener: Opener, deadline: _Deadline, **options: Any) -> None:
        super().__init__(sock, *arguments, **options)
        self.fp.close()
        self.fp = io.BufferedReader(_Raw(sock, deadline))
        self._opener = opener
        self._deadline = deadline

    def read(self, amount: int | None = None) -> bytes:
        """All of the body; its room in the budget is the taker's to give back.

        Raises:
            Refused: It is too large, ends early, or takes too long.
        """
        if amount is not None or self.fp is None:
            return super().read(amount)
        limit, budget, length = self._opener.max_bytes, self._opener.budget, self.length
        if length is not None and length > limit:
            raise self._opener.remembered(Refused("too many bytes", f"{length:,}, where {limit:,} are the limit"))
        room = min(_FIRST_ROOM, limit) if length is None else length
        with self._deadline.stopped():
            budget.reserve(room)
        try:
            body = self._read_up_to(room)
            if length is None and len(body) == room:
                with contextlib.ExitStack() as stack:
                    with self._deadline.stopped():
                        stack.enter_context(budget.grown())
                    body += self._read_up_to(limit - room + 1)
                    if len(body) > limit:
                        too_many = Refused("too many bytes", f"more than the limit of {limit:,}")
                        raise self._opener.remembered(too_many)
                    budget.give_back(room - len(body))
                    room = len(body)
            if length is not None and len(body) < length:
                raise Refused("broken off", f"{len(body):,} of {length:,} bytes came")
        except BaseException as error:
            budget.give_back(room)
            if isinstance(error, OSError | http.client.HTTPException):
                raise _reason(error) from None
            raise
        budget.give_back(room - len(body))
        return body

    def _read_up_to(self, length: int) -> bytes:
        body = bytearray()
        while len(body) < length and (chunk := super().read(min(_CHUNK, length - len(body)))):
            body += chunk
        return bytes(body)


class _Connection(http.client.HTTPConnection):
    """A connection to an address that the guard permits."""

    def __init__(self, host: str, *, opener: Opener, deadline: _Deadline, secure: bool, **options: Any) -> None:
        if secure:
            self.default_port = 443
        super().__init__(host, **options)
        self._opener = opener
        self._deadline = deadline
        self._secure = secure
        self._behind_proxy: str | None = None
        response: Any = functools.partial(_Response, opener=opener, deadline=deadline)
        self.response_class = response

    def set_tunnel(self, host: str, *arguments: Any, **options: Any) -> None:
        """Reach a host through the proxy that the connection is to."""
        super().set_tunnel(host, *arguments, **options)
        self._behind_proxy = host.rpartition(":")[0] or host

    def connect(self) -> None:
        """Connect, within the deadline, to the first address that answers."""
        self.sock = self._connected()
        self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if self._behind_proxy is not None:
            self._tunnel()  # type: ignore[attr-defined]
        if self._secure:
            self.sock.settimeout(self._deadline.left())
            self.sock = self._opener.tls.wrap_socket(self.sock, server_hostname=self._behind_proxy or self.host)

    def _connected(self) -> socket.socket:
        addresses = self._opener.guard.addresses(self.host)
        for address in addresses[:-1]:
            with contextlib.suppress(OSError):
                return socket.create_connection((address, self.port), self._deadline.left())
        return socket.create_connection((addresses[-1], self.port), self._deadline.left())


class _Request(urllib.request.Request):
    """A request that knows its attempt's deadline, and how often it was sent on."""

    def __init__(self, url: str, headers: dict[str, str], deadline: _Deadline, redirects: int) -> None:
        super().__init__(url, headers=headers)
        self.deadline = deadline
        self.redirects = redirects


class _Handler(urllib.request.AbstractHTTPHandler):
    def __init__(self, opener: Opener) -> None:
        super().__init__()
        self._opener = opener

    def http_open(self, request: _Request) -> Any:
        return self._open(request, secure=False)

    def https_open(self, request: _Request) -> Any:
        return self._open(request, secure=True)

    def _open(self, request: _Request, *, secure: bool) -> Any:
        connect: Any = functools.partial(_Connection, opener=self._opener, deadline=request.deadline, secure=secure)
        return self.do_open(connect, request)

    http_request = urllib.request.AbstractHTTPHandler.do_request_
    https_request = urllib.request.AbstractHTTPHandler.do_request_


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Goes where a server sends it, by the same rules as at first."""

    def http_error_302(self, req: Any, fp: Any, code: int, msg: str, headers: Any) -> Any:
        location = headers.get("location")
        if not location:
            return None  # an HTTP error like others
        fp.close()  # nobody wants its body
        if req.redirects == _REDIRECTS:
            raise Refused("too many redirects", f"more than {_REDIRECTS}")
        # The header's bytes come as ISO-8859-1, whatever they are.
        target = urljoin(req.full_url, quote(location, encoding="iso-8859-1", safe=string.punctuation))
        try:
            url = self.parent.guard.check(target)  # type: ignore[attr-defined]
            return self.parent.open(_Request(url, req.headers, req.deadline, req.redirects + 1))
        except Refused as refused:
            if "after a redirect" not in refused.detail:
                refused = Refused(refused.reason, f"{refused.detail} (after a redirect to {target[:200]!r})")
            raise refused from None

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302


class Opener(urllib.request.OpenerDirector):
    """Opens http and https URLs within the limits.

    An attempt's time, that of all its redirects, is `timeout` in all, looking up names excepted: the system's resolver
    has a limit of its own. Proxies that the environment names are used where the guard takes private addresses, and
    not otherwise: a proxy looks names up itself, and connects where nobody here can check it.

    Args:
        guard: Says what may be fetched.
        max_bytes: The largest body.
        budget: Bytes for all bodies at a time; the two largest bodies are what may come on top.
    """

    def __init__(self, guard: Guard, *, max_bytes: int, budget: int) -> None:
        super().__init__()
        self.guard = guard
        self.max_bytes = max_bytes
        self.budget = Budget(budget)
        self.tls = ssl.create_default_context()
        self._last = threading.local()  # what this thread opened last, and why that is of no use
        handlers = [
            _Handler(self),
            _Redirects(),
            urllib.request.HTTPErrorProcessor(),
            urllib.request.HTTPDefaultErrorHandler(),
            urllib.request.UnknownHandler(),
        ]
        if guard.allow_private:
            handlers.append(urllib.request.ProxyHandler())
        for handler in handlers:
            self.add_handler(handler)

    def open(self, fullurl: Any, data: Any = None, timeout: float | None = None) -> Any:
        """The response to a URL or a plain request for one.

        A caller that tries again what cannot change (img2dataset does) is answered without another request.

        Raises:
            Refused: It may not be fetched or could not be; "HTTP 404" and the like are reasons too.
        """
        if isinstance(fullurl, _Request):
            return self._open_once(fullurl)
        plain = urllib.request.Request(fullurl) if isinstance(fullurl, str) else fullurl
        if getattr(self._last, "url", None) == plain.full_url and self._last.refused is not None:
            raise Refused(*self._last.refused.args)
        self._last.url, self._last.refused = plain.full_url, None
        seconds = timeout if isinstance(timeout, int | float) else _TIMEOUT
        try:
            url = self.guard.check(plain.full_url)
            return self._open_once(_Request(url, dict(plain.headers), _Deadline(seconds), 0))
        except Refused as refused:
            raise self.remembered(refused) from None

    def remembered(self, refused: Refused) -> Refused:
        """The same; where another attempt cannot mend it, the next one by this thread fails without a request."""
        if not _PASSING.match(refused.reason):
            self._last.refused = refused
        return refused

    def _open_once(self, request: _Request) -> Any:
        try:
            return super().open(request, timeout=request.deadline.left())
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise _reason(error) from None


def _reason(error: BaseException) -> Refused:
    """Why an attempt failed, in words that do not depend on what a server says."""
    if isinstance(error, urllib.error.HTTPError):
        error.close()
        return Refused(f"HTTP {error.code}")
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        return _reason(error.reason)
    detail = f"{type(error).__name__}: {error}"[:200]
    if isinstance(error, TimeoutError):
        return Refused("timeout", "the server was silent")
    if isinstance(error, ssl.SSLCertVerificationError):
        return Refused("certificate", error.verify_message)
    if isinstance(error, ssl.SSLError):
        return Refused("TLS", detail)
    if isinstance(error, http.client.IncompleteRead):
        return Refused("broken off", "the body ended early")
    if isinstance(error, http.client.HTTPException) and not isinstance(error, OSError):
        return Refused("no HTTP", detail)
    if isinstance(error, OSError):
        return Refused("no connection", error.strerror or detail)
    return Refused("malformed URL", detail)
