"""The third stage: which images are for training and which for validation, and which are not wanted.

Must never let the two share an image or a near-identical one. Exact copies are merged into the first of them, whose
hashtags are then those of all.

Two rules, by `PrepareConfig.near`. "all": near-identical images, all over the corpus, come to the same side
(`dedup.clusters`), which takes time with the square of their number. "validation": an image is for validation by its
hash, or its group's, and training images that are near a validation image are dropped; that takes one product of each
training image with the validation images, and can be done by many machines.
"""

from __future__ import annotations

import functools
import hashlib
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.dedup import Near, clusters, split
from scale_wsl.corpus.images import SIDE
from scale_wsl.corpus.keyhash import mixed
from scale_wsl.corpus.places import edition
from scale_wsl.corpus.prepare.work import Chunk, Span, Work
from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.randomness import derived_seed

__all__ = [
    "COPY",
    "NEAR_VALIDATION",
    "REFUSED",
    "TRAIN",
    "VALIDATION",
    "Chosen",
    "NearFinder",
    "choose_by_cluster",
    "choose_by_hash",
    "merge_copies",
    "write_choices",
]

TRAIN, VALIDATION, REFUSED, COPY, NEAR_VALIDATION = range(5)
"""What becomes of a post."""

_AT_ONCE = 1 << 22  # hashes that are compared at a time: 24 bytes each, and as much again to sort them


@dataclass
class Chosen:
    """What becomes of every post, N of them.

    Takes 1 byte for each post and 16 for each exact copy; some 200 more, and its hashtags, while choices are written.
    """

    fate: NDArray[np.int8]
    """`[N]`"""
    copy: NDArray[np.int64]
    """`[C]`, the positions of exact copies, ascending ..."""
    first: NDArray[np.int64]
    """`[C]`, ... and of the image that each is merged into."""
    clusters: Mapping[str, int]
    """Figures of near-identical images for the report."""


def merge_copies(work: Work, chunks: Sequence[Chunk]) -> Chosen:
    """Find the images that cannot be used, and exact copies.

    Raises:
        UserError: Two posts have the same key.
    """
    total = sum(chunk.rows for chunk in chunks)
    fate = np.full(total, TRAIN, np.int8)
    for chunk in chunks:
        reason = work.seen(chunk, ["reason"]).column("reason")
        fate[chunk.start : chunk.start + chunk.rows][reason.is_valid().to_numpy()] = REFUSED
    passes = -(-total // _AT_ONCE)
    repeated = [_repeated(work, chunks, "key_hash", number, passes, None)[1] for number in range(passes)]
    if len(again := np.concatenate(repeated)):
        key = _key_at(work, chunks, int(again.min()))
        raise UserError(f"two posts have the same key, {key}: keys must be unique")
    found = [_repeated(work, chunks, "sha256", number, passes, fate) for number in range(passes)]
    first, copy = (np.concatenate(columns) for columns in zip(*found, strict=True))
    order = np.argsort(copy)
    fate[copy] = COPY
    return Chosen(fate, copy[order], first[order], {})


def _repeated(
    work: Work, chunks: Sequence[Chunk], column: str, number: int, passes: int, fate: NDArray[np.int8] | None
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(first, later) positions of equal hashes; of all hashes, those whose first bits are the pass's."""
    heads, tails, places = [], [], []
    for chunk in chunks:
        words = _words(work.seen(chunk, [column]).column(column))
        mine = words[:, 0] % np.uint64(passes) == number
        if fate is not None:
            mine &= fate[chunk.start : chunk.start + chunk.rows] != REFUSED
        heads.append(words[mine, 0])
        tails.append(words[mine, 1])
        places.append(np.flatnonzero(mine) + chunk.start)
    head, tail, place = np.concatenate(heads), np.concatenate(tails), np.concatenate(places)
    order = np.lexsort((place, tail, head))
    head, tail, place = head[order], tail[order], place[order]
    new = np.ones(len(head), np.bool_)
    new[1:] = (head[1:] != head[:-1]) | (tail[1:] != tail[:-1])
    first = place[new][np.cumsum(new) - 1]
    return first[~new], place[~new]


def _words(column: Any) -> NDArray[np.uint64]:
    """The first 128 bits of each hash of a column of hashes: `[B, 2]`."""
    array = column.combine_chunks()
    array = array.chunk(0) if hasattr(array, "chunk") else array
    width = array.type.byte_width
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * width :][: len(array) * width]
    return np.ascontiguousarray(data.reshape(len(array), width)[:, :16]).view("<u8")


def _key_at(work: Work, chunks: Sequence[Chunk], position: int) -> str:
    chunk = next(chunk for chunk in chunks if chunk.start <= position < chunk.start + chunk.rows)
    return str(work.posts(chunk, ["key"]).column("key")[position - chunk.start].as_py())


# --- by cluster ----------------------------------------------------------------------------------------------------


def choose_by_cluster(
    work: Work, chunks: Sequence[Chunk], chosen: Chosen, share: float, seed: int, *, has_variants: bool
) -> None:
    """Draw whole clusters of near-identical images for validation.

    Holds 256 bytes for each image, and what `dedup.clusters` takes.
    """
    kept = np.flatnonzero(chosen.fate == TRAIN)
    index = np.full(len(chosen.fate), -1)
    index[kept] = np.arange(len(kept))
    index[chosen.copy] = index[chosen.first]
    thumbnails = np.empty((len(kept), SIDE, SIDE), np.uint8)
    keys: list[str] = []
    groups: list[list[str]] = [[] for _ in range(len(kept))]
    for chunk in chunks:
        here = slice(chunk.start, chunk.start + chunk.rows)
        mine = np.flatnonzero(chosen.fate[here] == TRAIN)
        thumbnails[index[here][mine]] = _thumbnails(work, chunk)[mine]
        posts = work.posts(chunk, ["key", "group"])
        keys += posts.column("key").take(mine).to_pylist()
        if has_variants:
            for i, group in zip(index[here].tolist(), posts.column("group").to_pylist(), strict=True):
                if i >= 0 and group is not None:
                    groups[i].append(group)
    cluster = clusters(thumbnails, groups)
    validation = split(cluster, keys, share, seed)
    chosen.fate[kept[validation]] = VALIDATION
    sizes = np.bincount(cluster)
    chosen.clusters = {
        "clusters": int((sizes > 1).sum()),
        "largest": int(sizes.max()),
        "images": int(sizes[sizes > 1].sum()),
    }


def _thumbnails(work: Work, chunk: Chunk) -> NDArray[np.uint8]:
    array = work.seen(chunk, ["thumbnail"]).column("thumbnail").combine_chunks()
    array = array.chunk(0) if hasattr(array, "chunk") else array
    data = np.frombuffer(array.buffers()[1], np.uint8)[array.offset * SIDE * SIDE :]
    return data[: len(array) * SIDE * SIDE].reshape(len(array), SIDE, SIDE)


# --- by hash -------------------------------------------------------------------------------------------------------


def choose_by_hash(
    work: Work, chunks: Sequence[Chunk], chosen: Chosen, share: float, seed: int, *, has_variants: bool
) -> NDArray[np.uint8]:
    """Draw images for validation by the hash of their group, or of the image itself where it has none.

    Returns:
        The thumbnails of the validation images `[M, SIDE, SIDE]`.
    """
    salt = np.uint64(derived_seed("split by hash", seed))
    bound = np.uint64(min(int(share * 2**64), 2**64 - 1))
    joined, of_first = _joined_groups(work, chunks, chosen) if has_variants else ({}, {})
    thumbnails = [np.empty((0, SIDE, SIDE), np.uint8)]
    for chunk in chunks:
        here = slice(chunk.start, chunk.start + chunk.rows)
        words = _words(work.seen(chunk, ["sha256"]).column("sha256"))[:, 0].copy()
        if has_variants:
            for i, own in enumerate(work.posts(chunk, ["group"]).column("group").to_pylist()):
                group = of_first.get(chunk.start + i, own)
                if group is not None:
                    words[i] = _group_word(joined.get(group, group))
        drawn = (mixed(words ^ salt) < bound) & (chosen.fate[here] == TRAIN)
        chosen.fate[here][drawn] = VALIDATION
        if drawn.any():
            thumbnails.append(_thumbnails(work, chunk)[drawn])
    return np.concatenate(thumbnails)


def _group_word(group: str) -> int:
    return int.from_bytes(hashlib.sha256(b"group " + group.encode()).digest()[:8], "little")


def _joined_groups(work: Work, chunks: Sequence[Chunk], chosen: Chosen) -> tuple[dict[str, str], dict[int, str]]:
    """The first of the groups that copies of one image tie together, for each of these; and of each first copy."""
    of_image: defaultdict[int, set[str]] = defaultdict(set)
    involved = np.union1d(chosen.copy, chosen.first)
    first_of = dict(zip(chosen.copy.tolist(), chosen.first.tolist(), strict=True))
    for chunk, rows in _by_chunk(chunks, involved):
        groups = work.posts(chunk, ["group"]).column("group").take(rows).to_pylist()
        for row, group in zip(rows.tolist(), groups, strict=True):
            if group is not None:
                of_image[first_of.get(chunk.start + row, chunk.start + row)].add(group)
    parent: dict[str, str] = {}

    def root(group: str) -> str:
        while parent.setdefault(group, group) != group:
            group = parent[group]
        return group

    for groups in of_image.values():
        roots = sorted({root(group) for group in groups})
        for other in roots[1:]:
            parent[other] = roots[0]
    of_first = {first: root(min(groups)) for first, groups in of_image.items()}
    return {group: root(group) for group in parent}, of_first


@dataclass(frozen=True)
class NearFinder:
    """Finds the training images of a span's chunk that are near a validation image; picklable."""

    work: Work
    fates: str
    """File with what becomes of every post so far."""
    validation: str
    """File with the thumbnails of the validation images."""

    def __call__(self, chunk: Chunk) -> None:
        """Publish which rows of a chunk are near: bool `[B]`."""
        fate = np.load(self.fates, mmap_mode="r")[chunk.start : chunk.start + chunk.rows]
        training = np.flatnonzero(fate == TRAIN)
        near = np.zeros(chunk.rows, np.bool_)
        validation = _near(self.validation, edition(self.validation))
        near[training] = validation.any_near(_thumbnails(self.work, chunk)[training])
        with published_file(self.work.near(chunk)) as aside, open(aside, "wb") as handle:
            np.save(handle, near)


@functools.lru_cache(maxsize=1)
def _near(file: str, edition: tuple[int, int]) -> Near:
    return Near(np.load(file))


# --- what is written down ------------------------------------------------------------------------------------------


def write_choices(work: Work, spans: Sequence[Span], chosen: Chosen) -> None:
    """Publish what becomes of each span's posts: `fate`, and `more`, the hashtags of its exact copies (mostly null)."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    chunks = [chunk for span in spans for chunk in span.chunks]
    more: defaultdict[int, list[str]] = defaultdict(list)
    first_of = dict(zip(chosen.copy.tolist(), chosen.first.tolist(), strict=True))
    for chunk, rows in _by_chunk(chunks, chosen.copy):
        hashtags = work.posts(chunk, ["hashtags"]).column("hashtags").take(rows).to_pylist()
        for row, tags in zip(rows.tolist(), hashtags, strict=True):
            more[first_of[chunk.start + row]] += tags
    for span in spans:
        start, stop = span.chunks[0].start, span.chunks[-1].start + span.chunks[-1].rows
        hashtags = [more.get(i) for i in range(start, stop)] if more else [None] * (stop - start)
        columns = [pa.array(chosen.fate[start:stop]), pa.array(hashtags, pa.list_(pa.string()))]
        with published_file(work.choice(span)) as aside:
            pq.write_table(pa.table(columns, names=["fate", "more"]), aside, compression="zstd")


def _by_chunk(chunks: Sequence[Chunk], positions: NDArray[np.int64]) -> Iterator[tuple[Chunk, NDArray[np.int64]]]:
    """The chunks in which some of the ascending positions are, with their rows there."""
    starts = np.array([chunk.start for chunk in chunks], np.int64)
    borders = np.searchsorted(positions, np.append(starts, np.iinfo(np.int64).max))
    for number, chunk in enumerate(chunks):
        rows = positions[borders[number] : borders[number + 1]]
        if len(rows):
            yield chunk, rows - chunk.start
