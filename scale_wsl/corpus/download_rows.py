"""Reads a table of URLs for `download.py`: what is fetched and kept of each row, or why nothing will be.

Must never hold more of the table than a few rows, or of a row more than what its limits allow.
"""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scale_wsl.corpus.addresses import LONGEST_URL, Guard, Refused
from scale_wsl.corpus.download_shard import ROWS
from scale_wsl.corpus.posts import Reject, split_hashtags
from scale_wsl.corpus.sources.cells import cells_of
from scale_wsl.corpus.sources.files import find_files, is_remote
from scale_wsl.corpus.sources.rows import READERS, TableSplit, parquet_splits
from scale_wsl.corpus.sources.table import SUFFIXES
from scale_wsl.errors import UserError
from scale_wsl.hashtags import find_hashtags

__all__ = ["RawRow", "count", "digest", "read_rows", "reduce_row", "table_files", "write_rows"]

RawRow = tuple[int, list[Any] | Reject]
"""A row's number, and its cells as the table has them, or why there are none."""

_MOST_TEXT = 1 << 16  # characters of a row's hashtags, or of its caption, and its group


def table_files(posts: str) -> list[str]:
    """The files of a table, by path; in a folder, but for those whose names begin with a dot or underscore.

    Raises:
        UserError: There is none, or they are not on this machine.
    """
    if is_remote(posts):
        raise UserError(f"the table {posts} must be on this machine")
    return [file.path for file in find_files(posts, SUFFIXES)]


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
    yield from itertools.islice(enumerate(_rows(files, columns)), limit)


def _rows(files: list[str], columns: list[str]) -> Iterator[list[Any] | Reject]:
    for number, path in enumerate(files):
        whole = TableSplit(path, path, number, 0)
        suffix = Path(path).suffix.lower()
        for split in parquet_splits(whole) if suffix == ".parquet" else [whole]:
            for rows in READERS[suffix](split, columns, False):
                cells = [cells_of(rows.columns[column]) for column in columns]
                yield from map(list, zip(*cells, strict=True))
                yield from rows.rejects


def reduce_row(raw: RawRow, guard: Guard) -> dict[str, Any]:
    """What is fetched and kept of a row: its number, URL, hashtags, caption and group; or `refused`, why nothing is."""
    number, cells = raw
    kept: dict[str, Any] = dict.fromkeys(("url", "hashtags", "caption", "group", "refused"))
    kept["row"] = number
    if isinstance(cells, Reject):
        return kept | {"refused": f"{cells.reason}: {cells.key} of its file, {cells.detail}".rstrip(", ")}
    url, hashtags, *groups = cells
    group = groups[0] if groups else None
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
