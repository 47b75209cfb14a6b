"""Where posts come from: two corpora by name, and the user's own folder, table or tars."""

from __future__ import annotations

import dataclasses
import difflib
import os
from pathlib import Path
from typing import Any

from scale_wsl.corpus.posts import Source
from scale_wsl.corpus.sources.emoji import EmojiSource
from scale_wsl.corpus.sources.folder import FolderSource
from scale_wsl.corpus.sources.openclipart import OpenclipartSource
from scale_wsl.corpus.sources.table import SUFFIXES, TableSource, is_table
from scale_wsl.corpus.sources.webdataset import WebDatasetSource, is_webdataset
from scale_wsl.errors import UserError

__all__ = [
    "SOURCES",
    "EmojiSource",
    "FolderSource",
    "OpenclipartSource",
    "TableSource",
    "WebDatasetSource",
    "open_source",
    "source_class",
]

SOURCES: dict[str, type[Any]] = {
    "emoji": EmojiSource,
    "openclipart": OpenclipartSource,
    "folder": FolderSource,
    "table": TableSource,
    "webdataset": WebDatasetSource,
}


def source_class(name: str) -> type[Any]:
    """The class of a source, each a dataclass whose fields are its options, by its name or by the user's own path.

    Raises:
        UserError: There is no such source.
    """
    if name in SOURCES:
        return SOURCES[name]
    if is_webdataset(name):
        return WebDatasetSource
    if is_table(name):
        return TableSource
    path = Path(name)
    if os.path.isdir(path):  # unlike Path's, no error where a folder above may not be searched
        return FolderSource
    if os.path.isfile(path):
        if path.suffix.lower() in SUFFIXES:
            return TableSource
        raise UserError(f"{name} is a file, but no table: its name would end in {', '.join(SUFFIXES)}")
    raise UserError(f"{name!r} is no source: it must be {', '.join(SOURCES)}, or the path of a folder, a table or tars")


def open_source(name: str, /, **options: Any) -> Source:
    """A source by its name, `SOURCES`, or by the path of the user's own folder, table or tars.

    Raises:
        UserError: There is no such source, it has no such option, or it cannot be read.
    """
    cls = source_class(name)
    if name not in SOURCES:
        options = {"path": name, **options}
    fields = [field.name for field in dataclasses.fields(cls)]
    for option in options:
        if option not in fields:
            close = difflib.get_close_matches(option, fields, n=1)
            hint = f"did you mean {close[0]}?" if close else f"it has {', '.join(fields)}"
            raise UserError(f"the source {name} has no option {option}; {hint}")
    source: Source = cls(**options)
    return source
