"""`scale-wsl download`: fetch the images of a table of posts by their URLs."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from scale_wsl.commands import nothing_else
from scale_wsl.errors import UserError

__all__ = ["add"]


def add(commands: Any) -> None:
    """Add the subcommand."""
    parser = commands.add_parser(
        "download",
        help="fetch the images of a table of posts by their URLs",
        description="Fetch the images of a table of posts by their URLs into tars, which scale-wsl prepare reads. Run "
        "again, it goes on where it was. Needs img2dataset: pip install 'scale-wsl[download]'.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "posts", metavar="POSTS", help="a .csv, .jsonl or .parquet file, a folder of such, or a pattern in quotes"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where to")
    parser.add_argument("--image", default="url", metavar="COLUMN", help="column of the URLs; default: url")
    parser.add_argument(
        "--hashtags", default="hashtags", metavar="COLUMN", help="column of the hashtags or caption; default: hashtags"
    )
    parser.add_argument("--group", metavar="COLUMN", help="column whose equal values mark variants of one subject")
    parser.add_argument(
        "--size",
        default="original",
        metavar="PIXELS",
        help="shrink images to this shorter side, as JPEG; default: original, every file as it was sent",
    )
    parser.add_argument("--limit", type=int, metavar="N", help="take only the first N rows")
    parser.add_argument(
        "--images-per-shard", type=int, default=1000, metavar="N", help="rows for each tar; default: 1000"
    )
    parser.add_argument("--max-bytes", type=int, default=64 << 20, metavar="N", help="largest file; default: 64 MiB")
    parser.add_argument(
        "--max-pixels", type=int, default=25_000_000, metavar="N", help="largest image; default: 25000000"
    )
    parser.add_argument("--processes", type=int, metavar="N", help="default: one for each core, four at most")
    parser.add_argument("--threads", type=int, default=64, metavar="N", help="connections of each process; default: 64")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="SECONDS", help="for an attempt, redirects and all; default: 30"
    )
    parser.add_argument(
        "--retries", type=int, default=1, metavar="N", help="attempts after one that may have been bad luck; default: 1"
    )
    parser.add_argument(
        "--allow-private",
        action="store_true",
        help="take addresses that are not public too (an intranet's, this machine's), and use the environment's "
        "proxies",
    )
    parser.add_argument("--overwrite", action="store_true", help="remove an earlier download and start anew")
    parser.set_defaults(run=_download)


def _download(arguments: argparse.Namespace, extra: list[str]) -> None:
    nothing_else(extra)
    from scale_wsl.corpus.download import DownloadConfig, download

    config = DownloadConfig(
        image=arguments.image,
        hashtags=arguments.hashtags,
        group=arguments.group,
        size=_size(arguments.size),
        images_per_shard=arguments.images_per_shard,
        limit=arguments.limit,
        max_bytes=arguments.max_bytes,
        max_pixels=arguments.max_pixels,
        allow_private=arguments.allow_private,
        processes=arguments.processes,
        threads=arguments.threads,
        timeout=arguments.timeout,
        retries=arguments.retries,
    )
    downloaded = download(arguments.posts, arguments.out, config, overwrite=arguments.overwrite)
    print(downloaded.summary())
    if downloaded.reused:
        print(f"{downloaded.out} was downloaded before: nothing to do")
    elif downloaded.report["images"]:
        print(f"next: scale-wsl prepare {arguments.out}")


def _size(text: str) -> int | None:
    if text == "original":
        return None
    if not text.isascii() or not text.isdigit():
        raise UserError(f"--size is {text!r}, but must be a number of pixels, or original")
    return int(text)
