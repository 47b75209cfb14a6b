"""Publishing files and folders by one rename, so that a crash never leaves something half-made under its final name.

Must never write under the final name directly, and never remove something that is already published.
"""

from __future__ import annotations

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["discard", "published_file", "published_folder", "sync_folder"]


def sync_folder(folder: Path) -> None:
    """Flush a folder's entries to disk, so that a rename inside it survives a power cut (no-op where not possible)."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows, and some network file systems, cannot open a folder
        return
    try:
        os.fsync(descriptor)
    except OSError:
        pass
    finally:
        os.close(descriptor)


def discard(folder: Path) -> None:
    """Remove a folder, if it is there, so that a crash leaves it whole or not at all under its name.

    What is being removed has the name `.<name>.trash.part`, and is removed by the next call where a crash left it.
    """
    trash = folder.with_name(f".{folder.name.removeprefix('.')}.trash.part")
    shutil.rmtree(trash, ignore_errors=True)
    if folder.exists():
        os.rename(folder, trash)
        sync_folder(folder.parent)
        shutil.rmtree(trash, ignore_errors=True)


@contextmanager
def published_file(path: str | Path) -> Iterator[Path]:
    """Yield a path beside `path` to write to; on success it is flushed and renamed to `path`, on error removed."""
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        yield aside
        with open(aside, "rb+") as written:
            os.fsync(written.fileno())
        os.replace(aside, final)
        sync_folder(final.parent)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def published_folder(path: str | Path) -> Iterator[Path]:
    """Yield a fresh folder beside `path` to fill; on success it is flushed and renamed to `path`, on error removed.

    Raises:
        FileExistsError: `path` is there already when the folder is to be published.
    """
    final = Path(path)
    final.parent.mkdir(parents=True, exist_ok=True)
    aside = final.with_name(f".{final.name}.{uuid.uuid4().hex[:8]}.part")
    aside.mkdir()
    try:
        yield aside
        for written in (*aside.rglob("*"), aside):
            if written.is_file():
                with open(written, "rb+") as handle:
                    os.fsync(handle.fileno())
            else:
                sync_folder(written)
        if final.exists():
            raise FileExistsError(f"{final} is there already")
        os.rename(aside, final)
        sync_folder(final.parent)
    finally:
        shutil.rmtree(aside, ignore_errors=True)
