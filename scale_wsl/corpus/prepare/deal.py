"""The fourth and fifth stages: counts the hashtags of the training posts, then labels all posts and puts them in order.

Must never label by anything but the vocabulary, and never read an image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scale_wsl.corpus.kernel import HashtagCounter, HashtagKernel, label
from scale_wsl.corpus.places import label_places, places_of
from scale_wsl.corpus.prepare.choose import TRAIN, VALIDATION
from scale_wsl.corpus.prepare.work import Span, Work
from scale_wsl.files import published_file
from scale_wsl.hashtags import Vocabulary
from scale_wsl.hashtags.rules import VocabularyRule

__all__ = ["ROLES", "Dealer", "SpanCounter"]

ROLES = {"train": TRAIN, "val": VALIDATION}


@dataclass(frozen=True)
class SpanCounter:
    """Counts the hashtags of a span's training posts; picklable."""

    work: Work
    rule: VocabularyRule | Vocabulary

    def __call__(self, span: Span) -> None:
        """Publish the counts."""
        kernel = HashtagKernel(places_of(self.rule))
        counter = HashtagCounter(kernel)
        for _, posts in _chosen_posts(self.work, span, TRAIN):
            counter.add(kernel.read(posts.column("hashtags").combine_chunks()))
        counter.counts().save(self.work.counts(span))


@dataclass(frozen=True)
class Dealer:
    """Labels a span's posts and sorts them into their final order; picklable.

    The result, for each role, is an Arrow file with one batch: `order` (uint64, ascending), `key`, `extension`,
    `hashtags` (as typed, of all exact copies), `labels`, `path`, `offset`, `length`, `sha256` of each post that has a
    label; and `dropped`, in the schema's metadata, how many had none.
    """

    work: Work
    vocabulary: str
    """File."""
    seed: int
    shuffle: bool

    def __call__(self, task: tuple[str, Span]) -> None:
        """Publish a span's posts of one role."""
        import pyarrow as pa

        role, span = task
        kernel = HashtagKernel(label_places(self.vocabulary))
        tables: list[Any] = []
        examples: list[str] = []
        dropped = 0
        for rows, posts in _chosen_posts(self.work, span, ROLES[role]):
            labels = label(kernel.read(posts.column("hashtags").combine_chunks()), kernel)
            has_label = labels.value_lengths().to_numpy(zero_copy_only=False) > 0
            keys = posts.column("key").to_pylist()
            order = _hashed(keys, role, self.seed) if self.shuffle else rows.astype(np.uint64)
            table = posts.append_column("labels", labels).append_column("order", pa.array(order))
            tables.append(table.filter(pa.array(has_label)))
            dropped += int((~has_label).sum())
            examples += [keys[i] for i in np.flatnonzero(~has_label)[: 3 - len(examples)].tolist()]
        table = pa.concat_tables(tables) if tables else None
        facts = {b"dropped": str(dropped).encode(), b"examples": " ".join(examples[:3]).encode()}
        with published_file(self.work.dealt(role, span)) as aside:
            if table is None or not table.num_rows:
                table = pa.table({"order": pa.array([], pa.uint64())})
            else:
                table = table.take(np.lexsort((table.column("key").to_numpy(), table.column("order").to_numpy())))
            table = table.combine_chunks().replace_schema_metadata(facts)
            with pa.OSFile(str(aside), "wb") as sink, pa.ipc.new_file(sink, table.schema) as writer:
                writer.write_table(table)


def _chosen_posts(work: Work, span: Span, fate: int) -> Iterator[tuple[NDArray[np.int64], Any]]:
    """(positions, posts) of one fate, chunk by chunk, with what was seen of their images and their copies' hashtags."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    choice = pq.read_table(work.choice(span), use_threads=False).combine_chunks()
    fates = choice.column("fate").to_numpy()
    start = span.chunks[0].start
    for chunk in span.chunks:
        here = slice(chunk.start - start, chunk.start - start + chunk.rows)
        rows = np.flatnonzero(fates[here] == fate)
        if not len(rows):
            continue
        posts = work.posts(chunk, ["key", "hashtags", "path", "offset", "length"]).take(rows)
        seen = work.seen(chunk, ["extension", "sha256"]).take(rows)
        for name in seen.column_names:
            posts = posts.append_column(name, seen.column(name))
        more = choice.column("more")[here].take(rows)
        if more.null_count < len(more):
            both = [
                list(dict.fromkeys((mine or []) + (theirs or [])))
                for mine, theirs in zip(posts.column("hashtags").to_pylist(), more.to_pylist(), strict=True)
            ]
            place = posts.schema.get_field_index("hashtags")
            posts = posts.set_column(place, "hashtags", pa.array(both, pa.list_(pa.string())))
        yield rows + chunk.start, posts


def _hashed(keys: list[str], role: str, seed: int) -> NDArray[np.uint64]:
    """What the posts of a role are sorted by: a hash of each key and the seed."""
    salt = f"order {role} {seed} ".encode()
    digests = b"".join(hashlib.sha256(salt + key.encode()).digest()[:8] for key in keys)
    return np.frombuffer(digests, "<u8")
