"""Reads a table of URLs for `download.py`: what is fetched and kept of each row, or why nothing will be.

Must never hold more of the table than a few rows, or of a row more than what its limits allow.
"""

from __future__ import annotations

import glob
import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scale_wsl.corpus.addresses import LONGEST_URL, Guard, Refused
from scale_wsl.corpus.download_shard import ROWS
from scale_wsl.corpus.posts import split_hashtags
from scale_wsl.corpus.sources.table import SUFFIXES
from scale_wsl.errors import UserError
from scale_wsl.hashtags import find_hashtags

__all__ = ["RawRow", "count", "digest", "read_rows", "reduce_row", "table_files", "write_rows"]

RawRow = tuple[int, list[Any]]
"""A row's number, and its cells as the table has them."""

_MOST_TEXT = 1 << 16  # characters of a row's hashtags, or of its caption, and its group


def table_files(posts: str) -> list[str]:
    """The files of a table, by path; in a folder, but for those whose names begin with a dot or underscore.

    Raises:
        UserError: There is none.
    """
    kinds = ", ".join(SUFFIXES)
    if os.path.isfile(posts):
        if Path(posts).suffix.lower() not in SUFFIXES:
            raise UserError(f"the table {posts} is of no known kind: its name must end in {kinds}")
        return [posts]
    if os.path.isdir(posts):
        try:
            found = [
                entry.path for entry in os.scandir(posts) if entry.is_file() and not entry.name.startswith((".", "_"))
            ]
        except OSError as error:
            raise UserError(f"cannot read the folder {posts}: {error.strerror}") from None
    else:
        found = [path for path in glob.iglob(posts, recursive=True) if os.path.isfile(path)]
    tables = sorted(path for path in found if Path(path).suffix.lower() in SUFFIXES)
    if not tables:
        raise UserError(
            f"there is no table at {posts}: it must be a file whose name ends in {kinds}, or a folder of such"
        )
    return tables


def digest(files: list[str]) -> str:
    """SHA-256 over the contents of all files, in order."""
    hashed = hashlib.sha256()
    total = sum(os.path.getsize(path) for path in files)
    with tqdm(total=total, desc="reading the table", unit="B", unit_scale=True, disable=None) as bar:
        for path in files:
            hashed.update(f"{os.path.getsize(path)}\n".encode())
            try:
                with open(path, "rb") as handle:
                    while chunk := handle.read(1 << 20):
                        hashed.update(chunk)
                        bar.update(len(chunk))
            except OSError as error:
                raise UserError(f"cannot read the table {path}: {error.strerror}") from None
    return hashed.hexdigest()


def count(files: list[str], limit: int | None) -> int | None:
    """Rows to expect, where all files are Parquet."""
    import pyarrow
    import pyarrow.parquet as pq

    if any(Path(path).suffix.lower() != ".parquet" for path in files):
        return limit
    try:
        rows = sum(int(pq.read_metadata(path).num_rows) for path in files)
    except (OSError, pyarrow.ArrowException):
        return limit  # what is wrong is told when they are read
    return rows if limit is None else min(rows, limit)


def read_rows(files: list[str], columns: list[str], limit: int | None) -> Iterator[RawRow]:
    """Every row of a table in order, counted from 0 over all files.

    Args:
        files: As `table_files` gives them.
        columns: Of the URL, of the hashtags and, where there is one, of the group.
        limit: Rows; None: all.

    Raises:
        UserError: A file cannot be read.
    """
    rows = itertools.chain.from_iterable(SUFFIXES[Path(path).suffix.lower()](path, columns) for path in files)
    for number, row in enumerate(itertools.islice(rows, limit)):
        yield number, [row[column] for column in columns]


def reduce_row(raw: RawRow, guard: Guard) -> dict[str, Any]:
    """What is fetched and kept of a row: its number, URL, hashtags, caption and group; or `refused`, why nothing is."""
    number, (url, hashtags, *groups) = raw
    group = groups[0] if groups else None
    kept: dict[str, Any] = dict.fromkeys(("url", "hashtags", "caption", "group", "refused"))
    kept["row"] = number
    try:
        guard.check(url)
    except Refused as refused:
        shown = None if url is None else str(url)[:LONGEST_URL].encode("ascii", "backslashreplace").decode()
        return kept | {"url": shown, "refused": str(refused)}
    kept["url"] = url
    texts = [hashtags] if isinstance(hashtags, str) else [] if hashtags is None else hashtags
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return kept | {"refused": "hashtags: neither a text nor a list of texts"}
    if sum(map(len, texts)) + len(texts) + len(str(group)) > _MOST_TEXT:
        return kept | {"refused": f"too much text: more than {_MOST_TEXT:,} characters"}
    if isinstance(hashtags, str):
        kept["caption"] = _text(hashtags)
        texts = find_hashtags(hashtags) if "#" in hashtags or "＃" in hashtags else list(split_hashtags(hashtags))
    return kept | {"hashtags": [*map(_text, texts)], "group": None if group is None else _text(str(group))}


def _text(text: str) -> str:
    """The text with a question mark for each half of a surrogate pair, which no UTF-8 has."""
    return text.encode("utf-8", "replace").decode()


def write_rows(rows: list[dict[str, Any]], folder: Path) -> None:
    """Make a shard's folder, with what `download_shard` is to fetch."""
    import pyarrow as pa

    texts = {name: pa.string() for name in ("url", "caption", "group", "refused")}
    schema = pa.schema([("row", pa.int64()), ("hashtags", pa.list_(pa.string())), *texts.items()])
    folder.mkdir()
    with pa.OSFile(str(folder / ROWS), "wb") as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_table(pa.Table.from_pylist(rows, schema))
