"""A folder of the user's own images, with hashtags beside them or in the names of their folders.

Must never write into the folder, and never leave it but through links to files that the user put there.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from scale_wsl.corpus.naming import DatasetName
from scale_wsl.corpus.posts import Post, PostSource, key_of, split_hashtags
from scale_wsl.errors import UserError
from scale_wsl.recipe import setting

__all__ = ["FolderSource"]

_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp"}
_LARGEST_SIDECAR = 1 << 20  # bytes


@dataclass(frozen=True, kw_only=True)
class FolderSource(PostSource):
    """Every image below a folder.

    The hashtags of `a/b/cat.jpg` are those of `a/b/cat.txt` (separated by white space, commas or semicolons; # is
    optional), else those of `a/b/cat.json` (`{"hashtags": ["cat", "tabby cat"]}`), else the names of its folders, `a`
    and `b`.
    """

    path: str = setting("", "The folder.")
    name: str = setting("folder", "The source's part of the data sets' names.")
    licence: str = setting("unknown", "Licence of the images and hashtags, for the manifest.")
    attribution: str = setting("", "Whom to name as their authors, for the manifest.")

    stop = ()
    compares_images = True

    def __post_init__(self) -> None:
        DatasetName("train", self.name, 0, 0)
        if not self.path:
            raise UserError("a folder source needs its path: path=FOLDER")
        if not os.path.isdir(self.path):  # unlike Path's, no error where a folder above may not be searched
            raise UserError(f"the image folder {self.path} is not there, or is no folder")
        object.__setattr__(self, "path", os.path.abspath(self.path))  # whoever reads may be in another folder
        if next(self._images(), None) is None:
            raise UserError(f"there is no image ({', '.join(sorted(_SUFFIXES))}) in {self.path} or its folders")

    def fingerprint(self) -> Mapping[str, object]:
        """Names, sizes and times of change of all images and sidecars."""
        digest = hashlib.sha256()
        for image, sidecars in self._images():
            for path in (image, *sidecars):
                status = _status(path)
                facts = (status.st_size, status.st_mtime_ns) if status else None
                digest.update(f"{os.fsencode(path.relative_to(self.path))!r} {facts}\n".encode())
        return {"files": digest.hexdigest()}

    def count(self) -> int | None:
        """As many as there are images."""
        return sum(1 for _ in self._images())

    def posts(self, split: Any = None) -> Iterator[Post]:
        """Every image, by path."""
        for image, sidecars in self._images():
            inside = image.relative_to(self.path)
            hashtags = _read_sidecar(sidecars[0]) if sidecars else inside.parts[:-1]
            yield Post(key_of(inside.as_posix()), image, tuple(hashtags))

    def _images(self) -> Iterator[tuple[Path, list[Path]]]:
        """(image, its sidecars, .txt first), sorted by path."""
        for folder, subfolders, files in os.walk(self.path, onerror=_refuse):
            subfolders.sort()
            present = set(files)
            for file in sorted(files):
                stem, suffix = os.path.splitext(file)
                if suffix.lower() in _SUFFIXES:
                    sidecars = [Path(folder, stem + end) for end in (".txt", ".json") if stem + end in present]
                    yield Path(folder, file), sidecars


def _status(path: Path) -> os.stat_result | None:
    """A file's size and times; None for a link that leads nowhere, which is an image that cannot be read."""
    try:
        return path.stat()
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP):
            return None
        raise UserError(f"cannot look at {path}: {error.strerror}; may its folder be searched?") from None


def _refuse(error: OSError) -> NoReturn:
    raise UserError(f"cannot read the image folder {error.filename}: {error.strerror}") from None


def _read_sidecar(path: Path) -> tuple[str, ...]:
    try:
        if not stat.S_ISREG(path.stat().st_mode):  # a pipe would keep its reader waiting for ever
            raise UserError(f"the hashtags in {path} cannot be read: it is no regular file")
        with open(path, "rb") as handle:
            content = handle.read(_LARGEST_SIDECAR + 1)
        if len(content) > _LARGEST_SIDECAR:
            raise UserError(f"the hashtags in {path} are more than 1 MiB, which no image has")
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"cannot read the hashtags in {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise UserError(f"the hashtags in {path} are not UTF-8 text") from None
    if path.suffix == ".txt":
        return split_hashtags(text)
    try:
        parsed = json.loads(text)
    except (ValueError, RecursionError):
        parsed = None
    hashtags = parsed.get("hashtags") if isinstance(parsed, dict) else None
    if not isinstance(hashtags, list) or not all(isinstance(tag, str) for tag in hashtags):
        raise UserError(f'{path} must be of the form {{"hashtags": ["cat", "tabby cat"]}}')
    return tuple(hashtags)
