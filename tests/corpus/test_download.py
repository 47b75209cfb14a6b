"""Downloads from a server on loopback; img2dataset runs in its own processes."""

from __future__ import annotations

import contextlib
import csv
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from filelock import FileLock

from scale_wsl.corpus import download as module
from scale_wsl.corpus import download_processes
from scale_wsl.corpus.download import REASONS, DownloadConfig, download
from scale_wsl.corpus.prepare import PrepareConfig, prepare
from scale_wsl.corpus.sources import open_source
from scale_wsl.errors import UserError
from tests.corpus.web import Web, image_of, web

ROOT = Path(__file__).parents[2]

pytest.importorskip("img2dataset")


@pytest.fixture
def server() -> Iterator[Web]:
    with web() as running:
        yield running


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)


def config(**options: Any) -> DownloadConfig:
    return DownloadConfig(
        **{"allow_private": True, "images_per_shard": 20, "processes": 2, "threads": 8, "timeout": 10.0, **options}
    )


def write(path: Path, rows: list[tuple[Any, ...]], header: tuple[str, ...] = ("url", "hashtags")) -> str:
    with open(path, "w", newline="", encoding="utf-8") as handle:
        csv.writer(handle).writerows([header, *rows])
    return str(path)


def rejects(out: Path) -> list[tuple[int, str]]:
    return [(line["row"], line["reason"]) for line in pq.read_table(out / "rejects.parquet").to_pylist()]


def files(out: Path) -> dict[str, str]:
    """What must be equal of two downloads of the same: all but the statistics, which tell times."""
    names = [path for path in out.iterdir() if not path.name.endswith("_stats.json")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in names}


@pytest.mark.slow
def test_what_a_table_of_everything_becomes(server: Web, tmp_path: Path) -> None:
    rows = [(f"{server.url}/image/{i}", "A #cat, a #Dog", "g" if i < 2 else "") for i in range(30)]
    odd = {
        "missing/1": "HTTP 404",
        "broken/1": "HTTP 500",
        "flaky/40": None,
        "silent": "timeout",
        "drip": "timeout",
        "page": "undecodable",
        "cut/1": "broken off",
        "large/2000000": "too many bytes",
        "endless/2000000": "too many bytes",
        "chunked/4096": "undecodable",
        "nonsense": "no HTTP",
        "to?url=/image/41": None,
        "to?url=file:///etc/passwd": "scheme",
        "to?url=http://a:b@127.0.0.1/": "credentials",
        "loop/0": "too many redirects",
        "optout/1": "opted out",
    }
    rows += [(f"{server.url}/{path}", "cat; dog", "") for path in odd]
    bare = {
        "": "no URL",
        "ftp://127.0.0.1/x": "scheme",
        "http://u:p@127.0.0.1/": "credentials",
        "http://[": "malformed URL",
    }
    rows += [(url, "cat", "") for url in bare]
    posts = write(tmp_path / "posts.csv", rows, ("link", "text", "user"))
    options = config(image="link", hashtags="text", group="user", timeout=2.0, max_bytes=1_000_000)
    done = download(posts, tmp_path / "out", options)

    expected = [(30 + i, reason) for i, reason in enumerate([*odd.values(), *bare.values()]) if reason is not None]
    assert rejects(tmp_path / "out") == expected
    assert {reason for _, reason in expected} <= REASONS | {"HTTP 404", "HTTP 500"}
    assert done.report["rows"] == len(rows) == 50
    assert done.report["images"] == len(rows) - len(expected) == 32
    assert done.report["shards"] == 3
    assert sum(done.report["rejects"].values()) == len(expected)
    assert "50 posts: 32 images" in done.summary()
    assert "HTTP 404" in done.summary()

    members = {}
    for tar in sorted((tmp_path / "out").glob("*.tar")):
        with tarfile.open(tar) as opened:
            members |= {member.name: opened.extractfile(member).read() for member in opened}  # type: ignore[union-attr]
    assert list(members)[:4] == ["000000000.png", "000000000.json", "000000001.jpg", "000000001.json"]
    for i in range(30):
        assert members[f"{i:09d}.{'jpg' if i % 2 else 'png'}"] == image_of(i)  # as it was sent
    facts = json.loads(members["000000001.json"])
    assert facts == {
        "row": 1,
        "key": "000000001",
        "url": f"{server.url}/image/1",
        "hashtags": ["cat", "Dog"],
        "caption": "A #cat, a #Dog",
        "group": "g",
        "sha256": hashlib.sha256(image_of(1)).hexdigest(),
        "width": 40,
        "height": 40,
        "original_width": 40,
        "original_height": 40,
    }
    assert server.asked["/flaky/40"] == 2
    assert server.asked["/missing/1"] == 1
    table = pq.read_table(tmp_path / "out" / "000001.parquet")
    assert table["row"].to_pylist() == list(range(20, 40))
    assert json.loads((tmp_path / "out" / "000000_stats.json").read_text())["successes"] == 20
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.lock", "out", "posts.csv"]  # no wandb folder
    assert not (tmp_path / "out" / ".part").exists()

    asked = sum(server.asked.values())
    again = download(posts, tmp_path / "out", options)
    assert (again.reused, again.report) == (True, done.report)
    assert sum(server.asked.values()) == asked

    prepared = prepare(open_source(str(tmp_path / "out")), tmp_path / "prepared", PrepareConfig(min_count=1))
    assert prepared.report["posts"] == 32


def test_nothing_private_is_asked_for_by_default(server: Web, tmp_path: Path) -> None:
    rows = [(url, "cat") for url in (server.url, server.url.replace("127.0.0.1", "localhost"), "http://2130706433/")]
    done = download(write(tmp_path / "posts.csv", rows), tmp_path / "out", config(allow_private=False))
    assert done.report["rejects"] == {"private address": 2, "disguised address": 1}
    assert not server.asked


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_tables_of_every_kind(server: Web, kind: str, tmp_path: Path) -> None:
    from tests.corpus.sources.test_table import WRITERS

    (tmp_path / "posts").mkdir()
    for part in range(2):
        rows = [{"url": f"{server.url}/image/{i}", "hashtags": f"#t{i}"} for i in range(part * 15, part * 15 + 15)]
        WRITERS[kind](tmp_path / "posts" / f"{part}.{kind}", rows)
    (tmp_path / "posts" / "_SUCCESS").write_text("")
    posts = f"{tmp_path}/posts" if kind != "csv" else f"{tmp_path}/posts/*.csv"
    done = download(posts, tmp_path / "out", config(limit=25))
    assert (done.report["rows"], done.report["images"], done.report["shards"]) == (25, 25, 2)
    tags = {tag for post in open_source(str(tmp_path / "out")).posts() for tag in post.hashtags}
    assert tags == {f"t{i}" for i in range(25)}


def test_the_same_table_gives_the_same_bytes(server: Web, tmp_path: Path) -> None:
    rows = [(f"{server.url}/image/{i}", "cat") for i in range(30)] + [(f"{server.url}/missing/1", "cat")]
    posts = write(tmp_path / "posts.csv", rows)
    for out, delay, options in (("a", 0.0, {}), ("b", 0.02, {"threads": 3, "processes": 1})):
        server.delay = delay
        download(posts, tmp_path / out, config(**options))
    assert files(tmp_path / "a") == files(tmp_path / "b")


@contextlib.contextmanager
def started(posts: str, out: Path, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "scale_wsl.cli", "download", posts, "--out", str(out), "--allow-private"]
    command += ["--images-per-shard", "20", "--processes", "2", "--threads", "4", *options]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True) as process:
        try:
            yield process
        finally:
            process.kill()


def run(posts: str, out: Path) -> int:
    with started(posts, out) as process:
        return process.wait()


def children_of(pid: int) -> list[int]:
    """Of all its threads."""
    lists = [task.read_text().split() for task in Path(f"/proc/{pid}/task").glob("*/children")]
    return [int(child) for children in lists for child in children]


def waited_for(condition: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks up processes in /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_goes_on_where_it_was(server: Web, tmp_path: Path, number: int) -> None:
    rows = [(f"{server.url}/image/{i}", "cat") for i in range(200)]
    rows[55] = (f"{server.url}/missing/1", "cat")
    posts, out = write(tmp_path / "posts.csv", rows), tmp_path / "out"
    server.delay = 0.1
    with started(posts, out) as process:
        waited_for(lambda: len(list(out.glob("*_stats.json"))) >= 3)
        helpers = children_of(process.pid)
        assert len(helpers) == 2
        with pytest.raises(UserError, match="another process is downloading"):
            download(posts, out, config())
        process.send_signal(number)
        assert process.wait() != 0
    waited_for(lambda: not any(map(is_running, helpers)))
    done = len(list(out.glob("*_stats.json")))
    assert 3 <= done < 10
    assert json.loads((out / "download.json").read_text())["report"] is None
    with pytest.raises(UserError, match="has not ended"):
        open_source(str(out))
    assert len(list(open_source(f"{out}/*.tar").posts())) >= done * 20 - 1  # a tar of a shard that is not whole counts

    # What a crash can leave: half a shard, one whose statistics are there and whose tar was cut, an old staging folder.
    (out / "000009.tar").write_bytes(b"half")
    first = sorted(out.glob("*_stats.json"))[0].name.removesuffix("_stats.json")
    os.truncate(out / f"{first}.tar", 5000)
    (out / ".part" / "7").mkdir(parents=True, exist_ok=True)
    server.delay = 0.0
    asked = sum(server.asked.values())
    assert run(posts, out) == 0
    assert sum(server.asked.values()) - asked <= 200 - (done - 1) * 20
    assert run(posts, tmp_path / "whole") == 0
    assert files(out) == files(tmp_path / "whole")
    assert rejects(out) == [(55, "HTTP 404")]
    prepared = prepare(open_source(str(out)), tmp_path / "prepared", PrepareConfig(min_count=1))
    assert prepared.report["posts"] == 199


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="looks up processes in /proc")
def test_a_process_that_is_killed_is_replaced(server: Web, tmp_path: Path) -> None:
    server.delay = 0.2
    posts = write(tmp_path / "posts.csv", [(f"{server.url}/image/{i}", "cat") for i in range(80)])
    with started(posts, tmp_path / "out") as process:
        waited_for(lambda: len(server.asked) > 5)
        os.kill(children_of(process.pid)[0], signal.SIGKILL)
        assert process.wait() == 0
    assert json.loads((tmp_path / "out" / "download.json").read_text())["report"]["images"] == 80


def test_processes_that_always_die_are_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(download_processes, "_CODE", "import os; os._exit(7)")
    posts = write(tmp_path / "posts.csv", [("http://example.invalid/", "cat")])
    with pytest.raises(UserError, match=r"fetches shard 0 ended 3 times \(exit code 7"):
        download(posts, tmp_path / "out", config())


def test_a_defect_of_the_process_is_a_defect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        download_processes,
        "_CODE",
        'input(); input(); print(\'{"defect": "Traceback: it broke"}\', flush=True); input()',
    )
    posts = write(tmp_path / "posts.csv", [("http://example.invalid/", "cat")])
    with pytest.raises(RuntimeError, match="it broke"):
        download(posts, tmp_path / "out", config())


def test_img2dataset_is_missing_or_of_another_release(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    posts = write(tmp_path / "posts.csv", [("http://example.invalid/", "cat")])
    for code, match in (
        ("class Downloader:\n    def __init__(self, other): ...\n", "this release of img2dataset is not known here"),
        ("import nothing_of_this_name\n", "img2dataset cannot be imported .*nothing_of_this_name"),
    ):
        package = tmp_path / "path" / "img2dataset"
        package.mkdir(parents=True, exist_ok=True)
        (package / "__init__.py").write_text("")
        (package / "downloader.py").write_text(code)
        monkeypatch.setenv("PYTHONPATH", str(package.parent))
        monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
        with pytest.raises(UserError, match=match):
            download(posts, tmp_path / "out", config())
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="needs img2dataset, which is not installed"):
        download(posts, tmp_path / "out", config())


def test_img2dataset_loads_nothing_that_asks_the_network(tmp_path: Path) -> None:
    code = """
import sys
seen = []
sys.addaudithook(lambda event, arguments: seen.append(event) if event.startswith(("socket.", "urllib.")) else None)
from scale_wsl.corpus.download_shard import _img2dataset
assert _img2dataset().__module__ == "img2dataset.downloader"
loaded = {name.partition(".")[0] for name in sys.modules}
print(sorted(loaded & {"albumentations", "cv2", "ray", "torch", "pandas"}), sys.modules["wandb"].__spec__, seen)
"""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        check=True,
    )
    assert done.stdout == "[] None []\n"
    assert not list(tmp_path.iterdir())


def test_another_table_or_other_options_are_refused(tmp_path: Path) -> None:
    posts = write(tmp_path / "posts.csv", [("ftp://x/", "cat"), ("ftp://y/", "cat")])
    out = tmp_path / "out"
    assert download(posts, out, config()).report["rows"] == 2
    for options, changed in (
        ({"limit": 1}, "limit"),
        ({"size": 64}, "size"),
        ({"images_per_shard": 3, "max_bytes": 5}, "images_per_shard, max_bytes"),
        ({"hashtags": "url"}, "hashtags"),
        ({"allow_private": False}, "allow_private"),
    ):
        with pytest.raises(UserError, match=rf"holds another download \(different: {changed}\).*--overwrite"):
            download(posts, out, config(**options))
    assert download(posts, out, config(processes=1, threads=1, timeout=1.0, retries=0)).reused
    shutil.copy(posts, tmp_path / "moved.csv")
    assert download(str(tmp_path / "moved.csv"), out, config()).reused
    write(tmp_path / "posts.csv", [("ftp://x/", "dog")])
    with pytest.raises(UserError, match="different: posts"):
        download(posts, out, config())
    (out / "000007.tar").write_text("of the one before")
    done = download(posts, out, config(), overwrite=True)
    assert (done.reused, done.report["rows"]) == (False, 1)
    assert not (out / "000007.tar").exists()
    assert not list(tmp_path.glob(".out.old*"))


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_folder_of_something_else_is_left_alone(tmp_path: Path, overwrite: bool) -> None:
    posts = write(tmp_path / "posts.csv", [("ftp://x/", "cat")])
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    for content in (None, "{}", "[]", "[" * 10_000, '{"format": "scale_wsl download", "recipe": 3}'):
        if content is not None:
            (out / "download.json").write_text(content)
        with pytest.raises(UserError, match="not made by scale-wsl download"):
            download(posts, out, config(), overwrite=overwrite)
    (out / "download.json").write_text('{"format": "scale_wsl download", "version": 99, "recipe": {}}')
    with pytest.raises(UserError, match="a download of version 99"):
        download(posts, out, config(), overwrite=overwrite)
    assert (out / "thesis.tex").read_text() == "x"
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="is a file"):
        download(posts, tmp_path / "file", config(), overwrite=overwrite)
    with pytest.raises(UserError, match="cannot write into"):
        download(posts, tmp_path / "file" / "below", config(), overwrite=overwrite)


def test_a_link_is_followed_and_what_a_crash_left_is_removed(tmp_path: Path) -> None:
    posts = write(tmp_path / "posts.csv", [("ftp://x/", "cat")])
    (tmp_path / "disk" / "out").mkdir(parents=True)
    (tmp_path / "disk" / "out" / ".download.json.0123abcd.part").write_text('{"format": ')
    (tmp_path / "out").symlink_to(tmp_path / "disk" / "out")
    for overwrite in (False, True):
        assert download(posts, tmp_path / "out", config(), overwrite=overwrite).out == tmp_path / "disk" / "out"
    assert (tmp_path / "out").is_symlink()
    assert not list((tmp_path / "disk" / "out").glob(".*"))
    (tmp_path / "ring").symlink_to(tmp_path / "ring")
    with pytest.raises(UserError, match="links cannot be followed"):
        download(posts, tmp_path / "ring", config())


def test_a_full_disk_is_a_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "write_rows", full)
    posts = write(tmp_path / "posts.csv", [("ftp://x/", "cat")])
    with pytest.raises(UserError, match=r"cannot write into .*out: No space left on device"):
        download(posts, tmp_path / "out", config())


def test_two_at_a_time_are_refused(tmp_path: Path) -> None:
    posts = write(tmp_path / "posts.csv", [("ftp://x/", "cat")])
    with FileLock(tmp_path / ".out.lock"), pytest.raises(UserError, match="another process is downloading"):
        download(posts, tmp_path / "out", config())


def test_the_guide_names_every_reason() -> None:
    guide = (ROOT / "docs" / "download.md").read_text("utf-8")
    assert [reason for reason in REASONS if f"| `{reason}` |" not in guide] == []


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"size": 3}, "size is 3, but must be between 16 and 10,000"),
        ({"images_per_shard": 0}, "images per shard is 0"),
        ({"limit": 0}, "limit is 0, but must be at least 1"),
        ({"max_bytes": 0}, "max bytes is 0"),
        ({"max_pixels": 1 << 60}, "max pixels is"),
        ({"processes": 0}, "processes is 0"),
        ({"threads": 0}, "threads is 0"),
        ({"timeout": 0.0}, "timeout is 0"),
        ({"timeout": float("nan")}, "timeout is nan"),
        ({"retries": -1}, "retries is -1"),
    ],
)
def test_settings_out_of_range(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UserError, match=match):
        DownloadConfig(**options)
