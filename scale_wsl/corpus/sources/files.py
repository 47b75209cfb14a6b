"""Finds and opens the files of a table, on this machine or in an object store that Arrow reads (s3, gs, abfss, hdfs).

Must never follow a pattern out of the folder that it names, and never write.
"""

from __future__ import annotations

import fnmatch
import functools
import glob
import os
import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from scale_wsl.errors import UserError

__all__ = ["Found", "filesystem", "find_files", "is_remote"]

_REMOTE = re.compile(r"(s3|gs|gcs|abfss?|hdfs|viewfs)://")
_PATTERN = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class Found:
    """A file."""

    path: str
    """As `filesystem` takes it."""
    size: int
    """Bytes."""
    changed: int
    """When it was changed last, in nanoseconds of the epoch; 0 where that is not known."""

    @property
    def suffix(self) -> str:
        """The end of its name from the last dot on, in lower case."""
        return os.path.splitext(self.path)[1].lower()


def is_remote(path: str) -> bool:
    """Whether this is an address in an object store."""
    return _REMOTE.match(path) is not None


def filesystem(path: str) -> tuple[Any, str]:
    """The `pyarrow.fs.FileSystem` of a path or an address, and the path there.

    Raises:
        UserError: The address is none, or its store cannot be reached.
    """
    if not is_remote(path):
        from pyarrow import fs

        return fs.LocalFileSystem(), path
    address, _, options = path.partition("?")
    scheme, _, rest = address.partition("://")
    authority, _, inside = rest.partition("/")
    store, top = _store(f"{scheme}://{authority}/" + (f"?{options}" if options else ""))
    return store, f"{top.rstrip('/')}/{inside}"


@functools.lru_cache(maxsize=16)
def _store(address: str) -> tuple[Any, str]:
    """Kept, since opening one may take longer than reading an image."""
    import pyarrow
    from pyarrow import fs

    try:
        store, top = fs.FileSystem.from_uri(address)
    except (OSError, pyarrow.ArrowException, ValueError) as error:
        raise UserError(f"cannot open {_shown(address)}: {' '.join(str(error).split())[:200]}") from None
    return store, top


def find_files(path: str, suffixes: Collection[str]) -> list[Found]:
    """The files that a path means, by name: itself, those of a folder and the folders in it, or of a pattern (*, ?).

    Hidden files and those of other suffixes are passed over where a folder or a pattern was given.

    Raises:
        UserError: There is none, or the place cannot be read.
    """
    found = _remote_files(path) if is_remote(path) else _local_files(path)
    taken = [file for file in found if file.suffix in suffixes]
    if not taken:
        ends = ", ".join(sorted(suffixes))
        if not found:
            raise UserError(f"there is no file at {_shown(path)}")
        raise UserError(f"there is no file at {_shown(path)} whose name ends in {ends} ({len(found):,} others)")
    return sorted(taken, key=lambda file: file.path)


def _local_files(path: str) -> list[Found]:
    try:
        if os.path.isdir(path):
            names = [os.path.join(top, name) for top, _, some in os.walk(path, onerror=_refuse) for name in some]
            names = [name for name in names if not _is_hidden(os.path.relpath(name, path))]
        elif os.path.exists(path) or not _PATTERN.search(path):
            names = [path]
        else:
            names = glob.glob(path, recursive=True)
        found = []
        for name in names:
            if os.path.isfile(name):
                status = os.stat(name)
                found.append(Found(name, status.st_size, status.st_mtime_ns))
    except (OSError, ValueError) as error:
        raise UserError(f"cannot look at {path}: {error}") from None
    return found


def _refuse(error: OSError) -> None:
    raise error


def _remote_files(path: str) -> list[Found]:
    import pyarrow
    from pyarrow import fs

    store, inside = filesystem(path)
    pattern = _PATTERN.search(inside)
    base = inside[: pattern.start()].rpartition("/")[0] if pattern else inside
    try:
        (info,) = store.get_file_info([base])
        infos = (
            store.get_file_info(fs.FileSelector(base, recursive=True)) if info.type == fs.FileType.Directory else [info]
        )
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot look at {_shown(path)}: {' '.join(str(error).split())[:200]}") from None
    found = [i for i in infos if i.type == fs.FileType.File]
    if pattern:
        found = [i for i in found if fnmatch.fnmatchcase(i.path, inside)]
    found = [i for i in found if i.path == base or not _is_hidden(i.path[len(base) :].strip("/"))]
    return [Found(i.path, i.size, i.mtime_ns or 0) for i in found]


def _is_hidden(path: str) -> bool:
    return any(part.startswith((".", "_")) for part in path.split("/"))


def _shown(address: str) -> str:
    """An address without a password or a token that it may carry."""
    return re.sub(r"//[^/@]*@", "//", address.partition("?")[0])
