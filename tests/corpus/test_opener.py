from __future__ import annotations

import ipaddress
import threading
import time
import urllib.request
from collections.abc import Iterator

import pytest

from scale_wsl.corpus import opener as module
from scale_wsl.corpus.addresses import Guard, Refused
from scale_wsl.corpus.opener import Budget, Opener
from tests.corpus.web import Web, image_of, web

MIB = 1 << 20


@pytest.fixture(scope="module")
def server() -> Iterator[Web]:
    with web() as running:
        yield running


class OneAddress(Guard):
    """To whom 127.0.0.1 is the public internet, and nothing else is."""

    def permits(self, address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> bool:
        return str(address) == "127.0.0.1"

    def _look_up(self, host: str) -> tuple[str, ...]:
        return {"public.test": ("127.0.0.1",), "inside.test": ("10.0.0.1",)}.get(host) or super()._look_up(host)


def opener(guard: Guard | None = None, max_bytes: int = MIB, budget: int = 4 * MIB) -> Opener:
    return Opener(guard or OneAddress(), max_bytes=max_bytes, budget=budget)


def fetch(url: str, timeout: float = 5.0, by: Opener | None = None) -> bytes:
    with (by or opener()).open(
        urllib.request.Request(url, headers={"User-Agent": "test"}), timeout=timeout
    ) as response:
        body: bytes = response.read()
    return body


def refusal(url: str, timeout: float = 5.0, by: Opener | None = None) -> Refused:
    by = by or opener()
    with pytest.raises(Refused) as refused:
        fetch(url, timeout, by)
    assert by.budget.taken == 0  # nobody was left to give it back
    return refused.value


def test_a_body_is_fetched_as_it_is(server: Web) -> None:
    by = opener()
    assert fetch(f"{server.url}/image/1", by=by) == image_of(1)
    assert by.budget.taken == len(image_of(1))
    assert "test" in server.agents
    assert fetch(f"{server.url}/chunked/40960") == bytes(40960)
    assert fetch(f"{server.url}/endless/65536") == bytes(65536)
    with opener().open(f"{server.url}/image/2") as response:
        assert response.read(4) == image_of(2)[:4]


def test_a_name_is_asked_for_by_name_at_the_address_that_was_checked(server: Web) -> None:
    assert fetch(f"http://public.test:{server.server_port}/image/3") == image_of(3)
    assert server.hosts[-1] == f"public.test:{server.server_port}"


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("missing", "HTTP 404"),
        ("broken", "HTTP 500"),
        ("nowhere", "HTTP 302"),
        ("loop/0", "too many redirects"),
        ("cut/1", "broken off"),
        ("badchunks", "broken off"),
        ("nonsense", "no HTTP"),
        (f"large/{2 * MIB}", "too many bytes"),
        (f"large/{10**30}", "too many bytes"),
        (f"endless/{3 * MIB}", "too many bytes"),
        (f"chunked/{3 * MIB}", "too many bytes"),
    ],
)
def test_what_servers_do(server: Web, path: str, reason: str) -> None:
    assert refusal(f"{server.url}/{path}").reason == reason


@pytest.mark.parametrize("path", ["silent", "drip", "driphead"])
def test_an_attempt_ends_in_time_whatever_the_server_sends(server: Web, path: str) -> None:
    start = time.monotonic()
    assert refusal(f"{server.url}/{path}", timeout=0.5).reason == "timeout"
    assert time.monotonic() - start < 4


def test_the_time_is_that_of_all_redirects(server: Web) -> None:
    start = time.monotonic()
    assert refusal(f"{server.url}/to?url=/to%3Furl%3D/silent", timeout=0.6).reason == "timeout"
    assert time.monotonic() - start < 4


def test_what_another_attempt_cannot_mend_is_asked_for_once(server: Web) -> None:
    for path, times in (("missing/1", 1), (f"large/{3 * MIB}", 1), (f"endless/{2 * MIB}", 1), ("broken/1", 3)):
        by = opener()
        server.asked.clear()
        reasons = {refusal(f"{server.url}/{path}", by=by).reason for _ in range(3)}
        assert len(reasons) == 1
        assert server.asked[f"/{path}"] == times
        assert fetch(f"{server.url}/image/1", by=by) == image_of(1)
        by.budget.give_back(by.budget.taken)
        assert refusal(f"{server.url}/{path}", by=by).reason in reasons
        assert server.asked[f"/{path}"] == times + 1


def test_nobody_is_there() -> None:
    assert refusal("http://127.0.0.1:9/").reason == "no connection"
    assert refusal("http://nowhere.invalid/").reason == "unknown host"
    assert refusal("https://127.0.0.1:9/").reason == "no connection"


def test_tls_to_a_server_without_it(server: Web) -> None:
    assert refusal(server.url.replace("http", "https") + "/image/1").reason == "TLS"


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://10.0.0.1/", "private address"),
        ("http://localhost/", "private address"),
        ("http://inside.test/", "private address"),
        ("http://127.0.0.2/", "private address"),
        ("http://[::1]/", "private address"),
        ("http://2130706433/", "disguised address"),
        ("http://user:secret@127.0.0.1/", "credentials"),
        ("file:///etc/passwd", "scheme"),
        ("ftp://127.0.0.1/", "scheme"),
        ("http://127.0.0.1/" + "a" * 2048, "too long a URL"),
        ("http://a..b/", "malformed URL"),
    ],
)
def test_what_may_not_be_fetched_is_refused_at_first_and_after_a_redirect(server: Web, url: str, reason: str) -> None:
    assert refusal(url).reason == reason
    server.location = url
    at_last = refusal(f"{server.url}/to?url=/jump")
    assert at_last.reason == reason
    assert "after a redirect to" in at_last.detail


def test_a_redirect_to_what_is_no_url(server: Web) -> None:
    for location in ("http://[", "//[x]/", "http://\xff\xfe/"):
        server.location = location
        assert refusal(f"{server.url}/jump").reason == "malformed URL"


def test_redirects_to_what_may_be_fetched(server: Web) -> None:
    assert fetch(f"{server.url}/to?url=/image/5") == image_of(5)
    assert fetch(f"{server.url}/to?url=../image/5%23part") == image_of(5)
    assert fetch(f"{server.url}/to?url=http://public.test:{server.server_port}/image/6") == image_of(6)


def test_the_real_guard_lets_nothing_near_this_machine(server: Web) -> None:
    asked = sum(server.asked.values())
    for host in ("127.0.0.1", "localhost", "[::1]", "0.0.0.0", "2130706433"):
        by = opener(Guard())
        assert refusal(f"http://{host}:{server.server_port}/image/1", by=by).reason in (
            "private address",
            "disguised address",
        )
    assert sum(server.asked.values()) == asked
    assert fetch(f"http://localhost:{server.server_port}/image/1", by=opener(Guard(allow_private=True))) == image_of(1)


def test_proxies_are_used_only_where_private_addresses_are_taken(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.url)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    # The server takes a proxy's request line too, by its path.
    assert fetch("http://nowhere.invalid/image/7", by=opener(Guard(allow_private=True))) == image_of(7)
    assert server.hosts[-1] == "nowhere.invalid"
    assert refusal("http://nowhere.invalid/image/7", by=opener(Guard())).reason == "unknown host"


def test_bodies_keep_within_the_budget(server: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_FIRST_ROOM", 1 << 14)
    by = opener(max_bytes=MIB, budget=300_000)
    peak = 0

    def one(path: str) -> None:
        nonlocal peak
        body = fetch(f"{server.url}/{path}", timeout=20, by=by)
        peak = max(peak, by.budget.taken)
        time.sleep(0.01)
        by.budget.give_back(len(body))

    paths = [f"large/{1 << 17}", f"chunked/{1 << 18}", "image/1", f"endless/{1 << 19}"] * 6
    threads = [threading.Thread(target=one, args=(path,)) for path in paths]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert by.budget.taken == 0
    assert 0 < peak <= 300_000 + 2 * MIB


def test_one_body_larger_than_the_budget_waits_to_be_alone() -> None:
    budget = Budget(100)
    budget.reserve(60)
    taken = threading.Event()

    def large() -> None:
        budget.reserve(150)
        taken.set()

    thread = threading.Thread(target=large)
    thread.start()
    assert not taken.wait(0.1)
    budget.give_back(60)
    assert taken.wait(5)
    thread.join()
    assert budget.taken == 150
