"""The last stage: writes the shards of a data set, each on its own, from posts that are labelled and in order.

Must never write an image other than the one that was looked at.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from scale_wsl.corpus.fetch import fetch
from scale_wsl.corpus.images import RefusedImage
from scale_wsl.corpus.places import edition
from scale_wsl.corpus.prepare.work import Span, Work
from scale_wsl.corpus.writing import write_shard
from scale_wsl.errors import UserError
from scale_wsl.files import published_file
from scale_wsl.hashtags import Vocabulary

__all__ = ["ShardTask", "Writer", "dealt_facts", "shard_tasks"]


class ShardTask(NamedTuple):
    """One shard: the posts whose `order` is in [from, to)."""

    number: int
    start: int
    stop: int | None
    """None: to the end."""


def shard_tasks(work: Work, role: str, spans: Sequence[Span], records_per_shard: int) -> list[ShardTask]:
    """The shards of a role, whose posts are counted off in order; holds 8 bytes for each post, and as much to sort.

    Two posts with the same hash, of which there is none among fewer than billions, come into the same shard.
    """
    parts = [_dealt(work, role, span).column("order").to_numpy() for span in spans]
    order = np.sort(np.concatenate(parts)) if parts else np.empty(0, np.uint64)
    starts = [int(start) for start in np.unique(order[::records_per_shard])]
    return [ShardTask(i, start, stop) for i, (start, stop) in enumerate(pairwise([*starts, None])) if start is not None]


def dealt_facts(work: Work, role: str, spans: Sequence[Span]) -> tuple[int, list[str]]:
    """How many posts of a role had no label, and the keys of a few."""
    dropped, examples = 0, []
    for span in spans:
        metadata = _dealt(work, role, span).schema.metadata
        dropped += int(metadata[b"dropped"])
        examples += metadata[b"examples"].decode().split()
    return dropped, examples[:3]


@dataclass(frozen=True)
class Writer:
    """Writes a shard; picklable."""

    work: Work
    role: str
    spans: tuple[Span, ...]
    folder: Path
    vocabulary: str
    """File."""
    max_bytes: int

    def __call__(self, task: ShardTask) -> None:
        """Publish a shard.

        Raises:
            UserError: An image was changed or removed since it was looked at.
        """
        import pyarrow as pa

        parts = []
        for span in self.spans:
            table = _dealt(self.work, self.role, span)
            order = table.column("order").to_numpy()
            start = int(np.searchsorted(order, np.uint64(task.start)))
            stop = len(order) if task.stop is None else int(np.searchsorted(order, np.uint64(task.stop)))
            if start < stop:
                parts.append(table.slice(start, stop - start).replace_schema_metadata(None))
        posts = pa.concat_tables(parts)
        posts = posts.take(np.lexsort((posts.column("key").to_numpy(), posts.column("order").to_numpy())))
        records = (
            (row["key"], row["extension"], self._image(row), row["hashtags"], row["labels"])
            for batch in posts.to_batches(64)
            for row in batch.to_pylist()
        )
        facts = write_shard(self.folder, task.number, records, _vocabulary(self.vocabulary, edition(self.vocabulary)))
        with published_file(self.work.facts(self.role, task.number)) as aside:
            aside.write_text(json.dumps(facts), "ascii")

    def _image(self, row: dict[str, Any]) -> bytes:
        where = row["path"].decode("utf-8", "replace")
        try:
            data = fetch(row["path"], row["offset"], row["length"], self.max_bytes)
        except RefusedImage as refused:
            self.work.make_stale()
            raise UserError(f"cannot read {where} any more: {refused.detail}") from None
        if hashlib.sha256(data).digest() != row["sha256"]:
            self.work.make_stale()
            raise UserError(f"{where} was changed while the data set was being prepared: prepare it again")
        return data


def _dealt(work: Work, role: str, span: Span) -> Any:
    file = str(work.dealt(role, span))
    return _opened(file, edition(file))


@functools.lru_cache(maxsize=512)
def _opened(file: str, edition: tuple[int, int]) -> Any:
    """A table whose columns stay in the file; only what is read of them comes into memory."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(file)).read_all()


@functools.lru_cache(maxsize=2)
def _vocabulary(file: str, edition: tuple[int, int]) -> Vocabulary:
    return Vocabulary.load(file)
