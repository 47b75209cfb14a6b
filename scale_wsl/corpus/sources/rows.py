"""Reads the rows of one table file (CSV, JSON lines, Parquet) in batches of columns.

Every file is hostile: a row that cannot be read is a reject with its number and reason, and the next row is tried. Must
never hold more than a batch, and never take a row of more than `LONGEST_ROW` bytes into memory.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from scale_wsl.corpus.posts import Reject
from scale_wsl.corpus.sources.files import filesystem
from scale_wsl.errors import UserError

__all__ = ["LONGEST_ROW", "READERS", "Rows", "TableSplit", "open_parquet"]

LONGEST_ROW = 64 << 20
"""Bytes of a row of CSV or a line of JSON."""

_ROWS_AT_ONCE = 1 << 16
_IMAGES_AT_ONCE = 64  # rows that may hold whole images
_BYTES_AT_ONCE = 64 << 20  # of text
_ROW_GROUPS = 1 << 20  # rows of a split of Parquet, which is as many whole row groups


class TableSplit(NamedTuple):
    """A part of a table: a file, or some row groups of one."""

    address: str
    """Of the table, whose file system it is on."""
    path: str
    file: int | None
    """Its number among the table's files; None where it is the only one."""
    first_row: int
    groups: tuple[int, int] | None = None
    """Row groups [from, to) of Parquet."""


@dataclass(frozen=True)
class Rows:
    """Some rows of a table file, in order."""

    numbers: Sequence[int]
    """`[B]`, the number of each row in its file, from 1."""
    columns: dict[str, Any]
    """`[B]` each: a `pyarrow` array, or a list of what CSV or JSON holds."""
    rejects: Sequence[Reject] = ()


# --- text ----------------------------------------------------------------------------------------------------------


class _Lines:
    """The lines of a file as text, one for each call of `next`; bytes that are not UTF-8 become lone surrogates."""

    def __init__(self, handle: Any, path: str) -> None:
        self._handle = io.BufferedReader(handle, 1 << 20)
        self._path = path
        self.taken = 0  # bytes since `taken` was set to 0
        self.ended = False
        self._first = True

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        try:
            line = self._handle.readline(LONGEST_ROW)
        except OSError as error:
            raise unreadable(self._path, error) from None
        if not line:
            self.ended = True
            raise StopIteration
        if self._first:
            line, self._first = line.removeprefix(codecs.BOM_UTF8), False
        self.taken += len(line)
        if self.taken >= LONGEST_ROW:
            while line and not line.endswith(b"\n"):
                line = self._handle.readline(LONGEST_ROW)
            raise _TooLongError
        return line.decode("utf-8", "surrogateescape")


class _TooLongError(Exception):
    """A row has `LONGEST_ROW` bytes or more."""


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


class _Gathering:
    """Rows on their way into batches."""

    def __init__(self, columns: Sequence[str], split: TableSplit) -> None:
        self.columns = columns
        self.where = "" if split.file is None else f"file {split.file}, "
        self._clear()

    def _clear(self) -> None:
        self.rows: list[Sequence[Any]] = []
        self.numbers: list[int] = []
        self.rejects: list[Reject] = []
        self.bytes = 0

    def reject(self, number: int, reason: str, detail: str = "") -> None:
        self.rejects.append(Reject(f"{self.where}row {number}", reason, detail))

    @property
    def full(self) -> bool:
        return len(self.rows) + len(self.rejects) >= _ROWS_AT_ONCE or self.bytes >= _BYTES_AT_ONCE

    def take(self) -> Rows:
        columns = list(zip(*self.rows, strict=True)) if self.rows else [()] * len(self.columns)
        rows = Rows(self.numbers, dict(zip(self.columns, map(list, columns), strict=True)), self.rejects)
        self._clear()
        return rows


def _csv_rows(split: TableSplit, columns: Sequence[str], images: bool) -> Iterator[Rows]:
    csv.field_size_limit(LONGEST_ROW)
    with _opened(split) as handle:
        lines = _Lines(handle, split.path)
        try:
            header = next(csv.reader(lines, strict=True), [])
        except (csv.Error, _TooLongError) as error:
            raise UserError(f"cannot read the header of {split.path}: {error or 'it is too long'}") from None
        if not all(map(_is_text, header)):
            raise UserError(f"cannot read the header of {split.path}: it is not UTF-8 text")
        _check_columns(split.path, columns, header)
        places = [header.index(column) for column in columns]
        width = len(header)
        gathering = _Gathering(columns, split)
        number = 0
        while not lines.ended:
            reader = csv.reader(lines, strict=True)  # after a mistake, a new one: the next line is a row's first
            while True:
                lines.taken = 0
                try:
                    row = next(reader, None)
                    if row is None:
                        break
                    if not row:
                        continue  # an empty line
                    number += 1
                    if len(row) != width:
                        gathering.reject(number, "malformed row", f"{len(row)} fields, where the header has {width}")
                    elif not all(map(_is_text, cells := [row[place] for place in places])):
                        gathering.reject(number, "not UTF-8")
                    else:
                        gathering.rows.append(cells)
                        gathering.numbers.append(number)
                        gathering.bytes += lines.taken
                except csv.Error as error:
                    number += 1
                    gathering.reject(number, "malformed row", str(error))
                    break
                except _TooLongError:
                    number += 1
                    gathering.reject(number, "row too long", f"{LONGEST_ROW:,} bytes or more: a quote left open?")
                    break
                if gathering.full:
                    yield gathering.take()
        yield gathering.take()


def _json_rows(split: TableSplit, columns: Sequence[str], images: bool) -> Iterator[Rows]:
    with _opened(split) as handle:
        lines = _Lines(handle, split.path)
        gathering = _Gathering(columns, split)
        number = 0
        checked = False
        while not lines.ended:
            lines.taken = 0
            try:
                line = next(lines, None)
            except _TooLongError:
                number += 1
                gathering.reject(number, "row too long", f"{LONGEST_ROW:,} bytes or more")
                continue
            if line is None:
                break
            number += 1
            if not line.strip():
                continue
            if not _is_text(line):
                gathering.reject(number, "not UTF-8")
                continue
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            if not isinstance(row, dict):
                gathering.reject(number, "malformed row", "no JSON object")
            else:
                if not checked:
                    _check_columns(f"row {number} of {split.path}", columns, row)
                    checked = True
                gathering.rows.append([row.get(column) for column in columns])
                gathering.numbers.append(number)
                gathering.bytes += len(line)
            if gathering.full:
                yield gathering.take()
        yield gathering.take()


def _opened(split: TableSplit) -> Any:
    store, _ = filesystem(split.address)
    try:
        return store.open_input_stream(split.path, compression=None)
    except OSError as error:
        raise unreadable(split.path, error) from None


# --- Parquet -------------------------------------------------------------------------------------------------------


def _parquet_rows(split: TableSplit, columns: Sequence[str], images: bool) -> Iterator[Rows]:
    import pyarrow as pa

    with open_parquet(split) as file:
        _check_columns(split.path, columns, file.schema_arrow.names)
        assert split.groups is not None
        rows = _IMAGES_AT_ONCE if images and _holds_bytes(file.schema_arrow, columns) else _ROWS_AT_ONCE
        number = split.first_row
        try:
            for batch in file.iter_batches(rows, list(range(*split.groups)), list(columns), use_threads=False):
                numbers = range(number + 1, number + 1 + len(batch))
                yield Rows(numbers, {column: batch.column(column) for column in columns})
                number += len(batch)
        except (OSError, pa.ArrowException) as error:
            raise unreadable(split.path, error) from None


def _holds_bytes(schema: Any, columns: Sequence[str]) -> bool:
    import pyarrow as pa

    kinds = [schema.field(column).type for column in columns]
    return any(pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind) for kind in kinds)


def open_parquet(split: TableSplit) -> Any:
    """The file as `pyarrow.parquet.ParquetFile`.

    Raises:
        UserError: It is none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    store, _ = filesystem(split.address)
    try:
        # Buffered, or a column's whole part of a row group would be read at once.
        return pq.ParquetFile(split.path, filesystem=store, buffer_size=1 << 20, pre_buffer=False)
    except (OSError, pa.ArrowException) as error:
        raise unreadable(split.path, error) from None


def parquet_splits(whole: TableSplit) -> Iterator[TableSplit]:
    """The parts of a Parquet file: runs of whole row groups of about `_ROW_GROUPS` rows."""
    with open_parquet(whole) as file:
        metadata = file.metadata
        first, row, rows = 0, 0, 0
        for group in range(metadata.num_row_groups):
            rows += metadata.row_group(group).num_rows
            if rows >= _ROW_GROUPS or group == metadata.num_row_groups - 1:
                yield whole._replace(first_row=row, groups=(first, group + 1))
                first, row, rows = group + 1, row + rows, 0


READERS: dict[str, Callable[[TableSplit, Sequence[str], bool], Iterator[Rows]]] = {
    ".csv": _csv_rows,
    ".jsonl": _json_rows,
    ".parquet": _parquet_rows,
}
"""How the rows of each kind of table are read: (split, columns, whether images matter)."""


def _check_columns(where: str, wanted: Sequence[str], present: Any) -> None:
    for column in wanted:
        if column not in present:
            found = ", ".join(map(str, present)) or "none"
            raise UserError(f"{where} has no column {column!r} (found: {found[:300]})")


def unreadable(path: str, error: Exception) -> UserError:
    """What to say of a file that cannot be read."""
    return UserError(f"cannot read the table {path}: {' '.join(str(error).split())[:200]}")
