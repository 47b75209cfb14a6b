"""What a post is, and what a source of posts has to offer.

Must never hold more than a batch of posts, and never an image that lies in a file: a post says where its bytes are.
"""

from __future__ import annotations

import abc
import hashlib
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from scale_wsl.corpus.images import RefusedImage

__all__ = [
    "IS_KEY",
    "MAX_KEY",
    "Batch",
    "Post",
    "PostSource",
    "Reject",
    "Source",
    "key_of",
    "posts_schema",
    "split_hashtags",
]

MAX_KEY = 80
"""The longest key, in characters: a tar member's name has room for 100."""

IS_KEY = "^[A-Za-z0-9_-]{1,80}$"
"""What a key looks like, also to Arrow."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}", re.ASCII)
_NOT_KEY = re.compile(r"[^A-Za-z0-9_-]+", re.ASCII)
_BETWEEN_TAGS = re.compile(r"[\s,;]+")

_POSTS_AT_ONCE = 1024
_BYTES_AT_ONCE = 32 << 20  # of images, which end a batch too


@dataclass(frozen=True)
class Post:
    """An image and what its user wrote beside it.

    Raises:
        ValueError: The key is not one.
    """

    key: str
    """Unique in its source: ASCII letters, digits, _ and -, at most `MAX_KEY`. A dot would end a WebDataset key."""
    image: Path | tuple[Path, int, int] | Callable[[], bytes] = field(repr=False)
    """A file, or (file, offset, length) in one, that stays where it is until the data set is written; or what fetches
    or draws the bytes, called once at most."""
    hashtags: tuple[str, ...]
    """As typed, with or without #."""
    group: str | None = None
    """Posts of the same group are variants of one subject and never come to different splits."""

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"{self.key!r} is no key; make one with key_of")


class Reject(NamedTuple):
    """A post that cannot be used."""

    key: str
    """Its key, or where it is: "row 12"."""
    reason: str
    """One of a few, by which rejects are counted."""
    detail: str = ""


@dataclass(frozen=True)
class Batch:
    """Some posts of a split, in order, and those between them that cannot be used."""

    posts: Any
    """A `pyarrow.RecordBatch` of `posts_schema`; without the columns of images where they were not asked for."""
    rejects: Sequence[Reject] = ()


def posts_schema(*, images: bool) -> Any:
    """The columns of posts.

    `key`, `hashtags` (as typed) and `group` as in `Post`. With images, either `data` has the file's bytes, or `path`
    has a file (`os.fsencode`) or an object's address, of which `offset` and `length` (null: all of it) are the image.
    """
    import pyarrow as pa

    posts = [("key", pa.string()), ("hashtags", pa.list_(pa.string())), ("group", pa.string())]
    places = [("path", pa.binary()), ("offset", pa.int64()), ("length", pa.int64()), ("data", pa.large_binary())]
    return pa.schema(posts + places * images)


class Source(abc.ABC):
    """Where posts come from. It is sent to other processes, so it must hold little and be picklable.

    Attributes:
        name: The middle of a data set's name, as in train-IG-1B-17k: a letter, then letters, digits and _.
        licence: The licence of the images and tags, as it is written into the manifest.
        attribution: Whom to name, and where the material is from.
        stop: Normalised hashtags that never become labels, because no user meant them.
        compares_images: Whether the fingerprint sees that an image was changed.
    """

    name: str
    licence: str
    attribution: str
    stop: tuple[str, ...] = ()
    compares_images: bool = True

    @abc.abstractmethod
    def fingerprint(self) -> Mapping[str, object]:
        """What the posts depend on, as JSON: equal fingerprints mean equal posts. Cheap: nothing is downloaded."""

    def count(self) -> int | None:
        """How many posts to expect, for a progress bar; None where it is not known beforehand."""
        return None

    @abc.abstractmethod
    def splits(self) -> Sequence[Any]:
        """What names each of the parts that can be read on their own, in order; picklable.

        Raises:
            UserError: The source cannot be read.
        """

    @abc.abstractmethod
    def read(self, split: Any, *, images: bool) -> Iterator[Batch]:
        """The posts of one of `splits`, always in the same order.

        Args:
            split: One of `splits`.
            images: Whether to give the columns of images too; otherwise nothing is drawn or fetched.

        Raises:
            UserError: The source cannot be read.
        """


class PostSource(Source):
    """A source that makes its posts one by one; subclasses give `posts`."""

    def splits(self) -> Sequence[Any]:
        """All in one."""
        return (None,)

    @abc.abstractmethod
    def posts(self, split: Any = None) -> Iterator[Post | Reject]:
        """Every post of a split once, always in the same order.

        Raises:
            UserError: The source cannot be read.
        """

    def read(self, split: Any, *, images: bool) -> Iterator[Batch]:
        """See `Source.read`."""
        return _batches(self.posts(split), images)


def _batches(posts: Iterable[Post | Reject], images: bool) -> Iterator[Batch]:
    import pyarrow as pa

    schema = posts_schema(images=images)
    rows: list[tuple[Any, ...]] = []
    rejects: list[Reject] = []
    taken = 0

    def batch() -> Batch:
        columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
        arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
        return Batch(pa.RecordBatch.from_arrays(arrays, schema=schema), tuple(rejects))

    for post in posts:
        if isinstance(post, Reject):
            rejects.append(post)
            continue
        group = None if post.group is None else _text(post.group)
        row: tuple[Any, ...] = post.key, [_text(tag) for tag in post.hashtags], group
        if images:
            try:
                place = _place(post.image)
            except RefusedImage as refused:
                rejects.append(Reject(post.key, refused.reason, refused.detail))
                continue
            row += place
            taken += len(place[3] or b"")
        rows.append(row)
        if len(rows) == _POSTS_AT_ONCE or taken > _BYTES_AT_ONCE:
            yield batch()
            rows, rejects, taken = [], [], 0
    if rows or rejects:
        yield batch()


def _place(image: Path | tuple[Path, int, int] | Callable[[], bytes]) -> tuple[Any, Any, Any, bytes | None]:
    if isinstance(image, Path):
        return os.fsencode(image), None, None, None
    if isinstance(image, tuple):
        return os.fsencode(image[0]), image[1], image[2], None
    return None, None, None, image()


def _text(tag: str) -> str:
    """A tag as UTF-8 can hold it: half a surrogate pair, which JSON and file names may have, becomes a ?."""
    return tag.encode("utf-8", "replace").decode("utf-8")


def key_of(text: str) -> str:
    """A key made of `text`, such as a path: itself where it is one already, else its letters and a hash of it."""
    if _KEY.fullmatch(text):
        return text
    digest = hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:10]
    readable = _NOT_KEY.sub("_", text).strip("_")
    return f"{readable[-(MAX_KEY - 11) :]}-{digest}" if readable else digest


def split_hashtags(text: str) -> tuple[str, ...]:
    """The hashtags of a text that holds nothing else, separated by white space, commas or semicolons; # optional."""
    return tuple(tag for tag in _BETWEEN_TAGS.split(text) if tag.strip("#＃"))
