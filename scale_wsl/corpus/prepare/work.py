"""Where a preparation keeps what it has done so far, and in which parts it is done.

    input-<hash>/    what follows from the source and the limits of images alone
      scan/000000/       posts.parquet, rejects.parquet, counts.parquet, images.bin, report.json of each split
      look/000000/00000.parquet     what was seen of the images of each chunk of its posts
    output-<hash>/   what follows from the other settings too
      choice/, near/, counts/, dealt-train/, dealt-val/, facts-train/, facts-val/
      whole/             what will be renamed to the folder that was asked for

Every file and folder of a stage is published by one rename, so what is there is whole. Must never be read by anything
but the preparation that made it.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from scale_wsl.files import discard

__all__ = ["Chunk", "Span", "Work", "chunks_of", "spans_of"]

_SPAN = 1 << 18  # posts
_STALE = "stale"


class Chunk(NamedTuple):
    """A row group of the posts of a split: what one task looks at."""

    split: int
    group: int
    rows: int
    start: int
    """Position of its first post among all."""


class Span(NamedTuple):
    """Some chunks after one another, about `_SPAN` posts: what one task counts or labels."""

    number: int
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True)
class Work:
    """The folders of a preparation that is at work; picklable."""

    folder: Path
    input_hash: str
    output_hash: str

    @classmethod
    def open(cls, folder: Path, of_input: Mapping[str, Any], of_output: Mapping[str, Any]) -> Work:
        """The work on just this preparation, begun or not; another one's is taken away as far as it is no use."""
        work = cls(folder, _hash(of_input), _hash([of_input, of_output]))
        if (folder / _STALE).exists():
            discard(folder)
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path not in (work.input, work.output):
                discard(path)
        for path in folder.rglob(".*.part"):  # half-made, or half-removed
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        for part in ("scan", "look"):
            (work.input / part).mkdir(parents=True, exist_ok=True)
        for part in ("choice", "near", "counts", "dealt-train", "dealt-val", "facts-train", "facts-val", "whole"):
            (work.output / part).mkdir(parents=True, exist_ok=True)
        return work

    @property
    def input(self) -> Path:
        """Of the source and the images."""
        return self.folder / f"input-{self.input_hash}"

    @property
    def output(self) -> Path:
        """Of all settings."""
        return self.folder / f"output-{self.output_hash}"

    def scanned(self, split: int) -> Path:
        """Folder of a split's posts."""
        return self.input / "scan" / f"{split:06d}"

    def looked(self, chunk: Chunk) -> Path:
        """What was seen of a chunk's images."""
        return self.input / "look" / f"{chunk.split:06d}" / f"{chunk.group:05d}.parquet"

    def near(self, chunk: Chunk) -> Path:
        """Which of a chunk's images are near a validation image."""
        return self.output / "near" / f"{chunk.split:06d}" / f"{chunk.group:05d}.npy"

    def choice(self, span: Span) -> Path:
        """What becomes of a span's posts."""
        return self.output / "choice" / f"{span.number:06d}.parquet"

    def counts(self, span: Span) -> Path:
        """The hashtags of a span's training posts."""
        return self.output / "counts" / f"{span.number:06d}.parquet"

    def dealt(self, role: str, span: Span) -> Path:
        """A span's labelled posts of a role, in their final order."""
        return self.output / f"dealt-{role}" / f"{span.number:06d}.arrow"

    def facts(self, role: str, shard: int) -> Path:
        """What is known of a shard that is written."""
        return self.output / f"facts-{role}" / f"{shard:06d}.json"

    @property
    def whole(self) -> Path:
        """What will be renamed to the folder that was asked for."""
        return self.output / "whole"

    def shard_done(self, role: str, number: int, folder: Path) -> Path:
        """What says that a shard is there: its facts, which count for nothing where its files are gone."""
        files = [folder / f"{number:06d}.{suffix}" for suffix in ("tar", "parquet")]
        missing = next((path for path in files if not path.exists()), None)
        return missing or self.facts(role, number)

    def make_stale(self) -> None:
        """Say that images have changed since they were looked at, so the next try must begin anew."""
        (self.folder / _STALE).touch()

    def posts(self, chunk: Chunk, columns: Sequence[str]) -> Any:
        """Columns of a chunk's posts, a `pyarrow.Table`."""
        import pyarrow.parquet as pq

        with pq.ParquetFile(self.scanned(chunk.split) / "posts.parquet") as file:
            return file.read_row_group(chunk.group, columns=list(columns), use_threads=False)

    def seen(self, chunk: Chunk, columns: Sequence[str]) -> Any:
        """Columns of what was seen of a chunk's images, a `pyarrow.Table`."""
        import pyarrow.parquet as pq

        return pq.read_table(self.looked(chunk), columns=list(columns), use_threads=False)


def chunks_of(groups_of_splits: Sequence[Sequence[int]]) -> list[Chunk]:
    """All chunks in order, from the rows of each row group of each split."""
    chunks: list[Chunk] = []
    start = 0
    for split, groups in enumerate(groups_of_splits):
        for group, rows in enumerate(groups):
            chunks.append(Chunk(split, group, rows, start))
            start += rows
    return chunks


def spans_of(chunks: Sequence[Chunk]) -> list[Span]:
    """The chunks in spans."""
    return [Span(number, tuple(some)) for number, some in enumerate(_filled(chunks))]


def _filled(chunks: Sequence[Chunk]) -> Iterator[list[Chunk]]:
    some: list[Chunk] = []
    rows = 0
    for chunk in chunks:
        if some and rows + chunk.rows > _SPAN:
            yield some
            some, rows = [], 0
        some.append(chunk)
        rows += chunk.rows
    if some:
        yield some


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:12]
