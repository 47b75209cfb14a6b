"""The images of a training or an evaluation set, whether it is a prepared data set or a folder of plain files.

Must never hold the images: a set knows their keys and reads one at a time.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Protocol

from tqdm import tqdm

from scale_wsl.corpus.posts import key_of
from scale_wsl.corpus.shards import Dataset, find_dataset
from scale_wsl.corpus.sources.folder import FolderSource
from scale_wsl.errors import UserError

__all__ = ["ImageSet", "open_images"]


class ImageSet(Protocol):
    """Images by number."""

    @property
    def name(self) -> str:
        """For people."""

    @property
    def folder(self) -> Path:
        """Where it is."""

    @property
    def identity(self) -> str:
        """A SHA-256 of which images it has, in which order: of a data set its manifest's."""

    def key(self, i: int) -> str:
        """The key of image i."""

    def read(self, i: int) -> bytes:
        """The bytes of image i's file; safe in threads."""

    def labels(self, i: int) -> tuple[str, ...]:
        """The hashtags of image i."""

    def __len__(self) -> int: ...


class DatasetImages:
    """The images of a prepared data set."""

    def __init__(self, dataset: Dataset) -> None:
        self._dataset = dataset
        self.name = str(dataset.name)
        self.folder = Path(dataset.folder)
        self.identity = dataset.manifest_hash

    def __len__(self) -> int:
        return len(self._dataset)

    def key(self, i: int) -> str:
        """See `ImageSet.key`."""
        return str(self._dataset.keys[i])

    def read(self, i: int) -> bytes:
        """See `ImageSet.read`."""
        return self._dataset.read(i)

    def labels(self, i: int) -> tuple[str, ...]:
        """See `ImageSet.labels`."""
        entries = self._dataset.vocabulary.entries
        return tuple(entries[label].hashtag for label in self._dataset.labels(i).tolist())


class FolderImages:
    """Every image below a folder, with the keys and hashtags that `scale-wsl prepare` would give it.

    The identity is of the contents, so all of them are read once when it is opened.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.name = key_of(folder.resolve().name)
        posts = [post for post in FolderSource(path=str(folder)).posts() if isinstance(post.image, Path)]
        self._keys = [post.key for post in posts]
        self._labels = [tuple(tag.lstrip("#") for tag in post.hashtags) for post in posts]
        self._paths = [post.image for post in posts if isinstance(post.image, Path)]
        digest = hashlib.sha256(b"scale_wsl folder of images\n")
        for number, key in enumerate(tqdm(self._keys, f"{self.name}: hashing", unit=" images", disable=None)):
            digest.update(f"{key} {hashlib.sha256(self.read(number)).hexdigest()}\n".encode())
        self.identity = digest.hexdigest()

    def __len__(self) -> int:
        return len(self._paths)

    def key(self, i: int) -> str:
        """See `ImageSet.key`."""
        return self._keys[i]

    def read(self, i: int) -> bytes:
        """See `ImageSet.read`.

        Raises:
            UserError: The file cannot be read.
        """
        path = self._paths[i]
        try:
            if not path.is_file():  # a pipe would keep its reader waiting for ever
                raise UserError(f"{path} is no file any more, or leads nowhere: remove it, or put it back")
            return path.read_bytes()
        except OSError as error:
            raise UserError(f"cannot read {path}: {error.strerror}") from None

    def labels(self, i: int) -> tuple[str, ...]:
        """See `ImageSet.labels`."""
        return self._labels[i]


def open_images(path: str | Path, role: str) -> ImageSet:
    """The images of a prepared data set, of the one of that role in what `prepare` made, or of a folder of images.

    Args:
        path: Of the folder.
        role: train or val: which of a preparation's data sets is meant.

    Raises:
        UserError: It is none of these, or damaged.
    """
    folder = Path(path)
    try:
        if not folder.is_dir():
            raise UserError(f"{folder} is no folder: name a prepared data set, or a folder of images")
        if (folder / "manifest.json").is_file():
            return DatasetImages(Dataset.open(folder))
        if any(folder.glob(f"{role}-*/manifest.json")):
            return DatasetImages(Dataset.open(find_dataset(folder, role)))
        return FolderImages(folder)
    except OSError as error:
        raise UserError(f"cannot read {folder}: {error.strerror}") from None
