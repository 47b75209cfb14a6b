"""Reads every post of a source once: hashtags normalised, image checked and looked at, exact copies merged.

Must never hold the images: those that are no files of their own are spooled to one file aside. Held are, for each
image, its key, hashtags, groups, hash, thumbnail and place.
"""

from __future__ import annotations

import dataclasses
import hashlib
import stat
import sys
import warnings
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scale_wsl.corpus.images import SIDE, Look, RefusedImage, look
from scale_wsl.corpus.posts import Post, Source
from scale_wsl.errors import UserError
from scale_wsl.hashtags import normalize_all

__all__ = ["Gathered", "Record", "gather"]

_EXAMPLES = 3  # images that are named for each reason to drop them


@dataclass(slots=True)
class Record:
    """An image that can be used; `read` fetches its bytes again."""

    key: str
    extension: str
    hashtags: tuple[str, ...]
    """As typed, of all copies."""
    normalised: tuple[str, ...]
    groups: tuple[str, ...]
    """Of all copies."""
    sha256: bytes
    place: Path | tuple[int, int]
    """A file, or (offset, length) in the spool."""


@dataclass
class Gathered:
    """The usable images of a source, and what became of the rest."""

    records: list[Record]
    thumbnails: NDArray[np.uint8]
    """`[N, SIDE, SIDE]`"""
    spool: Path
    posts: int = 0
    copies: int = 0
    """Posts whose image file equals an earlier one's; their hashtags were added to that one's."""
    dropped: Counter[str] = dataclasses.field(default_factory=Counter)
    """Posts dropped, by reason."""
    examples: dict[str, list[str]] = dataclasses.field(default_factory=dict)
    dropped_hashtags: Counter[str] = dataclasses.field(default_factory=Counter)
    """Tags dropped, by the reason that `normalize_all` gives."""

    def drop(self, reason: str, key: str, detail: str = "") -> None:
        """Count a post that is dropped, and remember the first few by name."""
        self.dropped[reason] += 1
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(f"{key}: {detail}" if detail else key)

    def read(self, record: Record) -> bytes:
        """The bytes of a record's image, equal to those that were looked at.

        Raises:
            UserError: Its file was changed or removed since.
        """
        if isinstance(record.place, Path):
            try:
                data = record.place.read_bytes()
            except OSError as error:
                raise UserError(f"cannot read {record.place} any more: {error.strerror}") from None
        else:
            with open(self.spool, "rb") as handle:
                handle.seek(record.place[0])
                data = handle.read(record.place[1])
        if hashlib.sha256(data).digest() != record.sha256:
            raise UserError(f"{record.place} was changed while the data set was being prepared: prepare it again")
        return data


def gather(source: Source, spool: Path, *, max_pixels: int, max_bytes: int, workers: int) -> Gathered:
    """Read all posts of a source.

    Images are decoded by threads: Pillow and the hash let others run meanwhile, and no image is copied from one process
    to another. Four for each thread are in memory at a time.

    Args:
        source: Where the posts come from.
        spool: A file to make, for the images that are no files of their own.
        max_pixels: Images of more pixels are dropped.
        max_bytes: Image files of more bytes are dropped.
        workers: Threads.

    Raises:
        UserError: The source cannot be read, or two posts have the same key.
    """
    result = Gathered([], np.empty((0, SIDE, SIDE), np.uint8), spool)
    thumbnails: list[bytes] = []
    keys: set[str] = set()
    by_content: dict[bytes, Record] = {}

    def usable() -> Iterator[tuple[Post, tuple[str, ...]]]:
        for post in tqdm(source.posts(), f"{source.name}: posts", source.count(), unit=" posts", disable=None):
            result.posts += 1
            if post.key in keys:
                raise UserError(f"two posts of {source.name} have the same key, {post.key}: keys must be unique")
            keys.add(post.key)
            normalised, dropped = normalize_all(post.hashtags)
            result.dropped_hashtags.update(dropped)
            if normalised:
                yield post, tuple(map(sys.intern, normalised))
            else:
                result.drop("no hashtag", post.key)

    with warnings.catch_warnings(), open(spool, "wb") as spooled:
        # Bombs and damaged metadata are judged by `look`, so nothing is left to warn of. The filters are the whole
        # process's, so they are set here, before the threads start, and set back when all have ended.
        warnings.simplefilter("ignore")
        for (post, normalised), outcome in _looked(usable(), max_pixels, max_bytes, workers):
            if isinstance(outcome, RefusedImage):
                result.drop(outcome.reason, post.key, outcome.detail)
                continue
            data, digest, seen = outcome
            groups = () if post.group is None else (post.group,)
            if (first := by_content.get(digest)) is not None:
                result.copies += 1
                first.hashtags = _union(first.hashtags, post.hashtags)
                first.normalised = _union(first.normalised, normalised)
                first.groups = _union(first.groups, groups)
                continue
            place = post.image if isinstance(post.image, Path) else _append(spooled, data)
            hashtags = _union(post.hashtags)
            by_content[digest] = Record(post.key, seen.extension, hashtags, normalised, groups, digest, place)
            thumbnails.append(seen.thumbnail.tobytes())
    result.records = list(by_content.values())
    result.thumbnails = np.frombuffer(b"".join(thumbnails), np.uint8).reshape(-1, SIDE, SIDE)
    return result


_Usable = tuple[Post, tuple[str, ...]]
_Outcome = tuple[bytes, bytes, Look] | RefusedImage


def _looked(
    posts: Iterable[_Usable], max_pixels: int, max_bytes: int, workers: int
) -> Iterator[tuple[_Usable, _Outcome]]:
    """Each post with its image's bytes, SHA-256 and look, in order, or why it is refused."""
    waiting: deque[tuple[_Usable, Future[_Outcome]]] = deque()
    pool = ThreadPoolExecutor(workers)
    try:
        for usable in posts:
            waiting.append((usable, pool.submit(_outcome, usable[0], max_pixels, max_bytes)))
            if len(waiting) >= 4 * workers:
                done, future = waiting.popleft()
                yield done, future.result()
        for done, future in waiting:
            yield done, future.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _outcome(post: Post, max_pixels: int, max_bytes: int) -> _Outcome:
    try:
        data = _fetch(post, max_bytes)
        return data, hashlib.sha256(data).digest(), look(data, max_pixels)
    except RefusedImage as refused:
        return refused


def _fetch(post: Post, max_bytes: int) -> bytes:
    if not isinstance(post.image, Path):
        data = post.image()
    else:
        try:
            if not stat.S_ISREG(post.image.stat().st_mode):  # a pipe would keep its reader waiting for ever
                raise RefusedImage("unreadable", "it is no regular file")
            with open(post.image, "rb") as handle:
                data = handle.read(max_bytes + 1)
        except OSError as error:
            raise RefusedImage("unreadable", error.strerror or str(error)) from None
    if len(data) > max_bytes:
        raise RefusedImage("too many bytes", f"more than the limit of {max_bytes:,}")
    return data


def _append(spooled: BinaryIO, data: bytes) -> tuple[int, int]:
    offset = spooled.tell()
    spooled.write(data)
    return offset, len(data)


def _union(*tags: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(tag for some in tags for tag in some))
