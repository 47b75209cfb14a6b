from __future__ import annotations

from pathlib import Path

import pytest

from scale_wsl import cli
from scale_wsl.corpus.download import DownloadConfig, Downloaded


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    calls: list[tuple[object, ...]] = []

    def download(posts: str, out: Path, config: DownloadConfig, *, overwrite: bool) -> Downloaded:
        calls.append((posts, out, config, overwrite))
        report = {"rows": 1234, "images": 1000, "shards": 2, "bytes": 5_000_000, "rejects": {"HTTP 404": 234}}
        return Downloaded(out, len(calls) > 1, report)

    monkeypatch.setattr("scale_wsl.corpus.download.download", download)
    return calls


def test_every_option_arrives(called: list[tuple[object, ...]], capsys: pytest.CaptureFixture[str]) -> None:
    options = "--image a --hashtags b --group c --size 256 --limit 7 --images-per-shard 8 --max-bytes 9 --max-pixels 10"
    options += " --processes 11 --threads 12 --timeout 1.5 --retries 13 --allow-private --overwrite"
    assert cli.main(["download", "posts.csv", "--out", "data/x", *options.split()]) == 0
    assert cli.main(["download", "posts.csv", "--out", "data/x"]) == 0
    everything = DownloadConfig(
        image="a",
        hashtags="b",
        group="c",
        size=256,
        limit=7,
        images_per_shard=8,
        max_bytes=9,
        max_pixels=10,
        processes=11,
        threads=12,
        timeout=1.5,
        retries=13,
        allow_private=True,
    )
    assert called == [
        ("posts.csv", Path("data/x"), everything, True),
        ("posts.csv", Path("data/x"), DownloadConfig(), False),
    ]
    assert capsys.readouterr().out.splitlines() == [
        "1,234 posts: 1,000 images, 5.0 MB in 2 tars",
        "without an image: 234 HTTP 404",
        "data/x/rejects.parquet says which and why",
        "next: scale-wsl prepare data/x",
        "1,234 posts: 1,000 images, 5.0 MB in 2 tars",
        "without an image: 234 HTTP 404",
        "data/x/rejects.parquet says which and why",
        "data/x was downloaded before: nothing to do",
    ]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "large"], "--size is 'large', but must be a number of pixels, or original"),
        (["--size", "2"], "size is 2, but must be between 16 and 10,000"),
        (["--threads", "0"], "threads is 0"),
        (["--more"], "--more means nothing here"),
    ],
)
def test_mistakes(
    called: list[tuple[object, ...]], options: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["download", "posts.csv", "--out", "x", *options]) == 2
    assert says in capsys.readouterr().err
    assert not called


def test_help(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["download", "--help"])
    shown = capsys.readouterr().out
    for option in ("--image", "--hashtags", "--group", "--size", "--allow-private", "--retries", "--overwrite"):
        assert option in shown
