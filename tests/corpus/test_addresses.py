from __future__ import annotations

import contextlib
import ipaddress
import urllib.request
from urllib.parse import urlsplit

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scale_wsl.corpus import addresses
from scale_wsl.corpus.addresses import LONGEST_URL, Guard, Refused, is_public


class FakeGuard(Guard):
    """A guard whose resolver is a table; `asked` counts what it was asked."""

    def __init__(self, names: dict[str, tuple[str, ...]], *, allow_private: bool = False) -> None:
        super().__init__(allow_private=allow_private)
        self.names = names
        self.asked: list[str] = []

    def _look_up(self, host: str) -> tuple[str, ...]:
        self.asked.append(host)
        return self.names.get(host, ())


@pytest.mark.parametrize(
    ("url", "asked"),
    [
        ("http://example.com", "http://example.com"),
        ("HTTPS://Example.COM:8443/A?b=c#d", "https://example.com:8443/A?b=c"),
        (" http://example.com/a b.jpg ", "http://example.com/a%20b.jpg"),
        ("http://example.com/%20%41/é?ü=1", "http://example.com/%20%41/%C3%A9?%C3%BC=1"),
        ("http://bücher.example/", "http://xn--bcher-kva.example/"),
        ("http://8.8.8.8/x", "http://8.8.8.8/x"),
        ("http://[2606:4700::1111]:80/x", "http://[2606:4700::1111]:80/x"),
        ("http://a_b.example.com./x", "http://a_b.example.com./x"),
        ("http://example.com/a@b/c", "http://example.com/a@b/c"),
        ("http://example.com/'\"<>`{}|^[]\\", "http://example.com/'\"<>`{}|^[]\\"),
    ],
)
def test_urls_that_may_be_fetched(url: str, asked: str) -> None:
    assert Guard().check(url) == asked
    assert Guard().check(asked) == asked
    urllib.request.Request(asked)


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (None, "no URL"),
        ("", "no URL"),
        ("   ", "no URL"),
        (3, "no URL"),
        (b"http://example.com/", "no URL"),
        ("http://example.com/" + "a" * LONGEST_URL, "too long a URL"),
        ("http://example.com/\n", "control characters"),
        ("http://exa\tmple.com/", "control characters"),
        ("http://example.com/\x00", "control characters"),
        ("http://example.com/\x85", "control characters"),
        ("http://example.com/\ud800", "control characters"),
        ("example.com/a.jpg", "scheme"),
        ("//example.com/a.jpg", "scheme"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://example.com/", "scheme"),
        ("data:image/png;base64,AAAA", "scheme"),
        ("javascript:alert(1)", "scheme"),
        ("http://user@example.com/", "credentials"),
        ("http://user:secret@example.com/", "credentials"),
        ("http://@example.com/", "credentials"),
        ("http:///x", "malformed URL"),
        ("http:x", "malformed URL"),
        ("http://:80/", "malformed URL"),
        ("http://example.com:0/", "malformed URL"),
        ("http://example.com:65536/", "malformed URL"),
        ("http://example.com:x/", "malformed URL"),
        ("http://[::1/", "malformed URL"),
        ("http://[::x]/", "malformed URL"),
        ("http://[v1.x]/", "malformed URL"),
        ("http://300.1.1.1/", "malformed URL"),
        ("http://exa mple.com/", "malformed URL"),
        ("http://a..b/", "malformed URL"),
        ("http://-a.com/", "malformed URL"),
        ("http://127%2e0.0.1/", "malformed URL"),
        ("http://%31%32%37.0.0.1/", "malformed URL"),
        ("http://example.com\\@127.0.0.1/", "credentials"),
        ("http://example.com\\.127.0.0.1/", "malformed URL"),
        ("http://" + "a" * 64 + ".com/", "malformed URL"),
        ("http://" + "a." * 130 + "com/", "malformed URL"),
        ("http://" + "é" * 300 + "/", "malformed URL"),
        ("http://localhost/", "private address"),
        ("http://LOCALHOST.:80/", "private address"),
        ("http://x.localhost/", "private address"),
        ("http://localhost.localdomain/", "private address"),
        ("http://127.0.0.1/", "private address"),
        ("http://10.1.2.3/", "private address"),
        ("http://169.254.169.254/latest/meta-data/", "private address"),
        ("http://0.0.0.0/", "private address"),
        ("http://224.0.0.1/", "private address"),
        ("http://255.255.255.255/", "private address"),
        ("http://[::]/", "private address"),
        ("http://[::1]/", "private address"),
        ("http://[fe80::1]/", "private address"),
        ("http://[fe80::1%25eth0]/", "private address"),
        ("http://[fd00::1]/", "private address"),
        ("http://[ff02::1]/", "private address"),
        ("http://[::ffff:8.8.8.8]/", "private address"),
        ("http://[::ffff:127.0.0.1]/", "private address"),
        ("http://[::127.0.0.1]/", "private address"),
        ("http://[64:ff9b::7f00:1]/", "private address"),
        ("http://[2002:7f00:1::]/", "private address"),
        ("http://2130706433/", "disguised address"),
        ("http://0x7f000001/", "disguised address"),
        ("http://0x7f.1/", "disguised address"),
        ("http://017700000001/", "disguised address"),
        ("http://0177.0.0.1/", "disguised address"),
        ("http://127.1/", "disguised address"),
        ("http://127.0.0.1./", "disguised address"),
        ("http://127.0.0.01/", "disguised address"),
        ("http://0/", "disguised address"),
        ("http://0x/", "disguised address"),
        ("http://8.8.2056/", "disguised address"),
        ("http://１２７.０.０.１/", "private address"),
        ("http://127。0。0。1/", "private address"),
        ("http://①27.0.0.1/", "private address"),
    ],
)
def test_urls_that_may_not(url: object, reason: str) -> None:
    with pytest.raises(Refused) as refused:
        Guard().check(url)
    assert refused.value.reason == reason
    assert str(refused.value).startswith(f"{reason}: ")


def test_only_addresses_are_allowed_by_allow_private() -> None:
    guard = Guard(allow_private=True)
    for url in ("http://127.0.0.1:8000/x", "http://localhost/", "http://[::1]/", "http://2130706433/"):
        assert guard.check(url) == url
    for url in ("file:///etc/passwd", "http://user@127.0.0.1/", "http://127.0.0.1/\n", "http://x/" + "a" * 3000):
        with pytest.raises(Refused):
            guard.check(url)
    assert guard.addresses("127.0.0.1") == ("127.0.0.1",)
    assert "127.0.0.1" in guard.addresses("2130706433")


def test_names_are_looked_up_once_and_every_address_counts() -> None:
    guard = FakeGuard(
        {
            "public.test": ("93.184.215.14", "2606:4700::1"),
            "private.test": ("10.0.0.1",),
            "both.test": ("93.184.215.14", "127.0.0.1"),
            "six.test": ("fe80::1%eth0",),
        }
    )
    for _ in range(3):
        assert guard.addresses("public.test") == ("93.184.215.14", "2606:4700::1")
    assert guard.asked == ["public.test"]
    for name, detail in (
        ("private.test", "private.test is 10.0.0.1"),
        ("both.test", "both.test is 127.0.0.1"),
        ("six.test", "six.test is fe80::1%eth0"),
    ):
        for _ in range(2):
            with pytest.raises(Refused) as refused:
                guard.addresses(name)
            assert (refused.value.reason, refused.value.detail) == ("private address", detail)
    with pytest.raises(Refused, match=r"unknown host: gone\.test"):
        guard.addresses("gone.test")
    assert len(guard.asked) == 5


def test_what_is_remembered_is_bounded_and_grows_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "_REMEMBERED", 3)
    guard = FakeGuard({f"{i}.test": ("8.8.8.8",) for i in range(9)})
    for i in (0, 1, 2, 3, 3, 0):
        guard.addresses(f"{i}.test")
    assert guard.asked == ["0.test", "1.test", "2.test", "3.test", "0.test"]
    monkeypatch.setattr(addresses, "_REMEMBERED_FOR", 0.0)
    guard.addresses("0.test")
    assert guard.asked[-2:] == ["0.test", "0.test"]


def test_the_systems_resolver_is_what_is_asked() -> None:
    assert set(Guard(allow_private=True).addresses("localhost")) <= {"127.0.0.1", "::1"}
    with pytest.raises(Refused, match="private address: localhost is "):
        Guard().addresses("localhost")
    with pytest.raises(Refused, match="unknown host"):
        Guard().addresses("nowhere.invalid")


@given(st.ip_addresses(v=4))
def test_public_is_never_more_than_what_python_calls_global(address: ipaddress.IPv4Address) -> None:
    if is_public(address):
        assert address.is_global
        assert not any((address.is_multicast, address.is_reserved, address.is_loopback, address.is_link_local))


@given(st.one_of(st.ip_addresses(v=6), st.ip_addresses(v=6, network="2000::/3"), st.ip_addresses(network="2001::/16")))
def test_public_is_never_more_than_what_python_calls_global_in_six(address: ipaddress.IPv6Address) -> None:
    if is_public(address):
        assert address.is_global
        assert not any((address.is_multicast, address.is_loopback, address.is_link_local, address.ipv4_mapped))
        assert not address.is_reserved or address in ipaddress.ip_network("64:ff9b::/96")


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "93.184.215.14", "2606:4700::1111", "64:ff9b::808:808"])
def test_public_addresses_are_public(address: str) -> None:
    assert is_public(ipaddress.ip_address(address))


@given(st.one_of(st.text(max_size=60), st.text(max_size=40).map("http://{}".format)))
def test_any_text_is_checked_or_refused(text: str) -> None:
    with contextlib.suppress(Refused):
        checked = Guard().check(text)
        assert checked.isascii()
        assert Guard().check(checked) == checked
        parts = urlsplit(checked)
        assert parts.scheme in ("http", "https")
        urllib.request.Request(text)  # as img2dataset makes it of what was found good
        request = urllib.request.Request(checked)
        assert request.host == parts.netloc
        assert "@" not in parts.netloc
