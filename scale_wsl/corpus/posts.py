"""What a post is, and what a source of posts has to offer.

Must never hold an image: a post says where its bytes come from, and they are read when they are needed.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

__all__ = ["MAX_KEY", "Post", "Source", "key_of", "split_hashtags"]

MAX_KEY = 80
"""The longest key, in characters: a tar member's name has room for 100."""

_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}", re.ASCII)
_NOT_KEY = re.compile(r"[^A-Za-z0-9_-]+", re.ASCII)
_BETWEEN_TAGS = re.compile(r"[\s,;]+")


@dataclass(frozen=True)
class Post:
    """An image and what its user wrote beside it.

    Raises:
        ValueError: The key is not one.
    """

    key: str
    """Unique in its source: ASCII letters, digits, _ and -, at most `MAX_KEY`. A dot would end a WebDataset key."""
    image: Path | Callable[[], bytes] = field(repr=False)
    """A file that stays where it is until the data set is written, or what fetches or draws the bytes, called once."""
    hashtags: tuple[str, ...]
    """As typed, with or without #."""
    group: str | None = None
    """Posts of the same group are variants of one subject and never come to different splits."""

    def __post_init__(self) -> None:
        if not _KEY.fullmatch(self.key):
            raise ValueError(f"{self.key!r} is no key; make one with key_of")


class Source(Protocol):
    """Where posts come from."""

    @property
    def name(self) -> str:
        """The middle of a data set's name, as in train-IG-1B-17k: a letter, then letters, digits and _."""

    @property
    def licence(self) -> str:
        """The licence of the images and tags, as it is written into the manifest."""

    @property
    def attribution(self) -> str:
        """Whom to name, and where the material is from."""

    @property
    def stop(self) -> tuple[str, ...]:
        """Normalised hashtags that never become labels, because no user meant them."""

    @property
    def compares_images(self) -> bool:
        """Whether the fingerprint sees that an image was changed."""

    def fingerprint(self) -> Mapping[str, object]:
        """What the posts depend on, as JSON: equal fingerprints mean equal posts. Cheap: nothing is downloaded."""

    def count(self) -> int | None:
        """How many posts to expect, for a progress bar; None where it is not known beforehand."""

    def posts(self) -> Iterator[Post]:
        """Every post once, always in the same order.

        Raises:
            UserError: The source cannot be read.
        """


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
