"""The first stage: reads the posts of a split, keeps those with a hashtag that may get a place, counts all.

Must never keep an image that lies in a file: bytes that came with the posts are put into one file of the split's own.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from scale_wsl.corpus.kernel import HashtagCounter, HashtagKernel
from scale_wsl.corpus.places import places_of
from scale_wsl.corpus.posts import Reject, Source
from scale_wsl.corpus.prepare.work import Work
from scale_wsl.files import published_folder
from scale_wsl.hashtags import Vocabulary
from scale_wsl.hashtags.counts import HashtagCounts
from scale_wsl.hashtags.rules import VocabularyRule

__all__ = ["NO_HASHTAG", "UNKNOWN", "ScanReport", "Scanner", "read_scans", "rejects_schema"]

NO_HASHTAG = "no hashtag"
UNKNOWN = "no hashtag that could get a place"
_EXAMPLES = 3  # posts that are named for each reason to drop them


@dataclass(frozen=True)
class ScanReport:
    """What a split gave; adds up."""

    posts: int
    dropped: Counter[str]
    """Posts by reason."""
    examples: dict[str, list[str]]
    groups: list[list[int]]
    """Rows of each row group of each split."""
    has_variants: bool
    """Some post has a group."""
    counts: HashtagCounts
    """Of all posts."""


def rejects_schema() -> Any:
    """The columns of a table of rejects: key (or where it is), reason, detail."""
    import pyarrow as pa

    return pa.schema([("key", pa.string()), ("reason", pa.string()), ("detail", pa.string())])


@dataclass(frozen=True)
class Scanner:
    """Scans a split; picklable. Called with (number, split)."""

    source: Source
    rule: VocabularyRule | Vocabulary
    work: Work
    chunk_rows: int

    def __call__(self, task: tuple[int, Any]) -> None:
        """Publish what a split gave."""
        number, split = task
        with published_folder(self.work.scanned(number)) as aside, open(aside / "images.bin", "wb") as spool:
            _Scan(self, aside, spool, self.work.scanned(number) / "images.bin").run(split)


class _Scan:
    def __init__(self, scanner: Scanner, aside: Path, spool: BinaryIO, final_spool: Path) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.scanner = scanner
        self.aside = aside
        self.spool = spool
        self.spool_path = str(final_spool).encode("utf-8", "surrogateescape")
        self.kernel = HashtagKernel(places_of(scanner.rule))
        self.counter = HashtagCounter(self.kernel)
        self.dropped: Counter[str] = Counter()
        self.examples: dict[str, list[str]] = {}
        self.has_variants = False
        places = [("path", pa.binary()), ("offset", pa.int64()), ("length", pa.int64())]
        self.schema = pa.schema(
            [("key", pa.string()), ("hashtags", pa.list_(pa.string())), ("group", pa.string()), *places]
        )
        self.posts = pq.ParquetWriter(aside / "posts.parquet", self.schema, compression="zstd")
        self.rejects = pq.ParquetWriter(aside / "rejects.parquet", rejects_schema(), compression="zstd")
        self.waiting: list[Any] = []
        self.rows = 0
        self.groups: list[int] = []

    def run(self, split: Any) -> None:
        import numpy as np
        import pyarrow as pa

        posts = 0
        for batch in self.scanner.source.read(split, images=True):
            self._reject(batch.rejects)
            table = batch.posts
            posts += len(batch.rejects) + len(table)
            tagged = self.kernel.read(table.column("hashtags"))
            known = self.counter.add(tagged)
            has_any = np.zeros(len(table), np.bool_)
            has_any[tagged.post] = True
            self._drop(NO_HASHTAG, table.column("key"), ~has_any)
            self._drop(UNKNOWN, table.column("key"), has_any & ~known)
            kept = pa.table(table).filter(pa.array(known))
            if kept.num_rows:
                self.has_variants |= kept.column("group").null_count < kept.num_rows
                self._keep(self._spooled(kept))
        self._flush(everything=True)
        self.posts.close()
        self.rejects.close()
        self.counter.counts().save(self.aside / "counts.parquet")
        report = {
            "posts": posts,
            "dropped": dict(self.dropped),
            "examples": self.examples,
            "groups": self.groups,
            "has_variants": self.has_variants,
        }
        (self.aside / "report.json").write_text(json.dumps(report), "utf-8")

    def _reject(self, rejects: Sequence[Reject]) -> None:
        import pyarrow as pa

        if not rejects:
            return
        columns = [[_text(cell) for cell in column] for column in zip(*rejects, strict=True)]
        self.rejects.write_table(pa.table(columns, schema=rejects_schema()))
        for reject in rejects:
            self._note(reject.reason, f"{reject.key}: {reject.detail}" if reject.detail else reject.key)
            self.dropped[reject.reason] += 1

    def _drop(self, reason: str, keys: Any, mask: Any) -> None:
        if number := int(mask.sum()):
            self.dropped[reason] += number
            if len(self.examples.get(reason, ())) < _EXAMPLES:
                for i in mask.nonzero()[0][:_EXAMPLES].tolist():
                    self._note(reason, keys[i].as_py())

    def _note(self, reason: str, example: str) -> None:
        examples = self.examples.setdefault(reason, [])
        if len(examples) < _EXAMPLES:
            examples.append(_text(example)[:300])

    def _spooled(self, table: Any) -> Any:
        """The table without its `data`, which went into the spool."""
        import pyarrow as pa

        data = table.column("data")
        if data.null_count < len(data):
            columns = {name: table.column(name).to_pylist() for name in ("path", "offset", "length")}
            for i, content in enumerate(data):
                if content.is_valid:
                    columns["path"][i], columns["offset"][i] = self.spool_path, self.spool.tell()
                    columns["length"][i] = self.spool.write(content.as_buffer())
            for name, column in columns.items():
                place = table.schema.get_field_index(name)
                table = table.set_column(place, name, pa.array(column, self.schema.field(name).type))
        return table.drop_columns(["data"])

    def _keep(self, table: Any) -> None:
        self.waiting.append(table)
        self.rows += table.num_rows
        if self.rows >= self.scanner.chunk_rows:
            self._flush(everything=False)

    def _flush(self, *, everything: bool) -> None:
        """Write whole chunks, and what is left of one at the end."""
        import pyarrow as pa

        if not self.waiting:
            return
        table = pa.concat_tables(self.waiting).combine_chunks()
        size = self.scanner.chunk_rows
        whole = table.num_rows if everything else table.num_rows // size * size
        for start in range(0, whole, size):
            part = table.slice(start, min(size, whole - start))
            self.posts.write_table(part, row_group_size=size)
            self.groups.append(part.num_rows)
        rest = table.slice(whole)
        self.waiting, self.rows = [rest] if rest.num_rows else [], rest.num_rows


def read_scans(work: Work, splits: int) -> ScanReport:
    """What all splits gave together."""
    posts = 0
    dropped: Counter[str] = Counter()
    examples: dict[str, list[str]] = {}
    groups = []
    has_variants = False
    counts = HashtagCounts()
    for number in range(splits):
        report = json.loads((work.scanned(number) / "report.json").read_bytes())
        posts += report["posts"]
        dropped.update(report["dropped"])
        for reason, some in report["examples"].items():
            examples[reason] = (examples.get(reason, []) + some)[:_EXAMPLES]
        groups.append(report["groups"])
        has_variants |= report["has_variants"]
        counts.merge(HashtagCounts.load(work.scanned(number) / "counts.parquet"))
    return ScanReport(posts, dropped, examples, groups, has_variants, counts)


def _text(text: str) -> str:
    return text.encode("utf-8", "replace").decode()
