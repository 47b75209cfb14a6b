"""Which URLs may be fetched: http and https to public addresses, checked before any request is made.

Must never take a name for the address that it stands for: what is connected to is an address that was checked itself.
"""

from __future__ import annotations

import ipaddress
import re
import socket
import threading
import time
from collections import OrderedDict
from urllib.parse import quote, urlsplit

__all__ = ["LONGEST_URL", "Guard", "Refused", "is_public"]

LONGEST_URL = 2048
"""Characters; what browsers and sitemaps.org's protocol take."""

_Address = ipaddress.IPv4Address | ipaddress.IPv6Address

# IANA's special-purpose address registries, and multicast. Python's `is_global` changes with its version and takes
# multicast for global.
_NOT_PUBLIC = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        "0.0.0.0/8",  # this network (RFC 791)
        "10.0.0.0/8",  # private (RFC 1918)
        "100.64.0.0/10",  # carriers' shared space (RFC 6598)
        "127.0.0.0/8",  # loopback (RFC 1122)
        "169.254.0.0/16",  # link-local (RFC 3927), where clouds serve their machines' credentials
        "172.16.0.0/12",  # private
        "192.0.0.0/24",  # protocol assignments (RFC 6890)
        "192.0.2.0/24",  # documentation (RFC 5737)
        "192.88.99.0/24",  # 6to4 relays (RFC 7526)
        "192.168.0.0/16",  # private
        "198.18.0.0/15",  # benchmarks (RFC 2544)
        "198.51.100.0/24",  # documentation
        "203.0.113.0/24",  # documentation
        "224.0.0.0/4",  # multicast (RFC 5771)
        "240.0.0.0/4",  # reserved (RFC 1112), and broadcast
    )
)
_GLOBAL_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that IANA has assigned for it (RFC 4291)
_NOT_PUBLIC_6 = tuple(
    ipaddress.IPv6Network(network)
    for network in (
        "2001::/23",  # protocol assignments (RFC 2928), with Teredo, which names an IPv4 address
        "2001:db8::/32",  # documentation (RFC 3849)
        "2002::/16",  # 6to4 (RFC 3056), which names an IPv4 address
        "3fff::/20",  # documentation (RFC 9637)
    )
)
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # (RFC 6052) what networks without IPv4 reach it by

_NUMBER = r"(?:0x[0-9a-f]*|[0-9]+)"
_NUMERIC_HOST = re.compile(rf"{_NUMBER}(?:\.{_NUMBER}){{0,3}}\.?", re.ASCII)  # whatever inet_aton takes for an address
_DOTTED = re.compile(r"(?:0|[1-9][0-9]{0,2})(?:\.(?:0|[1-9][0-9]{0,2})){3}", re.ASCII)
_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
_LABEL = re.compile(r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?", re.ASCII)
_LONGEST_NAME = 253  # characters (RFC 1035)
_KEPT_IN_URLS = "".join(map(chr, range(0x21, 0x7F)))  # what is there already, escapes among it

_REMEMBERED = 65_536  # names
_REMEMBERED_FOR = 300.0  # seconds


class Refused(Exception):  # noqa: N818 - it names what was refused
    """A URL that is not fetched, or could not be; its text is `reason: detail`."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}"


def is_public(address: _Address) -> bool:
    """Whether an address is one of the public internet, unicast, and stands for no other that is not."""
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _NOT_PUBLIC)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(address.packed[-4:]))
    return address in _GLOBAL_UNICAST and not any(address in network for network in _NOT_PUBLIC_6)


class Guard:
    """Says what may be fetched and where from; threads may share one.

    Args:
        allow_private: Take every address and every form of one; the other rules hold all the same.
    """

    def __init__(self, *, allow_private: bool = False) -> None:
        self.allow_private = allow_private
        self._known: OrderedDict[str, tuple[float, tuple[str, ...]]] = OrderedDict()
        self._lock = threading.Lock()

    def check(self, url: object) -> str:
        """The URL as it is asked for: what is not ASCII, and spaces inside, escaped.

        Nothing is looked up: names are `addresses`' business, once there is a connection to make.

        Raises:
            Refused: It is no URL that may be fetched. The reasons: "no URL", "too long a URL", "control characters",
                "malformed URL", "scheme", "credentials", "private address", "disguised address".
        """
        if not isinstance(url, str) or not (url := url.strip(" ")):
            raise Refused("no URL", "" if url is None or url == "" else type(url).__name__)
        if len(url) > LONGEST_URL:
            raise Refused("too long a URL", f"{len(url):,} characters, where {LONGEST_URL:,} are the limit")
        if _CONTROL.search(url):
            raise Refused("control characters", repr(url)[1:-1])
        try:
            parts = urlsplit(url)
            host, port = parts.hostname, parts.port
        except ValueError as error:
            raise Refused("malformed URL", str(error)) from None
        if parts.scheme not in ("http", "https"):
            raise Refused("scheme", f"{parts.scheme or 'none'}, where http and https are taken")
        if parts.username is not None or "@" in parts.netloc:
            raise Refused("credentials", "a user's name or password stands before the host")
        if not host or port == 0:
            raise Refused("malformed URL", "it names no host" if not host else "there is no port 0")
        host = self._checked_host(host, bracketed="[" in parts.netloc)
        literal = f"[{host}]" if ":" in host else host
        netloc = literal if port is None else f"{literal}:{port}"
        return quote(parts._replace(netloc=netloc, fragment="").geturl(), safe=_KEPT_IN_URLS)

    def _checked_host(self, host: str, *, bracketed: bool) -> str:
        """The host's name in ASCII, or its address."""
        if bracketed or ":" in host:
            try:
                address: _Address = ipaddress.IPv6Address(host)
            except ValueError:
                raise Refused("malformed URL", "an IPv6 address that is none") from None
            self._check_address(address, host)
            return host
        try:
            # What resolvers are asked for, which also folds other scripts' digits and dots into ASCII ones. The codec
            # takes time with the square of the length.
            name = host.encode("idna").decode("ascii").lower() if len(host) <= _LONGEST_NAME else ""
        except UnicodeError:
            name = ""
        if _NUMERIC_HOST.fullmatch(name):
            if _DOTTED.fullmatch(name):
                try:
                    self._check_address(ipaddress.IPv4Address(name), host)
                except ipaddress.AddressValueError:
                    raise Refused("malformed URL", "an IPv4 address that is none") from None
            elif not self.allow_private:
                raise Refused("disguised address", f"{host} is an IPv4 address in a form that no link has")
            return name
        if not 0 < len(name) <= _LONGEST_NAME or not all(map(_LABEL.fullmatch, name.removesuffix(".").split("."))):
            raise Refused("malformed URL", "the host is no name")
        if not self.allow_private and f".{name.removesuffix('.')}".endswith((".localhost", ".localhost.localdomain")):
            raise Refused("private address", f"{host} is this machine")
        return name

    def permits(self, address: _Address) -> bool:
        """Whether an address may be connected to."""
        return self.allow_private or is_public(address)

    def _check_address(self, address: _Address, host: str) -> None:
        if not self.permits(address):
            raise Refused("private address", host if host == str(address) else f"{host} is {address}")

    def addresses(self, host: str) -> tuple[str, ...]:
        """The addresses that a name or address stands for, all of them permitted, in the resolver's order.

        What a name stands for is remembered for five minutes. A name of which any address is not permitted is refused,
        for the choice among them would be another's.

        Raises:
            Refused: "unknown host", or "private address".
        """
        now = time.monotonic()
        with self._lock:
            known = self._known.get(host)
        if known is not None and now - known[0] < _REMEMBERED_FOR:
            found = known[1]
        else:
            found = self._look_up(host)
            with self._lock:
                self._known[host] = (now, found)
                self._known.move_to_end(host)
                while len(self._known) > _REMEMBERED:
                    self._known.popitem(last=False)
        if not found:
            raise Refused("unknown host", host)
        for text in found:
            self._check_address(ipaddress.ip_address(text), host)
        return found

    def _look_up(self, host: str) -> tuple[str, ...]:
        """What the system's resolver says; nothing where it knows no address."""
        try:
            answers = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError):
            return ()
        return tuple(dict.fromkeys(str(answer[4][0]) for answer in answers))
