"""A table of the user's own posts: CSV, JSON lines or Parquet, a row an image.

Must never read an image outside the table's folder unless the user allows it, and never hold more than a few rows.
"""

from __future__ import annotations

import csv
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.posts import Post, split_hashtags
from scale_wsl.errors import UserError
from scale_wsl.recipe import setting

__all__ = ["SUFFIXES", "TableSource"]

_LONGEST_LINE = 64 << 20  # characters of a line of JSON, or a row of CSV
_ROWS_AT_ONCE = 64  # of a Parquet file, whose rows may hold whole images
_HASHTAG = re.compile(r"[#＃]([^\s#＃,;]+)")


@dataclass(frozen=True, kw_only=True)
class TableSource:
    """A post for each row of a table; a Parquet column may hold the image files' bytes instead of their paths.

    Hashtags are a list of texts, or one text: with a # in it, a caption of which the #hashtags are read; without one,
    hashtags separated by white space, commas or semicolons.
    """

    path: str = setting("", "The table: a .csv, .jsonl or .parquet file.")
    image: str = setting("image", "Column of the image: a path relative to `root`, or in Parquet the file's bytes.")
    hashtags: str = setting("hashtags", "Column of the hashtags.")
    group: str | None = setting(None, "Column whose equal values mark variants that must not be split; null: none.")
    root: str | None = setting(None, "Folder that image paths start from; null: the table's own.")
    anywhere: bool = setting(False, "Allow absolute image paths, and such as leave `root`.")
    name: str = setting("table", "The source's part of the data sets' names.")
    licence: str = setting("unknown", "Licence of the images and hashtags, for the manifest.")
    attribution: str = setting("", "Whom to name as their authors, for the manifest.")

    stop = ()
    compares_images = False

    def __post_init__(self) -> None:
        DatasetName("train", self.name, 0, 0)
        if not self.path:
            raise UserError("a table source needs its path: path=FILE")
        if not os.path.isfile(self.path):  # unlike Path's, no error where a folder may not be searched
            raise UserError(f"the table {self.path} is not there, or is no file")
        if Path(self.path).suffix.lower() not in SUFFIXES:
            raise UserError(f"the table {self.path} is of no known kind: its name must end in {', '.join(SUFFIXES)}")
        if not os.path.isdir(self._root):
            raise UserError(f"the folder of the images, {self._root}, is not there")

    @property
    def _root(self) -> Path:
        return Path(self.path).parent if self.root is None else Path(self.root)

    def fingerprint(self) -> Mapping[str, object]:
        """The table's contents and the options. The image files themselves are not looked at: there may be billions."""
        try:
            with open(self.path, "rb") as handle:
                digest = hashlib.file_digest(handle, "sha256").hexdigest()
        except OSError as error:
            raise _unreadable(self.path, error) from None
        columns = {"image": self.image, "hashtags": self.hashtags, "group": self.group}
        return {"sha256": digest, **columns, "root": str(self._root.resolve()), "anywhere": self.anywhere}

    def count(self) -> int | None:
        """Known for Parquet alone."""
        if Path(self.path).suffix.lower() != ".parquet":
            return None
        return int(_open_parquet(self.path).metadata.num_rows)

    def posts(self) -> Iterator[Post]:
        """Every row, in order; the key is the row's number."""
        columns = [self.image, self.hashtags, *([] if self.group is None else [self.group])]
        rows = SUFFIXES[Path(self.path).suffix.lower()](self.path, columns)
        empty = True
        for number, row in enumerate(rows, 1):
            empty = False
            at = f"row {number} of {self.path}"
            group = None if self.group is None or row[self.group] is None else str(row[self.group])
            hashtags = _parse_hashtags(row[self.hashtags], self.hashtags, at)
            yield Post(f"{number:09d}", self._image(row[self.image], at), hashtags, group)
        if empty:
            raise UserError(f"the table {self.path} has no rows")

    def _image(self, value: Any, at: str) -> Path | Callable[[], bytes]:
        if isinstance(value, dict):  # as the `datasets` library stores images
            value = content if isinstance(content := value.get("bytes"), bytes) else value.get("path")
        if isinstance(value, bytes):
            return functools.partial(bytes, value)
        if not isinstance(value, str) or not value or "\0" in value or not _is_path(value):
            raise UserError(f"the column {self.image} in {at} is no path of an image")
        path = self._root / value
        if not self.anywhere:
            if Path(value).is_absolute():
                raise UserError(f"the image path {value} in {at} is absolute, which needs anywhere=true")
            if not path.resolve().is_relative_to(self._root.resolve()):
                raise UserError(f"the image path {value} in {at} leads out of {self._root}, which needs anywhere=true")
        return path


def _is_path(text: str) -> bool:
    try:
        os.fsencode(text)
    except UnicodeEncodeError:  # half of a surrogate pair, as JSON may hold
        return False
    return True


def _parse_hashtags(value: Any, column: str, at: str) -> tuple[str, ...]:
    if value is None:
        return ()
    if isinstance(value, str):
        if "#" in value or "＃" in value:
            return tuple(_HASHTAG.findall(value))
        return split_hashtags(value)
    if isinstance(value, list) and all(isinstance(tag, str) for tag in value):
        return tuple(value)
    raise UserError(f"the column {column} in {at} is neither a text nor a list of texts")


_Rows = Iterator[Mapping[str, Any]]


def _csv_rows(path: str, columns: list[str]) -> _Rows:
    try:
        with open(path, encoding="utf-8-sig", newline="") as handle:
            taken = 0  # characters of the row that is being read

            def lines() -> Iterator[str]:
                nonlocal taken
                while line := handle.readline(_LONGEST_LINE):
                    taken += len(line)
                    if taken >= _LONGEST_LINE:
                        raise csv.Error(f"a row is longer than {_LONGEST_LINE:,} characters")
                    yield line

            reader = csv.DictReader(lines(), strict=True)
            _check_columns(path, columns, reader.fieldnames or ())
            taken = 0
            for row in reader:
                taken = 0
                yield row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise _unreadable(path, error) from None


def _json_rows(path: str, columns: list[str]) -> _Rows:
    try:
        with open(path, encoding="utf-8-sig") as handle:
            number = 0
            while line := handle.readline(_LONGEST_LINE):
                number += 1
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except (ValueError, RecursionError):
                    row = None
                if not isinstance(row, dict):
                    raise UserError(f"line {number} of {path} is no JSON object")
                _check_columns(f"line {number} of {path}", columns, row)
                yield row
    except (OSError, UnicodeDecodeError) as error:
        raise _unreadable(path, error) from None


def _parquet_rows(path: str, columns: list[str]) -> _Rows:
    import pyarrow

    file = _open_parquet(path)
    _check_columns(path, columns, file.schema_arrow.names)
    try:
        for batch in file.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


SUFFIXES: dict[str, Callable[[str, list[str]], _Rows]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
"""How the rows of each kind of table are read."""


def _open_parquet(path: str) -> Any:
    import pyarrow
    import pyarrow.parquet

    try:
        # Buffered, or a column's whole part of a row group would be read at once.
        return pyarrow.parquet.ParquetFile(path, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pyarrow.ArrowException) as error:
        raise _unreadable(path, error) from None


def _check_columns(where: str, wanted: list[str], present: Any) -> None:
    for column in wanted:
        if column not in present:
            found = ", ".join(map(str, present)) or "none"
            raise UserError(f"{where} has no column {column!r} (found: {found})")


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(f"cannot read the table {path}: {' '.join(str(error).split())[:200]}")
