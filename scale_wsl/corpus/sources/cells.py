"""Turns columns of hostile tables into Python values, text that is not UTF-8 into what says so.

Must never raise for what a cell holds.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

__all__ = ["NotText", "cells_of", "is_list_of_text", "is_utf8"]


def is_list_of_text(kind: Any) -> bool:
    """Whether an Arrow type is a list of texts, dictionary-encoded or not."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    if pa.types.is_dictionary(inner):
        inner = inner.value_type
    return bool(pa.types.is_string(inner) or pa.types.is_large_string(inner))


def is_utf8(values: Any) -> bool:
    """Whether all are: Parquet's word for it is not checked when it is read."""
    import pyarrow as pa

    try:
        values.validate(full=True)
    except pa.ArrowInvalid:
        return False
    return True


def cells_of(column: Any) -> Sequence[Any]:
    """A column as Python values; `NotText` where a text is not UTF-8."""
    if isinstance(column, list):
        return column
    import pyarrow as pa

    if pa.types.is_dictionary(column.type):
        column = column.dictionary_decode()
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):
        if is_utf8(column):
            return list(column.to_pylist())
        wide = pa.large_binary() if pa.types.is_large_string(column.type) else pa.binary()
        return [_decoded(cell) for cell in column.view(wide).to_pylist()]
    if is_list_of_text(column.type):
        values = cells_of(column.flatten())
        lengths = column.value_lengths().to_pylist()
        cells: list[Any] = []
        start = 0
        for length in lengths:
            part = None if length is None else list(values[start : start + length])
            # One tag that is no text spoils the list: nobody knows what else was damaged.
            cells.append(NotText() if part and any(isinstance(tag, NotText) for tag in part) else part)
            start += length or 0
        return cells
    try:
        return list(column.to_pylist())
    except (ValueError, OverflowError, pa.ArrowException):  # text inside a struct, a time that Python does not know
        return [_value(cell) for cell in column]


def _value(cell: Any) -> Any:
    import pyarrow as pa

    try:
        return cell.as_py()
    except (ValueError, OverflowError, pa.ArrowException):
        return None


class NotText:
    """Stands for a text that is not UTF-8."""


def _decoded(cell: bytes | None) -> str | NotText | None:
    try:
        return None if cell is None else cell.decode()
    except UnicodeDecodeError:
        return NotText()
