"""Passes over a table of posts that look at no image: counting hashtags, and labelling posts.

That is how it goes for posts whose images are still to be fetched: count, choose the vocabulary, label, and fetch the
images of those posts alone that have a label. Must never hold more than a batch of posts for each worker.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from scale_wsl.corpus.execution import Workers, run_stage
from scale_wsl.corpus.kernel import HashtagCounter, HashtagKernel, label
from scale_wsl.corpus.places import label_places, places_of
from scale_wsl.corpus.posts import Source
from scale_wsl.corpus.sources.table import TableSource
from scale_wsl.errors import UserError
from scale_wsl.files import discard, published_file
from scale_wsl.hashtags import Vocabulary
from scale_wsl.hashtags.counts import HashtagCounts
from scale_wsl.hashtags.rules import VocabularyRule

__all__ = ["count_covered", "count_posts", "label_posts"]

_LABELLED = "scale_wsl labelled posts"
_ROWS = 1 << 16  # of a row group of labelled posts


def count_posts(
    source: Source, rule: VocabularyRule, *, workers: Workers | None = None, work: Path | None = None
) -> HashtagCounts:
    """Count the hashtags of all posts of a source, without a look at any image.

    Args:
        source: Where the posts come from.
        rule: Which hashtags may have a place.
        workers: Who does the work; the processes of this machine when None.
        work: A folder for what is counted so far, so that a run that was killed can go on; it is made, and left there.
            None: a temporary one.

    Raises:
        UserError: The source cannot be read, or the rule's list.
    """
    splits = list(enumerate(source.splits()))
    facts = [source.name, source.fingerprint(), [rule.spec, rule.under, rule.stop, rule.sha256]]
    with _work_folder(work, facts) as folder:
        counter = _Counter(source, rule, folder)
        run_stage(f"{source.name}: counting", splits, counter, counter.result, workers or Workers())
        counts = HashtagCounts()
        for task in splits:
            counts.merge(HashtagCounts.load(counter.result(task)))
    return counts


def count_covered(
    source: Source, vocabulary: Vocabulary, *, workers: Workers | None = None, work: Path | None = None
) -> int:
    """How many posts have at least one label of a vocabulary; arguments as of `count_posts`.

    Raises:
        UserError: The source cannot be read.
    """
    splits = list(enumerate(source.splits()))
    with _work_folder(work, [source.name, source.fingerprint(), vocabulary.hash]) as folder:
        vocabulary.save(folder / "vocabulary.json")
        coverer = _Coverer(source, str(folder / "vocabulary.json"), folder)
        run_stage(f"{source.name}: coverage", splits, coverer, coverer.result, workers or Workers())
        return sum(int(coverer.result(task).read_text()) for task in splits)


@dataclass(frozen=True)
class _Coverer:
    source: Source
    vocabulary: str
    folder: Path

    def __call__(self, task: tuple[int, Any]) -> None:
        kernel = HashtagKernel(label_places(self.vocabulary))
        covered = 0
        for batch in self.source.read(task[1], images=False):
            covered += len(np.unique(kernel.read(batch.posts.column("hashtags")).canonical()[0]))
        with published_file(self.result(task)) as aside:
            aside.write_text(str(covered))

    def result(self, task: tuple[int, Any]) -> Path:
        return self.folder / f"{task[0]:06d}.covered"


@dataclass(frozen=True)
class _Counter:
    source: Source
    rule: VocabularyRule
    folder: Path

    def __call__(self, task: tuple[int, Any]) -> None:
        kernel = HashtagKernel(places_of(self.rule))
        counter = HashtagCounter(kernel)
        for batch in self.source.read(task[1], images=False):
            counter.add(kernel.read(batch.posts.column("hashtags")))
        counter.counts().save(self.result(task))

    def result(self, task: tuple[int, Any]) -> Path:
        return self.folder / f"{task[0]:06d}.parquet"


def label_posts(
    source: TableSource, vocabulary: Path, out: Path, *, workers: Workers | None = None, overwrite: bool = False
) -> Mapping[str, int]:
    """Write the posts of a table that have a label, as a folder of Parquet files; goes on where it was killed.

    The columns: `key`, `image` (a path or a URL, as the table has it), `group`, `hashtags` (as typed) and `labels`
    (class indices, ascending). Each file's schema carries the vocabulary's hash.

    Args:
        source: The table.
        vocabulary: Its file.
        out: The folder to make, or to go on with.
        workers: Who does the work; the processes of this machine when None.
        overwrite: Begin anew where `out` holds the posts of another table or vocabulary.

    Returns:
        How many posts were read, rejected and kept.

    Raises:
        UserError: The source or the vocabulary cannot be read, or `out` holds something else.
    """
    splits = list(enumerate(source.splits()))
    meaning = Vocabulary.load(vocabulary).hash
    facts = json.loads(json.dumps([_LABELLED, source.name, source.fingerprint(), meaning]))
    out, vocabulary = out.resolve(), vocabulary.resolve()  # whoever writes may be in another folder
    marker = out / "labelled.json"
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: choose a folder")
    if out.exists() and any(out.iterdir()):
        try:
            there = json.loads(marker.read_bytes())
        except (OSError, ValueError, RecursionError):
            raise UserError(f"{out} is not empty and holds no labelled posts: choose another folder") from None
        if not isinstance(there, list) or there[:1] != [_LABELLED]:
            raise UserError(f"{out} is not empty and holds no labelled posts: choose another folder")
        if there != facts:
            if not overwrite:
                raise UserError(f"{out} holds the posts of another table, or by another vocabulary: choose --overwrite")
            discard(out)
    out.mkdir(parents=True, exist_ok=True)
    with published_file(marker) as aside:
        aside.write_text(json.dumps(facts), "utf-8")
    labeller = _Labeller(source, str(vocabulary), meaning, out)
    run_stage(f"{source.name}: labelling", splits, labeller, labeller.result, workers or Workers())
    return labeller.figures(len(splits))


@dataclass(frozen=True)
class _Labeller:
    source: TableSource
    vocabulary: str
    meaning: str
    folder: Path

    def __call__(self, task: tuple[int, Any]) -> None:
        import pyarrow as pa
        import pyarrow.compute as pc
        import pyarrow.parquet as pq

        kernel = HashtagKernel(label_places(self.vocabulary))
        texts = {name: pa.string() for name in ("key", "image", "group")}
        columns = texts | {"hashtags": pa.list_(pa.string()), "labels": pa.list_(pa.int32())}
        schema = pa.schema(list(columns.items()), {b"vocabulary_hash": self.meaning.encode()})
        figures = dict.fromkeys(("posts", "rejected", "kept"), 0)
        with (
            published_file(self.result(task)) as aside,
            pq.ParquetWriter(aside, schema, compression="zstd", use_dictionary=["hashtags", "labels"]) as writer,
        ):
            for batch, references in self.source.references(task[1]):
                posts = batch.posts
                labels = label(kernel.read(posts.column("hashtags")), kernel)
                image = pa.array(references, pa.string())
                arrays = [posts.column("key"), image, posts.column("group"), posts.column("hashtags"), labels]
                kept = pc.greater(labels.value_lengths(), 0)
                table = pa.Table.from_arrays(arrays, schema=schema).filter(kept)
                writer.write_table(table, row_group_size=_ROWS)
                figures["posts"] += len(posts) + len(batch.rejects)
                figures["rejected"] += len(batch.rejects)
                figures["kept"] += table.num_rows
            writer.add_key_value_metadata({key: str(number) for key, number in figures.items()})

    def result(self, task: tuple[int, Any]) -> Path:
        return self.folder / f"{task[0]:06d}.parquet"

    def figures(self, parts: int) -> dict[str, int]:
        import pyarrow.parquet as pq

        total = dict.fromkeys(("posts", "rejected", "kept"), 0)
        for number in range(parts):
            metadata = pq.read_metadata(self.folder / f"{number:06d}.parquet").metadata
            for key in total:
                total[key] += int(metadata[key.encode()])
        return total


@contextmanager
def _work_folder(work: Path | None, facts: Any) -> Iterator[Path]:
    """A folder for the parts of just this work: in the given one, and kept, or a temporary one."""
    digest = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]
    with nullcontext(work.resolve()) if work else tempfile.TemporaryDirectory(prefix="scale_wsl-") as folder:
        parts = Path(folder) / digest
        try:
            parts.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {parts}: {error.strerror}") from None
        yield parts
